"""Parameters whose weights are slices of one flat tensor, cut into an equal shard for each data-parallel rank.

Shards have equally many numbers, wherever that cuts a parameter, and a collective moves a whole unit.
"""

import math

import torch
import torch.distributed as dist
from torch import Tensor, nn
from torch.distributed import ProcessGroup

from shared.weights import Weights, replace_parameters


class Unit:
    """Parameters that are reduced and gathered together."""

    def __init__(
        self,
        model: nn.Module,
        parameters: dict[str, nn.Parameter],
        weights: Weights,
        dtype: torch.dtype,
        device: torch.device,
        group: ProcessGroup,
        replicas: ProcessGroup | None,
        zero: int,
    ) -> None:
        rank, size = dist.get_rank(group), dist.get_world_size(group)
        self.group, self.replicas, self.zero = group, replicas, zero
        self.shard_size = math.ceil(sum(p.numel() for p in parameters.values()) / size)
        # Where this rank's shard lies in the flat tensor.
        self.shard_range = slice(rank * self.shard_size, (rank + 1) * self.shard_size)
        self.accumulated = torch.promote_types(dtype, torch.float32)
        self.flat = torch.zeros(size * self.shard_size, dtype=dtype, device=device)
        ranges, end = {}, 0
        for p in parameters.values():
            ranges[p] = slice(end, end := end + p.numel())
        # `.data`: what is gathered into the flat tensor counts as no change of what autograd has saved.
        new = replace_parameters(model, {p: self.flat[where].view_as(p).data for p, where in ranges.items()})
        # Where each parameter lies in the flat tensor.
        self.range_of = {new[p]: where for p, where in ranges.items()}
        self.shard = self.flat[self.shard_range].clone() if zero == 3 else self.flat[self.shard_range]
        self.master = self.shard if dtype == self.accumulated else self.shard.to(self.accumulated)
        for name, p in zip(parameters, self.range_of, strict=True):
            numbers, rows = self.numbers(p), self.rows(p)
            if numbers.start < numbers.stop:
                before = rows.start * p.shape[1:].numel()
                part = weights(name, rows).flatten()[numbers.start - before : numbers.stop - before]
                self.master[self.in_shard(p)] = part
        self.shard.copy_(self.master)
        self.flat_gradient, self.shard_gradient = None, None
        self.gathering, self.reducing, self.summing = None, None, None
        # Contributions to the gradients since they were last reduced: one for each parameter and micro-batch.
        self.arrived = 0
        # Reductions that are yet to come in this step.
        self.to_reduce = 0
        self.is_whole = False
        # Whether backward reads the weights after they have been freed.
        self.regathers = False
        if zero == 3:
            self.free()
        else:
            self.wait()

    def in_shard(self, p: nn.Parameter) -> slice:
        """Where this rank's numbers of a parameter lie in its shard. Empty if it has none."""
        where, first = self.range_of[p], self.shard_range.start
        begin, end = (min(max(i - first, 0), self.shard_size) for i in (where.start, where.stop))
        return slice(begin, end)

    def numbers(self, p: nn.Parameter) -> slice:
        """Which numbers of a parameter are in this rank's shard, row by row. Empty if none are."""
        where, shard = self.range_of[p], self.shard_range
        begin, end = (min(max(i, where.start), where.stop) - where.start for i in (shard.start, shard.stop))
        return slice(begin, end)

    def rows(self, p: nn.Parameter) -> slice:
        """The rows that they lie in."""
        numbers, columns = self.numbers(p), p.shape[1:].numel()
        return slice(numbers.start // columns, math.ceil(numbers.stop / columns))

    def add(self, p: nn.Parameter, gradient: Tensor) -> None:
        # What is being summed over the ranks is not to be changed.
        assert not self.reducing
        if self.flat_gradient is None:
            self.flat_gradient = torch.zeros_like(self.flat, dtype=self.accumulated)
        self.flat_gradient[self.range_of[p]].view_as(gradient).add_(gradient)
        self.arrived += 1

    def reduce(self) -> None:
        """Start to sum the gradients over the ranks, in place, each getting its shard of the sum."""
        self.arrived = 0
        self.to_reduce -= 1
        shard = self.flat_gradient[self.shard_range]
        self.reducing = dist.reduce_scatter_single(shard, self.flat_gradient, group=self.group, async_op=True)

    def finish_reducing(self) -> None:
        """Wait for that. After the step's last one, start to sum the shard over the replicas, in place."""
        if self.reducing:
            self.reducing.wait()
            self.reducing = None
            shard = self.flat_gradient[self.shard_range]
            if self.zero == 1:
                self.shard_gradient = shard
            else:
                self.flat_gradient = None
                # A copy, so that the flat tensor is freed; a sum, from the second micro-batch on.
                self.shard_gradient = shard.clone() if self.shard_gradient is None else self.shard_gradient.add_(shard)
        if self.replicas and self.to_reduce == 0 and not self.summing:
            self.summing = dist.all_reduce(self.shard_gradient, group=self.replicas, async_op=True)

    def finish_summing(self) -> None:
        if self.summing:
            self.summing.wait()
            self.summing = None

    def gather(self) -> None:
        """Start to collect the shards of the weights."""
        if not self.is_whole:
            if self.zero == 3:
                self.flat.untyped_storage().resize_(self.flat.nbytes)
            self.gathering = dist.all_gather_single(self.flat, self.shard, group=self.group, async_op=True)
            self.is_whole = True

    def wait(self) -> None:
        self.gather()
        if self.gathering:
            self.gathering.wait()
            self.gathering = None

    def free(self) -> None:
        """Give back the memory of all weights but the shard's. What autograd has saved of them stays valid: it refers
        to the same memory, which is filled again before it is read."""
        assert not self.gathering
        self.flat.untyped_storage().resize_(0)
        self.is_whole = False
