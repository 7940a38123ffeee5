"""Measure what machines.yaml says of a machine: matmuls, memory, attention, and messages among its devices."""

import math
import os
import statistics
import tempfile
import time
from collections.abc import Callable
from dataclasses import replace
from itertools import cycle
from pathlib import Path

import torch
import torch.distributed as dist
import torch.nn.functional as F
import yaml
from planning.layout import Layout, Model
from planning.machines import load_machine
from planning.time import Times
from transformers import LlamaConfig

from shared.errors import UserError
from shared.model import LlamaDecoderLayer

# Seconds for which each is measured.
SPAN = 0.3
# Bytes of a message that tells latency.
SMALL = 2**10
# Bytes that no cache holds.
CACHE = 2**26
# Of the device: rows of the largest matmul, and bytes of a message that tells bandwidth.
LARGEST = {"cuda": (8192, 2**26), "cpu": (1024, 2**23)}


def calibrate(path: Path, largest: tuple[int, int] | None = None) -> None:
    """Write the numbers of this machine to a file that --gpu takes. `largest`: as in LARGEST.

    Raises UserError if `path` cannot be written, before it measures.
    """
    try:
        path.touch()
    except OSError as error:
        raise UserError(f"--calibrate {path}: {error.strerror}") from error
    device = torch.device("cuda" if torch.cuda.is_available() else "cpu")
    numbers = _together(device, largest or LARGEST[device.type])
    text = yaml.safe_dump({key: float(f"{value:.4g}") for key, value in numbers.items()}, sort_keys=False)
    path.write_text(text)
    print(f"{text}wrote {path}")


def measure(device: torch.device, largest: tuple[int, int]) -> dict[str, float]:
    """The numbers of a machine, by all ranks at once, as they train. Links to other nodes are taken to be those inside.

    The same on all ranks: each is the mean of what they find.
    """
    rows, nbytes = largest
    numbers = _device_numbers(device, rows)
    if dist.get_world_size() > 1:
        numbers |= _link_numbers(device, nbytes)
    mean = torch.tensor(list(numbers.values()), dtype=torch.float64, device=device)
    dist.all_reduce(mean)
    return dict(zip(numbers, (mean / dist.get_world_size()).tolist(), strict=True))


def _device_numbers(device: torch.device, rows: int) -> dict[str, float]:
    on_gpu = device.type == "cuda"
    dtype = torch.bfloat16 if on_gpu else torch.float32
    # Of sizes that differ as the matrices of a layer do, neither the fastest nor the slowest.
    flops = statistics.median(
        2 * n**3 / seconds(_matmul(n, dtype, device), device) for n in (rows // 4, rows // 2, rows)
    )
    # More than a cache holds.
    x = torch.ones(16 * rows, rows, device=device)
    y = torch.empty_like(x)
    q = torch.randn(1, 8, rows // 2, 64, dtype=dtype, device=device)
    attention = seconds(lambda: F.scaled_dot_product_attention(q, q, q, is_causal=True), device)
    memory = (
        torch.cuda.get_device_properties(device).total_memory
        if on_gpu
        else os.sysconf("SC_PAGE_SIZE") * os.sysconf("SC_PHYS_PAGES")
    )
    return {
        "flops": flops,
        "memory": memory,
        "bandwidth": 2 * x.nbytes / seconds(lambda: y.copy_(x), device),
        # Of what has been measured, and not of a data sheet.
        "efficiency": 1.0,
        "attention": 2 * 8 * (rows // 2) ** 2 * 64 / attention / flops,
        "launch": _launch(device),
        "float32": seconds(_matmul(rows, dtype, device), device) / seconds(_matmul(rows, torch.float32, device), device)
        if on_gpu
        else 1.0,
    }


def _launch(device: torch.device) -> float:
    """Seconds that an operator takes which has next to nothing to compute."""
    if device.type == "cuda":
        # While it computes, Python goes on.
        small = torch.ones(1, device=device)
        return seconds(lambda: small.add_(1), device)
    # Those of a training step, with autograd and Python around them: a layer of few numbers, as time.py counts it.
    config = LlamaConfig(hidden_size=8, intermediate_size=8, num_attention_heads=1)
    layer, x, angles = LlamaDecoderLayer(config, 0), torch.ones(1, 8, 8, requires_grad=True), torch.ones(1, 8, 1, 4)
    free = replace(load_machine("laptop", 1), flops=math.inf, bandwidth=math.inf, launch=1.0)
    operators = sum(Times(Model.of(config), Layout(dtype="float32"), free).layer)
    return seconds(lambda: layer(x, angles, angles).sum().backward(), device) / operators


def _link_numbers(device: torch.device, nbytes: int) -> dict[str, float]:
    ranks = dist.get_world_size()
    little, much = (torch.ones(size // 4, device=device) for size in (SMALL, nbytes))
    part = much.new_empty(len(much) // ranks)
    few, many = (seconds(lambda x=x: dist.all_reduce(x), device) for x in (little, much))
    scatter = seconds(lambda: dist.reduce_scatter_single(part, much[: ranks * len(part)]), device)
    steps = 2 * (ranks - 1)
    bandwidth, latency = steps / ranks * (nbytes - SMALL) / max(many - few, 1e-9), few / steps
    return {
        "inside": bandwidth,
        "inside_latency": latency,
        # Of two processes on a CPU, which stand for nodes as well.
        **({"between": bandwidth, "between_latency": latency} if device.type == "cpu" else {}),
        "reduce_scatter": 2 * scatter / many,
        "interference": _interference(lambda: dist.all_reduce(much, async_op=True), many, device),
    }


def _interference(send: Callable[[], dist.Work], sent: float, device: torch.device) -> float:
    """Of the seconds of a message during matmuls, those that they take longer."""
    matmul = _matmul(512, torch.float32, device)
    # As long as three of the messages, if these are not slow.
    times = min(max(round(3 * sent / seconds(matmul, device)), 1), 300)

    def computed() -> None:
        for _ in range(times):
            matmul()

    def both() -> None:
        work = send()
        computed()
        work.wait()

    alone, together = seconds(computed, device), seconds(both, device)
    return min(max((together - alone) / sent, 0.0), 1.0)


def _matmul(n: int, dtype: torch.dtype, device: torch.device) -> Callable[[], object]:
    """Of activations that are in a cache, and weights that are not: each time it takes others."""
    x = torch.randn(n, n, device=device).to(dtype)
    weights = cycle([x.clone() for _ in range(math.ceil(CACHE / x.nbytes))])
    return lambda: x @ next(weights).T


def seconds(run: Callable[[], object], device: torch.device) -> float:
    """Of one call: the mean of those that SPAN has room for, as many on all ranks.

    A step is the sum of its operators. Where others use the machine too, the median of a few short calls would be that
    of those which nobody has interrupted.
    """

    def elapsed(times: int) -> float:
        start = time.perf_counter()
        for _ in range(times):
            run()
        if device.type == "cuda":
            torch.cuda.synchronize()
        return time.perf_counter() - start

    # The first one loads and allocates.
    elapsed(1)
    times = torch.tensor(SPAN / elapsed(1), device=device)
    if dist.is_initialized():
        dist.all_reduce(times, dist.ReduceOp.MIN)
    times = max(int(times), 1)
    return elapsed(times) / times


def _together(device: torch.device, largest: tuple[int, int]) -> dict[str, float]:
    """What the GPUs of this machine measure, or two processes on a CPU."""
    ranks = torch.cuda.device_count() if device.type == "cuda" else 2
    with tempfile.TemporaryDirectory() as directory:
        torch.multiprocessing.spawn(_rank, (ranks, device.type, directory, largest), ranks)
        numbers = yaml.safe_load((Path(directory) / "numbers").read_text())
    if device.type == "cpu":
        return numbers
    links = "links of one GPU" if ranks == 1 else "links between nodes"
    print(f"{links} are not measured, but taken from the h100 of machines.yaml")
    table = yaml.safe_load(Path(__file__).with_name("machines.yaml").read_text())["h100"]
    return {key: float(value) for key, value in table.items()} | numbers


def _rank(rank: int, ranks: int, kind: str, directory: str, largest: tuple[int, int]) -> None:
    torch.set_num_threads(1)
    device = torch.device(kind, rank) if kind == "cuda" else torch.device("cpu")
    if kind == "cuda":
        torch.cuda.set_device(device)
        # As in training.
        torch.set_float32_matmul_precision("high")
    backend = "nccl" if kind == "cuda" else "gloo"
    dist.init_process_group(backend, init_method=f"file://{directory}/store", rank=rank, world_size=ranks)
    numbers = measure(device, largest)
    if rank == 0:
        (Path(directory) / "numbers").write_text(yaml.safe_dump(numbers))
    dist.barrier()
    dist.destroy_process_group()
