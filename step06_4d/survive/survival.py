"""What keeps a run alive, as one context around the training loop."""

from collections.abc import Iterator
from contextlib import ExitStack
from dataclasses import dataclass
from types import TracebackType
from typing import Any

from survive import bad_steps, checkpoint, checkpoint_options, garbage, heartbeat, stopping
from torch import Tensor
from transformers import PreTrainedConfig

from shared.corpus import Corpus
from shared.metrics import Metrics


@dataclass
class Config(
    heartbeat.Config,
    stopping.Config,
    checkpoint_options.Config,
    bad_steps.Config,
    garbage.Config,
):
    """The options of a run that survives."""


class Run:
    """Context of a training loop, which takes its steps from `steps`, asks `accepts`, and reports by `log`."""

    def __init__(self, trainer: Any, model_config: PreTrainedConfig, corpus: Corpus) -> None:
        """`trainer` is the `Trainer` of train.py: it goes on from the newest checkpoint, if there is one."""
        self.config = config = trainer.config
        self.bad_steps = bad_steps.BadSteps(config, trainer.batches)
        self.checkpoints = checkpoint.Checkpoints(trainer, self.bad_steps, corpus)
        self.start = self.checkpoints.load()
        # Of the same run, as long as it lives in this directory.
        wandb_id = config.checkpoint_dir and config.checkpoint_dir / "wandb-id"
        consumed = trainer.batches.consumed
        self.metrics = Metrics(config, model_config, trainer.device, self.start, consumed, wandb_id)
        self.heartbeat = heartbeat.Heartbeat(config)
        self.stopping = stopping.Stopping(config, trainer.device)

    def __enter__(self) -> "Run":
        with ExitStack() as contexts:
            contexts.enter_context(self.stopping)
            contexts.enter_context(self.heartbeat)
            contexts.enter_context(self.metrics)
            contexts.enter_context(self.checkpoints)
            self.collect_garbage = contexts.enter_context(garbage.collected(self.config))
            self.contexts = contexts.pop_all()
        return self

    def __exit__(self, kind: type | None, error: BaseException | None, traceback: TracebackType | None) -> None:
        """Ends the process if the run was told to stop. Raises UserError if nothing is left of its last step."""
        self.contexts.__exit__(kind, error, traceback)
        if kind is None and self.stopping.told:
            self.stopping.leave(saved=self.checkpoints.saved_step is not None)
        if kind is None and not self.config.export_dir:
            self.checkpoints.check_saved()

    def steps(self) -> Iterator[int]:
        """The steps that are left. After each that is reported, all ranks agree whether to go on; it may be saved."""
        last = self.config.last_step
        if self.config.finished and self.metrics.reports:
            print(f"finished already: step {self.start} is in {self.config.newest}", flush=True)
        for step in range(self.start + 1, last + 1):
            if self.config.logs(step - 1) and self.stopping.agreed():
                self.checkpoints.save(step - 1)
                return
            self.heartbeat.step = step
            yield step
            self.checkpoints.maybe_save(step, last=step == last)

    def accepts(self, loss: Tensor, grad_norm: Tensor) -> bool:
        """Whether the optimizer may take this step."""
        return self.bad_steps.accepts(loss, grad_norm)

    def log(self, step: int, loss: Tensor, grad_norm: Tensor, lr: float) -> None:
        """Report a step. Raises UserError if it was bad and the run is to stop."""
        self.bad_steps.log(self.metrics, step, loss, grad_norm, lr)
        self.collect_garbage(step)

    def log_evaluation(self, step: int, losses: dict[str, float]) -> None:
        self.metrics.log_evaluation(step, losses)

    def export(self) -> None:
        """After training: write --export-dir, which no rank holds more of than one file."""
        # It ends soon enough, whoever is told to stop.
        with self.stopping:
            self.checkpoints.export(self.config.export_dir)
        self.checkpoints.check_saved()
