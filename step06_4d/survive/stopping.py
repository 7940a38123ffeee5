"""Stops a run that is told to stop, so that it can go on later. It is told by Ctrl-C, or by SIGTERM or SIGUSR1, which a
cluster sends before it takes its machines away, perhaps to one rank only. All ranks finish the step, save, and end."""

import signal
import sys
from contextlib import suppress
from dataclasses import dataclass
from types import FrameType
from typing import Any

import torch
import torch.distributed as dist
from survive import checkpoint_options, durable
from survive.agreement import Failed, with_agreement

from shared.config import UserError
from shared.ledger import Traffic
from shared.metrics import say

SIGNALS = (signal.SIGINT, signal.SIGTERM, signal.SIGUSR1)
# The exit code of a run that has stopped and saved: start the same command again.
REQUEUE = 85


@dataclass
class Config(checkpoint_options.Config):
    """The option of this feature. A run that saves can be stopped by a signal, too."""

    # Save and end after this step, with the learning rates of --steps: the same command without it goes on. What is
    # written at the end of --steps, an export and a timeline, is not.
    stop_after: int | None = None

    def logs(self, step: int) -> bool:
        # It will be saved.
        return super().logs(step) or step == self.stop_after

    @property
    def last_step(self) -> int:
        return min(self.steps, self.stop_after or self.steps)

    @property
    def finished(self) -> bool:
        return self.newest is not None and durable.step_of(self.newest) >= self.last_step

    def validate(self) -> None:
        if self.finished and self.export_dir and (self.export_dir / "config.json").is_file():
            # It was made when the run had finished.
            self.export_dir = None
        if self.finished or self.last_step < self.steps:
            # It was drawn when the run had finished, or will be.
            self.timeline = None
        if self.last_step < self.steps:
            self.export_dir = None
        super().validate()
        if self.stop_after is not None and not (self.stop_after > 0 and self.checkpoint_dir):
            raise UserError(f"--stop-after {self.stop_after} must be at least 1, and needs a --checkpoint-dir to go on")
        if self.resume_from and not (self.newest or self.new_stage):
            # One that is damaged is told of when it is loaded.
            with suppress(Failed, OSError):
                step = durable.read_manifest(durable.named(self.resume_from))["step"]
                if step >= self.last_step > 0:
                    raise UserError(
                        f"--resume-from {self.resume_from} has {step} steps, and this run is to have {self.last_step}: "
                        "raise --steps or --stop-after, or begin a stage with --new-stage"
                    )

    def traffic(self, trainer: Any) -> dict[tuple[str, str], Traffic]:
        """Payload of a rank per step that is reported, as all are with --ledger: an all-reduce of 4 bytes over all."""
        traffic = super().traffic(trainer)
        return with_agreement(traffic, torch.int32.itemsize) if self.checkpoint_dir else traffic


class Stopping:
    """Context of a training loop: notes these signals, or leaves them their meaning if nothing is saved anyway."""

    def __init__(self, config: Config, device: torch.device) -> None:
        self.config, self.device = config, device
        self.received, self.told = 0, 0

    def __enter__(self) -> "Stopping":
        numbers = SIGNALS if self.config.checkpoint_dir else ()
        self.previous = {number: signal.signal(number, self._note) for number in numbers}
        return self

    def __exit__(self, kind: type | None, *error: object) -> None:
        # Another signal must not disturb the way out: torchrun passes on what Slurm has sent to every process already,
        # and a job sends it again and again.
        if not (self.told or (self.received and kind is None)):
            for number, handler in self.previous.items():
                signal.signal(number, handler)

    def _note(self, number: int, frame: FrameType | None) -> None:
        self.received = number

    def agreed(self) -> bool:
        """Whether some rank was told to stop: all-reduces 4 bytes over all ranks, and waits for them."""
        if self.config.checkpoint_dir:
            told = torch.tensor(self.received, dtype=torch.int32, device=self.device)
            dist.all_reduce(told, dist.ReduceOp.MAX)
            # Not into `received`, or a signal that has come meanwhile would be lost.
            self.told = int(told)
        return self.told > 0

    def leave(self, saved: bool) -> None:
        """End the process, once all ranks have saved. Raises UserError if they could not: started again, the run would
        only come back to where it is."""
        if not saved:
            raise UserError("told to stop, but the last step could not be saved: make room, then the same command")
        if dist.get_rank() == 0:
            name = signal.Signals(self.told).name
            export = ", and writes --export-dir when it is done" if self.config.export_dir else ""
            say(f"told to stop ({name}), and saved: the same command goes on from there{export} (exit {REQUEUE})")
        dist.barrier()
        dist.destroy_process_group()
        sys.exit(REQUEUE)
