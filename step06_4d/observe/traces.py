"""Traces of a few steps by torch's profiler, with every operator and kernel, for chrome://tracing or Perfetto."""

from dataclasses import dataclass
from pathlib import Path

import torch.distributed as dist
from torch.profiler import profile, schedule

from shared.config import UserError, check_writable
from shared.metrics import Metrics


@dataclass
class Config:
    """The options of traces."""

    # Trace every operator and kernel from the first of these steps to the last, on every rank.
    trace_steps: tuple[int, int] | None = None
    # Write the traces in this directory, a file per rank. It must be empty or absent.
    trace_dir: Path = Path("traces")

    def validate(self) -> None:
        super().validate()
        if self.trace_steps is None:
            return
        first, last = self.trace_steps
        if not 1 <= first <= last <= self.steps:
            raise UserError(f"--trace-steps {first} {last}: choose a first and a last one of the {self.steps} steps")
        if (
            self.trace_dir.exists()
            and not self.resumes
            and (not self.trace_dir.is_dir() or any(self.trace_dir.iterdir()))
        ):
            raise UserError(f"--trace-dir {self.trace_dir} is not empty: choose another directory or empty it")
        check_writable(self.trace_dir.parent, "--trace-dir")


class Traces:
    """Context of a training loop, which calls `start_step`: traces the steps that the options name."""

    def __init__(self, config: Config, metrics: Metrics) -> None:
        self.config, self.metrics = config, metrics
        self.profiler: profile | None = None

    def __enter__(self) -> "Traces":
        if self.config.trace_steps and self.config.trace_steps[0] > self.metrics.start:
            first, last = self.config.trace_steps
            # Counted from 0, which is before the first step of this run. The one before `first` warms the profiler up.
            plan = schedule(wait=first - self.metrics.start - 1, warmup=1, active=last - first + 1, repeat=1)
            self.profiler = profile(schedule=plan, on_trace_ready=self._write).__enter__()
        return self

    def __exit__(self, *error: object) -> None:
        if self.profiler:
            self.profiler.__exit__(*error)

    def start_step(self) -> None:
        if self.profiler:
            self.profiler.step()

    def _write(self, profiler: profile) -> None:
        first, last = self.config.trace_steps
        path = self.config.trace_dir / f"steps-{first}-{last}-rank-{dist.get_rank()}.json.gz"
        path.parent.mkdir(parents=True, exist_ok=True)
        profiler.export_chrome_trace(str(path))
        self.metrics.note(last, f"trace in {path}", trace=str(path))
