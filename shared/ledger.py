"""What a training step sends: calls and bytes by group and kind, observed from outside.

The code under observation keeps calling plain `torch.distributed`: a dispatch mode sees the ops that these calls
become, on gloo and on NCCL alike.
"""

from collections import Counter
from types import TracebackType
from typing import NamedTuple

import torch
import torch.distributed as dist
from torch._C._distributed_c10d import ProcessGroup
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_iter

# Steps whose mean the table shows, if the run has as many.
STEPS = 3
# Op -> its name in the table, and the argument that holds this rank's payload: what it contributes, except for an
# all-gather, a scatter and a receive, where it is what arrives.
OPS = {
    "allreduce_": ("all-reduce", 0),
    "allreduce_coalesced_": ("all-reduce", 0),
    "reduce_": ("reduce", 0),
    "gather_": ("gather", 1),
    "scatter_": ("scatter", 0),
    "broadcast_": ("broadcast", 0),
    "_allgather_base_": ("all-gather", 0),
    "allgather_": ("all-gather", 0),
    "allgather_into_tensor_coalesced_": ("all-gather", 0),
    "_reduce_scatter_base_": ("reduce-scatter", 1),
    "reduce_scatter_": ("reduce-scatter", 1),
    "reduce_scatter_tensor_coalesced_": ("reduce-scatter", 1),
    "alltoall_base_": ("all-to-all", 1),
    "alltoall_": ("all-to-all", 1),
    "send": ("send", 0),
    "recv_": ("receive", 0),
    "recv_any_source_": ("receive", 0),
    "barrier": ("barrier", None),
}


class Traffic(NamedTuple):
    calls: int
    bytes: int


class Ledger(TorchDispatchMode):
    """Counts while it is the active mode. `counts` maps (axis, kind) to the Traffic of this rank.

    What runs under `torch.inference_mode`, as evaluation does, is not counted.
    """

    def __init__(self) -> None:
        super().__init__()
        self.calls: Counter[tuple[str, str]] = Counter()
        self.bytes: Counter[tuple[str, str]] = Counter()

    @property
    def counts(self) -> dict[tuple[str, str], Traffic]:
        return {key: Traffic(self.calls[key], self.bytes[key]) for key in sorted(self.calls)}

    def __torch_dispatch__(self, func, types, args=(), kwargs=None):  # noqa: ANN001, ANN204 (torch's own signature)
        self.count(func, args)
        return func(*args, **(kwargs or {}))

    def count(self, func: torch._ops.OpOverload, args: tuple) -> None:
        """What this op sends, if it does."""
        if func.namespace == "aten":
            return
        groups = [arg for arg in args if isinstance(arg, torch.ScriptObject) and "ProcessGroup" in str(arg._type())]
        if func.namespace == "_c10d_functional" or (groups and func._opname not in OPS):
            raise NotImplementedError(f"the ledger does not know {func}")
        if groups and not torch.is_inference_mode_enabled():
            kind, payload = OPS[func._opname]
            group = ProcessGroup.unbox(groups[0])
            key = group.group_desc.removeprefix("mesh_").replace("default_pg", "world"), kind
            self.calls[key] += 1
            if payload is not None:
                self.bytes[key] += sum(t.nbytes for t in tree_iter(args[payload]) if isinstance(t, torch.Tensor))


class LedgerReport:
    """Context of a training loop: prints the mean traffic of the first steps next to the expected, or does nothing."""

    def __init__(self, enabled: bool, expected: dict[tuple[str, str], Traffic]) -> None:
        self.ledger = Ledger() if enabled else None
        self.expected, self.steps = expected, 0

    def __enter__(self) -> "LedgerReport":
        if self.ledger:
            self.ledger.__enter__()
        return self

    def __exit__(self, kind: type | None, error: BaseException | None, traceback: TracebackType | None) -> None:
        if self.ledger:
            self.ledger.__exit__(kind, error, traceback)
            if kind is None and self.steps and (not dist.is_initialized() or dist.get_rank() == 0):
                print(table(self.ledger.counts, self.expected, self.steps), flush=True)
            self.ledger = None

    def end_step(self) -> None:
        self.steps += 1
        if self.steps == STEPS:
            self.__exit__(None, None, None)


def table(counts: dict[tuple[str, str], Traffic], expected: dict[tuple[str, str], Traffic], steps: int) -> str:
    """The counts per step of a rank, next to the formula's, as text."""
    lines = [f"{'per step and rank':<24}{'calls':>8}{'bytes':>16}    formula"]
    for axis, kind in sorted(counts.keys() | expected.keys()):
        calls, nbytes = (value / steps for value in counts.get((axis, kind), (0, 0)))
        formula = expected.get((axis, kind), Traffic(0, 0))
        mark = "=" if (calls, nbytes) == formula else "≠"
        lines.append(f"{axis + ' ' + kind:<24}{calls:>8g}{nbytes:>16,.0f}  {mark} {formula.calls} × {formula.bytes:,}")
    return "\n".join(lines)
