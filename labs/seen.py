"""Runs with a bug or without, and what there is to see of them."""

import contextlib
import io
import tempfile
from collections.abc import Callable
from functools import cache
from pathlib import Path
from types import ModuleType
from typing import NamedTuple

import parity
from conftest import load_step, small_options, write_text
from ranks import run_ranks
from running import report_into

from labs.bugs import Bug
from shared.timeline import Event

# Options that change the model, which a single device takes as well.
OF_THE_MODEL = ("--tie-word-embeddings", "--num-key-value-heads")


class Seen(NamedTuple):
    """What a rank sees of a run."""

    records: list[parity.StepRecord]
    # Counts and formula by (axis, kind), and the steps counted.
    ledger: dict
    # What the check at the end of training says, if the replicas differ.
    replicas: str | None
    # Of a pipeline, on rank 0: how the last step went, and how it would ideally.
    events: list[Event] | None
    ideal: list[Event] | None
    # Why the schedules of the stages could never run, if they could not.
    impossible: str | None


def watch(step: str, args: list[str], plant: Callable[[ModuleType], None] | None) -> Seen:
    """On a rank: train, once `plant` has broken the step's module."""
    module, ledger, found = load_step(step), {}, {}
    if plant:
        plant(module)
    module.LedgerReport = report_into(ledger)(module.LedgerReport)
    reducer = module.data_parallel.Reducer

    def check_replicas(self: object, real: Callable = reducer.check_replicas) -> None:
        try:
            real(self)
        except RuntimeError as error:
            found["replicas"] = str(error)

    reducer.check_replicas = check_replicas
    if hasattr(module, "pipeline_parallel"):
        pipeline = module.pipeline_parallel

        def simulate(schedules: list, real: Callable = pipeline.simulate) -> list[Event]:
            try:
                return real(schedules)
            except ValueError as error:
                found["impossible"] = str(error)
                return []

        pipeline.simulate = simulate
        pipeline.write_timeline = lambda path, events, ideal: found.update(events=events, ideal=ideal)
    # Nothing but what is asked for.
    with contextlib.redirect_stdout(io.StringIO()), contextlib.redirect_stderr(io.StringIO()):
        records = parity.observed(module, tuple(args))
    return Seen(records, ledger, *(found.get(name) for name in ("replicas", "events", "ideal", "impossible")))


@cache
def corpus() -> Path:
    """A text that a small model learns in seconds, for as long as this process lives."""
    corpus.directory = tempfile.TemporaryDirectory()
    return write_text(Path(corpus.directory.name))


def options(bug: Bug, steps: int) -> list[str]:
    """Of the run in which a bug shows. In float64, where a correct one agrees with a single device to rounding."""
    words = bug.options.split()
    # Ranks of tp and cp talk in each micro-batch: one per step. Of dp and pp they are the point: four.
    size = "8" if "--tp" in words or "--cp" in words else "2"
    common = ["--micro-batch-size", size, "--steps", str(steps), "--dtype", "float64", "--eval-every", "0"]
    return [*small_options(corpus()), *common, *words]


def run(bug: Bug, planted: bool, steps: int) -> list[Seen]:
    """What each rank sees of the run with the bug, or of the same without."""
    args = [*options(bug, steps), "--ledger"]
    if "--pp" in args:
        args += ["--timeline", str(corpus().parent / "timeline.svg")]
    return run_ranks(bug.ranks, watch, bug.step, args, bug.plant if planted else None)


def single_device(bug: Bug, steps: int) -> list[parity.StepRecord]:
    """The same model on the same batches, by step01."""
    words = bug.options.split()
    of_model = [word for i, name in enumerate(words) if name in OF_THE_MODEL for word in words[i : i + 2]]
    args = [*options(bug, steps)[: -len(words) or None], *of_model]
    with contextlib.redirect_stdout(io.StringIO()), contextlib.redirect_stderr(io.StringIO()):
        return parity.reference(tuple(args))
