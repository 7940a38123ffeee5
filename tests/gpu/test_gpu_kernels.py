"""Each kernel path on a GPU against float64 on the CPU. `pytest tests/gpu` finishes in the order of worth."""

import pytest
import torch
from conftest import load_step, tiny_config

import shared.attention as attention
from shared import ops
from shared.loss import linear_cross_entropy
from shared.model import LlamaForCausalLM

pytestmark = pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a GPU")
DTYPES = [torch.bfloat16, torch.float32, torch.float64]
# Of the norm of what float64 gives. Float32 matmuls run in TF32, as in training.
TOLERANCE = {torch.bfloat16: 2e-2, torch.float32: 5e-3, torch.float64: 1e-10}


@pytest.fixture(autouse=True)
def as_in_training():
    before = torch.get_float32_matmul_precision()
    torch.set_float32_matmul_precision("high")
    yield
    torch.set_float32_matmul_precision(before)


def random(*shapes):
    """Tensors in float64 on the CPU that bfloat16 has exactly: all dtypes are given the same numbers."""
    generator = torch.Generator().manual_seed(0)
    return [torch.randn(shape, generator=generator).bfloat16().double() for shape in shapes]


def on_gpu(dtype, *tensors):
    return [x.to("cuda", dtype if x.is_floating_point() else None) for x in tensors]


def close(ours, theirs, dtype):
    assert len(ours) == len(theirs)
    for i, (a, b) in enumerate(zip(ours, theirs, strict=True)):
        error = (a.cpu().double() - b).norm() / b.norm()
        assert a.shape == b.shape and error <= TOLERANCE[dtype], f"result {i} is off by {error:.1e}"


def with_gradients(function, *tensors):
    """What it returns, and the gradients of all tensors of numbers, for a gradient of ones times the result."""
    leaves = [x.detach().requires_grad_(x.is_floating_point()) for x in tensors]
    out = function(*leaves)
    out.backward(out.detach())
    return [out.detach(), *(x.grad for x in leaves if x.requires_grad)]


def compare(function, dtype, *tensors):
    close(with_gradients(function, *on_gpu(dtype, *tensors)), with_gradients(function, *tensors), dtype)


@pytest.mark.parametrize("kv_heads", [2, 8])
@pytest.mark.parametrize("d", [64, 128, 12])
@pytest.mark.parametrize("dtype", DTYPES)
def test_causal_attention(dtype, d, kv_heads):
    compare(attention.causal_attention, dtype, *random((2, 8, 300, d), (2, kv_heads, 300, d), (2, kv_heads, 300, d)))


@pytest.mark.parametrize("causal", [True, False])
@pytest.mark.parametrize("d", [64, 128, 12])
@pytest.mark.parametrize("dtype", DTYPES)
def test_a_block_and_its_log_sum_exp(dtype, d, causal):
    q, k, v, grad = tensors = random((2, 8, 300, d), (2, 2, 300, d), (2, 2, 300, d), (2, 8, 300, d))

    def block(q, k, v, grad):
        out, lse, extras = attention.block_forward(q, k, v, causal)
        gradients = attention.block_backward(grad, q, out.contiguous(), lse.contiguous(), k, v, causal, extras)
        return out, lse, *gradients

    close(block(*on_gpu(dtype, *tensors)), block(q, k, v, grad), dtype)


@pytest.mark.parametrize("dtype", DTYPES)
def test_documents(dtype):
    """Documents of 1 to 100 tokens in two sequences of 300: each is a block, of some rows and tokens."""
    module = load_step("step06_4d")
    from context import documents, fused_attention

    config = module.Config(seq_len=300)
    generator = torch.Generator().manual_seed(0)
    begins = (torch.rand(2, 300, generator=generator) < 0.02) * torch.arange(300)
    (blocks,) = documents.document_blocks(config, 0, begins.cummax(1).values)
    assert len(blocks) > 5

    def attend(q, k, v, grad):
        out, lse = fused_attention.nothing_seen(q)
        extras = fused_attention.attend(q, (k, v), blocks, out, lse)
        gradients = fused_attention.attend_backward(grad, q, (k, v), blocks, out.to(q.dtype), lse, extras)
        dq, dkv = torch.zeros_like(lse[..., None].expand(q.shape)), torch.zeros(2, *k.shape).to(lse)
        fused_attention.add_gradients(blocks, gradients, dq, dkv)
        return out, lse, dq, dkv

    tensors = random((2, 8, 300, 64), (2, 2, 300, 64), (2, 2, 300, 64), (2, 8, 300, 64))
    close(attend(*on_gpu(dtype, *tensors)), attend(*tensors), dtype)


@pytest.mark.parametrize("dtype", DTYPES)
def test_loss(dtype):
    hidden, weight = random((2, 300, 64), (1000, 64))
    labels = torch.randint(1000, (2, 300), generator=torch.Generator().manual_seed(0))
    compare(lambda h, w, y: linear_cross_entropy(h, w / 8, y), dtype, hidden, weight, labels)


@pytest.mark.parametrize("dtype", DTYPES)
def test_norm(dtype):
    compare(lambda x, weight: ops.rms_norm(x, weight, 1e-5), dtype, *random((2, 300, 64), (64,)))


@pytest.mark.parametrize("dtype", DTYPES)
def test_rope(dtype):
    (x,), angles = random((2, 300, 8, 64)), torch.rand(2, 300, 1, 32, dtype=torch.float64) * 1000

    def rotate(x):
        wide = torch.promote_types(x.dtype, torch.float32)
        return ops.rotate(x, angles.cos().to(x.device, wide), angles.sin().to(x.device, wide))

    compare(rotate, dtype, x)


@pytest.mark.parametrize("dtype", DTYPES)
def test_embedding(dtype):
    (weight,) = random((50, 64))
    ids = torch.randint(50, (2, 300), generator=torch.Generator().manual_seed(0))
    compare(lambda weight: ops.embedding(ids.to(weight.device), weight), dtype, weight)


@pytest.mark.parametrize("dtype", DTYPES)
def test_a_model(dtype):
    """Its logits, under autocast in bfloat16 as in training."""
    torch.manual_seed(0)
    model = LlamaForCausalLM(tiny_config(hidden_size=64, num_hidden_layers=4)).double()
    ids, positions = torch.randint(300, (2, 200)), torch.arange(200).expand(2, -1)
    expected = model(ids, positions).detach()
    model = model.to("cuda", torch.promote_types(dtype, torch.float32))
    with torch.autocast("cuda", torch.bfloat16, enabled=dtype == torch.bfloat16):
        ours = model(ids.cuda(), positions.cuda()).detach()
    close([ours], [expected], dtype)


@pytest.mark.parametrize("dtype", DTYPES)
def test_no_matrix_of_scores(dtype):
    """Forward and backward need less memory than 8 heads' scores of 4096 tokens would take."""
    s = 4096
    q, k, v = (x.requires_grad_() for x in on_gpu(dtype, *random((1, 8, s, 64), (1, 2, s, 64), (1, 2, s, 64))))
    torch.cuda.reset_peak_memory_stats()
    before = torch.cuda.memory_allocated()
    attention.causal_attention(q, k, v).sum().backward()
    assert torch.cuda.max_memory_allocated() - before < 8 * s * s * dtype.itemsize / 1.5
