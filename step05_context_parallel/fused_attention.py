"""Attention of some queries to blocks of keys by torch's fused kernels, and the sum of such blocks.

Next to the output, a kernel returns the log-sum-exp of each query's scores. That is all it takes to add up blocks, and
for backward to go through them one by one. No matrix of scores exists.

Shapes: b sequences, s tokens, d head dimension.
"""

from typing import NamedTuple

import torch
import torch.nn.functional as F
from torch import Tensor

aten = torch.ops.aten

# Of which sequences, heads and tokens: an index of (b, heads, s, d), and of (b, heads, s).
Index = tuple[slice, slice, slice]


class Block(NamedTuple):
    """Queries of this rank and the keys of one rank that they see. Causal: query i of the block sees keys up to i."""

    queries: Index
    keys: Index
    causal: bool


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


def nothing_seen(q: Tensor) -> tuple[Tensor, Tensor]:
    """Output (b, heads, s, d) and log-sum-exp (b, heads, s) over no keys at all, in at least float32."""
    out = torch.zeros_like(q, dtype=torch.promote_types(q.dtype, torch.float32))
    return out, out.new_full(q.shape[:3], float("-inf"))


def attend(q: Tensor, kv: Tensor, seen: list[Block], out: Tensor, lse: Tensor) -> list[list]:
    """Add to `out` and `lse` what queries see of the keys and values of a rank. Returns what backward needs besides."""
    extras = []
    for queries, keys, causal in seen:
        k, v = (x[keys] for x in kv)
        block_out, block_lse, extra = block_forward(q[queries], k, v, causal)
        merge(out[queries], lse[queries], block_out, block_lse)
        extras.append(extra)
    return extras


def attend_backward(
    grad: Tensor, q: Tensor, kv: Tensor, seen: list[Block], out: Tensor, lse: Tensor, extras: list[list]
) -> list[tuple[Tensor, Tensor, Tensor]]:
    """The gradients of each block's queries, keys and values, where `out` and `lse` are those over all blocks."""
    gradients = []
    for (queries, keys, causal), extra in zip(seen, extras, strict=True):
        k, v = (x[keys] for x in kv)
        of_queries = (x[queries] for x in (grad, q, out))
        gradients.append(block_backward(*of_queries, lse[queries].contiguous(), k, v, causal, extra))
    return gradients


def add_gradients(seen: list[Block], gradients: list[tuple[Tensor, Tensor, Tensor]], dq: Tensor, dkv: Tensor) -> None:
    """Add to dq (b, heads, s, d) and dkv (2, b, kv_heads, s, d) the gradients of blocks."""
    for (queries, keys, _), (block_dq, block_dk, block_dv) in zip(seen, gradients, strict=True):
        dq[queries] += block_dq
        dkv[0][keys] += block_dk
        dkv[1][keys] += block_dv
