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
    peak, turns = now, Counter()
    # Messages that are still to come, of activations and of gradients. Of each, a buffer waits for the next one, and
    # another holds what was sent last.
    forward = [chunk for kind, _, chunk in schedule if kind == "forward"]
    to_come = [
        sum(not stage.has_embedding(chunk) for chunk in forward),
        sum(not stage.has_head(chunk) for chunk in forward),
    ]
    waiting, sent = [n > 0 for n in to_come], [False, False]
    for kind, _, chunk in schedule:
        first, last = stage.has_embedding(chunk), stage.has_head(chunk)
        if kind == "weight":
            above, change = stage.layer.late_gradients, -stage.layer.late * chunks[chunk]
        elif kind == "forward":
            above, change = forwards[chunk]
            # What has arrived is the input that its layers keep.
            waiting[0] &= first
            sent[0] &= last
        else:
            above, change = backward(chunk, min(turns[chunk], 2))
            turns[chunk] += 1
            sent[1] &= first
        peak = max(peak, now + above + stage.message * (sum(waiting) + sum(sent)))
        now += change
        if kind == "forward":
            to_come[0] -= not first
            waiting[0], sent[0] = to_come[0] > 0, sent[0] or not last
        elif kind != "weight":
            to_come[1] -= not last
            waiting[1], sent[1] = to_come[1] > 0, sent[1] or not first
    return peak
