"""All-to-all attention: ranks exchange their tokens of all heads for all tokens of some heads (arXiv 2309.14509).

Shapes: b sequences, s tokens of a rank, d head dimension, c ranks.
"""

from collections.abc import Callable

import torch
import torch.distributed as dist
from torch import Tensor
from torch.autograd.function import FunctionCtx
from torch.distributed import ProcessGroup

Attention = Callable[[Tensor, Tensor, Tensor], Tensor]


def exchange(x: Tensor, group: ProcessGroup) -> Tensor:
    """Slice i of x (c, ...) goes to rank i. Returns the slices that come from all ranks."""
    out = torch.empty_like(x, memory_format=torch.contiguous_format)
    dist.all_to_all_single(out, x.contiguous(), group=group)
    return out


class _AllToAll(torch.autograd.Function):
    """`exchange`, whose backward sends the gradients back where the slices came from."""

    @staticmethod
    def forward(ctx: FunctionCtx, x: Tensor, group: ProcessGroup) -> Tensor:
        ctx.group = group
        return exchange(x, group)

    @staticmethod
    def backward(ctx: FunctionCtx, grad: Tensor) -> tuple[Tensor, None]:
        return exchange(grad, ctx.group), None


def all_to_all_attention(q: Tensor, k: Tensor, v: Tensor, group: ProcessGroup, whole_attention: Attention) -> Tensor:
    """Attention of q (b, heads, s, d) over the k and v (b, kv_heads, s, d) of all ranks: (b, heads, s, d).

    `whole_attention` is that of some heads and all c · s tokens, in the order of their positions. Two all-to-alls in
    forward and two in backward, of q, k and v together and of the output.
    """
    size = dist.get_world_size(group)
    # (b, heads, s, d) to (c, b, heads/c, s, d): a part of the heads for each rank.
    by_rank = [x.unflatten(1, (size, -1)).movedim(1, 0) for x in (q, k, v)]
    heads = [x.shape[2] for x in by_rank]
    # What arrives is ordered by rank, so by position: (b, heads/c, c·s, d).
    whole = _AllToAll.apply(torch.cat(by_rank, 2), group).movedim(0, 2).flatten(2, 3)
    out = whole_attention(*whole.split(heads, 1))
    # And back: (b, heads/c, c, s, d) to (b, heads, s, d).
    return _AllToAll.apply(out.unflatten(2, (size, -1)).movedim(2, 0), group).movedim(0, 1).flatten(1, 2)
