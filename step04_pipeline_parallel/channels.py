"""Messages between the stages of a pipeline.

On a GPU a message is a kernel of NCCL on each side. A receive runs until its message has come, and a send until it has
been received. The first launch of any other kernel loads its code, and may wait until all that runs has ended: with a
receive that was posted long before its message is due, forever. So a receive is posted when the next action needs it,
right after the send of the action before.
"""

from collections.abc import Callable

import torch
import torch.distributed as dist
from torch import Tensor
from torch.distributed import P2POp, ProcessGroup, Work
from torch.distributed.device_mesh import DeviceMesh

from shared.distributed import groups_along, make_group


def _start(operation: Callable, tensor: Tensor, pair: ProcessGroup) -> Work:
    """Start `dist.isend` or `dist.irecv` between this rank and the other one of a pair."""
    # In a batch of one, since torch warns of a call on its own with NCCL.
    (work,) = dist.batch_isend_irecv([P2POp(operation, tensor, group=pair, group_peer=1 - dist.get_rank(pair))])
    return work


class Channel:
    """A direction of travel: activations to the next stage (direction 1), or gradients to the previous one (−1).

    Messages of a process group leave and arrive in order. So each pair of neighbours has a group of its own for each
    direction, and no message waits for one that goes elsewhere.
    """

    def __init__(
        self, mesh: DeviceMesh, direction: int, device: torch.device, timeout: int, ring: bool = False
    ) -> None:
        """Connects each stage with its neighbours. In a ring, the last and the first stage are neighbours as well."""
        self.incoming: ProcessGroup | None = None
        self.outgoing: ProcessGroup | None = None
        stage, stages = mesh.get_local_rank("pp"), mesh["pp"].size()
        # In each of three rounds a rank is in one pair at most: pairs of an even stage and its next one, of an odd one,
        # and of the last stage and the first.
        for firsts in (range(0, stages - 1, 2), range(1, stages - 1, 2), range(stages - 1, stages if ring else 0)):
            pairs = [[ranks[i], ranks[(i + 1) % stages]] for ranks in groups_along(mesh, "pp") for i in firsts]
            pair = make_group(pairs, "pp", timeout)
            if pair is None:
                continue
            # NCCL connects two ranks at their first message, and each blocks until the other comes: both come now.
            if (stage in firsts) == (direction == 1):
                self.outgoing = pair
                _start(dist.isend, torch.empty(1, device=device), pair).wait()
            else:
                self.incoming = pair
                _start(dist.irecv, torch.empty(1, device=device), pair).wait()
        # gloo receives on a thread of its own: the next message arrives while this rank computes.
        self.posts_ahead = device.type == "cpu"
        self.sending: Work | None = None
        self.receiving: Work | None = None
        self.sent: Tensor | None = None
        self.received: Tensor | None = None

    def start(self, messages: int, new_buffer: Callable[[], Tensor]) -> None:
        """Before the first of that many messages arrives."""
        self.messages_to_come, self.new_buffer = messages, new_buffer
        self.expect()

    def expect(self, buffer: Tensor | None = None) -> None:
        """The next message, if there is one to come, is to arrive in `buffer` or a new one."""
        if self.messages_to_come:
            self.messages_to_come -= 1
            self.received = self.new_buffer() if buffer is None else buffer
            if self.posts_ahead:
                self.receiving = _start(dist.irecv, self.received, self.incoming)

    def receive(self) -> Tensor:
        """Wait for the message that is expected."""
        if self.receiving is None:
            self.receiving = _start(dist.irecv, self.received, self.incoming)
        self.receiving.wait()
        received, self.receiving, self.received = self.received, None, None
        return received

    def send(self, tensor: Tensor) -> None:
        """Start to send a tensor. `release` has to be called before the next one."""
        assert self.sending is None
        self.sent = tensor
        self.sending = _start(dist.isend, tensor.detach(), self.outgoing)

    def release(self) -> None:
        """Wait until what was sent has left, and free its data: backward needs its graph and its shape alone."""
        if self.sending:
            self.sending.wait()
            self.sent.data = self.sent.new_empty(()).expand_as(self.sent)
            self.sending, self.sent = None, None
