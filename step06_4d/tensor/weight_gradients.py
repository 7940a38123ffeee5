"""Gradients of the weights of a layer's matmuls: in backward, or put off until there is nothing better to do.

A stage of a pipeline waits for the gradient of its input, and nobody for those of weights before the end of a step
(zero bubble, arXiv 2401.10241). Shapes: b sequences, s tokens, n outputs and h inputs of a weight (n, h).
"""

from collections.abc import Iterator
from contextlib import contextmanager

import torch
import torch.nn.functional as F
from tensor.token_layout import Replicated
from torch import Tensor, nn
from torch.autograd.function import FunctionCtx

# Linears that read the same x (b, s, h), the gradients of their outputs (b, s, n), and x.
Matmuls = tuple[list[nn.Module], list[Tensor], Tensor]


class WeightGradients:
    """Whether the gradients of a model's split weights are put off. Its split linears hold this object."""

    def __init__(self, model: nn.Module) -> None:
        # What those that are put off need, or None while gradients of weights are computed in backward.
        self.late: list[Matmuls] | None = None
        for module in model.modules():
            if hasattr(module, "weight_gradients"):
                module.weight_gradients = self

    @contextmanager
    def put_off(self, enabled: bool) -> Iterator[list[Matmuls]]:
        """Forwards within prepare for it, and backwards within list what the weights' gradients need, in this list."""
        late: list[Matmuls] = []
        self.late = late if enabled else None
        try:
            yield late
        finally:
            self.late = None

    def compute(self, late: list[Matmuls]) -> Iterator[tuple[nn.Parameter, Tensor]]:
        """Each weight of such a list, and its gradient."""
        for linears, grads, x in late:
            for linear, gradient in zip(linears, weight_gradients(linears, grads, x), strict=True):
                yield linear.weight, gradient


def weight_gradients(linears: list[nn.Module], grads: list[Tensor], x: Tensor) -> list[Tensor]:
    """gradᵀ · x (n, h) of each linear, summed over the ranks that hold the same weight."""
    works, gradients = [], []
    for grad, linear in zip(grads, linears, strict=True):
        summed_dtype = torch.promote_types(linear.weight.dtype, torch.float32)
        dtype = linear.weight.dtype if linear.copies == 1 else summed_dtype
        gradients.append((grad.flatten(0, 1).T @ x.flatten(0, 1)).to(dtype))
        if linear.copies > 1:
            # Each copy has seen the queries of its own rank only.
            gradients[-1], work = Replicated.sum(gradients[-1], linear.copies_group, async_op=True)
            works.append(work)
    for work in filter(None, works):
        work.wait()
    return gradients


def is_put_off(linear: nn.Module) -> bool:
    """Whether the gradient of a split linear's weight is put off at the moment."""
    return linear.weight_gradients is not None and linear.weight_gradients.late is not None


def weight_gradients_or_none(linears: list[nn.Module], grads: list[Tensor], x: Tensor) -> list[Tensor | None]:
    """For autograd: the gradients, or none where they are put off."""
    if not is_put_off(linears[0]):
        return weight_gradients(linears, grads, x)
    linears[0].weight_gradients.late.append((linears, grads, x.detach()))
    return [None for _ in linears]


def weight_in_graph(linear: nn.Module) -> Tensor:
    """The weight as autograd is to see it. Where its gradient is put off, not as a parameter: the hooks of one are
    called even for a function that returns no gradient, and would take it for a contribution."""
    return linear.weight.detach() if is_put_off(linear) else linear.weight


class _KeepInput(torch.autograd.Function):
    """x as it is. When its backward runs, the gradient of the output of the linear behind it is in `grads`."""

    @staticmethod
    def forward(ctx: FunctionCtx, x: Tensor, linear: nn.Module, grads: list[Tensor]) -> Tensor:
        ctx.save_for_backward(x)
        ctx.linear, ctx.grads = linear, grads
        return x.view_as(x)

    @staticmethod
    def backward(ctx: FunctionCtx, grad_x: Tensor) -> tuple[Tensor, None, None]:
        weight_gradients_or_none([ctx.linear], [ctx.grads.pop()], *ctx.saved_tensors)
        return grad_x, None, None


def deferrable_linear(module: nn.Module, x: Tensor) -> Tensor:
    """`F.linear` of x (b, s, h) and the module's weight (n, h), whose gradient can be put off.

    Not one function that does both: it would save x behind the matmul, which the MLP's checkpoint would then repeat.
    """
    if not is_put_off(module):
        return F.linear(x, module.weight)
    grads: list[Tensor] = []
    y = F.linear(_KeepInput.apply(x, module, grads), weight_in_graph(module))
    y.register_hook(grads.append)
    return y
