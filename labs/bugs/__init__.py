"""Bugs that still train: each is a function that breaks a step's loaded train.py, and tests prove that it does.

Most were found in published trainers. The docstring of a bug is the solution of a mystery.
"""

import importlib
from collections.abc import Callable
from types import ModuleType
from typing import NamedTuple

# The families. An answer to a mystery names one.
REASONS = {
    "factor": "every gradient is the right one times the same number",
    "missing-sum": "what ranks have shares of is not summed, or not over all who have one",
    "counted-twice": "what ranks have in common is summed as if each had a share of it",
    "order": "the right things happen, one of them too early, too late or for the wrong turn",
    "lost": "a contribution is dropped, overwritten, or left over from before",
    "tokens": "ranks read the wrong tokens or labels, or place them at wrong positions",
    "mask": "queries see keys that they must not see, or miss keys that they should",
    "softmax": "parts of a softmax are put together on different scales",
    "weights": "ranks begin with weights that are not those of the model",
    "rounding": "a number is kept in fewer bits than it needs",
}


class Bug(NamedTuple):
    """A bug, and the run in which it shows."""

    plant: Callable[[ModuleType], None]
    step: str
    ranks: int
    options: str
    # Where the faulty line would be, and what kind of fault it is: any of these is right.
    files: tuple[str, ...]
    reasons: tuple[str, ...]

    @property
    def name(self) -> str:
        return self.plant.__name__

    @property
    def what(self) -> str:
        """What is wrong, in a paragraph."""
        return " ".join(self.plant.__doc__.split())


BUGS: dict[str, Bug] = {}


def bug(
    step: str, options: str, files: str, reasons: str, ranks: int = 2
) -> Callable[[Callable[[ModuleType], None]], Callable[[ModuleType], None]]:
    """Decorates a function that is handed the step's module, on each rank, before it trains."""

    def register(plant: Callable[[ModuleType], None]) -> Callable[[ModuleType], None]:
        BUGS[plant.__name__] = Bug(plant, step, ranks, options, tuple(files.split()), tuple(reasons.split()))
        return plant

    return register


for _step in ("step02", "step03", "step04", "step05", "step06"):
    importlib.import_module(f"labs.bugs.{_step}")
