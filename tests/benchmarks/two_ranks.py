"""What the benchmarks on two ranks share: the model, its batches, alternating rounds, and a link of a known speed."""

import argparse
import contextlib
import gc
import os
import shutil
import socket
import subprocess
import sys
import time
from collections.abc import Callable, Iterator
from pathlib import Path
from statistics import median
from types import ModuleType
from typing import Any
from unittest.mock import patch

import numpy as np
import torch
import torch.distributed as dist
from torch.distributed.device_mesh import DeviceMesh
from transformers import LlamaConfig

ROOT = Path(__file__).parents[2]
sys.path.append(str(ROOT / "tests"))
from shared import distributed
from shared.config import BaseConfig
from shared.corpus import Corpus
from shared.data import Batch
from shared.live_bytes import LiveBytes
from shared.weights import full_weights

RANKS = 2
# 32M parameters.
MODEL = LlamaConfig(
    vocab_size=8192,
    hidden_size=512,
    intermediate_size=1408,
    num_hidden_layers=8,
    num_attention_heads=8,
    num_key_value_heads=4,
)
GLOBAL_BATCH, MICRO_BATCH, SEQ_LEN = 16, 4, 256


def micro_batches(shares: int) -> list[Batch]:
    """This rank's micro-batches of a global batch that is cut into `shares`."""
    rows = torch.randint(8192, (GLOBAL_BATCH, SEQ_LEN + 1), generator=torch.Generator().manual_seed(0))
    mine = rows.chunk(shares)[dist.get_rank() % shares]
    positions = torch.arange(SEQ_LEN).expand(MICRO_BATCH, -1)
    return [Batch(micro[:, :-1], micro[:, 1:], positions) for micro in mine.split(MICRO_BATCH)]


def make_trainer(module: ModuleType, config: BaseConfig, mesh: DeviceMesh, model: LlamaConfig = MODEL) -> Any:
    """The Trainer of a step for this model, on this mesh."""
    corpus = Corpus.from_array(np.zeros(3 * config.global_batch_size * config.seq_len, np.uint16))
    with patch.object(distributed, "start_mesh", lambda config: (mesh, torch.device("cpu"))):
        return module.Trainer(config, model, corpus, full_weights(config, model))


def optimizer_step(trainer: Any) -> None:
    """What follows the gradients in a training step."""
    trainer.clip_grad_norm()
    trainer.optimizer.step()
    trainer.optimizer.zero_grad()


def timed(function: Callable[[], object]) -> float:
    """Seconds of the slower rank."""
    dist.barrier()
    start = time.perf_counter()
    function()
    seconds = torch.tensor(time.perf_counter() - start)
    dist.all_reduce(seconds, dist.ReduceOp.MAX)
    return seconds.item()


def warm_up(make_step: Callable[[], Callable[[], object]]) -> tuple[Callable[[], object], object, list[int]]:
    """Make a training step and run it twice. Returns it, what it returned, and each rank's peak of live bytes."""
    gc.collect()
    # Active from the start: some libraries make their buffers early, and again in the first backward.
    with LiveBytes() as memory:
        step = make_step()
        result = [step() for _ in range(2)][-1]
    peaks = [torch.tensor(0) for _ in range(RANKS)]
    dist.all_gather(peaks, torch.tensor(memory.peak))
    return step, result, [int(peak) for peak in peaks]


def alternate(steps: dict[str, Callable[[], object]], rounds: int) -> dict[str, list[float]]:
    """Seconds of each step in each round."""
    seconds = {name: [] for name in steps}
    for _ in range(rounds):
        for name, step in steps.items():
            seconds[name].append(timed(step))
    return seconds


def ratio(numerator: list[float], denominator: list[float]) -> float:
    return median(a / b for a, b in zip(numerator, denominator, strict=True))


@contextlib.contextmanager
def link(mbit: int) -> Iterator[list[list[str]]]:
    """Two network namespaces joined by a link of that speed. Yields the command prefix of each rank."""
    names = [f"steps{os.getpid()}-{rank}" for rank in range(RANKS)]

    def run(command):
        subprocess.run(command.split(), check=True, capture_output=True)

    try:
        for name in names:
            run(f"ip netns add {name}")
        run(f"ip link add veth0 netns {names[0]} type veth peer name veth0 netns {names[1]}")
        for rank, name in enumerate(names):
            for command in (
                "ip link set lo up",
                f"ip addr add 10.99.0.{rank + 1}/24 dev veth0",
                "ip link set veth0 up",
                f"tc qdisc add dev veth0 root tbf rate {mbit}mbit burst 256kb latency 50ms",
            ):
                run(f"ip netns exec {name} {command}")
        yield [["ip", "netns", "exec", name] for name in names]
    finally:
        for name in names:
            subprocess.run(["ip", "netns", "delete", name], capture_output=True)


def main(description: str, worker: Callable[[int], None]) -> None:
    """Read the options, start a process per rank, and call worker(rounds) in each."""
    parser = argparse.ArgumentParser(description=description, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--rounds", type=int, default=5)
    parser.add_argument("--link", type=int, help="Mbit/s")
    args = parser.parse_args()
    if "RANK" in os.environ:
        torch.set_num_threads(1)
        dist.init_process_group("gloo")
        worker(args.rounds)
        dist.barrier()
        dist.destroy_process_group()
        return
    if args.link and (os.geteuid() != 0 or not shutil.which("ip") or not shutil.which("tc")):
        sys.exit("skipped: --link needs root, and ip and tc of iproute2")
    with link(args.link) if args.link else contextlib.nullcontext([[], []]) as prefixes:
        with socket.create_server(("", 0)) as server:
            port = server.getsockname()[1]
        environment = os.environ | {
            "WORLD_SIZE": str(RANKS),
            "MASTER_ADDR": "10.99.0.1" if args.link else "127.0.0.1",
            "MASTER_PORT": str(port),
            "GLOO_SOCKET_IFNAME": "veth0" if args.link else "lo",
            "OMP_NUM_THREADS": "1",
        }
        command = [sys.executable, sys.argv[0], "--rounds", str(args.rounds)]
        workers = [
            subprocess.Popen([*prefix, *command], env=environment | {"RANK": str(rank)})
            for rank, prefix in enumerate(prefixes)
        ]
        sys.exit(any([process.wait() for process in workers]))
