"""No form of attention builds a matrix of scores on a GPU, forward or backward."""

import numpy as np
import pytest
import torch
from conftest import load_step
from fake_ranks import fake_group
from scores import on_a_gpu

from shared.config import parse
from shared.corpus import Corpus
from shared.llama_configs import load_model_config
from shared.weights import full_weights

TOKENS = 8192
# Step, ranks, options. The model has two heads for each key-value head.
FORMS = [
    ("step01_single_gpu", 1, ""),
    ("step05_context_parallel", 2, "--cp 2 --cp-engine all-gather"),
    ("step05_context_parallel", 2, "--cp 2 --cp-engine ring"),
    ("step05_context_parallel", 2, "--cp 2 --cp-engine ring --cp-split contiguous"),
    ("step05_context_parallel", 2, "--cp 2 --cp-engine all-to-all"),
    ("step06_4d", 1, "--mask-documents"),
    ("step06_4d", 2, "--cp 2 --cp-engine all-gather --mask-documents"),
    ("step06_4d", 2, "--cp 2 --cp-engine ring --mask-documents"),
    ("step06_4d", 2, "--cp 2 --cp-engine all-to-all --mask-documents"),
]


def attention_of(step, args):
    """The attention of a layer, and what it takes besides q, k and v: here the blocks of documents."""
    module = load_step(step)
    config = parse(module.Config, [*args, "--seq-len", str(TOKENS), "--max-position-embeddings", str(TOKENS)])
    model_config = load_model_config(config)
    tokens = TOKENS * 3 * config.global_batch_size + 1
    begins = list(range(0, tokens, TOKENS * 2 // 3))
    corpus = Corpus.from_array(np.ones(tokens, dtype=np.uint16), begins)
    trainer = module.Trainer(config, model_config, corpus, full_weights(config, model_config))
    batch = trainer.batches.next()[0]
    return trainer.model.model.layers["0"].self_attn.attention, batch[3:4]


def largest_tensor(attention, more, tokens, dtype):
    """That forward and backward make, in bytes of memory."""
    with on_a_gpu() as largest:
        q, k, v = (torch.empty(4, heads, tokens, 16, dtype=dtype, requires_grad=True) for heads in (4, 2, 2))
        out = attention(q, k, v, *more)
        out.backward(torch.empty_like(out))
    assert q.grad.shape == q.shape and k.grad.shape == k.shape
    return largest


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize(("step", "ranks", "options"), FORMS)
def test_no_scores(small_run, step, ranks, options, dtype):
    with fake_group(0, ranks):
        attention, more = attention_of(step, [*small_run, *options.split()])
        largest = largest_tensor(attention, more, TOKENS // ranks, dtype)
    # A byte for each score: less than the smallest number, or the mask, would take.
    assert largest.bytes < (TOKENS // ranks) ** 2, largest.where


def naive(q, k, v):
    scores = q @ k.repeat_interleave(2, 1).transpose(2, 3)
    mask = torch.ones(scores.shape[2:], dtype=torch.bool).tril()
    return scores.masked_fill(~mask, float("-inf")).softmax(3) @ v.repeat_interleave(2, 1)


def float64(q, k, v):
    """Which no fused kernel takes."""
    q, k, v = (x.double() for x in (q, k, v))
    return torch.nn.functional.scaled_dot_product_attention(q, k, v, is_causal=True, enable_gqa=True)


@pytest.mark.quick
@pytest.mark.parametrize("attention", [naive, float64])
def test_scores_are_found(attention):
    assert largest_tensor(attention, (), 1024, torch.float32).bytes >= 1024**2
