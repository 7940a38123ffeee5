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
    """Write the numbers of this machine to a file that --gpu takes. Prints its matmul table."""
    device = torch.device("cuda" if torch.cuda.is_available() else "cpu")
    torch.set_num_threads(1)
    numbers = device_numbers(device) | _links(device)
    path.write_text(yaml.safe_dump({key: float(f"{value:.4g}") for key, value in numbers.items()}, sort_keys=False))
    print(f"wrote {path}")


def device_numbers(device: torch.device) -> dict[str, float]:
    """Of one device, by itself."""
    on_gpu = device.type == "cuda"
    dtype, largest = (torch.bfloat16, 8192) if on_gpu else (torch.float32, 1024)
    rates = {n: 2 * n**3 / seconds(_matmul(n, dtype, device), device) for n in (largest // 8, largest // 2, largest)}
    for n, rate in rates.items():
        print(f"matmul of {n:>5}: {rate / 1e12:.3f} TFLOP/s")
    flops = max(rates.values())
    x = torch.empty(largest * largest, device=device)
    y = torch.empty_like(x)
    q = torch.randn(1, 8, largest // 2, 64, dtype=dtype, device=device)
    attention = seconds(lambda: F.scaled_dot_product_attention(q, q, q, is_causal=True), device)
    small = torch.ones(1, device=device)
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
        "attention": 2 * 8 * (largest // 2) ** 2 * 64 / attention / flops,
        "launch": seconds(lambda: small.add_(1), device),
    }


def link_numbers(device: torch.device) -> dict[str, float]:
    """Of the ranks that are there. Links to other nodes are taken to be the same: correct them by hand."""
    ranks, found = dist.get_world_size(), []
    for nbytes in (SMALL, LARGE):
        x = torch.ones(nbytes // 4, device=device)
        found.append(seconds(lambda x=x: dist.all_reduce(x), device))
    small, large = found
    steps = 2 * (ranks - 1)
    bandwidth, latency = steps / ranks * (LARGE - SMALL) / (large - small), small / steps
    return {"inside": bandwidth, "inside_latency": latency, "between": bandwidth, "between_latency": latency}


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


def _links(device: torch.device) -> dict[str, float]:
    """Of all-reduces among the GPUs, or two processes."""
    ranks = torch.cuda.device_count() if device.type == "cuda" else 2
    if ranks < 2:
        print("one GPU: its links are not measured, but taken from the h100 of machines.yaml")
        table = yaml.safe_load(Path(__file__).with_name("machines.yaml").read_text())["h100"]
        return {key: float(table[key]) for key in ("inside", "inside_latency", "between", "between_latency")}
    with tempfile.TemporaryDirectory() as directory:
        torch.multiprocessing.spawn(_all_reduces, (ranks, device.type, directory), ranks)
        return yaml.safe_load((Path(directory) / "links").read_text())


def _all_reduces(rank: int, ranks: int, kind: str, directory: str) -> None:
    torch.set_num_threads(1)
    device = torch.device(kind, rank) if kind == "cuda" else torch.device("cpu")
    if kind == "cuda":
        torch.cuda.set_device(device)
    backend = "nccl" if kind == "cuda" else "gloo"
    dist.init_process_group(backend, init_method=f"file://{directory}/store", rank=rank, world_size=ranks)
    numbers = link_numbers(device)
    if rank == 0:
        (Path(directory) / "links").write_text(yaml.safe_dump(numbers))
    dist.barrier()
    dist.destroy_process_group()
