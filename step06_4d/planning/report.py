"""What a plan says, as text."""

from collections.abc import Sequence
from dataclasses import fields
from operator import attrgetter

from planning.layout import Layout, Sizes
from planning.search import USABLE, Plan
from planning.time import Times
from planning.traffic import sums_of_layer

# Options that a layout is written by. What is not among them follows, or is no choice.
OPTIONS = (
    "dp",
    "tp",
    "pp",
    "cp",
    "zero",
    "shard",
    "sequence_parallel",
    "virtual_stages",
    "pp_schedule",
    "recompute",
    "micro_batch_size",
)
# Those that are changed together, for a neighbour. dp follows from the number of GPUs.
MOVES = {
    "tp": ("tp", "sequence_parallel"),
    "pp": ("pp", "virtual_stages", "pp_schedule"),
    "cp": ("cp",),
    "schedule": ("virtual_stages", "pp_schedule"),
    "zero": ("zero", "shard"),
    "recompute": ("recompute",),
    "micro-batch": ("micro_batch_size",),
}
GIB = 2**30


def options(layout: Layout) -> dict[str, object]:
    """Those that are not the default."""
    defaults = {field.name: field.default for field in fields(Layout)}
    return {
        name.replace("_", "-"): getattr(layout, name)
        for name in OPTIONS
        if name == "dp" or getattr(layout, name) != defaults[name]
    }


def name(layout: Layout) -> str:
    return " ".join(key if value is True else f"{key}={value}" for key, value in options(layout).items())


def table(plans: Sequence[Plan]) -> str:
    """A line for each plan: GiB of the fullest rank, seconds of a step, and what that is per GPU."""
    kinds = ("GiB", "weight", "grad", "optim", "activ", "s/step", "comp", "tp", "cp", "pp", "dp", "bubble", "opt")
    lines = ["".join(f"{kind:>8}" for kind in kinds) + f"{'tokens/s':>10}{'MFU':>7}{'causal':>7}  layout"]
    digits = 3 if plans[0].parts.total < 10 else 2
    for plan in plans:
        held, parts = plan.fullest, plan.parts
        numbers = "".join(f"{value / GIB:8.1f}" for value in (held.total, *held))
        numbers += "".join(f"{value:8.{digits}f}" for value in (parts.total, *parts))
        numbers += f"{plan.tokens_per_second:10,.0f}{plan.mfu(False):7.1%}{plan.mfu(True):7.1%}"
        lines.append(f"{numbers}  {name(plan.layout)}")
    return "\n".join(lines)


def neighbours(plan: Plan, plans: Sequence[Plan]) -> str:
    """Of each move, the fastest of those that change nothing else, and why it is not taken."""
    lines = [f"why not the neighbours of {name(plan.layout)}:"]
    for move, changed in MOVES.items():
        same = attrgetter(*(option for option in OPTIONS if option not in (*changed, "dp")))
        near = [other for other in plans if other is not plan and same(other.layout) == same(plan.layout)]
        if near:
            other = min(near, key=lambda other: other.estimate)
            lines.append(f"  {move:<12}{name(other.layout)}: {_reason(plan, other)}")
    return "\n".join(lines)


def _reason(plan: Plan, other: Plan) -> str:
    if not other.fits:
        return (
            f"needs {other.fullest.total / GIB:.1f} GiB of the {USABLE * plan.machine.memory / GIB:.1f} that tensors "
            "may take"
        )
    slower = other.parts.total - plan.parts.total
    grown = {part: getattr(other.parts, part) - getattr(plan.parts, part) for part in plan.parts._fields}
    part = max(grown, key=grown.get) if slower > 0 else min(grown, key=grown.get)
    if abs(slower) < 5e-4 * plan.parts.total:
        return "takes as long"
    return f"{slower / plan.parts.total:+.1%} of the time, {grown[part]:+.2f} s of it {part}"


def explain(plan: Plan) -> str:
    """The formulas, with the numbers in them."""
    layout, machine = plan.layout, plan.machine
    sizes = Sizes(plan.model, layout)
    times = Times(plan.model, layout, machine)
    work, m = times.layer, sizes.micro_batches
    stage = max(range(layout.pp), key=lambda i: plan.memory_of(i).total)
    layers = sum(plan.chunks[stage])
    numbers, held = times.numbers(layers, stage), plan.fullest
    forward, backward, again = (sum(kinds.values()) for kinds in sums_of_layer(layout))
    calls = forward + backward + again * (layout.recompute == "full")
    parts, h, t, e = plan.parts, plan.model.hidden_size, sizes.tokens, sizes.compute_bytes
    lines = [
        f"{name(layout)}: {held.total / GIB:.1f} of the {USABLE * machine.memory / GIB:.1f} GiB that tensors may take",
        f"stage {stage} of {layout.pp} holds most: {layers} layers of {times.layer_numbers:,} numbers = {numbers:,}",
        f"  weights      {held.weights / GIB:8.2f} GiB = {sizes.param_bytes} bytes each"
        + (f", of 1/{sizes.shards}" if layout.zero == 3 else ""),
        f"  gradients    {held.gradients / GIB:8.2f} GiB = {sizes.sum_bytes} bytes each"
        + (f", of 1/{sizes.shards}" if layout.zero > 1 else ""),
        f"  optimizer    {held.optimizer / GIB:8.2f} GiB = moments, and masters of bfloat16 weights, "
        f"of 1/{sizes.shards}",
        f"  activations  {held.activations / GIB:8.2f} GiB: the most of a walk through the schedule",
        f"micro-batch: {layout.micro_batch_size} · {layout.seq_len} / cp {layout.cp} = {t:,} tokens; m = "
        f"{layout.global_batch_size} / (dp {layout.dp} · {layout.micro_batch_size}) = {m}",
        f"a layer: forward {work.forward * 1e3:.2f} ms, backward {work.backward * 1e3:.2f} and weights "
        f"{work.weights * 1e3:.2f} ms, by matmuls of ({t}, {h}) at {machine.efficiency:.0%} of "
        f"{machine.rate(e) / 1e12:,.0f} TFLOP/s",
        f"tp: {calls} collectives of {t} · {h} · {e} bytes a layer, {work.tp_forward * 1e3:.2f} ms of forward and "
        f"{work.tp_backward * 1e3:.2f} of backward not hidden",
        f"step: m · stage {parts.compute:.2f} s + tp {parts.tp:.2f} + cp {parts.cp:.2f} + pp {parts.pp:.2f} + dp "
        f"{parts.dp:.2f} + bubble {parts.bubble:.2f} + optimizer {parts.optimizer:.2f} = {parts.total:.2f} s",
        f"tokens/s per GPU: {layout.global_batch_size} · {layout.seq_len} / {parts.total:.2f} / {plan.gpus} = "
        f"{plan.tokens_per_second:,.0f}; MFU {plan.mfu(False):.1%}, or {plan.mfu(True):.1%} without what a causal mask "
        "hides",
    ]
    return "\n".join(lines)
