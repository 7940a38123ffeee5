"""The two functions that tensor parallelism is made of, and what a rank holds of a split weight.

They are conjugate (arXiv 1909.08053): what one does in forward, the other does in backward. Shapes: b sequences,
s tokens, h hidden size.
"""

import torch
import torch.distributed as dist
from tensor.token_layout import Replicated, TokenLayout
from tensor.weight_gradients import WeightGradients
from torch import Tensor, nn
from torch.autograd.function import FunctionCtx
from torch.distributed import ProcessGroup


class CopyToRanks(torch.autograd.Function):
    """The same x on all ranks, with all tokens. Its gradient is the sum of theirs."""

    @staticmethod
    def forward(ctx: FunctionCtx, x: Tensor, layout: TokenLayout, group: ProcessGroup) -> Tensor:
        ctx.layout, ctx.group = layout, group
        return layout.gather(x, group)[0]

    @staticmethod
    def backward(ctx: FunctionCtx, grad: Tensor) -> tuple[Tensor, None, None]:
        return ctx.layout.sum(grad, ctx.group)[0], None, None


class SumOverRanks(torch.autograd.Function):
    """The sum of the ranks' x, which it may replace, for this rank's tokens. Its gradient is that of each rank's x."""

    @staticmethod
    def forward(ctx: FunctionCtx, x: Tensor, layout: TokenLayout, group: ProcessGroup) -> Tensor:
        ctx.layout, ctx.group = layout, group
        total, _ = layout.sum(x, group)
        # Compiled code changes nothing in place.
        if total is x and not torch.compiler.is_compiling():
            ctx.mark_dirty(x)
        return total

    @staticmethod
    def backward(ctx: FunctionCtx, grad: Tensor) -> tuple[Tensor, None, None]:
        return ctx.layout.gather(grad, ctx.group)[0], None, None


class ShardedModule(nn.Module):
    """Holds shard `index` of `count` along `dim` of a full weight; `copies` consecutive ranks hold the same."""

    # Of the tokens that a rank has, outside the split matrix.
    layout: TokenLayout = Replicated
    # What may put off the gradient of the weight.
    weight_gradients: WeightGradients | None = None

    def __init__(self, full: Tensor, dim: int, group: ProcessGroup, copies: int = 1) -> None:
        super().__init__()
        self.full_shape, self.dim, self.group, self.copies = full.shape, dim, group, copies
        self.index, self.count = dist.get_rank(group) // copies, dist.get_world_size(group) // copies
        self.is_first_copy = dist.get_rank(group) % copies == 0
        self.weight = nn.Parameter(self.shard_of(full.detach()).clone())

    def shard_of(self, full: Tensor) -> Tensor:
        """A view. If `count` does not divide the size, the first shards are larger by one."""
        return full.tensor_split(self.count, self.dim)[self.index]
