"""Runs a command, or all ranks of a trainer, in forks of this process: those start in a tenth of a second."""

import gc
import io
import multiprocessing
import os
import signal
import subprocess
import sys
import tempfile
import time
import traceback
from collections.abc import Callable
from pathlib import Path
from types import ModuleType
from typing import Any, NoReturn

import torch
import torch._dynamo  # Or each rank would import it, in 1.5 s.
import torch.distributed as dist
from conftest import hand_down, handed_down, load_step

# Seconds that torchrun leaves the others, after one has failed, between SIGTERM and SIGKILL.
GRACE = 10


def _become(main: Callable[[], None], args: list[object], out: int, errors: int, buffered: bool = True) -> NoReturn:
    """Run what a command runs, and end as it does. It writes to these files."""
    os.dup2(out, 1)
    os.dup2(errors, 2)
    # Those of pytest lead elsewhere. Not buffered as by `python -u`, which torchrun calls, or PYTHONUNBUFFERED.
    sys.stdout = os.fdopen(1, "w") if buffered else io.TextIOWrapper(io.FileIO(1, "w"), write_through=True)
    sys.stderr, sys.argv, code = os.fdopen(2, "w"), ["train.py", *map(str, args)], 0
    try:
        main()
    except SystemExit as exit:
        code = exit.code if isinstance(exit.code, int) else print(exit.code, file=sys.stderr) or 1
    except BaseException:
        traceback.print_exc()
        code = 1
    sys.stdout.flush()
    sys.stderr.flush()
    os._exit(code)


def run_command(
    main: Callable[[], None], *args: object, stdout: int | None = None, buffered: bool = True
) -> subprocess.CompletedProcess:
    """What a command prints, and its exit code. Its output goes to a file, if one is given."""
    with tempfile.TemporaryFile("w+") as out, tempfile.TemporaryFile("w+") as errors:
        child = os.fork()
        if child == 0:
            signal.alarm(300)
            _become(main, args, out.fileno() if stdout is None else stdout, errors.fileno(), buffered)
        _, status = os.waitpid(child, 0)
        out.seek(0)
        errors.seek(0)
        return subprocess.CompletedProcess(args, os.waitstatus_to_exitcode(status), out.read(), errors.read())


def _rank(
    rank: int, world_size: int, step: str, args: list[str], directory: Path, prepare: Callable[[ModuleType], None]
) -> None:
    log = os.open(directory / f"{rank}.log", os.O_WRONLY | os.O_CREAT | os.O_APPEND)
    torch.set_num_threads(1)
    gc.freeze()
    os.environ |= {"RANK": str(rank), "LOCAL_RANK": str(rank), "WORLD_SIZE": str(world_size)}
    init = dist.init_process_group
    dist.init_process_group = lambda backend, **kwargs: init(
        backend, **kwargs, init_method=f"file://{directory}/store", rank=rank, world_size=world_size
    )

    def main() -> None:
        module = load_step(step)
        prepare(module)
        module.main()

    _become(main, args, log, log)


def on_rank(rank: int, name: str, action: Callable[[int], None]) -> Callable[[ModuleType], None]:
    """To prepare a run: calls `action(number of the call)` on that rank before each call of the trainer's method."""

    def prepare(module: ModuleType) -> None:
        function, calls = getattr(module.Trainer, name), []

        def replaced(*args: Any) -> Any:
            calls.append(name)
            if dist.get_rank() == rank:
                action(len(calls))
            return function(*args)

        setattr(module.Trainer, name, replaced)

    return prepare


class Launch:
    """The ranks of a run, from its start to its end. Their logs are written to `directory`, which is made.

    `prepare` is called on each rank, with the trainer's module, before it trains.
    """

    def __init__(
        self,
        world_size: int,
        step: str,
        args: list[str],
        directory: Path,
        prepare: Callable[[ModuleType], None] = lambda module: None,
    ) -> None:
        hand_down(step)
        directory.mkdir()
        self.directory, context = directory, multiprocessing.get_context("fork")
        self.processes = [
            context.Process(target=_rank, args=(rank, world_size, step, args, directory, prepare), daemon=True)
            for rank in range(world_size)
        ]
        for process in self.processes:
            process.start()
        handed_down.clear()

    def signal(self, number: int, *ranks: int) -> None:
        """To these ranks, or all, as far as they live."""
        for process in [self.processes[rank] for rank in ranks] or self.processes:
            if process.is_alive():
                os.kill(process.pid, number)

    def steps(self) -> int:
        """How many rank 0 has reported."""
        log = self.directory / "0.log"
        return sum(" | loss " in line for line in log.read_text().splitlines()) if log.exists() else 0

    def after(self, steps: int) -> None:
        """Wait for so many steps."""
        deadline = time.monotonic() + 60
        while self.running() and self.steps() < steps and time.monotonic() < deadline:
            time.sleep(0.005)
        assert self.running(), self.output()

    def running(self) -> bool:
        """Whether all ranks are, or have succeeded, but not all."""
        codes = [process.exitcode for process in self.processes]
        return None in codes and not any(codes)

    def wait(self, timeout: float = 60) -> list[int]:
        """The exit codes of all ranks. When one has failed the others are ended, as by torchrun."""
        deadline = time.monotonic() + timeout
        while self.running() and time.monotonic() < deadline:
            time.sleep(0.01)
        for process in self.processes:
            if process.is_alive():
                process.terminate()
        deadline = time.monotonic() + GRACE
        for process in self.processes:
            process.join(max(0, deadline - time.monotonic()))
            process.kill()
            process.join()
        return [process.exitcode for process in self.processes]

    def output(self) -> str:
        return "".join(path.read_text() for path in sorted(self.directory.glob("*.log")))
