"""Where the time of a step goes, on every rank.

Observed from outside: the code keeps calling plain functions. While a run is profiled, those in which a phase happens
are replaced by functions that note when it starts and ends.
"""

import threading
import time
from collections.abc import Callable, Iterator
from contextlib import ExitStack, contextmanager
from dataclasses import dataclass
from itertools import pairwise
from typing import Any

import torch
import torch.distributed as dist
from pipeline.schedules import Action

from shared.config import UserError
from shared.metrics import Metrics, peak_memory

# `exposed_communication`: what this rank waits for with nothing to compute. `other`: gradient norm, clipping, logging.
PHASES = ("data", "forward", "backward", "exposed_communication", "optimizer", "other")
# All end in `Work.wait`, but for NCCL, which puts those that are waited for at once into the stream of the computation.
COLLECTIVES = (
    "all_reduce",
    "all_gather_single",
    "reduce_scatter_single",
    "all_to_all_single",
    "broadcast",
    "batch_isend_irecv",
)


@dataclass
class Config:
    """The options of timing."""

    # Time the phases of a step once every this many steps, on every rank. 0 times none.
    profile: int = 0

    def logs(self, step: int) -> bool:
        return super().logs(step) or bool(self.profile and step % self.profile == 0)

    def validate(self) -> None:
        super().validate()
        if self.profile < 0:
            raise UserError(f"--profile must not be negative, but is {self.profile}")


class Phases:
    """Context of a training loop, which calls `start_step` and `end_step`: divides the time of a step among phases.

    A step is a list of marks. Each says which phase goes on from there, so the phases add up to the step, and nothing
    counts twice. On a GPU a mark is an event in the stream of the computation, which a wait for communication holds up.
    The time between two marks is the GPU's, and the host waits for none before the end of the step.
    """

    def __init__(self, trainer: Any, metrics: Metrics) -> None:
        """`trainer` is the `Trainer` of train.py."""
        self.trainer, self.metrics = trainer, metrics
        self.every, self.device = trainer.config.profile, trainer.device
        self.marks: list[tuple[str, float | torch.cuda.Event]] = []
        self.replaced = ExitStack()

    def __enter__(self) -> "Phases":
        if self.every:
            self._observe(self.trainer.batches, "next", "data")
            self._observe(self.trainer.optimizer, "step", "optimizer")
            self._observe_actions(self.trainer.pipeline)
            self._observe(dist.Work, "wait", "exposed_communication")
            for name in COLLECTIVES:
                self._observe(dist, name, "exposed_communication")
        return self

    def __exit__(self, *error: object) -> None:
        self.replaced.close()

    def _observe(self, owner: object, name: str, phase: str) -> None:
        function = getattr(owner, name)

        @torch.compiler.disable
        def observed(*args: object, **kwargs: object) -> object:
            with self._phase(phase):
                return function(*args, **kwargs)

        self.replaced.enter_context(replaced(owner, name, observed))

    def _observe_actions(self, pipeline: Any) -> None:
        """The executor's own record of its actions, of whatever schedule."""
        recorded = pipeline._recorded

        @contextmanager
        def observed(action: Action) -> Iterator[None]:
            with self._phase("forward" if action.kind == "forward" else "backward"), recorded(action):
                yield

        self.replaced.enter_context(replaced(pipeline, "_recorded", observed))

    @contextmanager
    def _phase(self, phase: str) -> Iterator[None]:
        if not self.marks or threading.current_thread().name == "checkpoint":
            # Between two steps that are timed, or beside them.
            yield
            return
        outer, _ = self.marks[-1]
        self._mark(phase)
        yield
        self._mark(outer)

    def _mark(self, phase: str) -> None:
        if self.device.type == "cuda":
            now = torch.cuda.Event(enable_timing=True)
            now.record()
        else:
            now = time.perf_counter()
        self.marks.append((phase, now))

    def start_step(self, step: int) -> None:
        if self.every and step % self.every == 0:
            self._mark("other")

    @torch.inference_mode()
    def end_step(self, step: int) -> None:
        """Report the step, if it was timed. Gathers 8 numbers of 8 bytes from every rank, after the step's ledger."""
        if not self.marks:
            return
        self._mark("other")
        mine = {**self._seconds(), "peak_memory": peak_memory(self.device)}
        values = torch.tensor(list(mine.values()), dtype=torch.float64, device=self.device)
        everyones = values.new_empty(dist.get_world_size() * len(values))
        dist.all_gather_single(everyones, values)
        everyones = everyones.view(-1, len(values))
        largest, ranks = everyones.max(0)
        columns = {"mean": everyones.mean(0).tolist(), "max": largest.tolist(), "rank": ranks.tolist()}
        rows = [dict(zip(columns, row, strict=True)) for row in zip(*columns.values(), strict=True)]
        profile = dict(zip(mine, rows, strict=True))
        self.metrics.note(step, table(profile), profile=profile)

    def _seconds(self) -> dict[str, float]:
        """Of each phase, and of the step, which ends with this."""
        seconds = dict.fromkeys((*PHASES, "step"), 0.0)
        if self.device.type == "cuda":
            self.marks[-1][1].synchronize()
        for (phase, start), (_, end) in pairwise(self.marks):
            duration = start.elapsed_time(end) / 1000 if self.device.type == "cuda" else end - start
            seconds[phase] += duration
            seconds["step"] += duration
        self.marks = []
        return seconds


@contextmanager
def replaced(owner: object, name: str, function: Callable) -> Iterator[None]:
    """`owner` has this function in the place of its own. Nothing else replaces functions of torch.distributed."""
    original = getattr(owner, name)
    setattr(owner, name, function)
    try:
        yield
    finally:
        setattr(owner, name, original)


def table(profile: dict[str, dict[str, float]]) -> str:
    """The profile of a step as text: the mean over the ranks, the largest, and whose that is."""
    lines = [f"{'where the time goes':<24}{'mean':>12}{'max':>12}{'on rank':>9}"]
    for name, row in profile.items():
        unit, scale = ("GiB", 2**30) if name == "peak_memory" else ("ms", 1e-3)
        mean, largest = (f"{row[column] / scale:,.2f} {unit}" for column in ("mean", "max"))
        lines.append(f"{name.replace('_', ' '):<24}{mean:>12}{largest:>12}{row['rank']:>9}")
    return "\n".join(lines)
