"""Peak bytes of live tensors, counted exactly: what an algorithm needs, whatever the allocator makes of it."""

import weakref
from collections.abc import Iterable
from typing import Any

import torch
from torch.distributed.tensor import DTensor
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_iter


class LiveBytes(TorchDispatchMode):
    """While active, follows the storages that ops return, and those given to `track`. `peak` is in bytes.

    Storages that are emptied and filled again by `resize_`, as sharded weights are, count as what they hold.
    """

    def __init__(self) -> None:
        super().__init__()
        self.live: dict[int, int] = {}
        self.now = self.peak = 0

    def __enter__(self) -> "LiveBytes":
        resize_ = torch.UntypedStorage.resize_

        def observed(storage: torch.UntypedStorage, nbytes: int) -> torch.UntypedStorage:
            resize_(storage, nbytes)
            if (key := storage._cdata) in self.live:
                self._count(key, nbytes)
            return storage

        # Which hides the base class's.
        torch.UntypedStorage.resize_ = observed
        return super().__enter__()

    def __exit__(self, *error: object) -> None:
        del torch.UntypedStorage.resize_
        super().__exit__(*error)

    def _count(self, key: int, nbytes: int) -> None:
        self.now += nbytes - self.live.get(key, 0)
        self.live[key] = nbytes
        self.peak = max(self.peak, self.now)

    def track(self, values: Iterable) -> None:
        for tensor in tree_iter(values):
            if isinstance(tensor, torch.Tensor) and not isinstance(tensor, DTensor) and tensor.device.type != "meta":
                storage = tensor.untyped_storage()
                key = storage._cdata
                if key not in self.live:
                    self._count(key, storage.nbytes())
                    weakref.finalize(storage, self._free, key)

    def _free(self, key: int) -> None:
        self.now -= self.live.pop(key)

    def __torch_dispatch__(self, func, types, args=(), kwargs=None) -> Any:  # noqa: ANN001 (torch's own signature)
        if any(issubclass(kind, DTensor) for kind in types):
            # It has no storage of its own; the ops on its local tensors come by here.
            return NotImplemented
        out = func(*args, **(kwargs or {}))
        self.track(out)
        return out


def live_state(model: torch.nn.Module, optimizer: torch.optim.Optimizer) -> list:
    """Everything that lives between steps."""
    return [list(model.parameters()), [p.grad for p in model.parameters()], list(optimizer.state.values())]
