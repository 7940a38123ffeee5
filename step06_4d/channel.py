"""Messages between the stages of a pipeline."""

from collections.abc import Callable

import torch
import torch.distributed as dist
from torch import Tensor
from torch.distributed import ProcessGroup, Work


class Channel:
    """One direction of travel: activations to the next stage (step 1), or gradients to the one before (step −1).

    One receive is posted ahead, and what was sent is waited for before the next one is computed. Messages of a process
    group leave and arrive in order, so each pair of neighbours has a group of its own: with chunks, the first stage
    waits for the last one's message while it sends its own.
    """

    def __init__(self, ranks: list[int], step: int, ring: bool, device: torch.device) -> None:
        """Connects this rank of `ranks`, the stages, with its neighbours; a ring with last and first stage too."""
        rank, stages = dist.get_rank(), len(ranks)
        pairs = [(ranks[i], ranks[(i + 1) % stages]) for i in range(stages if ring else stages - 1)]
        self.incoming: ProcessGroup | None = None
        self.outgoing: ProcessGroup | None = None
        # In each of three rounds a rank is in one pair at most, or in a group alone: all make as many groups.
        for pairs_of_round in (pairs[: stages - 1 : 2], pairs[1 : stages - 1 : 2], pairs[stages - 1 :]):
            if not pairs_of_round:
                continue
            pair = next((pair for pair in pairs_of_round if rank in pair), (rank,))
            group = dist.new_group(list(pair), use_local_synchronization=True, group_desc="pp")
            if len(pair) == 1:
                continue
            source, destination = pair[::step]
            # NCCL connects two ranks at their first message, and each blocks until the other comes: both come now.
            if rank == source:
                self.outgoing, self.destination = group, destination
                dist.isend(torch.zeros(1, device=device), destination, group).wait()
            else:
                self.incoming, self.source = group, source
                dist.irecv(torch.zeros(1, device=device), source, group).wait()
        self.sending: Work | None = None
        self.receiving: Work | None = None
        self.sent: Tensor | None = None
        self.received: Tensor | None = None

    def start(self, messages: int, new_buffer: Callable[[], Tensor]) -> None:
        """Before the first of that many messages arrives."""
        self.left, self.new_buffer = messages, new_buffer
        self.expect()

    def expect(self, buffer: Tensor | None = None) -> None:
        """Start to receive the next message, if there is one left, into `buffer` or a new one."""
        if self.left:
            self.left -= 1
            self.received = self.new_buffer() if buffer is None else buffer
            self.receiving = dist.irecv(self.received, self.source, self.incoming)

    def receive(self) -> Tensor:
        """Wait for the message that is expected."""
        self.receiving.wait()
        received, self.receiving, self.received = self.received, None, None
        return received

    def send(self, tensor: Tensor) -> None:
        """Start to send a tensor. `release` has to be called before the next one."""
        assert self.sending is None
        self.sent = tensor
        self.sending = dist.isend(tensor.detach(), self.destination, self.outgoing)

    def release(self) -> None:
        """Wait until what was sent has left, and free its data: backward needs its graph and its shape alone."""
        if self.sending:
            self.sending.wait()
            self.sent.data = self.sent.new_empty(()).expand_as(self.sent)
            self.sending, self.sent = None, None
