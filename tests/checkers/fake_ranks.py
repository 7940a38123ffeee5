"""Be one rank of a layout whose other ranks do not exist, run the real train() of a step, and listen to it.

The process group is torch's "fake" one: a call of it returns at once, and nothing is sent. So a rank needs no other
process, and no two ranks have to run at the same time. The tensors are real, if small. What would arrive is zeros: the
numbers mean nothing, and which operators run in which order does not depend on them.
"""

import os
import sys
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from types import ModuleType
from typing import Protocol
from unittest.mock import patch

import torch
import torch.distributed as dist
from conftest import ROOT
from running import report_into
from torch import Tensor
from torch._C._distributed_c10d import FakeWork, ProcessGroup, Work
from torch._ops import OpOverload
from torch.distributed.device_mesh import init_device_mesh
from torch.testing._internal.distributed.fake_pg import FakeStore
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_iter

import shared.metrics
from shared import distributed
from shared.config import parse

# What torch.distributed calls become -> the kind, and the arguments that hold what is sent and what is received.
CALLS = {
    "allreduce_": ("all-reduce", 0, 0),
    "broadcast_": ("broadcast", 0, 0),
    "_allgather_base_": ("all-gather", 1, 0),
    "_reduce_scatter_base_": ("reduce-scatter", 1, 0),
    "alltoall_base_": ("all-to-all", 1, 0),
    "send": ("send", 0, None),
    "recv_": ("receive", None, 0),
    "barrier": ("barrier", None, None),
}


@dataclass
class Call:
    """A collective or a message that this rank has started."""

    kind: str
    # The communicator: a name that all its ranks agree on, and who they are.
    group: str
    ranks: tuple[int, ...]
    # What all of them have to agree on.
    payload: str
    # Of a message: the other rank. None for a collective.
    peer: int | None
    # Which `dist.batch_isend_irecv` of this rank it belongs to. None outside of one.
    batch: int | None
    # The line of the project that called.
    place: str


class Listener(Protocol):
    """What is told of a rank, in the order in which it happens."""

    def computed(self, op: OpOverload, args: tuple, kwargs: dict) -> None:
        """An operator of torch ran."""

    def started(self, work: Work, call: Call, sent: list[Tensor], received: list[Tensor]) -> None:
        """A collective or a message was started. A buffer may be both."""

    def waited(self, work: Work) -> None:
        """What was started is done, as far as later operators are concerned."""


def tensors(values: object) -> list[Tensor]:
    return [value for value in tree_iter(values) if isinstance(value, Tensor)]


def is_view(op: OpOverload) -> bool:
    """Whether an operator runs nothing: what it returns is its argument's memory."""
    aliases = [value.alias_info for value in op._schema.returns]
    return bool(aliases) and all(alias is not None and not alias.is_write for alias in aliases)


def place() -> str:
    """The innermost line of the project that runs now, those that only listen aside."""
    frame = sys._getframe(1)
    while frame:
        path = frame.f_code.co_filename
        # Not all that lies in the project's directory: a virtual environment may, too.
        if path.startswith((f"{ROOT}/step", f"{ROOT}/shared")) and not path.startswith(f"{ROOT}/shared/ledger"):
            return f"{path.removeprefix(f'{ROOT}/')}:{frame.f_lineno}"
        frame = frame.f_back
    return "?"


class Listening(TorchDispatchMode):
    """While active, tells the listeners what this rank computes, starts and waits for."""

    def __init__(self, *listeners: Listener) -> None:
        super().__init__()
        self.listeners = listeners
        self.batches, self.batch = 0, None

    def __enter__(self) -> "Listening":
        wait, batched = FakeWork.wait, dist.batch_isend_irecv

        def observed_wait(work: Work, *args: object) -> bool:
            for listener in self.listeners:
                listener.waited(work)
            return wait(work, *args)

        def observed_batch(operations: list[dist.P2POp]) -> list[Work]:
            self.batches += 1
            self.batch = self.batches
            works = batched(operations)
            self.batch = None
            return works

        FakeWork.wait, dist.batch_isend_irecv = observed_wait, observed_batch
        self.undo = lambda: (setattr(FakeWork, "wait", wait), setattr(dist, "batch_isend_irecv", batched))
        return super().__enter__()

    def __exit__(self, *error: object) -> None:
        super().__exit__(*error)
        self.undo()

    def __torch_dispatch__(self, op, types, args=(), kwargs=None):
        kwargs = kwargs or {}
        if op.namespace != "c10d":
            for listener in self.listeners:
                listener.computed(op, args, kwargs)
            return op(*args, **kwargs)
        kind, *arguments = CALLS[op._opname]
        sent, received = ([] if i is None else tensors(args[i]) for i in arguments)
        out = op(*args, **kwargs)
        (work,) = (Work.unbox(x) for x in tree_iter(out) if isinstance(x, torch.ScriptObject))
        groups = (x for x in args if isinstance(x, torch.ScriptObject) and "ProcessGroup" in str(x._type()))
        group = ProcessGroup.unbox(next(groups))
        ranks = tuple(dist.get_process_group_ranks(group))
        is_message = kind in ("send", "receive")
        call = Call(
            kind,
            f"{group.group_name} of {ranks}",
            ranks,
            " and ".join(["message" if is_message else kind, *(f"{t.numel()} {t.dtype}" for t in sent or received)]),
            ranks[args[2]] if is_message else None,
            self.batch,
            place(),
        )
        if kind == "receive":
            for tensor in received:
                # A change that autograd does not see.
                tensor.data.zero_()
        for listener in self.listeners:
            listener.started(work, call, sent, received)
        return out


@contextmanager
def fake_group(rank: int, ranks: int) -> Iterator[None]:
    """Be that rank of so many: a trainer finds a mesh whose other ranks do not exist."""

    def start_mesh(config):
        sizes = distributed.check_launch(config)
        options = {"mesh_dim_names": tuple(sizes), "backend_override": dict.fromkeys(sizes, "fake")}
        return init_device_mesh("cpu", tuple(sizes.values()), **options), torch.device("cpu")

    environment = {"RANK": str(rank), "LOCAL_RANK": str(rank), "WORLD_SIZE": str(ranks)}
    dist.init_process_group("fake", rank=rank, world_size=ranks, store=FakeStore())
    try:
        with patch.dict(os.environ, environment), patch.object(distributed, "start_mesh", start_mesh):
            yield
    finally:
        dist.destroy_process_group()


def post_when_due() -> None:
    """Let the pipeline of the loaded step post its receives as it does on a GPU."""
    for name in ("channels", "pipeline.channels"):
        if channels := sys.modules.get(name):
            make = channels.Channel.__init__

            def init(channel, *args, make=make, **kwargs):
                make(channel, *args, **kwargs)
                channel.posts_ahead = False

            channels.Channel.__init__ = init


def run_rank(module: ModuleType, rank: int, ranks: int, args: list[str], *listeners: Listener) -> dict:
    """train() of a loaded step as that rank. Returns what its ledger found."""
    found = {}
    report = report_into(found)(module.LedgerReport)
    config = parse(module.Config, [*args, "--ledger"])
    with (
        fake_group(rank, ranks),
        patch.object(module, "LedgerReport", report),
        # Measured, the peak takes a second.
        patch.object(shared.metrics, "peak_flops", lambda *_: 1.0),
        Listening(*listeners),
    ):
        module.train(config)
    return found
