"""Pipeline schedules in time: how one would run ideally, how it ran, the idle share of each, a picture and a trace."""

import json
from collections.abc import Sequence
from pathlib import Path
from typing import NamedTuple

from shared.config import UserError, check_writable

# A backward costs two forwards: gradients of the inputs, and of the weights.
UNIT_COSTS = {"forward": 1.0, "backward": 2.0}
COLORS = {"forward": "#7fb2e5", "backward": "#f2b47e"}
# How activations travel from stage to stage, and gradients.
DIRECTIONS = {"forward": 1, "backward": -1}


class Event(NamedTuple):
    """A stage's work on a micro-batch, from `start` to `end` in seconds."""

    stage: int
    kind: str
    micro_batch: int
    start: float
    end: float


def simulate(schedules: Sequence[Sequence[tuple[str, int]]], costs: dict[str, float] = UNIT_COSTS) -> list[Event]:
    """Run the schedules, a list of (kind, micro_batch) for each stage, without processes and with messages in no time.

    A stage waits as the executor does: for the message that an action needs, and, before it sends the next one in a
    direction, until the one before has been received. Raises ValueError if stages do not agree on the order of
    messages, if a backward precedes its forward, or if all wait for each other.
    """
    stages = range(len(schedules))
    order = {kind: [[m for other, m in schedule if other == kind] for schedule in schedules] for kind in DIRECTIONS}
    for kind, orders in order.items():
        if any(other != orders[0] for other in orders):
            raise ValueError(f"the stages do not agree on the order of {kind} messages: {orders}")
    events: list[Event] = []
    # When the n-th action of a kind ended on a stage.
    ends: dict[str, list[list[float]]] = {kind: [[] for _ in stages] for kind in DIRECTIONS}
    position, clock = [0 for _ in stages], [0.0 for _ in stages]

    def start_of_next(stage: int) -> float | None:
        """None while what it waits for has not happened."""
        kind, m = schedules[stage][position[stage]]
        if kind == "backward" and m not in order["forward"][stage][: len(ends["forward"][stage])]:
            raise ValueError(f"stage {stage}: backward of micro-batch {m} precedes its forward")
        n, step = len(ends[kind][stage]), DIRECTIONS[kind]
        # (stage, n): the source has sent this message, the destination made ready for the one before.
        needs = [(stage - step, n), (stage + step, n - 2)]
        needs = [(other, i) for other, i in needs if other in stages and i >= 0]
        if any(len(ends[kind][other]) <= i for other, i in needs):
            return None
        return max([clock[stage], *(ends[kind][other][i] for other, i in needs)])

    while any(position[stage] < len(schedules[stage]) for stage in stages):
        before = list(position)
        for stage in stages:
            while position[stage] < len(schedules[stage]) and (start := start_of_next(stage)) is not None:
                kind, m = schedules[stage][position[stage]]
                clock[stage] = start + costs[kind]
                events.append(Event(stage, kind, m, start, clock[stage]))
                ends[kind][stage].append(clock[stage])
                position[stage] += 1
        if position == before:
            waiting = {s: schedules[s][position[s]] for s in stages if position[s] < len(schedules[s])}
            raise ValueError(f"deadlock: the stages wait for each other, at {waiting}")
    return events


def bubble(events: Sequence[Event]) -> float:
    """The share of the stages' time, from the first start to the last end, in which they are idle."""
    span = max(event.end for event in events) - min(event.start for event in events)
    stages = len({event.stage for event in events})
    return 1 - sum(event.end - event.start for event in events) / (stages * span)


def check_timeline(path: Path, metrics_file: Path | None) -> None:
    """Raise UserError for a --timeline that could not be written after training."""
    if path.suffix not in (".svg", ".png"):
        raise UserError(f"--timeline {path} must end in .svg or .png")
    for file in (path, path.with_suffix(".json")):
        if file.exists() or (metrics_file and file.resolve() == metrics_file.resolve()):
            raise UserError(f"--timeline {path}: {file} exists already or is --metrics-file: choose another name")
    check_writable(path.parent, "--timeline")


def write_timeline(path: Path, events: Sequence[Event], ideal: Sequence[Event]) -> None:
    """Draw the events next to the ideal ones, write them as a trace to the same name with .json, print both bubbles."""
    import matplotlib

    matplotlib.use("agg")
    matplotlib.rcParams["svg.fonttype"] = "none"
    from matplotlib import pyplot

    path.parent.mkdir(parents=True, exist_ok=True)
    figure, rows = pyplot.subplots(2, figsize=(12, 5), layout="constrained")
    for axes, name, shown in ((rows[0], "measured", events), (rows[1], "ideal", ideal)):
        first = min(event.start for event in shown)
        for event in shown:
            width = event.end - event.start
            axes.barh(event.stage, width, left=event.start - first, color=COLORS[event.kind], edgecolor="white")
            axes.text(event.start - first + width / 2, event.stage, event.micro_batch, ha="center", va="center")
        axes.set_title(f"{name}: bubble {bubble(shown):.1%}", loc="left")
        axes.set_yticks(
            sorted({event.stage for event in shown}), [f"stage {s}" for s in sorted({e.stage for e in shown})]
        )
        axes.invert_yaxis()
    rows[0].set_xlabel("seconds")
    rows[1].set_xlabel("forward = 1, backward = 2")
    figure.savefig(path)
    pyplot.close(figure)
    trace = [
        {
            "name": f"{event.kind} {event.micro_batch}",
            "ph": "X",
            "ts": event.start * 1e6,
            "dur": (event.end - event.start) * 1e6,
            "pid": 0,
            "tid": event.stage,
        }
        for event in events
    ]
    path.with_suffix(".json").write_text(json.dumps({"traceEvents": trace}))
    print(f"bubble of the last step: {bubble(events):.1%}, in theory {bubble(ideal):.1%}: see {path}", flush=True)
