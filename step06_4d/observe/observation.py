"""What looks at a run, as one context around the training loop."""

from contextlib import ExitStack
from dataclasses import dataclass
from typing import Any

from observe import dry_run, phases, traces

from shared.metrics import Metrics


@dataclass
class Config(
    dry_run.Config,
    phases.Config,
    traces.Config,
):
    """The options of looking at a run."""


class Observation:
    """Context of a training loop, which calls `start_step` and `end_step`. Does nothing without an option."""

    def __init__(self, trainer: Any, metrics: Metrics) -> None:
        """`trainer` is the `Trainer` of train.py."""
        self.phases, self.traces = phases.Phases(trainer, metrics), traces.Traces(trainer.config, metrics)

    def __enter__(self) -> "Observation":
        with ExitStack() as contexts:
            contexts.enter_context(self.phases)
            contexts.enter_context(self.traces)
            self.contexts = contexts.pop_all()
        return self

    def __exit__(self, *error: object) -> None:
        self.contexts.__exit__(*error)

    def start_step(self, step: int) -> None:
        self.traces.start_step()
        self.phases.start_step(step)

    def end_step(self, step: int) -> None:
        """After the step has been logged."""
        self.phases.end_step(step)
