"""Questions on step01: what a model holds and computes."""

from random import Random

import torch

from labs.questions import Question
from labs.questions.project import Batches, Model, draw_batches, draw_model, step
from shared.config import BaseConfig
from shared.flops import flops_per_token
from shared.llama_configs import PRESETS
from shared.model import LlamaForCausalLM
from shared.optim import learning_rate


def _drawn(draw: Random) -> tuple[Model, Batches]:
    """The same for all questions of a seed: they ask about one run."""
    return draw_model(draw, (2,)), draw_batches(draw)


def divisor(draw: Random) -> Question:
    model, batches = _drawn(draw)
    m, b, s = batches
    return Question(
        f"A step has {batches}. The loss of a micro-batch is summed over its tokens. By what is the sum divided before "
        "backward?",
        f"By the tokens of the global batch, m · b · s = {m * b * s}: the gradients of all micro-batches then add up "
        "to that of the mean.",
        m * b * s,
        lambda: step(**model.options, **batches.options()).trainer.pipeline.tokens,
        0,
    )


def parameters(draw: Random) -> Question:
    # Relatives add biases and norms of heads.
    llamas = {name: c for name, c in PRESETS.items() if c.model_type == "llama" and c.num_hidden_layers <= 40}
    name, c = draw.choice(list(llamas.items()))
    layers = draw.randint(2, 12)
    h, f, v, d = c.hidden_size, c.intermediate_size, c.vocab_size, c.head_dim
    heads, kv_heads, embeddings = c.num_attention_heads, c.num_key_value_heads, 1 if c.tie_word_embeddings else 2
    layer = 2 * h * (heads + kv_heads) * d + 3 * h * f + 2 * h
    result = layers * layer + embeddings * v * h + h

    def answer() -> int:
        with torch.device("meta"):
            model = LlamaForCausalLM(type(c)(**c.to_dict() | {"num_hidden_layers": layers}))
        return sum(p.numel() for p in model.parameters())

    return Question(
        f"{name}, cut to {layers} layers: hidden size h = {h}, MLP of f = {f}, H = {heads} query heads and K = "
        f"{kv_heads} key-value heads of d = {d}, vocabulary {v}, embedding and head "
        f"{'one matrix' if embeddings == 1 else 'two matrices'}. How many parameters?",
        f"Per layer 2h(H + K)d for q, k, v, o, 3hf for the MLP, 2h for two norms: {layer:,}. In all {layers} · "
        f"{layer:,} + {embeddings} · {v} · h + h for the last norm = {result:,}.",
        result,
        answer,
        0,
    )


def states(draw: Random) -> Question:
    model, batches = _drawn(draw)
    n = model.parameters
    return Question(
        f"{model} Train it by AdamW in float32. How many KiB do parameters, gradients and moments take?",
        f"N = L(2h(H + K)d + 3hf + 2h) + 2Vh + h = {n:,}. 4N bytes of parameters, 4N of gradients, 8N of two moments: "
        f"16N = {16 * n / 2**10:,.1f} KiB.",
        16 * n / 2**10,
        lambda: step(**model.options, **batches.options()).kept / 2**10,
    )


def rate(draw: Random) -> Question:
    warmup, steps, lr = draw.choice((10, 20, 50)), draw.choice((100, 200, 400)), draw.choice((1e-3, 2e-3, 4e-3))
    at = draw.randrange(warmup, steps)
    share = (at - warmup) / (steps - 1 - warmup)
    result = lr / 10 + (lr - lr / 10) * (1 - share)
    config = BaseConfig(warmup_steps=warmup, steps=steps, lr=lr, schedule="linear")
    return Question(
        f"{steps} steps, of which {warmup} warm up to a rate of {lr}. Then it falls linearly to a tenth at the last "
        f"step. What is it at step {at}, counted from 0?",
        f"({at} − {warmup}) of {steps} − 1 − {warmup} steps have passed, a share of {share:.4f}. {lr / 10:g} + "
        f"{0.9 * lr:g} · (1 − {share:.4f}) = {result:.4e}.",
        result,
        lambda: learning_rate(config, at),
    )


def mfu(draw: Random) -> Question:
    name, s = draw.choice(("llama-3.2-1b", "llama-2-7b", "llama-3.1-8b")), draw.choice((2048, 4096, 8192))
    speed, peak = draw.randint(20, 60), draw.choice((312, 989))
    c = PRESETS[name]
    h, layers, d = c.hidden_size, c.num_hidden_layers, c.head_dim
    heads, kv_heads = c.num_attention_heads, c.num_key_value_heads
    matrices = layers * (2 * h * (heads + kv_heads) * d + 3 * h * c.intermediate_size) + h * c.vocab_size
    per_token = 6 * matrices + 12 * layers * heads * d * s
    # A speed at which the share is a sensible one.
    tokens = round(speed / 100 * peak * 1e12 / per_token, -1)
    result = 100 * tokens * per_token / (peak * 1e12)
    return Question(
        f"{name} has L = {layers}, h = {h}, f = {c.intermediate_size}, H = {heads}, K = {kv_heads}, d = {d}, V = "
        f"{c.vocab_size}. A GPU of {peak} TFLOP/s trains it at {tokens:,.0f} tokens/s, on sequences of {s}. What is "
        "its MFU in percent? Count attention in full.",
        f"6 FLOPs per matmul parameter, of which there are L(2h(H + K)d + 3hf) + hV = {matrices:,}, and 12LHds for "
        f"attention: {per_token / 1e9:,.2f} GFLOP per token. Times tokens/s over the peak: {result:.1f} %.",
        result,
        lambda: 100 * tokens * flops_per_token(c, s, causal=False) / (peak * 1e12),
    )


def computed(draw: Random) -> Question:
    model, batches = _drawn(draw)
    m, b, s = batches
    matrices = model.matrices - model.vocab * model.h
    attention = 14 * model.layers * model.heads * model.d * s
    result = m * b * s * (6 * matrices + attention + 2 * model.norms) / 1e9
    return Question(
        f"{model} How many GFLOP do all matmuls of a step *execute*, with {batches}? The attention kernel "
        "computes all pairs, and its scores a second time in backward.",
        f"6 per parameter and token in all matrices but the embedding, {matrices:,}. Attention: q·k and p·v are 2 · "
        "2Hds per token and layer in forward. Backward has q·k again and four matmuls of gradients, 5 · 2Hds. The "
        f"gradient of a norm's weight is a product too, 2h per token. So {m * b * s} · (6 · {matrices:,} + 14LHds + "
        f"2(2L + 1)h) = {result:.4f} GFLOP. MFU would count 12 in the place of 14, and no norm.",
        result,
        lambda: step(**model.options, **batches.options()).audit.flops / 1e9,
    )


def activations(draw: Random) -> Question:
    model, batches = _drawn(draw)
    _, b, s = batches
    h, f, d, heads, kv_heads = model.h, model.f, model.d, model.heads, model.kv_heads
    per_token = 4 * h + 2 + heads * d + 2 * kv_heads * d + heads * d + heads + 2 * f
    result = 4 * b * s * per_token / 2**10

    def answer() -> float:
        # What one layer more adds to what is alive at the worst moment.
        shallow = model._replace(layers=1)
        more, less = (step(**sizes.options, **batches.options()) for sizes in (model, shallow))
        return (more.activations - less.activations) / 2**10

    return Question(
        f"{model} By how many KiB do activations grow with each layer, for a micro-batch of {b} · {s} tokens in "
        "float32? Backward recomputes what is cheap, as the README's table says.",
        "Per token: 4h + 2 of two norms (input, output, one number each); Hd + 2Kd of q, k, v; Hd + H of attention "
        f"(output, log-sum-exp); 2f of gate and up. {per_token:,} numbers of 4 bytes, times {b * s} tokens: "
        f"{result:.2f} KiB.",
        result,
        answer,
    )


QUESTIONS = [divisor, parameters, states, rate, mfu, computed, activations]
