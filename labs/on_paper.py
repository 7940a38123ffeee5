"""Judges of functions that need no processes: schedules, masks, sums of softmaxes and boxes, on small sizes first.

Each says what is wrong, or returns None. `sys.modules` has the step, with the student's functions in it.
"""

import itertools
import math
import sys
from collections import Counter
from collections.abc import Callable, Sequence
from pathlib import Path
from types import ModuleType

import torch
from torch import Tensor

from shared.timeline import AFTER, bubble, simulate

STAGES = range(1, 5)


def _schedules(
    schedules: list[Sequence], expected: set[tuple], holds: Callable[[int], int], idle_share: float
) -> str | None:
    """`expected`: the actions of each stage. `holds`: of how many forwards a stage may have the activations at once."""
    for stage, schedule in enumerate(schedules):
        if not isinstance(schedule, list):
            return f"stage {stage}: this is {schedule!r}, not a list of actions"
        count = Counter(tuple(action) for action in schedule)
        for action in sorted(expected | count.keys()):
            if (count[action] != 1) if action in expected else True:
                times = {0: "missing", 1: "too much"}.get(count[action], f"there {count[action]} times")
                return f"stage {stage}: {_name(action)} is {times}"
        done = set()
        for action in schedule:
            before = (AFTER.get(action.kind), *action[1:])
            # Of a backward, the half that computes the gradient of the input.
            if before[0] and before not in done:
                return f"order: stage {stage} does {_name(action)} before the {before[0]} that it builds on"
            done.add(tuple(action))
    try:
        events = simulate(schedules)
    except ValueError as error:
        text = str(error)
        return text if text.startswith("deadlock") else f"order: {text}"
    for stage, schedule in enumerate(schedules):
        changes = [{"forward": 1, "input": 0}.get(action.kind, -1) for action in schedule]
        if (held := max(itertools.accumulate(changes))) > holds(stage):
            return f"in flight: stage {stage} holds the activations of {held} at once, where {holds(stage)} would do"
    if not math.isclose(idle := bubble(events), idle_share, abs_tol=1e-9):
        return f"bubble: the stages idle for {idle:.1%} of the time, the formula says {idle_share:.1%}"
    return None


def _name(action: tuple) -> str:
    kind, m, *chunk = action
    return f"{kind} of micro-batch {m}" + (f", chunk {chunk[0]}" if chunk and chunk[0] else "")


def _of_sizes(cases: Sequence[tuple], check: Callable[..., str | None], words: str) -> str | None:
    """The first complaint, with the sizes that lead to it."""
    for case in cases:
        if complaint := check(*case):
            return f"with {words.format(*case)}, {complaint}"
    return None


def one_forward_one_backward(module: ModuleType, directory: Path) -> str | None:
    make = sys.modules["schedules"].one_forward_one_backward

    def check(stages: int, micro_batches: int) -> str | None:
        expected = set(itertools.product(("forward", "backward"), range(micro_batches)))
        schedules = [make(stage, stages, micro_batches) for stage in range(stages)]
        return _schedules(
            schedules,
            expected,
            lambda stage: min(stages - stage, micro_batches),
            (stages - 1) / (micro_batches + stages - 1),
        )

    cases = list(itertools.product(STAGES, range(1, 9)))
    return _of_sizes(cases, check, "--pp {0} and {1} micro-batches")


def zero_bubble(module: ModuleType, directory: Path) -> str | None:
    make = sys.modules["pipeline.schedules"].zero_bubble

    def check(stages: int, micro_batches: int) -> str | None:
        expected = set(itertools.product(("forward", "input", "weight"), range(micro_batches), (0,)))
        schedules = [make(stage, stages, micro_batches) for stage in range(stages)]
        idle = stages - 1 + max(0, stages - micro_batches)
        return _schedules(
            schedules, expected, lambda stage: min(stages, micro_batches), idle / (3 * micro_batches + idle)
        )

    cases = list(itertools.product(STAGES, range(1, 9)))
    return _of_sizes(cases, check, "--pp {0} and {1} micro-batches")


def interleaved(module: ModuleType, directory: Path) -> str | None:
    make = sys.modules["pipeline.schedules"].interleaved

    def check(stages: int, micro_batches: int, chunks: int) -> str | None:
        expected = set(itertools.product(("forward", "backward"), range(micro_batches), range(chunks)))
        schedules = [make(stage, stages, micro_batches, chunks) for stage in range(stages)]
        return _schedules(
            schedules,
            expected,
            lambda stage: min(chunks * stages + stages - 2 * stage - 1, micro_batches * chunks),
            (stages - 1) / (chunks * micro_batches + stages - 1),
        )

    cases = [(p, groups * p, v) for p, groups, v in itertools.product(range(2, 5), range(1, 4), range(1, 4))]
    return _of_sizes(cases, check, "--pp {0}, {1} micro-batches and {2} chunks")


def positions(module: ModuleType, directory: Path) -> str | None:
    local_positions = module.context_parallel.local_positions

    def check(cp: int, split: str) -> str | None:
        config = module.Config(cp=cp, cp_split=split, seq_len=24)
        of_ranks = [local_positions(config, rank) for rank in range(cp)]
        for rank, mine in enumerate(of_ranks):
            if not isinstance(mine, Tensor) or mine.ndim != 1:
                return f"rank {rank}: this is no tensor of positions (s,): {mine!r}"
        holders = {p: [rank for rank, mine in enumerate(of_ranks) if p in mine] for p in range(config.seq_len)}
        if complaint := _once(holders, "position"):
            return complaint
        for rank, mine in enumerate(of_ranks):
            if mine.tolist() != sorted(mine.tolist()):
                return f"rank {rank} has its positions out of order: {mine.tolist()}"
        work = [mine.add(1).sum().item() for mine in of_ranks]
        busiest = max(range(cp), key=work.__getitem__)
        if split == "zigzag" and max(work) > min(work):
            share = work[busiest] * cp / sum(work)
            return f"under a causal mask, rank {busiest} has {share:.2f} times the mean work: it is not balanced"
        firsts = [mine[0].item() for mine in of_ranks]
        if firsts != sorted(firsts):
            return f"the ranks begin at positions {firsts}: an earlier rank has an earlier piece"
        if split == "contiguous" and firsts != list(range(0, config.seq_len, config.seq_len // cp)):
            return f"the ranks begin at positions {firsts}: a contiguous split has one piece for each"
        return None

    return _of_sizes([(1, "zigzag"), (2, "zigzag"), (3, "zigzag"), (3, "contiguous")], check, "--cp {} --cp-split {}")


def _once(holders: dict[int, list[int]], what: str) -> str | None:
    for number, ranks in holders.items():
        if len(ranks) != 1:
            return f"{what} {number} is " + (f"covered twice: by ranks {ranks}" if ranks else "never covered")
    return None


def visibility(module: ModuleType, directory: Path) -> str | None:
    visible, held = module.context_parallel.visible, module.context_parallel.local_positions

    def check(cp: int, split: str) -> str | None:
        config = module.Config(cp=cp, cp_split=split, seq_len=12)
        for rank, source in itertools.product(range(cp), repeat=2):
            queries, keys = held(config, rank), held(config, source)
            seen = torch.zeros(len(queries), len(keys), dtype=torch.int)
            for block in visible(config, rank, source):
                part = seen[block.queries[2], block.keys[2]]
                if block.causal and part.shape[0] != part.shape[1]:
                    return f"rank {rank}, keys of {source}: a causal block has as many keys as queries"
                part += torch.ones_like(part).tril() if block.causal else 1
            for (i, query), (j, key) in itertools.product(enumerate(queries.tolist()), enumerate(keys.tolist())):
                where = f"the query at position {query} (rank {rank})", f"the key at {key} (rank {source})"
                if seen[i, j] and key > query:
                    return f"{where[0]} sees {where[1]}, which comes later"
                if key <= query and seen[i, j] != 1:
                    return f"{where[1]} is {'covered twice' if seen[i, j] else 'never covered'}, by {where[0]}"
        return None

    return _of_sizes(
        [(2, "contiguous"), (3, "contiguous"), (2, "zigzag"), (3, "zigzag")], check, "--cp {} --cp-split {}"
    )


def merging(module: ModuleType, directory: Path) -> str | None:
    fused_attention = sys.modules["fused_attention"]
    generator = torch.Generator().manual_seed(0)

    def check(blocks: int, size: float) -> str | None:
        scores = torch.randn(2, 3, 4, 5 * blocks, generator=generator, dtype=torch.float64) * size
        values = torch.randn(5 * blocks, 8, generator=generator, dtype=torch.float64)
        # Of values that are all 1, a mean is 1.
        values[:, 0] = 1
        out, lse = fused_attention.nothing_seen(scores.new_empty(2, 3, 4, 8))
        for part, v in zip(scores.chunk(blocks, -1), values.chunk(blocks), strict=True):
            fused_attention.merge(out, lse, part.softmax(-1) @ v, part.logsumexp(-1))
        if not (out.isfinite().all() and lse.isfinite().all()):
            return "the result is not finite: what does exp make of large numbers, or of the −∞ at the start?"
        if not out.any():
            return "`out` is still zero: it is to be changed in place"
        right, right_lse = scores.softmax(-1) @ values, scores.logsumexp(-1)
        if not torch.allclose(out[..., 0], right[..., 0]):
            return f"the weights of a query's keys sum to {out[0, 0, 0, 0]:.3f}, not to 1"
        if not torch.allclose(lse, right_lse):
            return "`out` may be right, `lse` is not: it is to be the log of Σ exp over all keys so far, in place"
        if not torch.allclose(out, right):
            return "the weights of a query's keys sum to 1, but they are not in proportion to exp(score)"
        return None

    return _of_sizes([(1, 1), (2, 1), (3, 1), (2, 1000)], check, "{0} blocks and scores around {1}")


def boxes(module: ModuleType, directory: Path) -> str | None:
    range_boxes = sys.modules["survive.boxes"].range_boxes

    def check(shape: tuple[int, ...], begin: int, end: int) -> str | None:
        numbers = torch.arange(math.prod(shape)).view(shape)
        # A student's may go on for ever.
        found = list(itertools.islice(range_boxes(torch.Size(shape), begin, end), 20))
        if len(found) > 3:
            return f"there are {'20 boxes or more' if len(found) == 20 else f'{len(found)} boxes'}: three would do"
        covered = []
        for offset, size in found:
            if len(offset) != len(shape) or len(size) != len(shape):
                return f"the box {offset}, {size} has not the {len(shape)} dimensions of the tensor"
            if any(o < 0 or n < 1 or o + n > whole for o, n, whole in zip(offset, size, shape, strict=True)):
                return f"the box at {tuple(offset)} of size {tuple(size)} does not lie in the tensor"
            part = tuple(slice(o, o + n) for o, n in zip(offset, size, strict=True))
            covered += numbers[part].flatten().tolist()
        for number in range(math.prod(shape)):
            if (times := covered.count(number)) != (begin <= number < end):
                if times == 0:
                    return f"number {number} is never covered"
                return f"number {number} is covered " + ("twice" if times > 1 else "and does not belong to them")
        if covered != sorted(covered):
            return f"the boxes are not in the order of the numbers: {covered}"
        return None

    cases = [
        (shape, begin, end)
        for shape in ((5,), (1, 4), (4, 3))
        for begin, end in itertools.combinations(range(math.prod(shape) + 1), 2)
    ]
    return _of_sizes(cases, check, "shape {} and numbers {} to {}")
