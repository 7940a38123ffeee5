"""Questions on step06: what its options divide, hide, and compute again."""

from random import Random
from typing import Any

from labs.questions import Question
from labs.questions.project import Batches, Model, draw_batches, draw_model, step
from labs.questions.step04 import simulated
from shared.timeline import bubble


def _drawn(draw: Random) -> tuple[Model, Batches, int]:
    """The same for all questions of a seed: a model of two layers, what a rank sees, and the ranks."""
    return draw_model(draw, (2,)), draw_batches(draw, (1, 2), (16, 32)), draw.choice((2, 4, 8))


def _sharded(model: Model, batches: Batches, ranks: int, level: int, dtype: str) -> Any:
    return step(**model.options, **batches.options(ranks), zero=level, dtype=dtype)


def states(draw: Random) -> Question:
    model, batches, ranks = _drawn(draw)
    level, dtype = draw.choice((1, 2)), draw.choice(("float32", "bfloat16"))
    weights, optimizer, divided = *((4, 8) if dtype == "float32" else (2, 12)), ranks if level == 2 else 1
    each = weights + 4 / divided + optimizer / ranks
    result = model.parameters * each / 2**10
    return Question(
        f"{model} It is trained on {ranks} ranks with --zero {level} --dtype {dtype}. How many KiB of weights, "
        "gradients and optimizer states does each hold between two steps?",
        f"Bytes per parameter: {weights} of weights, 4/{divided} of gradients, {optimizer}/{ranks} of the "
        f"optimizer{', its float32 masters included' if weights == 2 else ''}: {each:g}. Times {model.parameters:,}: "
        f"{result:,.1f} KiB.",
        result,
        lambda: _sharded(model, batches, ranks, level, dtype).kept / 2**10,
    )


def sharded_traffic(draw: Random) -> Question:
    model, batches, ranks = _drawn(draw)
    level, dtype = draw.choice((1, 2, 3)), draw.choice(("float32", "bfloat16"))
    m, n, size = batches.m, model.parameters, 4 if dtype == "float32" else 2
    reduced = 4 * n * (1 if level == 1 else m)
    again = (model.layers - 1) * (model.matrices_of_layer + 2 * model.h)
    gathered = size * (m * (n + again) if level == 3 else n)
    result = (reduced + gathered) / 2**10
    how = f"for each of {m} micro-batches, and in backward again the {again:,} numbers of the units between"

    def answer() -> float:
        sharded = _sharded(model, batches, ranks, level, dtype)
        return sum(sharded.sent("dp", kind).bytes for kind in ("reduce-scatter", "all-gather")) / 2**10

    return Question(
        f"{model} On {ranks} ranks, each with {batches}, --zero {level} --dtype {dtype}. What is the payload of all "
        "reduce-scatters and all-gathers of a step, in KiB? Units are the embedding, each layer, and the head.",
        f"Gradients, in float32, {'once' if level == 1 else f'{m} times'}: {reduced:,} bytes. Weights of {size} bytes "
        f"{how if level == 3 else 'once'}: {gathered:,} bytes. In all {result:,.1f} KiB.",
        result,
        answer,
    )


def interleaved(draw: Random) -> Question:
    stages, chunks = draw.choice((2, 4)), draw.choice((2, 3, 4))
    m = stages * draw.randint(1, 4)
    result = 100 * (stages - 1) / (chunks * m + stages - 1)
    return Question(
        f"{stages} ranks of a pipeline, {m} micro-batches, --virtual-stages {chunks}. What share of the time is a "
        "rank idle, in percent?",
        f"The pipeline fills in the time of a chunk: (P − 1)/(VM + P − 1) = {stages - 1}/{chunks * m + stages - 1} = "
        f"{result:.2f} %.",
        result,
        lambda: 100 * bubble(simulated("1f1b", stages, m, chunks)),
    )


def zero_bubble(draw: Random) -> Question:
    stages = draw.choice((2, 4, 8))
    m = draw.randint(stages, 24)
    result = 100 * (stages - 1) / (3 * m + stages - 1)
    return Question(
        f"{stages} stages, {m} micro-batches, --pp-schedule zero-bubble. A forward, the gradient of the input, and "
        "that of the weights take the same time. What share of the time is a stage idle, in percent?",
        f"Idle are (P − 1)(F + I − W) = {stages - 1}, of that and 3M = {3 * m} of work: {result:.2f} %.",
        result,
        lambda: 100 * bubble(simulated("zero-bubble", stages, m)),
    )


def _sequence_parallel(draw: Random) -> tuple[Model, Batches, int]:
    model, batches, _ = _drawn(draw)
    return model._replace(kv_heads=4), batches, draw.choice((2, 4))


def gathers(draw: Random) -> Question:
    model, batches, tp = _sequence_parallel(draw)
    result = batches.m * (6 * model.layers + 2)
    return Question(
        f"{model} How many all-gathers over tp = {tp} does a step of {batches} take with --sequence-parallel?",
        "In each layer 2 before the split matrices in forward, 2 again in backward, since a rank keeps its own "
        "tokens only, and 2 for the gradients of what o and down have reduce-scattered. One before the head, one for "
        f"the gradient of the embedding. {batches.m} · (6 · {model.layers} + 2) = {result}.",
        result,
        lambda: (
            step(**model.options, **batches.options(), tp=tp, sequence_parallel=True).sent("tp", "all-gather").calls
        ),
        0,
    )


def sharded_activations(draw: Random) -> Question:
    model, batches, tp = _sequence_parallel(draw)
    _, b, s = batches
    whole = 4 * model.h + 2 + 2 * (model.heads + model.kv_heads) * model.d + model.heads + 2 * model.f
    result = 4 * b * s * whole / tp / 2**10

    def answer() -> float:
        shallow = model._replace(layers=1)
        more, less = (
            step(**one.options, **batches.options(), tp=tp, sequence_parallel=True).activations
            for one in (model, shallow)
        )
        return (more - less) / 2**10

    return Question(
        f"{model} By how many KiB do the activations of a rank of tp = {tp} with --sequence-parallel grow with each "
        f"layer, for a micro-batch of {b} · {s} tokens in float32?",
        f"Of the norms' {4 * model.h + 2} numbers per token it has its tokens only, of the others its heads and "
        f"columns: {whole:,}/{tp} numbers, of 4 bytes: {result:,.1f} KiB.",
        result,
        answer,
    )


def _recomputing(draw: Random) -> tuple[Model, Batches]:
    """One micro-batch."""
    model, batches, _ = _drawn(draw)
    return model, batches._replace(m=1)


def recomputed(draw: Random) -> Question:
    model, batches = _recomputing(draw)
    _, b, s = batches
    per_token = model.layers * (2 * (model.matrices_of_layer - model.h * model.f) + 4 * model.heads * model.d * s)
    result = b * s * per_token / 1e6

    def answer() -> float:
        full, none = (step(**model.options, **batches.options(), recompute=kind) for kind in ("full", "none"))
        return (full.audit.flops - none.audit.flops) / 1e6

    return Question(
        f"{model} How many MFLOP more do the matmuls of a step of {b} · {s} tokens take with --recompute full? "
        "Recompute stops as soon as backward has what it needs.",
        "The forward of each layer once more, without the last matmul, down: 2 · (2h(H + K)d + 2hf) per token, and "
        f"attention, 4Hds. {b * s} tokens, {model.layers} layers: {result:,.2f} MFLOP.",
        result,
        answer,
    )


def saved(draw: Random) -> Question:
    model, batches = _recomputing(draw)
    _, b, s = batches
    kind = draw.choice(("selective", "full"))
    kept = model.h if kind == "full" else 2 * model.h + 2 + 2 * (model.heads + model.kv_heads) * model.d
    kept += 0 if kind == "full" else model.heads + 2 * model.f
    result = 4 * b * s * kept / 2**10

    def answer() -> float:
        shallow = model._replace(layers=1)
        more, less = (step(**one.options, **batches.options(), recompute=kind).activations for one in (model, shallow))
        return (more - less) / 2**10

    return Question(
        f"{model} How many KiB of activations does a layer keep with --recompute {kind}, of {b} · {s} tokens in "
        "float32?",
        "full: its input, h per token. selective: all but what the two norms return, 2h less than 4h + 2 + 2(H + K)d "
        f"+ H + 2f. Here {kept:,} numbers of 4 bytes per token: {result:,.1f} KiB.",
        result,
        answer,
    )


QUESTIONS = [interleaved, zero_bubble, states, sharded_traffic, saved, sharded_activations, gathers, recomputed]
