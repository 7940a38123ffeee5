"""Parameters whose weights are slices of one flat tensor, cut into an equal shard for each data-parallel rank.

However that cuts a parameter: shards are equal to the number, and a collective moves a whole unit.
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
        zero: int,
    ) -> None:
        rank, size = dist.get_rank(group), dist.get_world_size(group)
        self.group, self.zero = group, zero
        self.shard_size = math.ceil(sum(p.numel() for p in parameters.values()) / size)
        self.own = slice(rank * self.shard_size, (rank + 1) * self.shard_size)
        self.accumulated = torch.promote_types(dtype, torch.float32)
        exact = torch.zeros(size * self.shard_size, dtype=self.accumulated, device=device)
        spans, end = {}, 0
        for name, p in parameters.items():
            spans[p] = slice(end, end := end + p.numel())
            exact[spans[p]] = weights(name).flatten()
        self.flat = exact.to(dtype)
        # `.data`: what is gathered into the flat tensor counts as no change of what autograd has saved.
        new = replace_parameters(model, {p: self.flat[span].view_as(p).data for p, span in spans.items()})
        # Where each parameter lies in the flat tensor.
        self.span = {new[p]: span for p, span in spans.items()}
        self.shard = self.flat[self.own].clone() if zero == 3 else self.flat[self.own]
        self.master = self.shard if dtype == self.accumulated else exact[self.own].clone()
        self.flat_gradient, self.shard_gradient = None, None
        self.gathering, self.reducing = None, None
        # Contributions to the gradients since they were last reduced: one for each parameter and micro-batch.
        self.arrived = 0
        self.is_whole = True
        # Whether backward reads the weights after they have been freed.
        self.again = False
        if zero == 3:
            self.free()

    def part(self, p: nn.Parameter) -> slice:
        """Where this rank's part of a parameter lies in its shard. Empty if it has none."""
        begin, end = (min(max(i - self.own.start, 0), self.shard_size) for i in (self.span[p].start, self.span[p].stop))
        return slice(begin, end)

    def add(self, p: nn.Parameter, gradient: Tensor) -> None:
        if self.flat_gradient is None:
            self.flat_gradient = torch.zeros_like(self.flat, dtype=self.accumulated)
        self.flat_gradient[self.span[p]].view_as(gradient).add_(gradient)
        self.arrived += 1

    def reduce(self) -> None:
        """Start to sum the gradients over the ranks, in place, each getting its shard of the sum."""
        self.arrived = 0
        own = self.flat_gradient[self.own]
        self.reducing = dist.reduce_scatter_single(own, self.flat_gradient, group=self.group, async_op=True)

    def finish_reducing(self) -> None:
        if self.reducing:
            self.reducing.wait()
            self.reducing = None
            own = self.flat_gradient[self.own]
            if self.zero == 1:
                self.shard_gradient = own
                return
            self.flat_gradient = None
            # A copy, so that the flat tensor is freed; a sum, from the second micro-batch on.
            self.shard_gradient = own.clone() if self.shard_gradient is None else self.shard_gradient.add_(own)

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
