"""Attention of some queries to blocks of keys by torch's fused kernels, and the sum of such blocks.

Next to the output, a kernel returns the log-sum-exp of each query's scores. That is all it takes to add up blocks, and
for backward to go through them one by one. No matrix of scores exists.

Shapes: b sequences, s tokens, d head dimension.
"""

from typing import NamedTuple

import torch
from torch import Tensor

from shared.attention import block_backward, block_forward

# Of which sequences, heads and tokens: an index of (b, heads, s, d), and of (b, heads, s).
Index = tuple[slice, slice, slice]


class Block(NamedTuple):
    """Queries of this rank and the keys of one rank that they see. Causal: query i of the block sees keys up to i."""

    queries: Index
    keys: Index
    causal: bool


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
