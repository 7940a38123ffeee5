"""Put a student's functions in the project's place, on every rank, and say what is wrong with them."""

import io
import json
import sys
import tempfile
from contextlib import redirect_stderr, redirect_stdout
from functools import cache, lru_cache
from pathlib import Path

from labs.table import Lab

if "conftest" not in sys.modules:
    # The harness measures the peak of matmuls, which takes seconds, and no lab asks for the share of it.
    from shared import metrics

    metrics.peak_flops = lambda *_: 1.0

from unittest.mock import patch

import parity
from conftest import load_step, small_options, write_text
from ranks import RankFailed, run_ranks

from labs import on_paper
from labs.attempt import Call, Failure, Trained, attempt, train
from labs.diagnosis import diagnose
from labs.forward import Outputs, first_difference, recorded
from labs.waiting import disagreements

# Seconds that a rank waits for the others' call, and for the whole judgement.
PATIENCE, LIMIT = 10, 120
# Besides the sizes of the tests' small runs.
OPTIONS = {
    # Two parameters, so that one can see where backward begins.
    "tie-word-embeddings": False,
    "steps": parity.STEPS,
    "eval-every": 0,
    "dtype": "float64",
    # Which forgives no factor.
    "optimizer": "sgd",
    "lr": 0.5,
}


@cache
def corpus() -> tempfile.TemporaryDirectory:
    """A text that a model can learn."""
    directory = tempfile.TemporaryDirectory(prefix="parallel-steps-labs-")
    write_text(Path(directory.name))
    return directory


def arguments(lab: Lab) -> tuple[str, ...]:
    """Of the run on one device that the lab's is compared with."""
    options = [word for name, value in OPTIONS.items() for word in (f"--{name}", str(value))]
    return (*small_options(Path(corpus().name, "corpus.txt")), *options, *lab.model.split())


def with_micro_batches(lab: Lab) -> tuple[str, ...]:
    """The same with micro-batches as large as the lab's."""
    words = lab.options.split()
    first = words.index("--micro-batch-size") if "--micro-batch-size" in words else len(words)
    return (*arguments(lab), *words[first : first + 2])


@lru_cache
def outputs_of_one_device(args: tuple[str, ...]) -> Outputs:
    module = load_step("step01_single_gpu")
    with recorded(module) as outputs:
        parity.observed(module, args)
    return outputs


@lru_cache
def last_micro_batch(args: tuple[str, ...]) -> parity.StepRecord:
    """The first step of one device that sees its last micro-batch alone."""
    module = load_step("step01_single_gpu")
    whole = module.Trainer.forward_backward
    with patch.object(module.Trainer, "forward_backward", lambda trainer, batches: whole(trainer, batches[-1:])):
        return parity.observed(module, args)[0]


def judge(lab: Lab, path: Path) -> str | None:
    """What is wrong with the functions in this file. None if nothing is."""
    with tempfile.TemporaryDirectory(prefix="parallel-steps-labs-") as name:
        directory = Path(name)
        if lab.judge != "training":
            work, ranks, args = getattr(on_paper, lab.judge), 1, ()
        else:
            options = (*lab.options.split(), "--timeout", str(PATIENCE))
            work, ranks, args = train, lab.ranks, ((*arguments(lab), *options),)
            # What it says of its corpus is none of the student's business.
            with redirect_stdout(io.StringIO()), redirect_stderr(io.StringIO()):
                right = parity.reference(arguments(lab))
        try:
            returned = run_ranks(ranks, attempt, lab.step, lab, path, directory, work, *args, timeout=LIMIT)
        except RankFailed as error:
            return of_failure(directory, str(error))
        if lab.judge != "training":
            return returned[0]
        called = calls(directory)
        if found := disagreements(called):
            return found[0]
    alone, known = with_micro_batches(lab), returned[0].known

    def forward() -> str | None:
        return first_difference([trained.outputs for trained in returned], outputs_of_one_device(alone), known)

    parts = {"the last micro-batch alone": last_micro_batch(alone)} if ranks == 1 else {}
    wrong = diagnose([trained.records for trained in returned], right, known, parts, forward)
    return wrong or of_traffic(lab, returned, called)


def calls(directory: Path) -> list[Call]:
    lines = [line for file in sorted(directory.glob("calls-*")) for line in file.read_text().splitlines()]
    return [Call(*json.loads(line)) for line in lines]


def of_failure(directory: Path, otherwise: str) -> str:
    """Why the ranks did not come to an end."""
    failures = [Failure(*json.loads(file.read_text())) for file in sorted(directory.glob("failed-*"))]
    raised = [failure for failure in failures if failure.why != "waiting"]
    if raised:
        # Of the first: it may have been the cause of the others.
        why, message, place, line, is_students = raised[0]
        if why == "missing":
            return message
        if why == "not written":
            return f"`{message}` is not written yet ({place})"
        used = "" if is_students else "what your function has done does not fit its use in "
        return f"{used}{place}\n    {line}\n{message}"
    found = disagreements(calls(directory))[:3]
    hangs = "hangs: " if found and not found[0].startswith("the ranks do not agree") else ""
    text = "; ".join(found) or otherwise.strip().splitlines()[-1]
    return hangs + text + (f" ({failures[0].place}: {failures[0].line})" if failures else "")


def of_traffic(lab: Lab, returned: list[Trained], called: list[Call]) -> str | None:
    """Right numbers at a higher price."""
    for rank, trained in enumerate(returned):
        for key in sorted(trained.counts.keys() | trained.formula.keys()):
            calls, nbytes = (n / parity.STEPS for n in trained.counts.get(key, (0, 0)))
            formula = trained.formula.get(key, (0, 0))
            if (calls, nbytes) != formula:
                return (
                    f"the numbers are right, the traffic is not: {' '.join(key)} of rank {rank} is {calls:g} calls and "
                    f"{nbytes:,.0f} bytes per step, where the formula has {formula[0]} and {formula[1]:,}"
                )
    if lab.overlaps and not any(call.in_backward and call.axis == lab.overlaps for call in called):
        return f"the numbers are right, but no call of {lab.overlaps} begins while backward runs: nothing overlaps"
    return None
