"""Runs of a step's train(), observed or changed from outside."""

import contextlib
import io
from types import ModuleType
from unittest.mock import patch

from conftest import load_step

from shared.config import UserError, parse


def train(args, step, **replaced):
    """Run train() with some of its functions wrapped: name=wrapper(original)."""
    module = load_step(step)
    modules = [value for value in vars(module).values() if isinstance(value, ModuleType)]
    with contextlib.ExitStack() as patches:
        for name, wrapper in replaced.items():
            # A method of Trainer, or of train.py or of what that imports.
            owner = next(owner for owner in (module.Trainer, module, *modules) if name in vars(owner))
            patches.enter_context(patch.object(owner, name, wrapper(getattr(owner, name))))
        module.train(parse(module.Config, args))


def printed(args, step):
    """What a run prints on this rank."""
    with contextlib.redirect_stdout(io.StringIO()) as out:
        train(args, step)
    return out.getvalue()


def instrumented(function):
    """For `train`: calls function(trainer) before the first step."""

    def init(original):
        def made(trainer, *args):
            original(trainer, *args)
            function(trainer)

        return made

    return {"__init__": init}


def report_into(found):
    """For `LedgerReport`: puts what it has counted, and the formula, into a dictionary."""

    def report(original):
        class Report(original):
            def __exit__(self, *error):
                if self.ledger:
                    found.update(counts=self.ledger.counts, expected=self.expected, steps=self.steps)
                super().__exit__(*error)

        return Report

    return report


def ledger_of(args, step):
    """What this rank's ledger counted per step, and the formula."""
    found = {}
    train([*args, "--ledger"], step, LedgerReport=report_into(found))
    return found


def check_ledger(found):
    """Assert that a rank has sent what the formula says: one that needs the others, or see fake_ranks.py."""
    steps = found["steps"]
    counts = {key: (t.calls / steps, t.bytes / steps) for key, t in found["counts"].items()}
    assert steps > 1 and counts == {key: tuple(t) for key, t in found["expected"].items()}


def user_error(args, step, **replaced):
    """The message of the UserError that ends a run, or None."""
    try:
        train(args, step, **replaced)
    except UserError as error:
        return str(error)
