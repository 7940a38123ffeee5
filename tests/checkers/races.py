"""Races: who touches a buffer that is on its way?

An asynchronous call returns before anything has moved. From then on, until `wait()`, the buffers belong to the library.
On gloo a thread reads and writes them; on NCCL a kernel does, on a stream of its own, next to what is computed.

- What is *sent* may be read meanwhile, but not written: the other rank would get some of the old and some of the new.
- What is *received* may be neither read nor written: it holds the old, the new, or both.
- Its memory must not be given back.
- Each `Work` has to be waited for, or nothing says when that time is over.
- Tensors must be contiguous: gloo and NCCL move bytes from the first one on, not strides.

A race rarely shows: on one machine the message is usually faster than what would disturb it, and a test of the numbers
passes. Here nothing depends on timing: the arguments of each operator are compared with the buffers on their way.
"""

from fake_ranks import Call, is_view, place, tensors
from torch import Tensor
from torch._C._distributed_c10d import Work
from torch._ops import OpOverload

# Operators that look at the shape and dtype of their argument alone: how their names begin.
LIKE = ("empty", "new_", "zeros_like", "ones_like", "full_like")


def addresses(tensor: Tensor) -> range:
    """Of the bytes from its first number to its last."""
    if tensor.numel() == 0:
        return range(0)
    last = sum((size - 1) * stride for size, stride in zip(tensor.shape, tensor.stride(), strict=True))
    start = tensor.data_ptr()
    return range(start, start + (last + 1) * tensor.element_size())


def overlap(a: range, b: range) -> bool:
    return max(a.start, b.start) < min(a.stop, b.stop)


def reads_and_writes(op: OpOverload, args: tuple, kwargs: dict) -> tuple[list[Tensor], list[Tensor]]:
    """The tensors that an operator reads, and those that it writes."""
    reads, writes = [], []
    if is_view(op) or op._opname.startswith(LIKE):
        return reads, writes
    for i, argument in enumerate(op._schema.arguments):
        value = args[i] if i < len(args) else kwargs.get(argument.name)
        written = argument.alias_info is not None and argument.alias_info.is_write
        (writes if written else reads).extend(tensors(value))
    return reads, writes


class OnItsWay:
    """A call that has not been waited for. Holds its tensors, so that no other one gets their memory."""

    def __init__(self, work: Work, call: Call, sent: list[Tensor], received: list[Tensor]) -> None:
        self.work, self.call, self.tensors = work, call, sent + received
        self.sent, self.received = ([addresses(tensor) for tensor in part] for part in (sent, received))


class Races:
    """A listener."""

    def __init__(self) -> None:
        self.on_their_way: dict[int, OnItsWay] = {}
        # What is wrong, in words: the keys, each once and in order.
        self.found: dict[str, None] = {}

    def _complain(self, what: str, call: Call) -> None:
        self.found[f"{what} the {call.kind} started at {call.place}"] = None

    def _touch(self, name: str, reads: list[Tensor], writes: list[Tensor]) -> None:
        for other in self.on_their_way.values():
            for tensor in writes:
                if any(overlap(addresses(tensor), buffer) for buffer in other.sent):
                    self._complain(f"{name} at {place()} writes what is sent by", other.call)
            for tensor in reads + writes:
                if any(overlap(addresses(tensor), buffer) for buffer in other.received):
                    self._complain(f"{name} at {place()} touches what is received by", other.call)

    def computed(self, op: OpOverload, args: tuple, kwargs: dict) -> None:
        if self.on_their_way:
            self._touch(op._opname, *reads_and_writes(op, args, kwargs))

    def started(self, work: Work, call: Call, sent: list[Tensor], received: list[Tensor]) -> None:
        self._touch(f"the {call.kind}", sent, received)
        for tensor in sent + received:
            if not tensor.is_contiguous():
                self._complain(f"a tensor with strides {tensor.stride()} is given to", call)
        self.on_their_way[id(work)] = OnItsWay(work, call, sent, received)

    def waited(self, work: Work) -> None:
        # Waiting twice does no harm.
        ended = self.on_their_way.pop(id(work), None)
        if ended and [addresses(tensor) for tensor in ended.tensors] != ended.sent + ended.received:
            self._complain("memory is given back before the end of", ended.call)

    def end(self) -> list[str]:
        """After the run: all that was found."""
        for other in self.on_their_way.values():
            self._complain("nothing waits for", other.call)
        return list(self.found)
