"""dp = 2: step02's engines against torch's DistributedDataParallel, and against two ranks that do not talk at all.

    python tests/benchmarks/step02_against_ddp.py [--rounds 5] [--link MBIT]

Same model (32M parameters), batches and threads, in alternating rounds of one run. With --link the two ranks sit in
network namespaces joined by a link of that speed (needs root and iproute2): loopback hides what overlap is for.
"""

import argparse
import contextlib
import gc
import os
import shutil
import socket
import subprocess
import sys
import time
from collections.abc import Iterator
from pathlib import Path
from statistics import median

import torch
import torch.distributed as dist
from torch import nn
from torch.nn.parallel import DistributedDataParallel
from transformers import LlamaConfig

ROOT = Path(__file__).parents[2]
sys.path += [str(ROOT / "step02_data_parallel"), str(ROOT / "tests")]
import train as step02
from data_parallel import make_data_parallel
from live_bytes import LiveBytes

from shared.data import Batch
from shared.weights import full_weights

RANKS = 2
MODEL = LlamaConfig(
    vocab_size=8192,
    hidden_size=512,
    intermediate_size=1408,
    num_hidden_layers=8,
    num_attention_heads=8,
    num_key_value_heads=4,
)
GLOBAL_BATCH, MICRO_BATCH, SEQ_LEN = 16, 4, 256


class Loss(nn.Module):
    """DDP wants one module whose forward ends in the loss."""

    def __init__(self, config, model):
        super().__init__()
        self.config, self.model = config, model

    def forward(self, batch):
        return step02.micro_batch_loss(self.config, self.model, batch)


def make_step(variant, group, batches):
    config = step02.Config(
        seq_len=SEQ_LEN,
        global_batch_size=GLOBAL_BATCH,
        micro_batch_size=MICRO_BATCH,
        dp_engine="naive" if variant == "naive" else "bucketed",
    )
    model = step02.build_model(config, MODEL, full_weights(config, MODEL), torch.device("cpu"))
    optimizer = step02.build_optimizer(config, model)
    if variant == "DDP":
        loss_module = DistributedDataParallel(Loss(config, model), process_group=group, gradient_as_bucket_view=True)
    else:
        # "alone": an engine of one rank, so all that step02 does but talk.
        alone = [dist.new_group([rank]) for rank in range(RANKS)][dist.get_rank()] if variant == "alone" else group
        gradients = make_data_parallel(config, list(model.parameters()), alone)

    def ddp_forward_backward():
        for batch in batches:
            synchronized = contextlib.nullcontext() if batch is batches[-1] else loss_module.no_sync()
            with synchronized:
                # DDP averages, so each rank's loss is multiplied by their number.
                (loss_module(batch) * RANKS / (GLOBAL_BATCH * SEQ_LEN)).backward()

    def step():
        if variant == "DDP":
            ddp_forward_backward()
        else:
            step02.forward_backward(config, model, batches, gradients)
        step02.clip_grad_norm(config, model)
        optimizer.step()
        optimizer.zero_grad()
        return model

    return step


def timed(function):
    """Seconds of the slower rank."""
    dist.barrier()
    start = time.perf_counter()
    function()
    seconds = torch.tensor(time.perf_counter() - start)
    dist.all_reduce(seconds, dist.ReduceOp.MAX)
    return seconds.item()


def worker(rounds):
    torch.set_num_threads(1)
    dist.init_process_group("gloo")
    group = dist.group.WORLD
    rows = torch.randint(8192, (GLOBAL_BATCH, SEQ_LEN + 1), generator=torch.Generator().manual_seed(0))
    mine = rows.chunk(RANKS)[dist.get_rank()]
    positions = torch.arange(SEQ_LEN).expand(MICRO_BATCH, -1)
    batches = [Batch(micro[:, :-1], micro[:, 1:], positions) for micro in mine.split(MICRO_BATCH)]

    variants = ("alone", "naive", "bucketed", "DDP")
    steps, peaks = {}, {}
    for variant in variants:
        gc.collect()
        # Active from the start: DDP makes its buckets when it is made, and again in the first backward.
        with LiveBytes() as memory:
            steps[variant] = make_step(variant, group, batches)
            weights = [steps[variant]() for _ in range(2)][-1].state_dict()
        peaks[variant] = memory.peak
        if variant == "naive":
            reference = weights
        elif variant != "alone":
            for name, weight in weights.items():
                torch.testing.assert_close(weight, reference[name], rtol=1e-2, atol=1e-4, msg=f"{variant}: {name}")

    gradients = torch.zeros(sum(weight.numel() for weight in reference.values()))
    communication = median(timed(lambda: dist.all_reduce(gradients)) for _ in range(3))
    seconds = {variant: [] for variant in variants}
    for _ in range(rounds):
        for variant in variants:
            seconds[variant].append(timed(steps[variant]))
    if dist.get_rank() == 0:
        print(f"one all-reduce of the gradients takes {communication * 1e3:.0f} ms when nothing else runs")
        print(f"{'':10}{'tokens/s':>10}{'of two alone':>14}{'× DDP':>8}{'hidden':>8}{'peak MiB':>10}{'× DDP':>8}")
        for variant in variants:
            rate = GLOBAL_BATCH * SEQ_LEN / median(seconds[variant])
            share = median(a / b for a, b in zip(seconds["alone"], seconds[variant], strict=True))
            speedup = median(a / b for a, b in zip(seconds["DDP"], seconds[variant], strict=True))
            exposed = median(b - a for a, b in zip(seconds["alone"], seconds[variant], strict=True))
            hidden = "" if variant == "alone" else f"{1 - exposed / communication:.0%}"
            memory = f"{peaks[variant] / 2**20:10.0f}{peaks[variant] / peaks['DDP']:8.2f}"
            print(f"{variant:10}{rate:10.0f}{share:14.1%}{speedup:8.2f}{hidden:>8}{memory}", flush=True)
    dist.barrier()
    dist.destroy_process_group()


@contextlib.contextmanager
def link(mbit) -> Iterator[list[list[str]]]:
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


def main():
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--rounds", type=int, default=5)
    parser.add_argument("--link", type=int, help="Mbit/s")
    args = parser.parse_args()
    if "RANK" in os.environ:
        worker(args.rounds)
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
        command = [sys.executable, __file__, "--rounds", str(args.rounds)]
        workers = [
            subprocess.Popen([*prefix, *command], env=environment | {"RANK": str(rank)})
            for rank, prefix in enumerate(prefixes)
        ]
        sys.exit(any([process.wait() for process in workers]))


if __name__ == "__main__":
    main()
