"""Questions on step03: what a rank of tp holds, and what its layers send."""

import math
from random import Random

from labs.questions import Question
from labs.questions.project import Batches, Model, draw_batches, draw_model, step, tensor_parallel
from shared.config import UserError
from shared.llama_configs import PRESETS


def _drawn(draw: Random) -> tuple[Model, Batches, int, int]:
    """A model with a vocabulary that tp does not divide, what a rank sees, tp, and a rank."""
    model, tp = draw_model(draw, (2,)), draw.choice((2, 4))
    model = model._replace(vocab=model.vocab + draw.randrange(1, tp))
    return model, draw_batches(draw, s=(64, 128)), tp, draw.randrange(tp)


def _step(model: Model, batches: Batches, tp: int, rank: int) -> object:
    return step(rank, **model.options, **batches.options(), tp=tp)


def sizes_that_fit(draw: Random) -> Question:
    name = draw.choice([name for name, c in PRESETS.items() if c.num_attention_heads <= 64])
    c, ranks = PRESETS[name], draw.choice((8, 16, 32, 64))
    heads, kv_heads, f = c.num_attention_heads, c.num_key_value_heads, c.intermediate_size
    fitting = [
        tp for tp in range(1, ranks + 1) if math.gcd(heads, f) % tp == 0 and math.gcd(tp, kv_heads) in (tp, kv_heads)
    ]

    def answer() -> int:
        allowed = 0
        for tp in range(1, ranks + 1):
            try:
                tensor_parallel._check_sizes(c, tp)
                allowed += 1
            except UserError:
                pass
        return allowed

    return Question(
        f"{name} has {heads} heads, {kv_heads} key-value heads and an MLP of {f} columns. How many of the sizes from "
        f"1 to {ranks} can --tp take?",
        "It has to divide the heads and the columns, and to divide the key-value heads or be a multiple of them: "
        f"{', '.join(map(str, fitting))}. That is {len(fitting)}.",
        len(fitting),
        answer,
        0,
    )


def rows(draw: Random) -> Question:
    model, _, tp, rank = drawn = _drawn(draw)
    result = model.vocab // tp + (rank < model.vocab % tp)
    return Question(
        f"A vocabulary of {model.vocab} tokens, on tp = {tp} ranks. How many rows of the embedding does rank {rank} "
        "hold?",
        f"{model.vocab} = {tp} · {model.vocab // tp} + {model.vocab % tp}: the first {model.vocab % tp} ranks hold a "
        f"row more. {result}.",
        result,
        lambda: _step(*drawn).trainer.model.model.embed_tokens.weight.shape[0],
        0,
    )


def parameters(draw: Random) -> Question:
    model, _, tp, rank = drawn = _drawn(draw)
    h, d, rows_of_rank = model.h, model.d, model.vocab // tp + (rank < model.vocab % tp)
    kv_heads = max(model.kv_heads // tp, 1)
    layer = 2 * h * model.heads // tp * d + 2 * h * kv_heads * d + 3 * h * model.f // tp + 2 * h
    result = model.layers * layer + 2 * rows_of_rank * h + h
    return Question(
        f"{model} How many parameters does rank {rank} of tp = {tp} hold?",
        f"Of q and o H/t heads, of k and v {kv_heads}, of the MLP f/t columns, and both norms: 2h(H/t)d + 2h · "
        f"{kv_heads}d + 3hf/t + 2h = {layer:,} per layer. Of embedding and head {rows_of_rank} rows each. With the "
        f"last norm: {result:,}.",
        result,
        lambda: _step(*drawn).parameters,
        0,
    )


def calls(draw: Random) -> Question:
    model, batches, tp, _ = drawn = _drawn(draw)
    m, b, s = batches
    chunks, copies = -(-b * s // max(model.h // 2, 128)), 2 * model.layers * (tp > model.kv_heads)
    result = m * (4 * model.layers + 2 + 2 * chunks + copies) + 1
    return Question(
        f"{model} How many all-reduces over tp = {tp} does a step of {batches} take, all included?",
        "Per micro-batch: 4 in each layer, one for the embedding, one before the head, and two for each chunk of the "
        f"loss. A chunk is max(h/2, 128) tokens, so there are {chunks}. Copies of key-value heads add {copies}. Once "
        f"per step: the norm. {m} · (4 · {model.layers} + 2 + 2 · {chunks} + {copies}) + 1 = {result}.",
        result,
        lambda: _step(*drawn).sent("tp", "all-reduce").calls,
        0,
    )


def payload(draw: Random) -> Question:
    model, batches, tp, _ = drawn = _drawn(draw)
    m, b, s = batches
    copies = 2 * model.layers * (tp > model.kv_heads) * model.d * model.h
    numbers = m * ((4 * model.layers + 2) * b * s * model.h + 3 * b * s + copies) + 1
    return Question(
        f"{model} How many KiB does a rank all-reduce over tp = {tp}, in a step of {batches}, in float32?",
        "Per micro-batch: (4L + 2) · b · s · h, and 3 numbers per token for the loss. Copies of key-value heads: "
        f"{copies:,} numbers. With the norm {numbers:,} numbers of 4 bytes: {4 * numbers / 2**10:,.1f} KiB.",
        4 * numbers / 2**10,
        lambda: _step(*drawn).sent("tp", "all-reduce").bytes / 2**10,
    )


def activations(draw: Random) -> Question:
    model, batches, tp, rank = _drawn(draw)
    _, b, s = batches
    heads, kv_heads = model.heads // tp, max(model.kv_heads // tp, 1)
    per_token = 4 * model.h + 2 + 2 * (heads + kv_heads) * model.d + heads + 2 * model.f // tp
    result = 4 * b * s * per_token / 2**10

    def answer() -> float:
        shallow = model._replace(layers=1)
        more, less = (_step(sizes, batches, tp, rank).activations for sizes in (model, shallow))
        return (more - less) / 2**10

    return Question(
        f"{model} By how many KiB do the activations of a rank of tp = {tp} grow with each layer, for a micro-batch "
        f"of {b} · {s} tokens in float32?",
        f"Whole: 4h + 2 of two norms. Of {heads} heads and {kv_heads} key-value heads: q, k, v, output and "
        f"log-sum-exp. Of f/t columns: gate and up. {per_token:,} numbers per token, of 4 bytes: {result:,.1f} KiB.",
        result,
        answer,
    )


QUESTIONS = [sizes_that_fit, rows, parameters, calls, payload, activations]
