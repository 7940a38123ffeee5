"""Peak bytes of a rank, by kind: what its states take, and the most that a step adds to them."""

from collections import Counter
from collections.abc import Sequence
from functools import cache
from typing import NamedTuple

from pipeline.schedules import make_schedule
from planning.activations import BATCH_BYTES, Stage
from planning.layout import Layout, Model, Place, Sizes, units
from planning.states import states


class Memory(NamedTuple):
    """Bytes."""

    weights: int
    gradients: int
    optimizer: int
    activations: int

    @property
    def total(self) -> int:
        return sum(self)


def memory(model: Model, layout: Layout, place: Place, chunks: Sequence[int]) -> Memory:
    """Of the rank at a place, with so many layers in each of its chunks."""
    sizes = Sizes(model, layout, place.tp)
    return Memory(*states(sizes, place, sum(chunks)), activations(sizes, place, chunks))


def activations(sizes: Sizes, place: Place, chunks: Sequence[int]) -> int:
    layout, stage = sizes.layout, Stage(sizes, place, chunks)
    # Beyond these, a step repeats itself.
    micro_batches = min(sizes.micro_batches, 2 * layout.pp) if layout.pp_schedule != "afab" else sizes.micro_batches
    schedule = make_schedule(layout.pp_schedule, place.pp, layout.pp, micro_batches, len(chunks))
    backward = cache(stage.backward)
    forwards = [stage.forward(chunk) for chunk in range(len(chunks))]
    now = BATCH_BYTES * sizes.tokens * sizes.micro_batches
    if not stage.put_off:
        now += stage.layer.copies * sum(chunks)
    # What is left of the last step's gradients is freed.
    if layout.zero > 1:
        now -= sum(-(-sum(group) // sizes.shards) for group in units(sizes, place.pp, sum(chunks))) * sizes.sum_bytes
    peak = now
    turns = Counter()
    for kind, _, chunk in schedule:
        ends = stage.has_embedding(chunk), stage.has_head(chunk)
        if kind == "forward":
            above, change = forwards[chunk]
            buffers = stage.message * (2 - sum(ends))
        elif kind == "weight":
            above, change, buffers = stage.layer.weight_gradient, -stage.layer.late * chunks[chunk], 0
        else:
            above, change = backward(chunk, min(turns[chunk], 2))
            turns[chunk] += 1
            buffers = stage.message * (2 - sum(ends))
        peak = max(peak, now + above + buffers)
        now += change
    return peak
