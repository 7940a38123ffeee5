"""Order: can all ranks' collectives, messages and waits end, in the strictest order that a GPU and NCCL may choose?

On gloo, threads move what is sent while Python goes on: much works there that hangs on GPUs. On a GPU each collective,
send or receive is a *kernel*, which Python puts into a queue. It starts when its turn comes, and runs, spinning on the
device, until its partners on the other devices run as well. What NCCL and CUDA promise about that is little, and a
program that needs more works on most days. The replay grants nothing beyond these rules:

1. A device starts kernels in the order in which they were issued. What cannot start yet, or waits, holds up all that
   was issued later, as with CUDA_DEVICE_MAX_CONNECTIONS=1 or when its hardware queues are full.
2. A communicator is a stream: its next kernel starts when its last one has ended. Collectives of *different*
   communicators run one after the other as well: a device may have no room for two.
3. A collective ends when all ranks of its group have started theirs, a message when both of its ends have. NCCL sends
   small messages without a receiver, but large ones not. What is in one `batch_isend_irecv` is one kernel.
4. `wait()` lets nothing start before the kernel has ended.
5. Before the first launch of a kernel its code is loaded, for which the device may have to be idle: until *all* that
   runs has ended, a receive whose message has not left included (CUDA programming guide, "Lazy Loading"; the default
   since CUDA 12). Only the first launch: afterwards a receive may run next to it.

From rule 5 follows that a receive must not be posted long before its message: the rank's next new kernel waits for the
receive, which waits for a message, which may wait for this rank.

A rank is traced alone (fake_ranks.py), so its trace is what it would do however the others behave. The replay then
takes all ranks' traces, and lets each go on as far as the rules allow. If none can, they are deadlocked. The order
among ranks does not matter: what a rank may do now, it may still do after others have gone on.
"""

from collections import Counter, defaultdict
from dataclasses import dataclass
from typing import Literal

from fake_ranks import Call, is_view, place, tensors
from torch._C._distributed_c10d import Work
from torch._ops import OpOverload

# What the ranks of a call share: the communicator, the ends of a message or nothing, and how many came before it there.
Key = tuple[str, tuple[int, ...], int]


@dataclass(eq=False)
class Kernel:
    """One that NCCL runs for this rank: a collective, or the messages of a batch."""

    calls: list[Call]
    keys: list[Key]

    @property
    def group(self) -> str:
        return self.calls[0].group

    @property
    def is_collective(self) -> bool:
        return self.calls[0].peer is None

    def __str__(self) -> str:
        names = [call.kind if call.peer is None else f"{call.kind} with rank {call.peer}" for call in self.calls]
        return f"{' and '.join(names)} ({self.calls[0].place})"


@dataclass
class Event:
    """What a rank issues: the start of a kernel of NCCL, a wait for its end, or the first launch of another kernel."""

    kind: Literal["start", "wait", "first launch"]
    what: Kernel | str

    def __str__(self) -> str:
        return f"{self.kind} of {self.what}"


class Trace:
    """A listener: the events of a rank, in order."""

    def __init__(self, rank: int) -> None:
        self.rank = rank
        self.events: list[Event] = []
        self.kernels: dict[int, tuple[Work, Kernel]] = {}
        self.batch: int | None = None
        self.counts: Counter[tuple[str, tuple[int, ...]]] = Counter()
        # Kernels whose code is on the device: an operator has one for each dtype.
        self.loaded: set[tuple] = set()

    def computed(self, op: OpOverload, args: tuple, kwargs: dict) -> None:
        name = op._opname, *(tensor.dtype for tensor in tensors((args, kwargs)))
        if name not in self.loaded and not is_view(op) and "empty" not in op._opname:
            self.loaded.add(name)
            self.events.append(Event("first launch", f"{op._opname} ({place()})"))

    def started(self, work: Work, call: Call, *buffers: object) -> None:
        assert call.peer is None or call.batch is not None, "NCCL warns of a message outside of batch_isend_irecv"
        if call.batch is None or call.batch != self.batch:
            self.events.append(Event("start", Kernel([], [])))
        self.batch, kernel = call.batch, self.events[-1].what
        ends = {"send": (self.rank, call.peer), "receive": (call.peer, self.rank)}.get(call.kind, ())
        kernel.calls.append(call)
        kernel.keys.append((call.group, ends, self.counts[call.group, ends]))
        self.counts[call.group, ends] += 1
        self.kernels[id(work)] = work, kernel

    def waited(self, work: Work) -> None:
        self.events.append(Event("wait", self.kernels[id(work)][1]))


class OutOfOrder(AssertionError):
    """The ranks wait for each other forever, or do not agree on what comes next."""


def replay(traces: list[Trace]) -> None:
    """Let all ranks go on until all have ended. Raises OutOfOrder if they cannot."""
    position = [0 for _ in traces]
    # Who has started what, and the kernels of a rank that may still run.
    started: dict[Key, dict[int, Call]] = defaultdict(dict)
    running: list[list[Kernel]] = [[] for _ in traces]

    def has_ended(kernel: Kernel) -> bool:
        return all(
            len(started[key]) == (len(call.ranks) if call.peer is None else 2)
            for call, key in zip(kernel.calls, kernel.keys, strict=True)
        )

    def may_go_on(rank: int, event: Event) -> bool:
        running[rank] = [kernel for kernel in running[rank] if not has_ended(kernel)]
        if event.kind == "first launch":
            return not running[rank]
        if event.kind == "wait":
            return event.what not in running[rank]
        group, is_collective = event.what.group, event.what.is_collective
        return not any(k.group == group or (is_collective and k.is_collective) for k in running[rank])

    def start(rank: int, kernel: Kernel) -> None:
        running[rank].append(kernel)
        for call, key in zip(kernel.calls, kernel.keys, strict=True):
            for other, theirs in started[key].items():
                if call.payload != theirs.payload:
                    ours = f"rank {rank} has {call.payload} ({call.place})"
                    raise OutOfOrder(f"{ours}, where rank {other} has {theirs.payload} ({theirs.place})")
            started[key][rank] = call

    advanced = True
    while advanced:
        advanced = False
        for rank, trace in enumerate(traces):
            while position[rank] < len(trace.events) and may_go_on(rank, event := trace.events[position[rank]]):
                if event.kind == "start":
                    start(rank, event.what)
                position[rank] += 1
                advanced = True
    stuck = [
        f"rank {rank}: {trace.events[at]}; running: {', '.join(map(str, running[rank])) or 'nothing'}"
        for rank, (trace, at) in enumerate(zip(traces, position, strict=True))
        if at < len(trace.events)
    ]
    if stuck:
        raise OutOfOrder("\n".join(["no rank can go on", *stuck]))
