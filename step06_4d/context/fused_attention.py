"""Attention of some queries over a block of keys by torch's fused kernels, and the sum of such blocks.

Next to the output, a kernel returns the log-sum-exp of each query's scores. That is all it takes to add up blocks, and
for backward to go through them one by one.
"""

import torch
import torch.nn.functional as F
from torch import Tensor

aten = torch.ops.aten


def block_forward(q: Tensor, k: Tensor, v: Tensor, causal: bool) -> tuple[Tensor, Tensor, list]:
    """Attention by torch's fused kernels: output (b, heads, s, d), log-sum-exp (b, heads, s), backward's extras."""
    if not q.is_cuda:
        return *aten._scaled_dot_product_flash_attention_for_cpu(q, k, v, 0.0, causal), []
    if q.dtype == torch.float32:
        k, v = (x.repeat_interleave(q.shape[1] // x.shape[1], 1) for x in (k, v))
        out, lse, *extras = aten._scaled_dot_product_efficient_attention(q, k, v, None, True, 0.0, causal)
        # The kernel pads it to a multiple of 32.
        return out, lse[..., : q.shape[2]], extras
    out, lse, *extras = aten._scaled_dot_product_flash_attention(q, k, v, 0.0, causal)
    return out, lse, extras[:6]


def block_backward(
    grad: Tensor, q: Tensor, out: Tensor, lse: Tensor, k: Tensor, v: Tensor, causal: bool, extras: list
) -> tuple[Tensor, Tensor, Tensor]:
    """Gradients of q, k and v. `out` and `lse` are those over all blocks, so this is one block's share of them."""
    if not q.is_cuda:
        backward = aten._scaled_dot_product_flash_attention_for_cpu_backward
        return backward(grad, q, k, v, out, lse, 0.0, causal)
    if q.dtype == torch.float32:
        groups = q.shape[1] // k.shape[1]
        k, v = (x.repeat_interleave(groups, 1) for x in (k, v))
        lse = F.pad(lse, (0, -lse.shape[-1] % 32), value=float("inf"))
        backward = aten._scaled_dot_product_efficient_attention_backward
        wanted = [True, True, True, False]
        dq, dk, dv, _ = backward(grad, q, k, v, None, out, lse, *extras, 0.0, wanted, causal)
        return dq, *(x.unflatten(1, (-1, groups)).sum(2) for x in (dk, dv))
    backward = aten._scaled_dot_product_flash_attention_backward
    return backward(grad, q, k, v, out, lse, *extras[:4], 0.0, causal, *extras[4:])


def merge(out: Tensor, lse: Tensor, block_out: Tensor, block_lse: Tensor) -> None:
    """Add a block to the softmax over the blocks before it, in place: each counts by its share of Σ exp(score)."""
    total = torch.logaddexp(lse, block_lse)
    out.mul_((lse - total).exp_().unsqueeze(-1)).addcmul_(block_out, (block_lse - total).exp_().unsqueeze(-1))
    lse.copy_(total)
