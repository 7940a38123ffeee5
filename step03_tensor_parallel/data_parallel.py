"""Data parallelism: every rank holds the whole model and its share of each global batch; gradients are summed.

Summed, not averaged: each rank's loss is divided by the tokens of the *global* batch already.
"""

from dataclasses import dataclass
from typing import Any, Literal

import torch
import torch.distributed as dist
from torch import Tensor, nn
from torch.distributed import ProcessGroup

from shared.ledger import Traffic

# Elements whose checksum is computed at once: few enough for a cache of a CPU, enough for all processors of a GPU.
CHUNK = {"cpu": 2**16, "cuda": 2**22}


@dataclass
class Config:
    """The options of this axis."""

    # Data-parallel ranks. The default is all that the other axes leave.
    dp: int | None = None
    # Who sums the gradients. naive all-reduces each one after backward. bucketed all-reduces flat buckets of them while
    # backward runs.
    dp_engine: Literal["bucketed", "naive"] = "bucketed"
    # MiB of gradients per bucket. In a large one, a call's latency is small next to its transfer. Of small ones, the
    # first leaves early, and little is left to wait for after the last gradient.
    bucket_mib: float = 25.0

    def traffic(self, trainer: Any) -> dict[tuple[str, str], Traffic]:
        """An all-reduce of every gradient, and one of the loss.

        A ring all-reduce makes each of D ranks send 2(D − 1)/D of its payload.
        """
        reducer, size = trainer.reducer, self.grad_dtype.itemsize
        numbers = sum(p.numel() for p in reducer.parameters)
        return super().traffic(trainer) | {("dp", "all-reduce"): Traffic(reducer.all_reduces + 1, (numbers + 1) * size)}


class Reducer:
    """The idea in one line: once backward is over, all-reduce each gradient.

    Bytes: one all-reduce of every parameter per step. Nothing overlaps, and each of many small calls pays its latency.
    """

    def __init__(self, model: nn.Module, group: ProcessGroup) -> None:
        self.parameters, self.group = list(model.parameters()), group
        self.all_reduces = len(self.parameters)

    def start(self, micro_batches: int) -> None:
        """Before the first of a step's micro-batches."""

    def finish(self) -> None:
        """After the last micro-batch: `.grad` becomes the sum over the ranks."""
        for parameter in self.parameters:
            if parameter.grad is None:
                parameter.grad = torch.zeros_like(parameter)
            dist.all_reduce(parameter.grad, group=self.group)

    def sum(self, value: Tensor) -> Tensor:
        """The sum of the ranks' values, such as their losses. All-reduces it in place."""
        dist.all_reduce(value, group=self.group)
        return value

    def check_replicas(self) -> None:
        """Raise RuntimeError unless all ranks hold bitwise the same parameters.

        Compares a checksum of each parameter's bits: two all-reduces of 8 bytes per parameter tensor.
        """
        sums = torch.stack([checksum(p) for p in self.parameters])
        lowest, highest = sums.clone(), sums.clone()
        dist.all_reduce(lowest, dist.ReduceOp.MIN, self.group)
        dist.all_reduce(highest, dist.ReduceOp.MAX, self.group)
        if not torch.equal(lowest, highest):
            differing = (lowest != highest).nonzero().flatten().tolist()
            raise RuntimeError(f"the replicas of parameters {differing} have diverged")


def checksum(tensor: Tensor) -> Tensor:
    """Sum of the elements' bits, each times an odd number of its own, so that exchanged elements show. () int64."""
    bits = tensor.detach().view({2: torch.int16, 4: torch.int32, 8: torch.int64}[tensor.element_size()]).flatten()
    total = torch.zeros((), dtype=torch.int64, device=bits.device)
    # Not all at once: factors and products are of 8 bytes.
    size = CHUNK[bits.device.type]
    for first in range(0, len(bits), size):
        chunk = bits[first : first + size]
        total += (chunk * torch.arange(2 * first + 1, 2 * (first + len(chunk)), 2, device=bits.device)).sum()
    return total


class Bucket:
    """A flat tensor whose slices are the gradients of some parameters."""

    def __init__(self, parameters: list[nn.Parameter]) -> None:
        self.flat = torch.zeros(
            sum(p.numel() for p in parameters), dtype=parameters[0].dtype, device=parameters[0].device
        )
        slices = self.flat.split([p.numel() for p in parameters])
        self.views = [(p, view.view_as(p)) for p, view in zip(parameters, slices, strict=True)]
        # Contributions to its gradients that are yet to come: one for each parameter and micro-batch.
        self.pending = 0


class BucketedReducer(Reducer):
    """All-reduce flat buckets of gradients as soon as they are complete, while those of earlier layers are computed.

    Backward accumulates straight into the buckets: no copy, and no more bytes than the gradients themselves. Bytes:
    one all-reduce of every parameter per step, whatever the number of micro-batches.
    """

    def __init__(self, model: nn.Module, group: ProcessGroup, bucket_bytes: float) -> None:
        super().__init__(model, group)
        self.buckets: list[Bucket] = []
        self.bucket_of: dict[nn.Parameter, Bucket] = {}
        current: list[nn.Parameter] = []
        # Backward reaches the last layers first, so their bucket comes first.
        for parameter in reversed(self.parameters):
            current.append(parameter)
            if sum(p.nbytes for p in current) >= bucket_bytes or parameter is self.parameters[0]:
                self.buckets.append(Bucket(current))
                self.bucket_of |= dict.fromkeys(current, self.buckets[-1])
                current = []
            # Runs when a backward has added its last contribution to the gradient, also of a tied parameter.
            parameter.register_post_accumulate_grad_hook(self._on_gradient)
        self.all_reduces = len(self.buckets)

    def start(self, micro_batches: int) -> None:
        self.launched, self.works = 0, []
        for bucket in self.buckets:
            bucket.flat.zero_()
            bucket.pending = len(bucket.views) * micro_batches
            for parameter, view in bucket.views:
                parameter.grad = view

    def _on_gradient(self, parameter: nn.Parameter) -> None:
        self.bucket_of[parameter].pending -= 1
        # In the order of the list, which is the same on all ranks, even if gradients arrive in another.
        while self.launched < len(self.buckets) and self.buckets[self.launched].pending == 0:
            self._launch()

    def _launch(self) -> None:
        flat = self.buckets[self.launched].flat
        self.works.append(dist.all_reduce(flat, group=self.group, async_op=True))
        self.launched += 1

    def finish(self) -> None:
        # Parameters without a gradient have held up their bucket.
        while self.launched < len(self.buckets):
            self._launch()
        for work in self.works:
            work.wait()


def make_reducer(config: Config, model: nn.Module, group: ProcessGroup) -> Reducer:
    """The engine that the options name, for the ranks of `group`."""
    if config.dp_engine == "naive":
        return Reducer(model, group)
    return BucketedReducer(model, group, config.bucket_mib * 2**20)
