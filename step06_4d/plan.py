"""Plan a run: which layouts fit so many GPUs, how fast each would be, and why.

python step06_4d/plan.py --model llama-3.1-70b --gpus 256 --gpu h100 --seq-len 8192 --global-batch-size 1024
"""

from dataclasses import dataclass, replace
from itertools import count
from pathlib import Path
from typing import Literal

import tyro
import yaml
from planning import report
from planning.calibrate import calibrate
from planning.layout import Layout, Model
from planning.machines import Machine, load_machine
from planning.pictures import draw
from planning.search import USABLE, Plan, any_fits, layouts, plans_of, search

from shared.command import ending_in_a_line
from shared.config import BaseConfig, UserError, parse
from shared.errors import check_writable
from shared.llama_configs import load_model_config

# How far it is looked for more GPUs or shorter sequences that would do.
DOUBLINGS = 10


@dataclass
class PlanConfig:
    """Find the fastest layouts that fit."""

    # Preset of shared/llama_configs.py, Hugging Face id or local directory.
    model: str = "llama-3.1-8b"
    # GPUs of the run.
    gpus: int = 8
    # Of planning/machines.yaml, or a .yaml file that --calibrate has written.
    gpu: str = "h100"
    # GPUs that share a node's links.
    gpus_per_node: int = 8
    # Tokens per sequence.
    seq_len: int = 8192
    # Longest sequence the model is meant for. The default is its own.
    max_position_embeddings: int | None = None
    # Sequences per optimizer step.
    global_batch_size: int = 256
    # Precision of the run.
    dtype: Literal["bfloat16", "float32"] = "bfloat16"
    # Layouts to show.
    show: int = 10
    # Show the numbers of one layout, as the table names it: "dp=8 tp=8 pp=4 sequence-parallel".
    explain: str | None = None
    # Show the numbers of what a file for --config of train.py runs, be it searched or not. It says all but the GPU.
    config: Path | None = None
    # Write the fastest layout, or that of --explain, as a file for --config of train.py and submit.py.
    write: Path | None = None
    # Draw where time and memory go on 1, 2, 4, 8 and 16 times as many GPUs, into this .svg or .png.
    picture: Path | None = None
    # Measure this machine, which should be idle else, and write what --gpu reads.
    calibrate: Path | None = None


def plan(config: PlanConfig) -> None:
    """Raises UserError for sizes that are none, a layout that is none, and a request that nothing fits."""
    if config.calibrate:
        return calibrate(config.calibrate)
    for option in ("gpus", "gpus_per_node", "seq_len", "global_batch_size", "show"):
        if getattr(config, option) < 1:
            raise UserError(f"--{option.replace('_', '-')} must be at least 1, not {getattr(config, option)}")
    if config.picture and config.picture.suffix not in (".svg", ".png"):
        raise UserError(f"--picture {config.picture} must end in .svg or .png")
    for option, path in (("--write", config.write), ("--picture", config.picture)):
        if path:
            check_writable(path.parent, option)
    machine = load_machine(config.gpu, config.gpus_per_node)
    if config.config:
        if config.explain or config.write or config.picture:
            raise UserError("--config explains what is in a file: leave out --explain, --write and --picture")
        return print(report.explain(of_file(config.config, machine)))
    sizes = {"seq_len": config.seq_len, "max_position_embeddings": config.max_position_embeddings}
    model = Model.of(load_model_config(BaseConfig(model=config.model, **sizes)))
    base = Layout(seq_len=config.seq_len, global_batch_size=config.global_batch_size, dtype=config.dtype)
    best, plans = search(model, machine, config.gpus, base, config.show)
    if not plans:
        raise UserError(no_layout(model, machine, config.gpus, base))
    if config.explain is not None:
        chosen = named(config.explain, plans)
        print(report.explain(chosen))
    elif not best:
        raise UserError(too_large(model, machine, config.gpus, base, plans))
    else:
        chosen = best[0]
        print(report.table(best))
        for one in best[:3]:
            print(f"\n{report.neighbours(one, plans)}")
    if config.write:
        write(chosen, config)
    if config.picture:
        more = (search(model, machine, config.gpus << doubling, base, 1)[0] for doubling in range(1, 5))
        draw([chosen, *(found[0] for found in more if found)], config.picture)


def of_file(path: Path, machine: Machine) -> Plan:
    """What train.py would run. Raises UserError for what it would refuse."""
    # Here, for it takes seconds to load.
    from observe.dry_run import check_layout
    from train import Config, Trainer

    run = parse(Config, ["--config", str(path), "--dry-run", "--device", "cuda"])
    check_layout(run, Trainer)
    return next(plans_of(Model.of(load_model_config(run)), machine, [Layout.of(run)]))


def named(text: str, plans: list[Plan]) -> Plan:
    """The plan whose layout a text names."""
    for one in plans:
        if sorted(report.name(one.layout).split()) == sorted(text.split()):
            return one
    raise UserError(
        f"--explain {text!r} is none of the layouts of {plans[0].gpus} GPUs that are searched: name it as the table "
        f"does ({report.name(plans[0].layout)}), or write what train.py is to run into a file for --config"
    )


def no_layout(model: Model, machine: Machine, gpus: int, base: Layout) -> str:
    """How many GPUs could share the work, as one always can, and of how many sequences. As many as GPUs always do."""

    def splits(gpus: int, batch: int) -> bool:
        return any(layouts(model, machine, gpus, replace(base, global_batch_size=batch)))

    fewer = next(2**i for i in range(gpus.bit_length() - 1, -1, -1) if splits(2**i, base.global_batch_size))
    more = next(batch for batch in count(base.global_batch_size + 1) if splits(gpus, batch))
    return (
        f"no layout splits --global-batch-size {base.global_batch_size}, --seq-len {base.seq_len} and "
        f"{model.num_hidden_layers} layers over {gpus} GPUs. What would do: --gpus {fewer} or "
        f"--global-batch-size {more}"
    )


def too_large(model: Model, machine: Machine, gpus: int, base: Layout, plans: list[Plan]) -> str:
    """Why nothing fits, and what would."""
    smallest = min(plans, key=lambda plan: plan.fullest.total if plan.layout.recompute == "full" else float("inf"))
    text = (
        f"nothing fits: {report.name(smallest.layout)} needs least, {smallest.fullest.total / report.GIB:.1f} GiB, and "
        f"tensors may take {USABLE * machine.memory / report.GIB:.1f} GiB of a GPU"
    )
    remedies = []
    for doubling in range(1, DOUBLINGS + 1):
        if any_fits(model, machine, gpus << doubling, base):
            remedies.append(f"--gpus {gpus << doubling}")
            break
    for halving in range(1, DOUBLINGS + 1):
        shorter = replace(base, seq_len=base.seq_len >> halving)
        if shorter.seq_len and any_fits(model, machine, gpus, shorter):
            remedies.append(f"--seq-len {shorter.seq_len}")
            break
    return f"{text}. What would do: {' or '.join(remedies) or 'a smaller model'}"


def write(chosen: Plan, config: PlanConfig) -> None:
    layout = chosen.layout
    run = {
        "model": config.model,
        **report.options(layout),
        "dtype": layout.dtype,
        "seq-len": layout.seq_len,
        "global-batch-size": layout.global_batch_size,
        "micro-batch-size": layout.micro_batch_size,
    }
    if config.max_position_embeddings:
        run["max-position-embeddings"] = config.max_position_embeddings
    try:
        config.write.write_text(f"# By plan.py, for {chosen.gpus} GPUs.\n{yaml.safe_dump(run, sort_keys=False)}")
    except OSError as error:
        raise UserError(f"--write {config.write}: {error.strerror}") from error


def main() -> None:
    with ending_in_a_line():
        plan(tyro.cli(PlanConfig))


if __name__ == "__main__":
    main()
