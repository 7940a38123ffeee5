"""The attention kernels of GPUs are given what they take, and what they gave. What they compute needs a GPU."""

from unittest.mock import patch

import pytest
import torch
import torch.nn.functional as F
from conftest import load_step
from ranks import run_ranks
from test_step05 import STEP, _attention, put_together, tensors, whole
from torch._subclasses.fake_tensor import FakeTensorMode

import shared.attention


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_kernels_of_gpus_are_called_with_what_they_take(dtype):
    """Shapes only: fake tensors that claim to be on a GPU. What the kernels compute needs one."""
    load_step(STEP)
    import fused_attention

    with FakeTensorMode(), patch.object(torch.Tensor, "is_cuda", True):
        q, k, v, grad = tensors(40, dtype=dtype)
        out, lse, extras = fused_attention.block_forward(q, k, v, True)
        grads = fused_attention.block_backward(grad, q, out, lse, k, v, True, extras)
    assert out.shape == q.shape and lse.shape == q.shape[:3]
    assert [x.shape for x in grads] == [q.shape, k.shape, v.shape]


def on_gpu(block):
    """A function that takes its tensors to be on a GPU."""

    def call(*args):
        with patch.object(torch.Tensor, "is_cuda", True):
            return block(*args)

    return call


class Kernels:
    """Those of GPUs, computed on the CPU. Backward must get back, in order, what forward gave."""

    def __init__(self):
        self.given = []

    def replace(self):
        """Be called in their place, by functions that take all tensors to be on a GPU."""
        import fused_attention

        shared.attention.aten = self
        for name in ("block_forward", "block_backward"):
            setattr(fused_attention, name, on_gpu(getattr(fused_attention, name)))

    def _forward(self, q, k, v, causal, scale):
        assert q.shape[-1] % 8 == k.shape[-1] % 8 == v.shape[-1] % 8 == 0
        kernel = torch.ops.aten._scaled_dot_product_flash_attention_for_cpu
        out, lse = kernel(q, k, v, 0.0, causal, scale=scale)
        self.given.append([object() for _ in range(6)] + [q.shape, k.shape])
        return out, lse, self.given[-1]

    def _backward(self, grad, q, k, v, out, lse, causal, extras, scale):
        (given,) = [given for given in self.given if given[0] is extras[0]]
        assert all(a is b for a, b in zip(given, extras, strict=False)) and given[-2:] == [q.shape, k.shape]
        backward = torch.ops.aten._scaled_dot_product_flash_attention_for_cpu_backward
        return backward(grad, q, k, v, out, lse, 0.0, causal, scale=scale)

    def _scaled_dot_product_flash_attention(self, q, k, v, dropout, causal, scale):
        out, lse, extras = self._forward(q, k, v, causal, scale)
        return out, lse, *extras[:6], "debug mask"

    def _scaled_dot_product_flash_attention_backward(
        self, grad, q, k, v, out, lse, cum_q, cum_k, max_q, max_k, dropout, causal, rng_state, unused, scale
    ):
        extras = [cum_q, cum_k, max_q, max_k, rng_state, unused]
        return self._backward(grad, q, k, v, out, lse, causal, extras, scale)

    def _scaled_dot_product_efficient_attention(self, q, k, v, bias, with_lse, dropout, causal, scale):
        assert q.shape[1] == k.shape[1] == v.shape[1] and with_lse
        out, lse, extras = self._forward(q, k, v, causal, scale)
        return out, F.pad(lse, (0, -lse.shape[-1] % 32), value=float("inf")), *extras[:2]

    def _scaled_dot_product_efficient_attention_backward(
        self, grad, q, k, v, bias, out, lse, seed, offset, dropout, wanted, causal, scale
    ):
        rows = q.shape[2]
        assert wanted == [True, True, True, False]
        assert lse.shape[-1] % 32 == 0 and lse[..., rows:].isposinf().all()
        return *self._backward(grad, q, k, v, out, lse[..., :rows].contiguous(), causal, [seed, offset], scale), None


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_kernels_of_gpus_are_given_what_they_take_and_gave(dtype):
    with_kernels = put_together(run_ranks(2, _attention, 2, "ring zigzag", 80, dtype, Kernels().replace), 80)
    for ours, theirs in zip(with_kernels, whole(*tensors(80, dtype=dtype)), strict=True):
        tolerance = 1e-5 if dtype == torch.float32 else 0.1
        torch.testing.assert_close(ours, theirs, rtol=tolerance, atol=tolerance)
