"""The numbers behind "what does it cost": what layouts of real models hold, compute and send, by the planner."""

import itertools
import sys
from collections import Counter
from functools import cache
from pathlib import Path
from typing import Any

ROOT = Path(__file__).parent.parent
sys.path.append(str(ROOT / "step06_4d"))

import yaml
from pipeline.schedules import make_schedule
from pipeline.stages import split_layers
from planning.flops import flops
from planning.layout import Layout, Model, Place, Sizes
from planning.machines import TABLE
from planning.search import USABLE, Plan
from planning.traffic import traffic

from shared.llama_configs import PRESETS
from shared.timeline import bubble, simulate

MODELS = ("smollm-1.7b", "llama-3.1-8b", "llama-3.1-70b")
GPUS = (8, 64, 512)
NODE = 8
SEQ_LEN, GLOBAL_BATCH_SIZE = 8192, 512
# Of each choice, the name of the option and what it may be.
CHOICES = {
    "tp": (1, 2, 4, 8),
    "pp": (1, 2, 4, 8),
    "cp": (1, 4),
    "zero": (0, 1, 3),
    "recompute": ("none", "full"),
}
KINDS = ("weights", "gradients", "optimizer", "activations")
AXES = ("dp", "tp", "cp", "pp")


def costs() -> dict[str, Any]:
    """Of each row "model gpus tp pp cp zero recompute" of a grid, `numbers`. And what GPUs can do."""
    rows = {
        " ".join(map(str, (model, gpus, *choice))): numbers(model, layout)
        for model, gpus, choice in itertools.product(MODELS, GPUS, itertools.product(*CHOICES.values()))
        if (layout := layout_of(gpus, *choice))
    }
    machines = yaml.safe_load(TABLE.read_text())
    return {
        "choices": {"model": MODELS, "gpus": GPUS, **CHOICES},
        "kinds": KINDS,
        "axes": AXES,
        "rows": rows,
        "machines": {name: machines[name] for name in ("h100", "a100", "h200", "b200")},
        "usable": USABLE,
        "node": NODE,
        "tokens": SEQ_LEN * GLOBAL_BATCH_SIZE,
    }


def layout_of(gpus: int, tp: int, pp: int, cp: int, zero: int, recompute: str) -> Layout | None:
    """None if there is none: too few GPUs, or what train.py refuses."""
    dp, rest = divmod(gpus, tp * pp * cp)
    if rest or not dp or (zero == 3 and pp > 1):
        return None
    return Layout(
        dp=dp,
        tp=tp,
        pp=pp,
        cp=cp,
        zero=zero,
        recompute=recompute,
        sequence_parallel=tp > 1,
        global_batch_size=GLOBAL_BATCH_SIZE,
        seq_len=SEQ_LEN,
    )


def numbers(name: str, layout: Layout) -> list[float]:
    """Bytes that the fullest rank holds, by kind. Then of the busiest rank: FLOPs, idle time per time at work, and
    bytes that it sends by axis, through a ring. Micro-batches at the end."""
    model, micro_batches = model_of(name), layout.global_batch_size // layout.dp
    plan = Plan(model, layout, None, lambda stages: split(name, stages), {})
    places = [Place(stage) for stage in range(layout.pp)]
    most_flops = max(flops(model, layout, place, sum(plan.chunks[place.pp])) for place in places)
    wires = [on_wires(model, layout, place, sum(plan.chunks[place.pp])) for place in places]
    most = [max(wire[axis] for wire in wires) for axis in AXES]
    return [*plan.fullest, most_flops, _idle(layout.pp, micro_batches), *map(round, most), micro_batches]


def on_wires(model: Model, layout: Layout, place: Place, layers: int) -> Counter:
    """Bytes that a rank's links carry away from it, by axis."""
    # Over pp, a tied embedding's gradient is summed, by both ends. The other sums are of a number.
    sizes = {"dp": layout.dp * layout.cp, "tp": layout.tp, "cp": layout.cp, "pp": min(layout.pp, 2)}
    found = Counter()
    for (axis, kind), nbytes in traffic(Sizes(model, layout, place.tp), place, layers).items():
        found[axis] += on_wire(kind, nbytes, sizes[axis])
    return found


def on_wire(kind: str, nbytes: int, size: int) -> float:
    """Bytes that each of `size` ranks sends for a payload, by a ring. What it receives is sent by another."""
    if kind == "send":
        return nbytes
    steps = {"all-reduce": 2 * (size - 1), "all-gather": size - 1, "reduce-scatter": size - 1}
    return nbytes * steps[kind] / size


@cache
def model_of(name: str) -> Model:
    return Model.of(PRESETS[name])


@cache
def split(name: str, stages: int) -> list[int]:
    return [len(layers) for layers in split_layers(model_of(name), SEQ_LEN, stages)]


@cache
def _idle(stages: int, micro_batches: int) -> float:
    share = bubble(simulate([make_schedule("1f1b", stage, stages, micro_batches) for stage in range(stages)]))
    return round(share / (1 - share), 9)
