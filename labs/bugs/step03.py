"""Bugs of tensor parallelism."""

from functools import partial
from types import ModuleType
from typing import Any
from unittest.mock import patch

import torch.distributed as dist
from torch import Tensor

from labs.bugs import bug

bug = partial(bug, "step03_tensor_parallel")


@bug("--tp 2", "tensor_parallel.py conjugates.py", "weights")
def rows_of_rank_0(module: ModuleType) -> None:
    """Every rank takes the first shard of each matrix: nobody adds the rank's offset. The shards are twins and stay
    twins, so the model is half as wide as it says."""

    def shard_weights(model: Any, weights: Any) -> Any:
        modules = module.tensor_parallel.sharded_modules(model)

        def first_shard(name: str) -> Tensor:
            full = weights(name)
            return full.tensor_split(modules[name].count, modules[name].dim)[0].clone() if name in modules else full

        return first_shard

    module.tensor_parallel.shard_weights = shard_weights


@bug("--tp 2", "tensor_parallel.py train.py", "counted-twice")
def norms_counted_by_all(module: ModuleType) -> None:
    """Each rank adds the norms' weights, of which all hold the whole, to the square of the gradient norm."""
    module.tensor_parallel.counted = lambda model: list(model.parameters())


@bug("--tp 2 --num-key-value-heads 1", "tensor_parallel.py weight_gradients.py", "missing-sum")
def copies_not_summed(module: ModuleType) -> None:
    """Two ranks hold the same key-value head, each has its gradient from its own queries only, and nobody adds them."""

    def apply(model: Any, *args: Any, real: Any = module.tensor_parallel.apply) -> None:
        real(model, *args)
        for layer in model.model.layers.values():
            layer.self_attn.k_proj.copies = layer.self_attn.v_proj.copies = 1

    module.tensor_parallel.apply = apply


@bug("--tp 2 --tp-engine naive", "conjugates.py", "missing-sum")
def input_gradient_not_summed(module: ModuleType) -> None:
    """The copy in front of column-parallel linears passes gradients on as they are: each rank back-propagates what its
    own columns say of the input."""
    module.tensor_parallel.CopyToRanks.backward = staticmethod(lambda ctx, grad: (grad, None))


@bug("--tp 2", "conjugates.py", "counted-twice")
def summed_in_both_directions(module: ModuleType) -> None:
    """The sum behind row-parallel linears sums the gradients as well, as an all-reduce that autograd knows does: all
    ranks have the same gradient there, so each linear doubles it."""

    def backward(ctx: Any, grad: Tensor) -> tuple[Tensor, None]:
        grad = grad.clone()
        dist.all_reduce(grad, group=ctx.group)
        return grad, None

    def forward(ctx: Any, x: Tensor, group: Any, real: Any = module.tensor_parallel.SumOverRanks.forward) -> Tensor:
        ctx.group = group
        return real(ctx, x, group)

    module.tensor_parallel.SumOverRanks.forward = staticmethod(forward)
    module.tensor_parallel.SumOverRanks.backward = staticmethod(backward)


@bug("--tp 2", "vocab_parallel.py", "softmax missing-sum")
def highest_logit_of_each_rank(module: ModuleType) -> None:
    """Each rank subtracts the highest of its own logits before it takes exponentials, and these are added as if all had
    subtracted the same."""
    all_reduce = dist.all_reduce

    def without_maximum(tensor: Tensor, op: Any = dist.ReduceOp.SUM, *args: Any, **kwargs: Any) -> Any:
        return None if op == dist.ReduceOp.MAX else all_reduce(tensor, op, *args, **kwargs)

    def cross_entropy(self: Any, logits: Tensor, label: Tensor, real: Any) -> Tensor:
        with patch.object(dist, "all_reduce", without_maximum):
            return real(self, logits, label)

    head = module.tensor_parallel.VocabParallelHead
    head.cross_entropy = partial_method(cross_entropy, head.cross_entropy)


def partial_method(function: Any, real: Any) -> Any:
    return lambda self, *args: function(self, *args, real)
