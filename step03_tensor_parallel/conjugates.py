"""The two functions that tensor parallelism is made of, and what a rank holds of a split weight.

They are conjugate (arXiv 1909.08053): what one does in forward, the other does in backward. Shapes: b sequences,
s tokens, h hidden size.
"""

import torch
import torch.distributed as dist
from torch import Tensor, nn
from torch.autograd.function import FunctionCtx
from torch.distributed import ProcessGroup, Work
from torch.distributed import _functional_collectives as functional


def sum_over_ranks(x: Tensor, group: ProcessGroup, async_op: bool = False) -> tuple[Tensor, Work | None]:
    """The sum of the ranks' x, and what to wait for, if anything. All-reduces x.nbytes, in place unless compiled."""
    if dist.get_world_size(group) == 1:
        # A collective, even of one rank, would cut what torch.compile fuses.
        return x, None
    if torch.compiler.is_compiling():
        # An operator that the compiler knows. It leaves x as it is.
        return functional.all_reduce(x, "sum", group), None
    x = x.contiguous()
    return x, dist.all_reduce(x, group=group, async_op=async_op)


class CopyToRanks(torch.autograd.Function):
    """The same x on all ranks. Its gradient is the sum of theirs."""

    @staticmethod
    def forward(ctx: FunctionCtx, x: Tensor, group: ProcessGroup) -> Tensor:
        ctx.group = group
        return x

    @staticmethod
    def backward(ctx: FunctionCtx, grad: Tensor) -> tuple[Tensor, None]:
        return sum_over_ranks(grad, ctx.group)[0], None


class SumOverRanks(torch.autograd.Function):
    """The sum of the ranks' x, which it may replace. Its gradient is that of each rank's x."""

    @staticmethod
    def forward(ctx: FunctionCtx, x: Tensor, group: ProcessGroup) -> Tensor:
        total, _ = sum_over_ranks(x, group)
        # Compiled code changes nothing in place.
        if total is x and not torch.compiler.is_compiling():
            ctx.mark_dirty(x)
        return total

    @staticmethod
    def backward(ctx: FunctionCtx, grad: Tensor) -> tuple[Tensor, None]:
        return grad, None


class ShardedModule(nn.Module):
    """Holds shard `index` of `count` along `dim` of a full weight; `copies` consecutive ranks hold the same."""

    def __init__(self, full: Tensor, dim: int, group: ProcessGroup, copies: int = 1) -> None:
        super().__init__()
        self.full_shape, self.dim, self.group, self.copies = full.shape, dim, group, copies
        self.index, self.count = dist.get_rank(group) // copies, dist.get_world_size(group) // copies
        self.is_first_copy = dist.get_rank(group) % copies == 0
        self.weight = nn.Parameter(self.shard_of(full.detach()).clone())

    def shard_of(self, full: Tensor) -> Tensor:
        """A view. If `count` does not divide the size, the first shards are larger by one."""
        return full.tensor_split(self.count, self.dim)[self.index]
