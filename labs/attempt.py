"""What a rank does with a student's functions in place, and what it leaves behind for the judge, even if it hangs."""

import faulthandler
import json
import os
import sys
import time
import traceback
from collections.abc import Callable
from pathlib import Path
from types import ModuleType
from typing import NamedTuple
from unittest.mock import patch

import parity
import torch
import torch.distributed as dist
from conftest import load_step
from torch._C._distributed_c10d import ProcessGroup
from torch.utils._pytree import tree_leaves

import shared.ledger
from labs import ROOT
from labs.cut import Missing, transplant
from labs.forward import Outputs, recorded
from labs.table import Lab
from shared.config import parse
from shared.ledger import OPS, Ledger, LedgerReport, Traffic


class Call(NamedTuple):
    """A collective or a message that a rank has started."""

    rank: int
    # The communicator, by a name that all its ranks agree on, the axis that it serves, and who they are.
    group: str
    axis: str
    ranks: list[int]
    kind: str
    bytes: int
    # Of a message: the other rank.
    peer: int | None
    in_backward: bool


class Failure(NamedTuple):
    """The exception that ended a rank."""

    # not written, missing, waiting (for a call that does not come), or raised
    why: str
    message: str
    # The innermost line of the student, or else of the project.
    place: str
    line: str
    is_students: bool


class Recorder(Ledger):
    """A ledger that writes each call to a file as it begins. What parity gathers to look at it is not counted."""

    # Descriptor of the file.
    file: int
    counts_now = True

    def count(self, func: torch._ops.OpOverload, args: tuple) -> None:
        groups = [arg for arg in args if isinstance(arg, torch.ScriptObject) and "ProcessGroup" in str(arg._type())]
        if groups:
            kind, payload = OPS[func._opname]
            group = ProcessGroup.unbox(groups[0])
            ranks = dist.get_process_group_ranks(group)
            tensors = [] if payload is None else tree_leaves(args[payload])
            call = Call(
                dist.get_rank(),
                group.group_name,
                group.group_desc.removeprefix("mesh_").replace("default_pg", "world"),
                ranks,
                kind,
                sum(t.nbytes for t in tensors if isinstance(t, torch.Tensor)),
                ranks[args[2]] if kind in ("send", "receive") else None,
                torch._C._current_graph_task_id() != -1,
            )
            os.write(self.file, (json.dumps(call) + "\n").encode())
        if self.counts_now:
            super().count(func, args)


class Trained(NamedTuple):
    """What a rank's training came to."""

    records: list[parity.StepRecord]
    # In all its steps, and by the formula in one.
    counts: dict[tuple[str, str], Traffic]
    formula: dict[tuple[str, str], Traffic]
    outputs: Outputs
    # Numbers that a wrong factor may be, and what they are.
    known: dict[str, float]


def train(module: ModuleType, directory: Path, args: tuple[str, ...]) -> Trained:
    """The run of parity.py, recorded."""
    found = {}

    class Report(LedgerReport):
        def __exit__(self, *error: object) -> None:
            if self.ledger:
                found.update(counts=self.ledger.counts, formula=self.expected)
                self.ledger.__exit__(*error)
                self.ledger = None

    def uncounted(function: Callable) -> Callable:
        def gather(*args: object) -> object:
            Recorder.counts_now = False
            result = function(*args)
            Recorder.counts_now = True
            return result

        return gather

    def parsed(*args: object) -> object:
        found["config"] = parse(*args)
        return found["config"]

    rank = os.environ["RANK"]
    Recorder.file = os.open(directory / f"calls-{rank}", os.O_CREAT | os.O_WRONLY)
    module.LedgerReport = Report
    if hasattr(module, "data_parallel"):
        # It would end the run with an exception; here the judge looks at the replicas.
        module.data_parallel.Reducer.check_replicas = lambda self: None
    with (
        patch.object(shared.ledger, "Ledger", Recorder),
        patch.object(parity, "parse", parsed),
        recorded(module) as outputs,
        patch.object(parity, "whole", uncounted(parity.whole)),
        patch.object(parity, "gradient", uncounted(parity.gradient)),
    ):
        records = parity.observed(module, (*args, "--ledger"))
    config = found.pop("config")
    known = {
        "ranks": int(os.environ["WORLD_SIZE"]),
        "micro-batches of the global batch": config.global_batch_size // config.micro_batch_size,
        "tokens of the global batch": config.global_batch_size * config.seq_len,
        "tokens of a micro-batch": config.micro_batch_size * config.seq_len,
    }
    return Trained(records, **found, outputs=outputs, known=known)


def attempt(step: str, lab: Lab, path: Path, directory: Path, work: Callable, *args: object) -> object:
    """On a rank: work(module of the step, directory, *args), with the student's functions."""
    module = load_step(step)
    # gloo ends a process when ranks do not agree. Its last words say no more than the judge does.
    faulthandler.disable()
    os.dup2(os.open(directory / f"stderr-{os.environ['RANK']}", os.O_CREAT | os.O_WRONLY), 2)
    try:
        transplant(lab, path)
        return work(module, directory, *args)
    except BaseException as error:
        file = directory / f"failed-{time.monotonic():015.4f}-{os.environ['RANK']}"
        file.write_text(json.dumps(failure(error, path)))
        raise
    finally:
        # What the student prints: a rank ends without.
        sys.stdout.flush()


def _innermost(error: BaseException) -> str:
    *_, (frame, _) = traceback.walk_tb(error.__traceback__)
    return frame.f_code.co_qualname


def failure(error: BaseException, path: Path) -> Failure:
    frames = traceback.extract_tb(error.__traceback__)
    if isinstance(error, SyntaxError):
        frames = [traceback.FrameSummary(error.filename or "", error.lineno or 0, "", line=error.text or "")]
    students = [frame for frame in frames if frame.filename == str(path)]
    projects = [frame for frame in frames if frame.filename.startswith((f"{ROOT}/step", f"{ROOT}/shared"))]
    frame = (students or projects or frames)[-1]
    why = "raised"
    if isinstance(error, NotImplementedError) and frames[-1].filename == str(path):
        why = "not written"
    elif isinstance(error, Missing):
        why = "missing"
    elif isinstance(error, RuntimeError) and ("gloo" in str(error) or "torch/distributed" in frames[-1].filename):
        why = "waiting"
    name = _innermost(error) if why == "not written" else f"{type(error).__name__}: {error}"
    place = f"{frame.filename.removeprefix(f'{ROOT}/')}:{frame.lineno}"
    return Failure(why, str(error) if why == "missing" else name, place, (frame.line or "").strip(), bool(students))
