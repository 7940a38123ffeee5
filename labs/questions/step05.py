"""Questions on step05: who holds which tokens, who sees what, and what attention sends."""

import math
from random import Random

import torch
import torch.distributed as dist

from labs.questions import Question
from labs.questions.project import (
    Batches,
    Model,
    context_parallel,
    draw_batches,
    draw_model,
    fused_attention,
    on_mesh,
    step,
    train,
)


def _drawn(draw: Random) -> tuple[Model, Batches, int]:
    """A model, what a rank sees, and cp, which divides the key-value heads."""
    return draw_model(draw, kv_heads=(4,)), draw_batches(draw), draw.choice((2, 4))


def _step(model: Model, batches: Batches, cp: int, engine: str) -> object:
    return step(**model.options, **batches.options(), cp=cp, cp_engine=engine)


def _positions(s: int, cp: int, split: str) -> list[list[int]]:
    config = train.Config(cp=cp, seq_len=s, cp_split=split)
    return [context_parallel.local_positions(config, rank).tolist() for rank in range(cp)]


def holder(draw: Random) -> Question:
    cp, piece = draw.choice((2, 4, 8)), draw.choice((8, 16, 32))
    s = 2 * cp * piece
    token = draw.randrange(s)
    number = token // piece
    result = min(number, 2 * cp - 1 - number)
    return Question(
        f"A sequence of {s} tokens, cp = {cp}, zigzag. Which rank holds token {token}, counted from 0?",
        f"2c = {2 * cp} pieces of {piece}. The token is in piece {number}. Rank r holds the pieces r and {2 * cp - 1} "
        f"− r: {result}.",
        result,
        lambda: next(rank for rank, held in enumerate(_positions(s, cp, "zigzag")) if token in held),
        0,
    )


def late_piece(draw: Random) -> Question:
    cp, piece = draw.choice((2, 4, 8)), draw.choice((8, 16, 32))
    s, rank = 2 * cp * piece, draw.randrange(cp)
    result = (2 * cp - 1 - rank) * piece
    return Question(
        f"A sequence of {s} tokens, cp = {cp}, zigzag. At which position does the late piece of rank {rank} begin?",
        f"It is piece 2c − 1 − r = {2 * cp - 1 - rank}, of {piece} tokens each: {result}.",
        result,
        lambda: _positions(s, cp, "zigzag")[rank][piece],
        0,
    )


def imbalance(draw: Random) -> Question:
    cp = draw.choice((2, 3, 4, 8, 16))
    result = (2 * cp - 1) / cp

    def answer() -> float:
        config, work = train.Config(cp=cp, cp_split="contiguous"), []
        for rank in range(cp):
            blocks = [block for source in range(cp) for block in context_parallel.visible(config, rank, source)]
            # In halves of a square.
            work.append(sum(1 if block.causal else 2 for block in blocks))
        return work[-1] / (sum(work) / cp)

    return Question(
        f"cp = {cp}, contiguous pieces. How many times longer than the average does the last rank attend? Count a "
        "square of piece by piece as 2, and one under the causal mask as 1.",
        f"Rank r sees 2r + 1. The last {2 * cp - 1}, the average c = {cp}: {result:.4f}.",
        result,
        answer,
    )


def pairs(draw: Random) -> Question:
    split, cp, piece = draw.choice(("contiguous", "zigzag")), draw.choice((2, 4)), draw.choice((4, 8, 16))
    s, rank = 2 * cp * piece, draw.randrange(cp)
    n = s // cp
    result = n * rank * n + n * (n + 1) // 2 if split == "contiguous" else s * (s + 1) // 2 // cp
    how = (
        f"{n} queries see {rank} · {n} earlier keys each, and {n} · {n + 1}/2 pairs are its own"
        if split == "contiguous"
        else f"all s(s + 1)/2 pairs, shared equally by {cp} ranks"
    )
    return Question(
        f"A sequence of {s} tokens, cp = {cp}, {split}. How many pairs of a query and a key that it sees does rank "
        f"{rank} work on, its own token included?",
        f"{how[0].upper()}{how[1:]}: {result:,}.",
        result,
        lambda: sum(position + 1 for position in _positions(s, cp, split)[rank]),
        0,
    )


def merged(draw: Random) -> Question:
    l1, l2 = (round(draw.uniform(-1, 2), 1) for _ in range(2))
    o1, o2 = (round(draw.uniform(-3, 3), 1) for _ in range(2))
    share = 1 / (1 + math.exp(l2 - l1))
    result = share * o1 + (1 - share) * o2

    def answer() -> float:
        out, lse = (torch.tensor([x], dtype=torch.float64) for x in (o1, l1))
        more = (torch.tensor([x], dtype=torch.float64) for x in (o2, l2))
        fused_attention.merge(out[None], lse, *more)
        return out.item()

    return Question(
        f"A query's softmax over one block of keys gives {o1}, with a log-sum-exp of {l1}. Over a second block it "
        f"gives {o2}, with {l2}. What does it give over both?",
        f"The first counts e^{l1} / (e^{l1} + e^{l2}) = {share:.4f}, the second the rest: {share:.4f} · {o1} + "
        f"{1 - share:.4f} · {o2} = {result:.4f}.",
        result,
        answer,
    )


def summing(draw: Random) -> Question:
    dp, tp, cp = draw.choice((2, 4)), draw.choice((1, 2, 4)), draw.choice((2, 4, 8))

    def answer() -> int:
        with on_mesh(0, pp=1, dp=dp, cp=cp, tp=tp) as mesh:
            return dist.get_world_size(context_parallel.replicas(train.Config(dp=dp, tp=tp, cp=cp), mesh))

    return Question(
        f"dp = {dp}, tp = {tp}, cp = {cp}. Over how many ranks is the gradient of a weight summed after backward?",
        f"Those that hold the same weights and see other tokens: dp · cp = {dp * cp}. The loss is divided by the "
        "tokens of the global batch already.",
        dp * cp,
        answer,
        0,
    )


def ring(draw: Random) -> Question:
    model, batches, cp = drawn = _drawn(draw)
    m, b, s = batches
    n = b * s // cp * model.kv_heads * model.d
    result = m * model.layers * 3 * (cp - 1) * 2 * n * 4 / 2**10
    return Question(
        f"{model} Sequences are cut over cp = {cp}, in a step of {batches}. How many KiB does a rank send around the "
        "ring, in float32?",
        f"n = b · s/c · K · d = {n:,} numbers of keys, as many of values. c − 1 hops in forward, in backward as many, "
        f"and as many of gradients: m · L · 3 · {cp - 1} · 2n · 4 bytes = {result:,.1f} KiB.",
        result,
        lambda: _step(*drawn, "ring").sent("cp", "send").bytes / 2**10,
    )


def exchanged(draw: Random) -> Question:
    model, batches, cp = drawn = _drawn(draw)
    m, b, s = batches
    numbers = m * model.layers * 4 * b * s // cp * (model.heads + model.kv_heads) * model.d
    result = numbers * 4 * (cp - 1) / cp / 2**10
    return Question(
        f"{model} Sequences are cut over cp = {cp}, in a step of {batches}, by --cp-engine all-to-all. How many KiB "
        "leave a rank, in float32? What it exchanges with itself does not.",
        "In forward q, k, v, then the output: b · s/c · (2H + 2K) · d numbers. In backward the same of gradients. Of "
        f"m · L · 4 · b · s/c · (H + K) · d numbers, 1/{cp} stays: {result:,.1f} KiB.",
        result,
        lambda: _step(*drawn, "all-to-all").sent("cp", "all-to-all").bytes * (cp - 1) / cp / 2**10,
    )


QUESTIONS = [holder, late_piece, imbalance, summing, pairs, merged, ring, exchanged]
