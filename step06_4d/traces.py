"""Traces of single steps by torch's profiler, with every operator and kernel, for chrome://tracing or Perfetto."""

from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path

import torch.distributed as dist
from torch.profiler import profile, schedule

from shared.config import UserError, check_writable
from shared.metrics import Metrics


@dataclass
class TracesConfig:
    """The options of traces."""

    # Trace from this step to that one, on every rank.
    trace_steps: tuple[int, int] | None = None
    # Directory of the traces, a file per rank. Must be empty or absent.
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


@contextmanager
def traced(config: TracesConfig, metrics: Metrics) -> Iterator[Callable[[], None]]:
    """Context of a training loop. Yields what to call before each step."""
    if config.trace_steps is None or config.trace_steps[0] <= metrics.start:
        yield lambda: None
        return
    first, last = config.trace_steps
    path = config.trace_dir / f"steps-{first}-{last}-rank-{dist.get_rank()}.json.gz"

    def write(profiler: profile) -> None:
        path.parent.mkdir(parents=True, exist_ok=True)
        profiler.export_chrome_trace(str(path))
        metrics.note(last, f"trace in {path}", trace=str(path))

    # Counted from 0, which is before the first step of this run. The one before `first` warms the profiler up.
    plan = schedule(wait=first - metrics.start - 1, warmup=1, active=last - first + 1, repeat=1)
    with profile(schedule=plan, on_trace_ready=write) as profiler:
        yield profiler.step
