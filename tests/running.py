"""Runs of a step's train(), observed or changed from outside."""

from types import ModuleType

from conftest import load_step

from shared.config import parse


def train(args, step, **replaced):
    """Run train() with some of its functions wrapped: name=wrapper(original)."""
    module = load_step(step)
    modules = [value for value in vars(module).values() if isinstance(value, ModuleType)]
    for name, wrapper in replaced.items():
        # A method of Trainer, or of train.py or of what that imports.
        owner = next(owner for owner in (module.Trainer, module, *modules) if name in vars(owner))
        setattr(owner, name, wrapper(getattr(owner, name)))
    module.train(parse(module.Config, args))


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
