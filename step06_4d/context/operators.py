"""Attention over ranks as an operator that torch.compile does not look into.

Compiled line by line, a ring would wait for each message where it is sent. What is gathered again in backward would be
taken for what forward has gathered, and kept. And other documents would be compiled anew.

Shapes: b sequences, s tokens of a rank, d head dimension.
"""

from collections.abc import Callable
from itertools import count
from types import SimpleNamespace
from weakref import WeakValueDictionary

import torch
from context.fused_attention import nothing_seen
from torch import Tensor
from torch.autograd.function import Function, FunctionCtx
from torch.distributed import ProcessGroup
from torch.distributed.distributed_c10d import _resolve_process_group

_numbers = count()
_numbered: "WeakValueDictionary[int, Blocks]" = WeakValueDictionary()
_functions: dict[str, type[Function]] = {}


class Blocks(list):
    """What queries see of each rank's keys: a list of blocks for each rank. Operators, which take tensors and plain
    values only, are told its number."""

    def __init__(self, by_rank: list[list]) -> None:
        super().__init__(by_rank)
        number = next(_numbers)
        # A tensor: of a number, torch would compile each value anew.
        self.number = torch.tensor(number, device="cpu")
        _numbered[number] = self


def _context(**values: object) -> SimpleNamespace:
    """In the place of autograd's context."""
    context = SimpleNamespace(**values)
    context.save_for_backward = lambda *tensors: setattr(context, "saved_tensors", tensors)
    return context


@torch.library.custom_op("context::attention", mutates_args=())
def _forward(q: Tensor, k: Tensor, v: Tensor, number: Tensor, name: str, group: str) -> tuple[Tensor, Tensor, Tensor]:
    context, blocks = _context(), _numbered[number.item()]
    _functions[name].forward(context, q, k, v, _resolve_process_group(group), blocks)
    # What kernels want back: without dropout, sizes and empty tensors, the same for each layer.
    blocks.extras = context.extras
    _, own, out, lse = context.saved_tensors
    return out, own, lse


@_forward.register_fake
def _(q: Tensor, k: Tensor, v: Tensor, number: Tensor, name: str, group: str) -> tuple[Tensor, Tensor, Tensor]:
    out, lse = nothing_seen(q)
    return out.to(q.dtype), torch.stack((k, v)), lse


@torch.library.custom_op("context::attention_backward", mutates_args=())
def _backward(
    grad: Tensor, q: Tensor, own: Tensor, out: Tensor, lse: Tensor, number: Tensor, name: str, group: str
) -> tuple[Tensor, Tensor, Tensor]:
    blocks = _numbered[number.item()]
    context = _context(group=_resolve_process_group(group), blocks=blocks, extras=blocks.extras)
    context.save_for_backward(q, own, out, lse)
    dq, dk, dv, *_ = _functions[name].backward(context, grad)
    # Not views of one tensor, which operators may not return.
    return dq, dk.clone(), dv.clone()


@_backward.register_fake
def _(
    grad: Tensor, q: Tensor, own: Tensor, out: Tensor, lse: Tensor, number: Tensor, name: str, group: str
) -> tuple[Tensor, Tensor, Tensor]:
    return torch.empty_like(q), torch.empty_like(own[0]), torch.empty_like(own[1])


def _setup_context(ctx: FunctionCtx, inputs: tuple, output: tuple[Tensor, Tensor, Tensor]) -> None:
    (q, _, _, number, *ctx.names), (out, own, lse) = inputs, output
    ctx.save_for_backward(q, own, out, lse, number)


def _differentiate(ctx: FunctionCtx, grad: Tensor, *unused: Tensor) -> tuple[Tensor | None, ...]:
    return *_backward(grad, *ctx.saved_tensors, *ctx.names), None, None, None


_forward.register_autograd(_differentiate, setup_context=_setup_context)


def operator(name: str) -> Callable[[type[Function]], type[Function]]:
    """A decorator of what `attend_over_ranks` is to know by this name."""
    return lambda function: _functions.setdefault(name, function)


def attend_over_ranks(name: str, q: Tensor, k: Tensor, v: Tensor, group: ProcessGroup, blocks: Blocks) -> Tensor:
    """`apply` of the function of this name, as one operator where it is compiled."""
    if not torch.compiler.is_compiling():
        return _functions[name].apply(q, k, v, group, blocks)
    return _forward(q, k, v, blocks.number, name, group.group_name)[0]
