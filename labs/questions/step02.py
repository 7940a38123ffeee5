"""Questions on step02: who sees which sequences, and what the sum of gradients sends."""

from random import Random
from types import SimpleNamespace

import numpy as np

from labs.questions import Question
from labs.questions.project import Batches, Model, draw_batches, draw_model, step
from labs.questions.step00 import ring_sent
from shared.config import BaseConfig
from shared.data import GlobalBatches


def _drawn(draw: Random) -> tuple[Model, Batches, int, float]:
    """A model, what a rank sees, the ranks, and the KiB of a bucket."""
    model = draw_model(draw)
    return (
        model,
        draw_batches(draw),
        draw.choice((2, 4, 8)),
        draw.choice((0.1, 0.2, 0.4)) * model.parameters * 4 / 2**10,
    )


def _step(model: Model, batches: Batches, ranks: int, kib: float, engine: str = "bucketed") -> object:
    return step(**model.options, **batches.options(ranks), bucket_mib=kib / 2**10, dp_engine=engine)


def micro_batches(draw: Random) -> Question:
    _, (m, b, _), ranks, _ = drawn = _drawn(draw)
    batch = ranks * m * b
    return Question(
        f"--global-batch-size {batch} --micro-batch-size {b}, on {ranks} ranks. How many micro-batches does each rank "
        "run per step?",
        f"{batch} / ({ranks} · {b}) = {m}.",
        m,
        lambda: _step(*drawn).trainer.batches.micro_batches,
        0,
    )


def place(draw: Random) -> Question:
    m, b, ranks, at = draw.choice((2, 3, 4)), draw.choice((2, 4)), draw.choice((2, 4, 8)), draw.randint(2, 9)
    rank, micro, batch = draw.randrange(ranks), draw.randrange(m), ranks * m * b
    # Sequences whose tokens are their place in the order of training.
    order = SimpleNamespace(locate=lambda i, seed: ([np.full(5, i) for i in range(i + 1)], i))

    def answer() -> int:
        config = BaseConfig(seq_len=4, global_batch_size=batch, micro_batch_size=b, device="cpu")
        batches = GlobalBatches(order, config, rank, ranks).make((at - 1) * batch)
        return batches[micro].input_ids[0, 0].item()

    return Question(
        f"--global-batch-size {batch} --micro-batch-size {b}, on {ranks} ranks. Count the sequences of training from "
        f"0, in their order. Which is the first that rank {rank} sees in micro-batch {micro}, counted from 0, of step "
        f"{at}, counted from 1?",
        f"{at - 1} steps took {batch} each. Rank {rank}'s share of {batch // ranks} begins after {rank} others, and "
        f"{micro} micro-batches of {b} precede: {(at - 1) * batch} + {rank} · {batch // ranks} + {micro} · {b} = "
        f"{(at - 1) * batch + rank * (batch // ranks) + micro * b}.",
        (at - 1) * batch + rank * (batch // ranks) + micro * b,
        answer,
        0,
    )


def payload(draw: Random) -> Question:
    model, batches, ranks, _ = drawn = _drawn(draw)
    result = 4 * model.parameters + 4
    return Question(
        f"{model} It is trained in float32 on {ranks} ranks, each with {batches}. How many bytes does a rank "
        "all-reduce per step, the loss included?",
        f"4 per parameter, once per step whatever m is, and 4 for the loss: 4 · {model.parameters:,} + 4 = {result:,}.",
        result,
        lambda: _step(*drawn).sent("dp", "all-reduce").bytes,
        0,
    )


def sent_by_ring(draw: Random) -> Question:
    model, _, ranks, _ = _drawn(draw)
    result = 2 * (ranks - 1) / ranks * 4 * model.parameters
    return Question(
        f"{model} How many bytes does each of {ranks} ranks *send* per step, if a ring all-reduces the gradients in "
        "float32?",
        f"2(D − 1)/D of the payload: 2 · {ranks - 1}/{ranks} · 4 · {model.parameters:,} = {result:,.0f}.",
        result,
        lambda: ring_sent(model.parameters, ranks).bytes,
    )


def naive_calls(draw: Random) -> Question:
    model, batches, _, _ = drawn = _drawn(draw)
    result = 9 * model.layers + 3 + 1
    return Question(
        f"{model} How many all-reduces does --dp-engine naive make per step, of {batches}, the one of the loss "
        "included?",
        "One per parameter tensor, once per step: q, k, v, o, gate, up, down and two norms in each layer, embedding, "
        f"last norm, head. 9 · {model.layers} + 3, and the loss: {result}.",
        result,
        lambda: _step(*drawn, "naive").sent("dp", "all-reduce").calls,
        0,
    )


def bucket_calls(draw: Random) -> Question:
    model, batches, ranks, kib = drawn = _drawn(draw)
    kv, q, f = (n * model.h for n in (model.kv_heads * model.d, model.heads * model.d, model.f))
    # In the order of the model, in numbers.
    sizes = [
        model.vocab * model.h,
        *[q, kv, kv, q, f, f, f, model.h, model.h] * model.layers,
        model.h,
        model.vocab * model.h,
    ]
    buckets, filled = [], 0
    for size in reversed(sizes):
        filled += 4 * size
        if filled >= kib * 2**10:
            buckets.append(filled)
            filled = 0
    buckets += [filled] if filled else []
    return Question(
        f"{model} How many all-reduces does a step of {batches} make on {ranks} ranks, with buckets of {kib:.1f} KiB, "
        "the one of the loss included? A bucket closes when it has reached its size, and the last parameters come "
        "first.",
        "From the head backwards: head, last norm, then per layer two norms, down, up, gate, o, v, k, q, at last the "
        f"embedding. Buckets close at {', '.join(f'{size / 2**10:,.1f}' for size in buckets)} KiB. With the loss: "
        f"{len(buckets) + 1}.",
        len(buckets) + 1,
        lambda: _step(*drawn).sent("dp", "all-reduce").calls,
        0,
    )


QUESTIONS = [micro_batches, place, payload, sent_by_ring, naive_calls, bucket_calls]
