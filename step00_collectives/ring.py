"""A ring all-reduce out of messages between neighbours, and what a message costs on this machine."""

import sys
import time

import torch
import torch.distributed as dist
from torch import Tensor

# Bytes of the messages that are timed. The first is all latency, the last nearly all transfer.
SIZES = (8, 2**12, 2**16, 2**20, 2**24)
# Round trips per size. The fastest counts: whatever else the machine does can only make one slower.
TRIPS = 100


def ring_all_reduce(x: Tensor) -> int:
    """Sum x over all ranks, in place. Returns the bytes that this rank has sent.

    In the first D − 1 turns sums travel, each one term richer with every rank: a reduce-scatter. In the others they
    travel as they are: an all-gather.
    """
    rank, ranks, sent = dist.get_rank(), dist.get_world_size(), 0
    parts = x.tensor_split(ranks)
    for turn in range(2 * (ranks - 1)):
        mine, coming = parts[(rank - turn) % ranks], parts[(rank - turn - 1) % ranks]
        arrived = torch.empty_like(coming)
        messages = [dist.isend(mine, (rank + 1) % ranks), dist.irecv(arrived, (rank - 1) % ranks)]
        for message in messages:
            message.wait()
        coming.copy_(coming + arrived if turn < ranks - 1 else arrived)
        sent += mine.nbytes
    return sent


def message_seconds(nbytes: int) -> float:
    """Seconds from rank 0 to rank 1: half of the fastest round trip."""
    x, fastest = torch.zeros(nbytes, dtype=torch.uint8), float("inf")
    for _ in range(TRIPS):
        start = time.perf_counter()
        if dist.get_rank() == 0:
            dist.send(x, 1)
            dist.recv(x, 1)
        elif dist.get_rank() == 1:
            dist.recv(x, 0)
            dist.send(x, 0)
        fastest = min(fastest, time.perf_counter() - start)
    dist.barrier()
    return fastest / 2


def main() -> None:
    dist.init_process_group("gloo")
    rank, ranks = dist.get_rank(), dist.get_world_size()
    if ranks == 1:
        sys.exit(f"a ring takes two: torchrun --nproc-per-node 4 {sys.argv[0]}")
    x = torch.full((ranks * 2**16,), float(rank))
    sent = ring_all_reduce(x)
    seconds = [message_seconds(size) for size in SIZES]
    if rank == 0:
        print(f"sum of the ranks' numbers: {x[0]:g}, everywhere: {bool((x == x[0]).all())}")
        print(f"bytes of x                {x.nbytes:>10,}")
        print(f"sent by each rank         {sent:>10,} = 2({ranks} − 1)/{ranks} of them")
        print("on this machine:")
        for size, s in zip(SIZES, seconds, strict=True):
            print(f"{size:>12,} bytes in {1e6 * s:>9,.0f} µs: {size / s / 1e9:>8.4f} GB/s")
        alpha = seconds[0]
        beta = (SIZES[-1] - SIZES[0]) / (seconds[-1] - seconds[0])
        print(f"α = {1e6 * alpha:,.0f} µs, β = {beta / 1e9:.2f} GB/s, αβ = {alpha * beta / 2**10:,.0f} KiB")
    # No rank leaves while another still talks to it.
    dist.barrier()
    dist.destroy_process_group()


if __name__ == "__main__":
    main()
