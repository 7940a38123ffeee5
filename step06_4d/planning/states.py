"""Bytes that a rank holds between steps: weights, gradients, and what the optimizer has."""

from collections import Counter
from collections.abc import Sequence
from math import ceil
from typing import NamedTuple

from planning.layout import Place, Sizes, units


class States(NamedTuple):
    weights: int
    # With what else is left between steps: the positions of a sequence's tokens, the loss, the numbers of all ranks,
    # and that of what attention over ranks sees.
    gradients: int
    optimizer: int


def states(sizes: Sizes, place: Place, layers: int) -> States:
    """Of the rank at a place, whose stage has so many layers."""
    layout = sizes.layout
    # Layers are alike: each kind is looked at once.
    groups = Counter(map(tuple, units(sizes, place.pp, layers))).items()
    param, total = sizes.param_bytes, sizes.sum_bytes
    moments = 2 * total if layout.optimizer == "adamw" else 0
    step = 4 if layout.optimizer == "adamw" else 0
    in_parts = layout.cp > 1 and layout.cp_engine != "all-to-all"
    zigzag = in_parts and layout.cp_split == "zigzag"
    left = 8 * layout.seq_len // (layout.cp if zigzag else 1) + total + 4 * layout.pp * sizes.replicas * layout.tp
    left += 8 * in_parts
    if not layout.zero:
        numbers, tensors = (sum(n * size(group) for group, n in groups) for size in (sum, len))
        gradients = numbers * param if layout.dp_engine == "bucketed" else 0
        return States(numbers * param, gradients + left, numbers * moments + tensors * step)
    # Shards of a unit have equally many numbers: the last ones may be padding.
    part = sum(n * ceil(sum(group) / sizes.shards) for group, n in groups)
    whole = sizes.shards * part
    mine = [(in_shard(sizes, place, group), n) for group, n in groups]
    numbers = sum(n * sum(held) for held, n in mine)
    tensors = sum(n * sum(size > 0 for size in held) for held, n in mine)
    masters = part * total if param < total else 0
    return States(
        (part if layout.zero == 3 else whole) * param,
        (whole if layout.zero == 1 else part) * total + left,
        numbers * moments + tensors * step + masters,
    )


def in_shard(sizes: Sizes, place: Place, unit: Sequence[int]) -> list[int]:
    """How many numbers of each parameter of a unit are in this rank's shard."""
    size, end, mine = ceil(sum(unit) / sizes.shards), 0, []
    first = (place.dp * sizes.layout.cp + place.cp) % sizes.shards * size
    for numbers in unit:
        begin, end = end, end + numbers
        mine.append(max(min(end, first + size) - max(begin, first), 0))
    return mine
