"""The options of checkpoints, and what a run finds that was started before."""

from contextlib import suppress
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Literal

from survive import durable
from survive.agreement import Failed
from survive.boxes import own_boxes

from shared.config import UserError, check_writable


@dataclass
class Config:
    """The options of checkpoints."""

    # Save checkpoints in this directory, which all machines must see. If it has some, training goes on from the newest,
    # under any layout. After a crash, the same command line goes on, and continues --metrics-file too.
    checkpoint_dir: Path | None = None
    # Save a checkpoint after every this many steps, and one after the last step. 0 saves the last one only.
    save_every: int = 100
    # Keep this many of the newest checkpoints. With two, a damaged one costs --save-every steps, and not the run.
    keep: int = 2
    # Keep those of steps that this divides, too, for good. 0 keeps no others.
    keep_every: int = 0
    # Start from this checkpoint, or from the newest in this directory, unless --checkpoint-dir has one of its own.
    resume_from: Path | None = None
    # Go on with the weights and moments of --resume-from, and begin anew with all else: the steps, the schedule, and
    # data, which may be another --dataset or --seq-len.
    new_stage: bool = False
    # What to do if a checkpoint cannot be written, say because the disk is full. warn: go on without it. stop: end the
    # run.
    on_save_error: Literal["warn", "stop"] = "warn"

    @property
    def resumes(self) -> bool:
        return self.checkpoint_dir is not None and self.checkpoint_dir.is_dir()

    @property
    def newest(self) -> Path | None:
        """The checkpoint that the same command goes on from."""
        return next(iter(durable.complete(self.checkpoint_dir)), None) if self.resumes else None

    @property
    def sequences(self) -> int:
        """How many are trained on until the last step. Those before may have had another --global-batch-size."""
        found = durable.complete(self.checkpoint_dir) if self.resumes else []
        if not found and self.resume_from and not self.new_stage:
            found = [durable.named(self.resume_from)]
        for path in found:
            # One that is damaged is not what a run goes on from.
            with suppress(Failed, OSError):
                done = durable.read_manifest(path)
                return done["consumed"] + max(self.steps - done["step"], 0) * self.global_batch_size
        return super().sequences

    def copied_bytes(self, trainer: Any) -> int:
        """What this rank copies into its machine's memory for a save, and keeps there."""
        kinds = 3 if self.optimizer == "adamw" else 1
        share = own_boxes(trainer.model, trainer.reducer, share=True)
        return kinds * sum((own.part.stop - own.part.start) * own.trained.element_size() for own in share)

    def left_unfinished(self) -> str:
        return f"the same command goes on from {self.newest}" if self.newest else super().left_unfinished()

    def logs(self, step: int) -> bool:
        # Nothing is saved that may not be a number.
        return super().logs(step) or bool(self.checkpoint_dir and self.save_every and step % self.save_every == 0)

    def validate(self) -> None:
        super().validate()
        if self.save_every < 0 or self.keep < 1:
            raise UserError(f"--save-every {self.save_every} and --keep {self.keep} must be at least 0 and 1")
        if self.keep_every and (self.keep_every < 0 or not self.save_every or self.keep_every % self.save_every):
            raise UserError(f"--keep-every {self.keep_every} must be a multiple of --save-every {self.save_every}")
        if self.new_stage and not self.resume_from:
            raise UserError("--new-stage goes on from another run's checkpoint: name it by --resume-from")
        if self.checkpoint_dir:
            check_writable(self.checkpoint_dir, "--checkpoint-dir")
        try:
            found = not self.resume_from or self.newest or (durable.named(self.resume_from) / durable.MANIFEST).exists()
        except OSError as error:
            raise UserError(f"--resume-from {self.resume_from}: {error.strerror}") from error
        if not found:
            raise UserError(f"--resume-from {self.resume_from} holds no complete checkpoint")
        ours = self.checkpoint_dir.resolve() if self.checkpoint_dir else None
        if ours and self.resume_from and self.resume_from.resolve().is_relative_to(ours):
            raise UserError(
                f"--resume-from {self.resume_from} lies in --checkpoint-dir, whose newest checkpoint is taken anyway: "
                "to go back to an earlier one, save to another --checkpoint-dir"
            )
