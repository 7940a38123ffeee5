"""`labs hang`: runs of step06 that hang, each in its own way, and what one sees of them meanwhile.

How to read it is in HANGS.md.
"""

import argparse
import faulthandler
import json
import os
import re
import signal
import tempfile
import threading
import time
from collections.abc import Callable
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from types import ModuleType
from typing import Any, NamedTuple

import torch
import torch.distributed as dist
from conftest import small_options
from launcher import Launch
from torch._C._distributed_c10d import _dump_fr_trace_json

from labs import ROOT, seen

STEP = "step06_4d"
# The step in which a run hangs, seconds until its ranks are asked where they are, and until a collective gives up. A
# busy machine may keep a rank from its step for some of them.
AT, ASK, TIMEOUT = 3, 10, 25


class Hang(NamedTuple):
    plant: Callable[[ModuleType], None]
    ranks: int
    options: str


HANGS: dict[str, Hang] = {}


def hang(ranks: int, options: str) -> Callable:
    def register(plant: Callable[[ModuleType], None]) -> Callable[[ModuleType], None]:
        HANGS[plant.__name__] = Hang(plant, ranks, options)
        return plant

    return register


def at_step(module: ModuleType, name: str, function: Callable) -> None:
    """On each rank, `function(trainer)` is called before that method of Trainer in the step that hangs."""
    real, calls = getattr(module.Trainer, name), []

    def wrapped(trainer: Any, *args: Any) -> Any:
        calls.append(name)
        if len(calls) == AT:
            function(trainer)
        return real(trainer, *args)

    setattr(module.Trainer, name, wrapped)


@hang(2, "--pp 2")
def skipped(module: ModuleType) -> None:
    """Rank 1 finds its own gradients small, and skips the all-reduce of the norm: nothing to clip. No rank may decide
    alone about what all do together."""

    def skip(trainer: Any, real: Callable = module.tensor_parallel.norm_over_ranks) -> None:
        if dist.get_rank() == 1:
            pp = trainer.mesh.get_group("pp")
            module.tensor_parallel.norm_over_ranks = lambda norm, group: norm if group is pp else real(norm, group)

    at_step(module, "clip_grad_norm", skip)


@hang(4, "--dp 2 --tp 2 --zero 1")
def other_order(module: ModuleType) -> None:
    """Ranks 0 and 3 sum the norm over dp and then over tp, ranks 1 and 2 over tp and then over dp. Each waits for one
    that waits for another, around in a circle."""

    def swap(trainer: Any, real: Callable = module.tensor_parallel.norm_over_ranks) -> None:
        if dist.get_rank() in (1, 2):
            dp, tp = trainer.reducer.shard_group, trainer.mesh.get_group("tp")
            other = {dp: tp, tp: dp}
            module.tensor_parallel.norm_over_ranks = lambda norm, group: real(norm, other.get(group, group))

    at_step(module, "clip_grad_norm", swap)


@hang(2, "--pp 2")
def receive_without_send(module: ModuleType) -> None:
    """The first stage sends one micro-batch less than the second expects, as when each counts them for itself."""

    def drop(trainer: Any) -> None:
        channel, sent = trainer.pipeline.to_next, []

        def send(tensor: Any, real: Callable = channel.send) -> None:
            sent.append(tensor)
            if len(sent) < trainer.batches.micro_batches:
                real(tensor)

        if dist.get_rank() == 0:
            channel.send = send

    at_step(module, "forward_backward", drop)


@hang(2, "--pp 2")
def one_channel(module: ModuleType) -> None:
    """Activations and gradients share one queue, in which nothing starts before what is ahead has arrived, as in one
    communicator of NCCL. Each stage sends first, and would receive when its message has been taken."""

    def in_turn(trainer: Any) -> None:
        for channel in (trainer.pipeline.to_next, trainer.pipeline.to_previous):
            channel.posts_ahead = False

            def send(tensor: Any, channel: Any = channel, real: Callable = channel.send) -> None:
                real(tensor)
                channel.release()

            channel.send = send

    at_step(module, "forward_backward", in_turn)


@hang(2, "")
def elsewhere(module: ModuleType) -> None:
    """Rank 1 waits for something of its own, here a file system that does not answer, and never comes."""
    at_step(module, "clip_grad_norm", lambda trainer: time.sleep(1000) if dist.get_rank() == 1 else None)


class Report(NamedTuple):
    """Of a run that hung: the Python stack of each rank, its flight recorder, and the lines in which ranks say why they
    end."""

    stacks: list[list[str]]
    recorders: list[dict]
    verdict: list[str]
    codes: list[int]


def listen(directory: Path, plant: Callable[[ModuleType], None]) -> Callable[[ModuleType], None]:
    """On a rank, before it trains: be ready to say where it is."""

    def prepare(module: ModuleType) -> None:
        # Python's own signal handlers wait for the main thread, which waits for other ranks. This one does not.
        faulthandler.register(signal.SIGUSR2, file=2, all_threads=False)
        pid = os.getpid()

        def record() -> None:
            while not (directory / "ask").exists():
                time.sleep(0.1)
            (directory / f"{pid}.json").write_bytes(_dump_fr_trace_json())

        threading.Thread(target=record, daemon=True).start()
        plant(module)

    return prepare


def observe(*several: Hang) -> list[Report]:
    """Run them at the same time, ask their ranks where they are, and wait for their end."""
    common = [*small_options(seen.corpus()), "--micro-batch-size", "2", "--steps", "6", "--eval-every", "0"]
    common += ["--heartbeat-timeout", "60", "--timeout", str(TIMEOUT)]
    with tempfile.TemporaryDirectory() as name, ThreadPoolExecutor(len(several)) as pool:
        runs = []
        for i, one in enumerate(several):
            directory = Path(name, str(i))
            args, prepare = [*common, *one.options.split()], listen(directory, one.plant)
            runs.append(Launch(one.ranks, STEP, args, directory, prepare))
        # Only now are there threads, which no process may be forked among.
        return list(pool.map(follow, runs))


def follow(run: Launch) -> Report:
    """From its start to its end: by their heartbeats, or killed if they have none left."""
    try:
        run.after(AT - 1)
        time.sleep(ASK)
        run.signal(signal.SIGUSR2)
        (run.directory / "ask").touch()
        # All but those that wait for something else fail by then, and say so.
        deadline = time.monotonic() + 3 * TIMEOUT
        while time.monotonic() < deadline and not ended(run):
            time.sleep(0.1)
    finally:
        run.signal(signal.SIGKILL)
        codes = run.wait()
    logs = [(run.directory / f"{rank}.log").read_text() for rank in range(len(codes))]
    recorders = [json.loads((run.directory / f"{process.pid}.json").read_text()) for process in run.processes]
    verdict = [line for log in logs for line in log.splitlines() if line.startswith("[rank")]
    return Report([frames(log) for log in logs], recorders, verdict, codes)


def ended(run: Launch) -> bool:
    """Whether a rank has said why it ends, and ended."""
    return any(process.exitcode is not None for process in run.processes) and "[rank" in run.output()


def frames(log: str) -> list[str]:
    """Of the stack that faulthandler wrote into a log, the step's own lines up to `train`, innermost first."""
    stack = log.partition("most recent call first")[2]
    found = re.findall(rf'File "{ROOT / STEP}/(\S+)", line (\d+) in (\w+)', stack)
    return [f"{path}:{line} in {function}" for path, line, function in found if function != "main"]


class Calls(NamedTuple):
    """The collectives that a rank has called in a group: how many, the last of them, and whether it waits there."""

    count: int
    last: str
    waits: bool

    def __str__(self) -> str:
        return f"{self.count} called, {'waits in' if self.waits else 'done with'} the last, {self.last}"


def calls(recorder: dict) -> dict[str, Calls]:
    """By group, as number and name."""
    by_group: dict[str, list[dict]] = {}
    for entry in recorder["entries"]:
        by_group.setdefault(" ".join(entry["process_group"]), []).append(entry)
    return {group: Calls(len(of), describe(of[-1]), not of[-1]["retired"]) for group, of in by_group.items()}


def describe(entry: dict) -> str:
    kind = entry["profiling_name"].removeprefix("gloo:").replace("_", "-")
    return f"{kind} of {' × '.join(map(str, entry['input_sizes'][0])) or 'one number'}"


def show(name: str) -> None:
    one = HANGS[name]
    print(f"{name}: {STEP} on {one.ranks} ranks, {one.options or 'no options'}. It hangs in step {AT} ...", flush=True)
    (report,) = observe(one)
    print(f"\nPython's stacks after {ASK} s (faulthandler), innermost first:")
    for rank, stack in enumerate(report.stacks):
        print(f"rank {rank}", *(f"  {frame}" for frame in stack), sep="\n")
    print("\nTorch's flight recorder, calls by group:")
    by_rank = [calls(recorder) for recorder in report.recorders]
    for group in sorted(set().union(*by_rank)):
        rows = {rank: of[group] for rank, of in enumerate(by_rank) if group in of}
        if len(rows) > 1:
            print(f"group {group}", *(f"  rank {rank}: {text}" for rank, text in rows.items()), sep="\n")
    print(f"\nThe heartbeat, when a collective has failed after {TIMEOUT} s:", *report.verdict, sep="\n")
    print(f"\nWhat it is: {' '.join(one.plant.__doc__.split())}")


def command(args: argparse.Namespace) -> int:
    torch.set_num_threads(1)
    if args.name is None:
        print("\n".join(f"{name:<22}{' '.join(one.plant.__doc__.split())}" for name, one in HANGS.items()))
    else:
        show(args.name)
    return 0


def add_commands(commands: argparse._SubParsersAction) -> None:
    parser = commands.add_parser("hang", help="run something that hangs, and see what one sees of it")
    parser.add_argument("name", nargs="?", choices=list(HANGS), help="without it: all hangs")
    parser.set_defaults(run=command)
