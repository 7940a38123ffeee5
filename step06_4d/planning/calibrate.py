"""Measure what machines.yaml says of a machine: matmuls, memory, attention, and all-reduces among its devices."""

import os
import tempfile
import time
from collections.abc import Callable
from pathlib import Path

import torch
import torch.distributed as dist
import torch.nn.functional as F
import yaml

# Repetitions of which the fastest counts.
TRIES = 5
# Bytes of the all-reduces that tell latency and bandwidth.
SMALL, LARGE = 2**10, 2**24


def calibrate(path: Path) -> None:
    """Write the numbers of this machine to a file that --gpu takes. Prints the matmul table."""
    device = torch.device("cuda" if torch.cuda.is_available() else "cpu")
    torch.set_num_threads(1)
    dtype = torch.bfloat16 if device.type == "cuda" else torch.float32
    largest = 8192 if device.type == "cuda" else 1024
    rates = {n: 2 * n**3 / seconds(_matmul(n, dtype, device), device) for n in (largest // 8, largest // 2, largest)}
    for n, rate in rates.items():
        print(f"matmul {n:>5} {rate / 1e12:10.3f} TFLOP/s")
    flops = max(rates.values())
    x = torch.empty(largest * largest, device=device)
    y = torch.empty_like(x)
    bandwidth = 2 * x.nbytes / seconds(lambda: y.copy_(x), device)
    q = torch.randn(1, 8, largest // 2, 64, dtype=dtype, device=device)
    attention = seconds(lambda: F.scaled_dot_product_attention(q, q, q, is_causal=True), device)
    small = torch.ones(1, device=device)
    latency, link = _links(device)
    if device.type == "cuda":
        memory = torch.cuda.get_device_properties(device).total_memory
    else:
        memory = os.sysconf("SC_PAGE_SIZE") * os.sysconf("SC_PHYS_PAGES")
    measured = {
        "flops": flops,
        "memory": memory,
        "bandwidth": bandwidth,
        "efficiency": 1.0,
        "attention": 2 * 8 * (largest // 2) ** 2 * 64 / attention / flops,
        "launch": seconds(lambda: small.add_(1), device),
        "inside": link,
        "inside_latency": latency,
        # As if other nodes were as near: measure those with a file of your own.
        "between": link,
        "between_latency": latency,
    }
    path.write_text(yaml.safe_dump({key: float(f"{value:.4g}") for key, value in measured.items()}, sort_keys=False))
    print(f"wrote {path}")


def _matmul(n: int, dtype: torch.dtype, device: torch.device) -> Callable[[], object]:
    a = torch.randn(n, n, device=device).to(dtype)
    return lambda: a @ a


def seconds(run: Callable[[], object], device: torch.device) -> float:
    """Of one call, the fastest of a few."""
    best = float("inf")
    for _ in range(TRIES + 1):
        start = time.perf_counter()
        run()
        if device.type == "cuda":
            torch.cuda.synchronize()
        best = min(best, time.perf_counter() - start)
    return best


def _links(device: torch.device) -> tuple[float, float]:
    """Seconds per message, and bytes per second: of ring all-reduces of two sizes, among GPUs or two processes."""
    ranks = torch.cuda.device_count() if device.type == "cuda" else 2
    if ranks < 2:
        print("one GPU: its links are not measured, take those of machines.yaml")
        return 3e-6, 1e11
    with tempfile.TemporaryDirectory() as directory:
        torch.multiprocessing.spawn(_all_reduces, (ranks, device.type, directory), ranks)
        small, large = map(float, (Path(directory) / "seconds").read_text().split())
    steps = 2 * (ranks - 1)
    return small / steps, steps / ranks * (LARGE - SMALL) / (large - small)


def _all_reduces(rank: int, ranks: int, kind: str, directory: str) -> None:
    torch.set_num_threads(1)
    device = torch.device(kind, rank) if kind == "cuda" else torch.device("cpu")
    backend = "nccl" if kind == "cuda" else "gloo"
    dist.init_process_group(backend, init_method=f"file://{directory}/store", rank=rank, world_size=ranks)
    found = []
    for nbytes in (SMALL, LARGE):
        x = torch.ones(nbytes // 4, device=device)
        found.append(seconds(lambda x=x: dist.all_reduce(x), device))
    if rank == 0:
        (Path(directory) / "seconds").write_text(" ".join(map(str, found)))
    dist.barrier()
    dist.destroy_process_group()
