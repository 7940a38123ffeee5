"""Where the time and the memory of the fastest layout go as GPUs are added."""

from collections.abc import Sequence
from pathlib import Path

from planning.search import USABLE, Plan


def draw(plans: Sequence[Plan], path: Path) -> None:
    """Of each plan a bar: seconds of a step times GPUs, by part, and GiB of the fullest rank, by kind."""
    import matplotlib

    matplotlib.use("agg")
    matplotlib.rcParams["svg.fonttype"] = "none"
    # Without these, each file would differ from the last.
    matplotlib.rcParams["svg.hashsalt"] = "planner"
    from matplotlib import pyplot

    figure, (time, memory) = pyplot.subplots(1, 2, figsize=(12, 4), layout="constrained")
    names = [f"{plan.gpus}" for plan in plans]
    _stack(time, names, [{part: s * plan.gpus for part, s in plan.parts._asdict().items()} for plan in plans])
    _stack(memory, names, [{kind: n / 2**30 for kind, n in plan.fullest._asdict().items()} for plan in plans])
    memory.axhline(USABLE * plans[0].machine.memory / 2**30, color="black", linestyle="--")
    time.set_title("GPU-seconds of a step", loc="left")
    memory.set_title("GiB of the fullest rank, and what tensors may take", loc="left")
    for axes in (time, memory):
        axes.set_xlabel("GPUs")
    figure.savefig(path, metadata={"Date": None} if path.suffix == ".svg" else None)
    pyplot.close(figure)


def _stack(axes: object, names: list[str], bars: list[dict[str, float]]) -> None:
    bottom = [0.0 for _ in names]
    for kind in bars[0]:
        values = [bar[kind] for bar in bars]
        axes.bar(names, values, bottom=bottom, label=kind)
        bottom = [low + value for low, value in zip(bottom, values, strict=True)]
    axes.legend()
