"""Checkpoints that any layout can load. Each rank writes what it trains, as boxes of tensors with Hugging Face's names.

`model.<name>` are the weights that the optimizer trains, `exp_avg.<name>` and `exp_avg_sq.<name>` its moments. All else
is a few numbers in the manifest. Training draws no random numbers, so there are no generators to save. The order of the
data follows from the seed and the sequences consumed.
"""

import json
import sys
import threading
import time
from collections.abc import Collection
from pathlib import Path
from statistics import median
from types import TracebackType
from typing import Any

import torch
import torch.distributed as dist
from survive import durable, exports, replicas
from survive.agreement import Damaged, Failed, on_first
from survive.bad_steps import BadSteps
from survive.boxes import Boxes
from survive.checkpoint_files import read, verified, write
from survive.state import TrainedState, will_load
from transformers import AutoConfig, PreTrainedConfig

from shared.config import UserError
from shared.corpus import Corpus
from shared.corpus.tokenizers import as_written
from shared.distributed import make_group
from shared.families import biased_linears, has_head_norms, has_rope
from shared.llama_configs import OVERRIDES
from shared.metrics import say
from shared.rope import ROPE_KEYS

# Seconds that a rank waits for another one to write its files.
PATIENCE = 1800
# What the order of the data depends on, which a new stage may change.
DATA = ("seed", "seq_len", "corpus", "training sequences")


class Checkpoints:
    """Context of a training loop: when it ends, the last checkpoint is complete.

    Saving stops training only for a copy of what is saved, in the memory of the CPU: with AdamW 12 bytes per number of
    this rank's share (24 in float64). A thread writes the copy, by a group of its own on gloo.
    """

    def __init__(self, trainer: Any, bad_steps: BadSteps, corpus: Corpus) -> None:
        """`trainer` is the `Trainer` of train.py."""
        self.config, self.model_config = trainer.config, trainer.model.model.config
        self.reducer, self.optimizer, self.batches = trainer.reducer, trainer.optimizer, trainer.batches
        self.bad_steps, self.corpus, self.device = bad_steps, corpus, trainer.device
        self.state = TrainedState(trainer)
        self.group = None
        if self.config.checkpoint_dir or self.config.resume_from or self.config.export_dir:
            everyone = list(range(dist.get_world_size()))
            self.group = make_group([everyone], "checkpoint", PATIENCE, "gloo")
        if self.config.export_dir:
            exports.check_shared(self.group, self.config.export_dir.parent)
        self.thread: threading.Thread | None = None
        self.error: BaseException | None = None
        # The step of which there is a checkpoint, or soon.
        self.saved_step: int | None = None
        # Of each step since the last save began; of a step before that; the save's own, when it is over.
        self.seconds: list[float] = []
        self.usual_seconds, self.report = 0.0, ""
        self.step_start = time.perf_counter()

    # Loading

    def load(self) -> int:
        """Go on from the newest checkpoint that is whole. Returns the step that it was saved after, or 0 without one.

        Raises UserError, on all ranks, if there are some but none is whole, or if it is of another model or run.
        """
        if not (self.config.checkpoint_dir or self.config.resume_from):
            return 0
        option = "--checkpoint-dir"
        try:
            found, damaged = on_first(self.group, self._find) if self.config.checkpoint_dir else [], {}
            option = option if found else "--resume-from"
            others = [on_first(self.group, self._named)] if self.config.resume_from else []
            for path in found or others:
                try:
                    step = self._read(path, new_stage=self.config.new_stage and path not in found)
                except Damaged as error:
                    damaged[path] = error
                    continue
                if path in found:
                    self.saved_step = step
                    self._set_aside(damaged)
                return step
        except Failed as error:
            raise UserError(f"{option}: {error}") from error
        if damaged:
            reasons = "; ".join(map(str, damaged.values()))
            raise UserError(f"no checkpoint to resume from is whole: {reasons}: restore a file, or start elsewhere")
        if will_load(self.config):
            # So it has no weights.
            raise UserError(f"--checkpoint-dir {self.config.checkpoint_dir} is not what rank 0 sees: share it")
        return 0

    def _find(self) -> list[Path]:
        directory = self.config.checkpoint_dir
        directory.mkdir(parents=True, exist_ok=True)
        durable.discard_unfinished(directory)
        return durable.complete(directory)

    def _named(self) -> Path:
        # By one rank: another run may be saving there.
        return durable.named(self.config.resume_from)

    def _set_aside(self, damaged: dict[Path, Damaged]) -> None:
        """Rename them, now that there is one to go on from: they must not stay the newest."""
        for path, error in damaged.items():
            aside = on_first(self.group, lambda path=path: durable.set_aside(path))
            self._say(f"warning: {path.name} is damaged ({error}): renamed to {aside.name}")

    def _read(self, path: Path, new_stage: bool) -> int:
        manifest = verified(self.group, path)
        self._check_same_run(path, manifest, () if new_stage else DATA)
        if new_stage:
            self._check_tokenizer(path / durable.TOKENIZER)
        # Straight into the weights and moments, which may have another dtype.
        read(self.group, path, self.state.views())
        for state in self.optimizer.state.values():
            state["step"].fill_(manifest["optimizer_steps"])
        self.reducer.weights_changed()
        if new_stage:
            self._say(f"new stage from {path} | its step {manifest['step']} | saved by {manifest['layout']}")
            return 0
        self.batches.consumed = manifest["consumed"]
        self.bad_steps.good.extend(map(tuple, manifest["bad_steps"]["good"]))
        self.bad_steps.in_a_row = manifest["bad_steps"]["in_a_row"]
        self._say(f"resumed from {path} | step {manifest['step']} | saved by {manifest['layout']}")
        return manifest["step"]

    def _check_same_run(self, path: Path, manifest: dict, data: Collection[str]) -> None:
        """Raise UserError unless it is of this model, optimizer and these parts of `DATA`. Other options may change."""
        # Another version of transformers may have written more of the model than it is made of, or less. What an older
        # version of this project has not written is no difference.
        ours = self._identity()
        theirs = ours | manifest["identity"] | made_of(AutoConfig.for_model(**manifest["model"]))
        same = [key for key in ours if key in data or key not in DATA]
        different = [f"{key} {theirs[key]} there, {ours[key]} here" for key in same if ours[key] != theirs[key]]
        if different:
            raise UserError(
                f"{path} is of another run: {'; '.join(different)}: give the options that it was started with, or go "
                "on under other data by --resume-from with --new-stage, or export it (step06_4d/export.py) and start "
                "a new run from its weights with --init-from"
            )

    def _check_tokenizer(self, saved: Path) -> None:
        """Raise UserError if a token has another id by now, which its embedding does not know."""
        before, now = as_written(saved).get_vocab(), self.corpus.tokenizer.get_vocab()
        if not before.items() <= now.items():
            raise UserError(f"{saved.parent} was trained with another tokenizer: pass --tokenizer {saved}")

    def _identity(self) -> dict:
        return {
            **made_of(self.model_config),
            "optimizer": self.config.optimizer,
            "seed": self.config.seed,
            "seq_len": self.config.seq_len,
            "corpus": self.corpus.fingerprint,
            # Fewer if more are held out. A stream has as many as the run is long.
            "training sequences": None if self.config.streaming else list(map(len, self.batches.sequences.sources)),
        }

    # Saving

    def maybe_save(self, step: int, last: bool) -> None:
        """`save` after every `save_every` steps and after the last."""
        self.seconds.append(time.perf_counter() - self.step_start)
        self._tell()
        every = self.config.save_every
        if self.config.checkpoint_dir and (last or (every and step % every == 0)):
            self.save(step)
        self.step_start = time.perf_counter()

    def save(self, step: int) -> None:
        """Copy what `step` has left, and write it while training goes on. `finish` waits for that; so does the next."""
        start = time.perf_counter()
        self.finish()
        if step == self.saved_step:
            return
        self.saved_step = step
        copies = self.state.copies(), self.state.checksums(), self._manifest(step)
        self.usual_seconds, self.seconds = median(self.seconds or [0.0]), []
        waited = time.perf_counter() - start
        # A daemon, for a process that fails must not wait for ranks that will not come.
        self.thread = threading.Thread(target=self._write, args=(step, waited, *copies), name="checkpoint", daemon=True)
        self.thread.start()

    def finish(self) -> None:
        """Wait for the checkpoint that is being written. Raises UserError if it failed and the run is to stop."""
        if self.thread:
            self.thread.join()
        self._tell()
        self.thread, error, self.error = None, self.error, None
        if isinstance(error, Failed):
            # Stopping tries again.
            self.saved_step = None
            if self.config.on_save_error == "stop":
                raise UserError(f"{error}: make room, or go on without it by --on-save-error warn")
        elif error:
            raise error

    def check_saved(self) -> None:
        """After the last step: raise UserError if it could not be saved, or the run would count as finished."""
        if self.config.checkpoint_dir and self.config.steps and self.saved_step is None:
            raise UserError("the last step could not be saved: make room, then the same command")

    def __enter__(self) -> "Checkpoints":
        return self

    def __exit__(self, kind: type | None, error: BaseException | None, traceback: TracebackType | None) -> None:
        # A UserError ends all ranks alike. Others end one, which must not wait for the rest.
        if kind is None or issubclass(kind, UserError):
            self.finish()

    def export(self, directory: Path) -> None:
        """Write the weights in Hugging Face's format, and in the precision that the model computes with."""
        # Which is that of the last step, since that is saved.
        step = self.saved_step
        saved = None if step is None else durable.step_directory(self.config.checkpoint_dir, step)
        model = self.model_config, self.corpus.tokenizer, self.config.param_dtype
        exports.export(self.group, saved, self.state.weights(), *model, directory)

    def _manifest(self, step: int) -> dict:
        # The same for all parameters, and on a GPU each a number to wait for.
        steps = [state["step"] for state in self.optimizer.state.values() if "step" in state]
        axes = ("pp", "cp", "tp", "zero", "virtual_stages", "dtype")
        return {
            "step": step,
            # Fewer than `step` if bad ones were skipped.
            "optimizer_steps": steps[0].item() if steps else 0.0,
            "consumed": self.batches.consumed,
            "bad_steps": {"good": list(self.bad_steps.good), "in_a_row": self.bad_steps.in_a_row},
            "identity": self._identity(),
            "model": as_json(self.model_config),
            "layout": f"{dist.get_world_size()} ranks, "
            + ", ".join(f"{axis} {getattr(self.config, axis)}" for axis in axes),
        }

    def _write(self, step: int, waited: float, state: dict[str, Boxes], sums: dict, manifest: dict) -> None:
        """In a thread, which talks to those of the other ranks: they all fail, or none does."""
        start, final = time.perf_counter(), durable.step_directory(self.config.checkpoint_dir, step)
        if self.device.type == "cuda":
            # A new thread's device is the first, on which each rank would open a context.
            torch.cuda.set_device(self.device)
        try:
            replicas.check(self.group, sums)
            keep = self.config.keep, self.config.keep_every
            nbytes = write(self.group, final, state, manifest, *keep, self.corpus.tokenizer.save_pretrained)
            took = f"training waited {waited:.2f} s, writing took {time.perf_counter() - start:.2f} s"
            self.report = f"saved {final} | {nbytes / 1e6:,.1f} MB | {took}"
        except UserError as error:
            # Raised by the next `finish`, on all ranks after the same step.
            self.error = error
            self._say(f"warning: {error}")
        except Failed as error:
            self.error = Failed(f"--checkpoint-dir: step {step} could not be saved ({error})")
            self._say(f"warning: {self.error}")
        except BaseException as error:
            self.error = error

    def _tell(self) -> None:
        """Print what a save has taken, if one is over, and how long steps were that overlapped with it."""
        if self.report:
            steps = f", steps {median(self.seconds or [0.0]):.2f} s meanwhile, {self.usual_seconds:.2f} s before"
            self._say(self.report + (steps if self.seconds else ""))
            self.report = ""

    def _say(self, text: str) -> None:
        if dist.get_rank() == 0:
            say(text, sys.stderr if text.startswith("warning") else None)


def as_json(model_config: PreTrainedConfig) -> dict:
    """A model's configuration as it is after having been written to a file."""
    return json.loads(json.dumps(model_config.to_dict()))


def made_of(model_config: PreTrainedConfig) -> dict:
    """What of a model's configuration its weights depend on: all that shared/model.py reads."""
    sizes = [key for key in (*OVERRIDES, "rms_norm_eps") if key != "max_position_embeddings"]
    rope, layers = model_config.rope_parameters, range(model_config.num_hidden_layers)
    return {key: getattr(model_config, key) for key in sizes} | {
        "rope": {key: rope.get(key) for key in ("rope_type", "rope_theta", *ROPE_KEYS[rope["rope_type"]])},
        "layers without rope": [i for i in layers if not has_rope(model_config, i)],
        "biases": biased_linears(model_config),
        "norms of heads": has_head_norms(model_config),
    }
