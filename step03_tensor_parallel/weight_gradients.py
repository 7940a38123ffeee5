"""Gradients of the weights of linears that read the same input.

Shapes: b sequences, s tokens, n outputs and h inputs of a weight (n, h).
"""

import torch
from conjugates import sum_over_ranks
from torch import Tensor, nn


def weight_gradients(linears: list[nn.Module], grads: list[Tensor], x: Tensor) -> list[Tensor]:
    """gradᵀ · x (n, h) of each linear, summed over the ranks that hold the same weight."""
    works, gradients = [], []
    for grad, linear in zip(grads, linears, strict=True):
        summed_dtype = torch.promote_types(linear.weight.dtype, torch.float32)
        dtype = linear.weight.dtype if linear.copies == 1 else summed_dtype
        gradients.append((grad.flatten(0, 1).T @ x.flatten(0, 1)).to(dtype))
        if linear.copies > 1:
            # Each copy has seen the queries of its own rank only.
            gradients[-1], work = sum_over_ranks(gradients[-1], linear.copies_group, async_op=True)
            works.append(work)
    for work in filter(None, works):
        work.wait()
    return gradients
