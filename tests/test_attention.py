"""Attention on a GPU: which kernel is called with what, and never a matrix of scores. Tensors claim to be on one."""

from unittest.mock import patch

import pytest
import torch
import torch.nn.functional as F
from test_kernels_of_gpus import Kernels, on_gpu

import shared.attention as attention
from shared.live_bytes import LiveBytes

DTYPES = [torch.float32, torch.bfloat16, torch.float64]


def tensors(dtype, s=40, d=16, heads=6, kv_heads=2):
    """q, k, v and a gradient of the output, of 2 sequences."""
    generator = torch.Generator().manual_seed(0)
    shapes = [(2, h, s, d) for h in (heads, kv_heads, kv_heads, heads)]
    return [torch.randn(shape, dtype=torch.float64, generator=generator).to(dtype) for shape in shapes]


def close(ours, theirs):
    tolerance = {torch.float64: 1e-12, torch.float32: 1e-5, torch.bfloat16: 0.05}[theirs[0].dtype]
    for a, b in zip(ours, theirs, strict=True):
        assert a.dtype == b.dtype and a.shape == b.shape
        torch.testing.assert_close(a, b, rtol=tolerance, atol=tolerance)


@pytest.mark.parametrize("causal", [True, False])
@pytest.mark.parametrize("d", [16, 12, 300])
@pytest.mark.parametrize("dtype", DTYPES)
def test_a_block_is_that_of_the_cpu(dtype, d, causal):
    """Several chunks of queries, heads that share keys, and widths that no kernel takes as they are."""
    q, k, v, grad = tensors(dtype, s=300, d=d)
    out, lse, _ = attention.block_forward(q, k, v, causal)
    expected = out, lse, *attention.block_backward(grad, q, out, lse, k, v, causal, [])
    with patch.object(attention, "aten", Kernels()):
        out, lse, extras = on_gpu(attention.block_forward)(q, k, v, causal)
        gradients = on_gpu(attention.block_backward)(grad, q, out, lse.contiguous(), k, v, causal, extras)
    close((out, *gradients), (expected[0], *expected[2:]))
    torch.testing.assert_close(lse, expected[1].to(lse.dtype), rtol=1e-2, atol=1e-2)


@pytest.mark.parametrize("d", [16, 12, 300])
@pytest.mark.parametrize("dtype", DTYPES)
def test_causal_attention_takes_a_fused_kernel_or_chunks(dtype, d):
    """A fused kernel takes grouped heads in bfloat16 only, and no float64 or wider heads. In float32, d must be
    a multiple of 4."""
    given = []

    def kernel(q, k, v, real=F.scaled_dot_product_attention, **options):
        given.append((q.shape[1] // k.shape[1], q.shape[-1]))
        return real(q, k, v, **options)

    results = []
    for function in (attention.causal_attention, on_gpu(attention.causal_attention)):
        q, k, v, grad = tensors(dtype, d=d)
        leaves = [x.requires_grad_() for x in (q, k, v)]
        with patch.object(F, "scaled_dot_product_attention", kernel):
            out = function(*leaves)
        out.backward(grad)
        results.append([out.detach(), *(x.grad for x in leaves)])
    close(*reversed(results))
    fused = {
        (torch.bfloat16, 16): [(3, 16)],
        # torch pads these itself.
        (torch.bfloat16, 12): [(3, 12)],
        (torch.float32, 16): [(1, 16)],
        (torch.float32, 12): [(1, 16)],
        (torch.float32, 300): [(1, 304)],
    }
    assert given[1:] == fused.get((dtype, d), [])


def test_chunks_hold_no_matrix_of_scores():
    s, heads = 2048, 6
    q, k, v, grad = tensors(torch.float64, s=s)
    with LiveBytes() as memory:
        out, lse = attention.chunked_forward(q, k, v, True)
        attention.chunked_backward(grad, q, out, lse, k, v, True)
    assert memory.peak < 2 * heads * s * s * 8 / 2
