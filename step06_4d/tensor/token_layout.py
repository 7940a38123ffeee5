"""Who has which tokens outside the split matrices of tensor parallelism, and how they get in and out.

Before a split matrix, every rank needs all tokens. After it, what the ranks have is summed. In backward it is the
other way round. Two functions, `gather` and `sum`, are all that differs between the layouts: identity and all-reduce
where every rank has all tokens (arXiv 1909.08053), all-gather and reduce-scatter where each has its part (2205.05198).

Shapes: b sequences, s tokens, h hidden size, t ranks.
"""

import torch
import torch.distributed as dist
from torch import Tensor
from torch.distributed import ProcessGroup, Work
from torch.distributed import _functional_collectives as functional


class Replicated:
    """Every rank has all tokens, (b, s, h)."""

    @staticmethod
    def gather(x: Tensor, group: ProcessGroup, async_op: bool = False) -> tuple[Tensor, Work | None]:
        """All tokens, given those that a rank has: the same."""
        return x, None

    @staticmethod
    def sum(x: Tensor, group: ProcessGroup, async_op: bool = False) -> tuple[Tensor, Work | None]:
        """The sum of the ranks' x, for the tokens that a rank has. All-reduces x.nbytes, in place unless compiled."""
        if dist.get_world_size(group) == 1:
            # A collective, even of one rank, would cut what torch.compile fuses.
            return x, None
        if torch.compiler.is_compiling():
            # An operator that the compiler knows. It leaves x as it is.
            return functional.all_reduce(x, "sum", group), None
        x = x.contiguous()
        return x, dist.all_reduce(x, group=group, async_op=async_op)


class Sharded:
    """Rank r has the r-th of t contiguous parts of the b · s tokens, held as (b, s/t, h).

    The parts one after the other are (b, s, h) already: nothing is moved or copied around a collective.
    """

    @staticmethod
    def gather(x: Tensor, group: ProcessGroup, async_op: bool = False) -> tuple[Tensor, Work | None]:
        """(b, s/t, h) to (b, s, h). All-gathers t · x.nbytes."""
        b, s, h = x.shape
        whole = x.new_empty(b, s * dist.get_world_size(group), h)
        # Flattened, for gloo cuts along the first dimension.
        rows, part = whole.flatten(0, 1), x.contiguous().flatten(0, 1)
        # The compiler knows a collective as an operator, but none that is asynchronous.
        async_op = async_op and not torch.compiler.is_compiling()
        return whole, dist.all_gather_single(rows, part, group=group, async_op=async_op)

    @staticmethod
    def sum(x: Tensor, group: ProcessGroup, async_op: bool = False) -> tuple[Tensor, Work | None]:
        """(b, s, h) of each rank to (b, s/t, h) of their sum. Reduce-scatters x.nbytes."""
        b, s, h = x.shape
        part = x.new_empty(b, s // dist.get_world_size(group), h)
        rows, whole = part.flatten(0, 1), x.contiguous().flatten(0, 1)
        async_op = async_op and not torch.compiler.is_compiling()
        return part, dist.reduce_scatter_single(rows, whole, group=group, async_op=async_op)


TokenLayout = type[Replicated] | type[Sharded]


@torch.library.custom_op("tensor::later", mutates_args=())
def later(x: Tensor, after: Tensor) -> Tensor:
    """A copy of x, which the compiler finds to depend on `after`. What depends on x alone it would do in forward
    already, and keep until backward."""
    return x.clone()


@later.register_fake
def _(x: Tensor, after: Tensor) -> Tensor:
    return torch.empty_like(x)
