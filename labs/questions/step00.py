"""Questions on step00: groups, collectives, the ring, and the time of a message."""

import importlib.util
from functools import cache
from random import Random
from types import ModuleType
from typing import NamedTuple

import torch
import torch.distributed as dist
from torch.testing._internal.distributed.fake_pg import FakeStore

from labs import ROOT
from labs.questions import Question
from shared.distributed import make_mesh
from shared.ledger import Ledger, Traffic


@cache
def _ring() -> ModuleType:
    spec = importlib.util.spec_from_file_location("step00_ring", ROOT / "step00_collectives" / "ring.py")
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    return module


def ring_sent(numbers: int, ranks: int) -> Traffic:
    """What a rank of step00's ring sends: run without the others, and counted."""
    dist.init_process_group("fake", rank=0, world_size=ranks, store=FakeStore())
    try:
        with Ledger() as ledger:
            _ring().ring_all_reduce(torch.zeros(numbers))
    finally:
        dist.destroy_process_group()
    return ledger.counts["world", "send"]


class Numbers(NamedTuple):
    """Rank r of `ranks` starts with a·r + b·i at place i, for as many places as there are ranks."""

    ranks: int
    a: int
    b: int

    def __str__(self) -> str:
        return (
            f"Rank r of {self.ranks} starts with the numbers {self.a}·r + {self.b}·i, for i from 0 to {self.ranks - 1}."
        )

    def sum_at(self, place: int) -> int:
        return self.a * self.ranks * (self.ranks - 1) // 2 + self.ranks * self.b * place


def _drawn(draw: Random) -> Numbers:
    """The same for all questions of a seed: they ask about one run."""
    return Numbers(draw.choice((3, 4)), draw.randint(3, 20), draw.randint(2, 9))


@cache
def on_ranks(numbers: Numbers) -> list[dict[str, list[int]]]:
    """What each rank has after each collective. The ranks are real."""
    from ranks import run_ranks

    # New processes: forked ones would inherit groups that other questions have made.
    return run_ranks(numbers.ranks, _collectives, numbers, method="spawn")


def _collectives(numbers: Numbers) -> dict[str, list[int]]:
    dist.init_process_group("gloo")
    x = numbers.a * dist.get_rank() + numbers.b * torch.arange(numbers.ranks)
    summed, dealt, exchanged = x.clone(), x[:1].clone(), torch.empty_like(x)
    dist.all_reduce(summed)
    dist.reduce_scatter_single(dealt, x)
    dist.all_to_all_single(exchanged, x)
    return {"all-reduce": summed.tolist(), "reduce-scatter": dealt.tolist(), "all-to-all": exchanged.tolist()}


def neighbours(draw: Random) -> Question:
    dp, tp = draw.choice((2, 3, 4)), draw.choice((2, 4, 8))
    axis, rank = draw.choice(("dp", "tp")), draw.randrange(dp * tp)
    row, column = divmod(rank, tp)
    members = [column + tp * i for i in range(dp)] if axis == "dp" else [tp * row + i for i in range(tp)]

    def answer() -> int:
        dist.init_process_group("fake", rank=rank, world_size=dp * tp, store=FakeStore())
        try:
            mesh = make_mesh("cpu", {"dp": dp, "tp": tp}, {"dp": "fake", "tp": "fake"})
            return dist.get_process_group_ranks(mesh.get_group(axis))[-1]
        finally:
            dist.destroy_process_group()

    return Question(
        f"A mesh of dp {dp} × tp {tp}. tp is the last axis. Which is the last rank in the {axis} group of rank {rank}?",
        f"Rank {rank} is at dp {row}, tp {column}. Along {axis}: {members}.",
        members[-1],
        answer,
        0,
    )


def transposed(draw: Random) -> Question:
    numbers = _drawn(draw)
    rank, place = draw.sample(range(numbers.ranks), 2)
    result = numbers.a * place + numbers.b * rank
    return Question(
        f"{numbers} What is at i = {place} on rank {rank} after an all-to-all?",
        f"What rank {place} had at i = {rank}: {numbers.a} · {place} + {numbers.b} · {rank} = {result}.",
        result,
        lambda: on_ranks(numbers)[rank]["all-to-all"][place],
        0,
    )


def all_reduced(draw: Random) -> Question:
    numbers = _drawn(draw)
    (ranks, a, b), place = numbers, draw.randrange(numbers.ranks)
    return Question(
        f"{numbers} What is at i = {place} on every rank after an all-reduce?",
        f"Σ over r of {a}·r + {b}·{place} = {a} · {ranks * (ranks - 1) // 2} + {ranks} · {b * place} = "
        f"{numbers.sum_at(place)}.",
        numbers.sum_at(place),
        lambda: on_ranks(numbers)[-1]["all-reduce"][place],
        0,
    )


def reduce_scattered(draw: Random) -> Question:
    numbers = _drawn(draw)
    (ranks, a, b), rank = numbers, draw.randrange(numbers.ranks)
    return Question(
        f"{numbers} A reduce-scatter deals one number to each rank. Which does rank {rank} get?",
        f"The sum at i = {rank}: {a} · {ranks * (ranks - 1) // 2} + {ranks} · {b * rank} = {numbers.sum_at(rank)}.",
        numbers.sum_at(rank),
        lambda: on_ranks(numbers)[rank]["reduce-scatter"][0],
        0,
    )


def ring_bytes(draw: Random) -> Question:
    ranks, mib = draw.choice((2, 4, 8, 16)), draw.choice((1, 2, 4))
    result = 2 * (ranks - 1) / ranks * mib
    return Question(
        f"How many MiB does each of {ranks} ranks send in a ring all-reduce of {mib} MiB?",
        f"A part of {mib}/{ranks} in each of 2 · {ranks - 1} turns: {result} MiB.",
        result,
        lambda: ring_sent(mib * 2**18, ranks).bytes / 2**20,
    )


def ring_time(draw: Random) -> Question:
    ranks, mib = draw.choice((4, 8, 16)), draw.choice((1, 2, 4))
    alpha, beta = draw.choice((10, 20, 50, 100)), draw.choice((10, 25, 50))
    turns, part = 2 * (ranks - 1), mib * 2**20 / ranks
    result = turns * (alpha + part / (beta * 1e3))

    def answer() -> float:
        calls, nbytes = ring_sent(mib * 2**18, ranks)
        return calls * alpha + nbytes / (beta * 1e3)

    return Question(
        f"α = {alpha} µs, β = {beta} GB/s. How many µs does a ring all-reduce of {mib} MiB take on {ranks} ranks?",
        f"2 · {ranks - 1} = {turns} turns of {part:,.0f} bytes, each α + {part:,.0f}/β: {result:,.1f} µs.",
        result,
        answer,
    )


def one_or_many(draw: Random) -> Question:
    ranks, calls, alpha = draw.choice((4, 8, 16)), draw.choice((10, 50, 100)), draw.choice((10, 20, 50))
    # Each part is of whole numbers.
    numbers = 1000 * ranks
    result = (calls - 1) * 2 * (ranks - 1) * alpha / 1000

    def answer() -> float:
        many, one = (ring_sent(n, ranks) for n in (numbers, calls * numbers))
        assert calls * many.bytes == one.bytes
        return (calls * many.calls - one.calls) * alpha / 1000

    return Question(
        f"{calls} gradients of {4 * numbers:,} bytes each, on {ranks} ranks, α = {alpha} µs. How many ms does one ring "
        f"all-reduce of them all save, against {calls} one after the other?",
        f"The bytes are the same. {calls - 1} calls less, of 2 · {ranks - 1} turns each, each α less: {result:g} ms.",
        result,
        answer,
    )


QUESTIONS = [neighbours, transposed, all_reduced, reduce_scattered, ring_bytes, ring_time, one_or_many]
