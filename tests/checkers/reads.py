"""Reads of the device: how often does a training step make Python wait for the GPU?

Python issues kernels and runs ahead of them. Where it asks for a number, `loss.item()` or `if norm > 1:`, it waits for
all kernels before. Meanwhile it issues nothing, and the device idles until the next ones come. So a step has
few reads, all in known places, and none within forward and backward.

On a CPU nothing tells a read from other work. So this listens for what is a read on a GPU:

- operators at whose result Python looks, or whose shape depends on numbers (torch tags both): `item`, `bool(tensor)`,
  `equal`, `nonzero`, `x[mask]`, `repeat_interleave` by a tensor;
- methods that bring a tensor to the CPU: `cpu`, `to("cpu")`, `tolist`, `numpy`. On a CPU they run no operator.
"""

from collections.abc import Iterator
from contextlib import contextmanager

import torch
from fake_ranks import place, tensors
from torch import Tensor
from torch.overrides import TorchFunctionMode
from torch.utils._python_dispatch import TorchDispatchMode

TAGS = {torch.Tag.data_dependent_output, torch.Tag.dynamic_output_shape}


class _Operators(TorchDispatchMode):
    def __init__(self, found: list[str]) -> None:
        super().__init__()
        self.found = found

    def __torch_dispatch__(self, op, types, args=(), kwargs=None):
        # An index of integers has a shape of its own. Tagged is the operator, for one of booleans has not.
        by_integers = op._opname == "index" and all(index.dtype != torch.bool for index in tensors(args[1]))
        if TAGS & set(op.tags) and not by_integers:
            self.found.append(f"{op._opname} ({place()})")
        return op(*args, **(kwargs or {}))


class _Methods(TorchFunctionMode):
    def __init__(self, found: list[str]) -> None:
        super().__init__()
        self.found = found

    def __torch_function__(self, function, types, args=(), kwargs=None):
        kwargs = kwargs or {}
        # By that name: a `torch.device("cpu")` may stand for a GPU here.
        to_cpu = function == Tensor.to and "cpu" in (*args[1:2], kwargs.get("device"))
        if function in (Tensor.cpu, Tensor.tolist, Tensor.numpy) or (to_cpu and not kwargs.get("non_blocking")):
            self.found.append(f"{function.__name__} ({place()})")
        return function(*args, **kwargs)


@contextmanager
def reads() -> Iterator[list[str]]:
    """Each read of the device so far, and the line of the project that makes it."""
    found: list[str] = []
    with _Operators(found), _Methods(found):
        yield found
