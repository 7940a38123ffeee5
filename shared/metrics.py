"""What a run reports of each step: to the console, to a file of JSON lines, to TensorBoard and to Weights & Biases."""

import dataclasses
import json
import math
import os
import resource
import sys
import time
from collections.abc import Iterator
from contextlib import contextmanager
from importlib.util import find_spec
from pathlib import Path
from types import TracebackType
from typing import Any, TextIO

import torch
import torch.distributed as dist
from torch import Tensor
from tqdm import tqdm
from transformers import PreTrainedConfig

from shared.config import BaseConfig, UserError
from shared.flops import flops_per_token, peak_flops


class NotFinite(UserError):
    """A loss or gradient norm is NaN or infinite. `what` says which."""

    def __init__(self, step: int, what: str) -> None:
        super().__init__(f"step {step}: {what}: lower --lr or raise --warmup-steps")
        self.what = what


class Metrics:
    """Context of a training loop. Only rank 0 reports; losses and norms are the same on all ranks anyway."""

    def __init__(
        self,
        config: BaseConfig,
        model_config: PreTrainedConfig,
        device: torch.device,
        start: int = 0,
        consumed: int = 0,
        wandb_id: Path | None = None,
    ) -> None:
        """`start`: steps that were done before this process began, with `consumed` sequences. `wandb_id`: the file that
        names the run of Weights & Biases in which they are, or will name a new one."""
        self.config, self.device, self.start, self.wandb_id = config, device, start, wandb_id
        self.tokens_before = consumed * config.seq_len
        self.reports = not dist.is_initialized() or dist.get_rank() == 0
        self.world_size = dist.get_world_size() if dist.is_initialized() else 1
        self.tokens_per_step = config.global_batch_size * config.seq_len
        self.flops = flops_per_token(model_config, config.seq_len, causal=False)
        self.flops_causal = flops_per_token(model_config, config.seq_len, causal=True)
        if self.reports:
            self.peak = peak_flops(device, config.compute_dtype)
        if device.type == "cuda":
            # From here on, it is training's memory alone.
            torch.cuda.empty_cache()
            torch.cuda.reset_peak_memory_stats(device)

    def __enter__(self) -> "Metrics":
        self.file, self.tensorboard, self.wandb = None, None, None
        # Options for which something could not be written.
        self.lost: set[str] = set()
        # On all ranks, and before a file exists that would be in the way of the next try.
        if self.config.tensorboard and find_spec("tensorboard") is None:
            raise UserError("--tensorboard needs a package: pip install tensorboard")
        if self.config.metrics_file and self.reports:
            self.config.metrics_file.parent.mkdir(parents=True, exist_ok=True)
            if self.config.resumes:
                _forget_after(self.config.metrics_file, self.start)
            self.file = self.config.metrics_file.open("a" if self.config.resumes else "x")
        if self.config.tensorboard and self.reports:
            self.tensorboard = _start_tensorboard(self.config.tensorboard, self.start)
        if self.config.wandb and self.reports:
            self.wandb = _start_wandb(self.config, self.wandb_id)
        # On a terminal a bar shows the latest step; a log file gets a line per step.
        on_terminal = self.reports and sys.stdout.isatty() and sys.stderr.isatty()
        layout = "{percentage:3.0f}%|{bar:10}| {n}/{total} {remaining}{postfix}"
        options = {"disable": not on_terminal, "bar_format": layout, "dynamic_ncols": True}
        self.bar = tqdm(total=self.config.steps, initial=self.start, **options)
        # Steps since the last report, and the sums of their losses and norms: NaN and infinity stay in a sum.
        self.steps, self.sums = 0, torch.zeros(2, dtype=self.config.grad_dtype, device=self.device)
        # When these steps began, as if nothing but they had taken time, and when the last of them was noted.
        self.clock = self.noted = time.perf_counter()
        return self

    def __exit__(self, kind: type | None, error: BaseException | None, traceback: TracebackType | None) -> None:
        self.bar.close()
        if self.file:
            with self._may_be_lost("metrics-file"):
                self.file.close()
        if self.tensorboard:
            with self._may_be_lost("tensorboard"):
                self.tensorboard.close()
        if self.wandb:
            with self._may_be_lost("wandb"):
                self.wandb.finish(exit_code=0 if kind is None else 1)

    def log(self, step: int, loss: Tensor, grad_norm: Tensor, lr: float) -> None:
        """Report step `step`, counted from 1, which ends now, or note it. `grad_norm` is the norm before clipping.

        Reads the device, once, if the step is reported. Raises NotFinite then, on every rank, if the loss or the norm
        of it, or of a step since the last report, is no number.
        """
        self.steps += 1
        now = torch.stack((loss, grad_norm))
        self.sums += now
        if self.config.logs(step):
            loss, grad_norm, *sums = torch.cat((now, self.sums)).tolist()
            self._check(step, sums)
            if self.reports:
                self._report(step, loss, grad_norm, lr, time.perf_counter() - self.clock)
            self.sums.zero_()
            self.steps, self.clock = 0, time.perf_counter()
        self.noted = time.perf_counter()

    def _check(self, step: int, sums: list[float]) -> None:
        names = zip(("loss", "gradient norm"), sums, strict=True)
        bad = [f"{name} not a finite number" for name, value in names if not math.isfinite(value)]
        if bad:
            which = f", in this step or the {self.steps - 1} before (--log-every 1 tells which)"
            raise NotFinite(step, ", ".join(bad) + (which if self.steps > 1 else ""))

    def _report(self, step: int, loss: float, grad_norm: float, lr: float, seconds: float) -> None:
        """`seconds`: of the steps since the last report."""
        tokens_per_second = self.steps * self.tokens_per_step / seconds
        flops_per_second = tokens_per_second / self.world_size / self.peak
        record = {
            "step": step,
            "loss": loss,
            "grad_norm": grad_norm,
            "lr": lr,
            "tokens": self.tokens_before + (step - self.start) * self.tokens_per_step,
            "tokens_per_second": tokens_per_second,
            "tokens_per_second_per_device": tokens_per_second / self.world_size,
            "mfu": flops_per_second * self.flops,
            "mfu_causal": flops_per_second * self.flops_causal,
            "peak_memory": peak_memory(self.device),
            **allocator(self.device),
        }
        shown = {
            "loss": f"{loss:.4f}",
            "tokens/s": f"{tokens_per_second:,.0f}",
            "MFU": f"{record['mfu']:.1%}",
            "grad norm": f"{grad_norm:.3f}",
            "lr": f"{lr:.2e}",
            "GiB": f"{record['peak_memory'] / 2**30:.2f}",
        }
        if self.config.compile and step == self.start + 1:
            # What the compiler took, nearly all of it.
            shown["first step"] = f"{seconds:.1f} s"
        if record.get("allocation_retries"):
            # Each has emptied the cache, which stops the GPU: memory is nearly full.
            shown["allocation retries"] = str(record["allocation_retries"])
        if self.bar.disable:
            say(" | ".join((f"step {step}", *(f"{name} {value}" for name, value in shown.items()))))
        self.bar.set_postfix(shown, refresh=False)
        # To this step: those before it that were noted only were steps as well.
        self.bar.update(step - self.bar.n)
        self._write(record)

    def log_evaluation(self, step: int, losses: dict[str, float]) -> None:
        """Report the loss on the held-out sequences of each source after step `step`."""
        if len(losses) == 1:
            (loss,) = losses.values()
            self.note(step, f"validation loss {loss:.4f}", validation_loss=loss)
        else:
            text = ", ".join(f"{name} {loss:.4f}" for name, loss in losses.items())
            self.note(step, f"validation loss {text}", validation_loss=losses)

    def note(self, step: int, text: str, **record: object) -> None:
        """Report what else there is to say of step `step`. The time since the last log counts for no step."""
        if not self.reports:
            return
        say(f"step {step} | {text}")
        self._write({"step": step, **record})
        self.clock += time.perf_counter() - self.noted
        self.noted = time.perf_counter()

    def _write(self, record: dict[str, object]) -> None:
        if self.file:
            with self._may_be_lost("metrics-file"):
                self.file.write(json.dumps(record) + "\n")
                self.file.flush()
        if self.tensorboard:
            with self._may_be_lost("tensorboard"):
                for name, value in _scalars(record):
                    self.tensorboard.add_scalar(name, value, record["step"])
        if self.wandb:
            with self._may_be_lost("wandb"):
                self.wandb.log(record)

    @contextmanager
    def _may_be_lost(self, option: str) -> Iterator[None]:
        """On a full disk, say, or when W&B's process has died of a signal to all. The run goes on."""
        try:
            yield
        except Exception as error:  # which share no base
            if option not in self.lost:
                say(f"warning: --{option} may lack what is reported from now on: {error}", sys.stderr)
            self.lost.add(option)


def say(text: str, to: TextIO | None = None) -> None:
    """Print a line above the bar, if there is one. A full disk may lose it, but not the run."""
    try:
        tqdm.write(text, to)
        (to or sys.stdout).flush()
    except BrokenPipeError:
        # Nobody reads on.
        raise
    except OSError:
        pass


def _forget_after(path: Path, step: int) -> None:
    """Move away the lines of later steps, which will be trained once more, and one that a crash has cut off."""
    kept, dropped = [], []
    for line in path.read_text().splitlines(keepends=True) if path.exists() else []:
        try:
            (kept if json.loads(line)["step"] <= step else dropped).append(line)
        except ValueError:
            dropped.append(line)
    if dropped:
        with path.with_name(f"{path.name}.dropped").open("a") as file:
            file.writelines(dropped)
    temporary = path.with_name(f".{path.name}.tmp")
    temporary.write_text("".join(kept))
    os.replace(temporary, path)


def peak_memory(device: torch.device) -> int:
    """Bytes: what torch allocated at most on a GPU, what the process held at most on a CPU."""
    if device.type == "cuda":
        return torch.cuda.max_memory_allocated(device)
    unit = 1 if sys.platform == "darwin" else 1024
    return resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * unit


def allocator(device: torch.device) -> dict[str, int]:
    """Of torch's allocator on a GPU: bytes that it has taken at most, those in no tensor included, and how often it had
    to give some back to find a large enough piece."""
    if device.type != "cuda":
        return {}
    retries = torch.cuda.memory_stats(device)["num_alloc_retries"]
    return {"reserved_memory": torch.cuda.max_memory_reserved(device), "allocation_retries": retries}


def _start_tensorboard(directory: Path, start: int) -> Any:
    """torch's writer of TensorBoard's files. Later steps than `start` that are there already are hidden."""
    from torch.utils.tensorboard import SummaryWriter

    return SummaryWriter(str(directory), purge_step=start + 1)


def _scalars(record: dict[str, Any], within: str = "") -> Iterator[tuple[str, float]]:
    """The numbers of a record but its step, and those of its dictionaries."""
    for name, value in record.items():
        if isinstance(value, dict):
            yield from _scalars(value, f"{within}{name}/")
        elif isinstance(value, int | float) and (within or name != "step"):
            yield f"{within}{name}", value


def _start_wandb(config: BaseConfig, id_file: Path | None) -> Any:
    """A run of wandb, the one that `id_file` names if it exists, or None if that fails."""
    # It takes a second to import, which a run that does not log to it need not wait for.
    import wandb

    options = {key: str(value) for key, value in dataclasses.asdict(config).items()}
    known = id_file.read_text() if id_file and id_file.exists() else None
    try:
        resumed = {"id": known, "resume": "allow"} if known else {}
        run = wandb.init(project=config.wandb_project, name=config.run_name, config=options, **resumed)
    except Exception as error:  # no reason to lose a training run, whatever it is
        print(f"warning: training goes on without Weights & Biases: {error}", file=sys.stderr)
        return None
    # By wandb's own count of steps, what is trained again would be left out.
    run.define_metric("*", step_metric="step")
    if id_file and not known:
        id_file.write_text(run.id)
    return run
