"""Eight collectives on four ranks, each with what it leaves where.

Rank r starts with the numbers 10·r, 10·r + 1, 10·r + 2, 10·r + 3: the tens say whose a number was, the ones which.
"""

import sys

import torch
import torch.distributed as dist
from torch import Tensor
from torch.distributed.device_mesh import init_device_mesh

RANKS = 4


def show(what: str, mine: object) -> None:
    """Print what each rank has, in a line. Only rank 0 prints: lines of four processes would mix."""
    mine = mine.tolist() if isinstance(mine, Tensor) else mine
    everyones = [None] * RANKS if dist.get_rank() == 0 else None
    dist.gather_object(mine, everyones)
    if everyones:
        print(f"{what:<16}" + "".join(f"{'-' if one is None else str(one):<19}" for one in everyones).rstrip())


def start() -> Tensor:
    """The four numbers that this rank starts with."""
    return 10 * dist.get_rank() + torch.arange(RANKS)


def groups() -> None:
    """A mesh of 2 × 2, and the two groups that each rank is in."""
    mesh = init_device_mesh("cpu", (2, 2), mesh_dim_names=("dp", "tp"))
    show("place", f"dp {mesh.get_local_rank('dp')}, tp {mesh.get_local_rank('tp')}")
    for axis in ("dp", "tp"):
        group = mesh.get_group(axis)
        show(f"{axis} group", dist.get_process_group_ranks(group))
        summed = start()
        dist.all_reduce(summed, group=group)
        show(f"sum over {axis}", summed)


def from_one_rank() -> None:
    x = start()
    dist.broadcast(x, src=0)
    show("broadcast", x)

    mine = torch.empty(1, dtype=torch.int64)
    dist.scatter(mine, list(start().split(1)) if dist.get_rank() == 0 else None, src=0)
    show("scatter", mine)


def to_one_rank() -> None:
    first = dist.get_rank() == 0
    everyones = [torch.empty(1, dtype=torch.int64) for _ in range(RANKS)] if first else None
    dist.gather(start()[:1], everyones, dst=0)
    show("gather", torch.cat(everyones) if first else None)

    x = start()
    dist.reduce(x, dst=0)
    # On the other ranks, x now holds anything.
    show("reduce", x if first else None)


def to_all_ranks() -> None:
    everyones = torch.empty(RANKS, dtype=torch.int64)
    dist.all_gather_single(everyones, start()[:1])
    show("all-gather", everyones)

    mine = torch.empty(1, dtype=torch.int64)
    dist.reduce_scatter_single(mine, start())
    show("reduce-scatter", mine)

    x = start()
    dist.all_reduce(x)
    show("all-reduce", x)

    x = torch.empty_like(start())
    dist.all_to_all_single(x, start())
    show("all-to-all", x)


def from_rank_to_rank() -> None:
    """Each sends to the next. Both calls return at once: four blocking sends would wait for each other."""
    rank, arrived = dist.get_rank(), torch.empty_like(start())
    sending = dist.isend(start(), (rank + 1) % RANKS)
    receiving = dist.irecv(arrived, (rank - 1) % RANKS)
    for message in (sending, receiving):
        message.wait()
    show("send, receive", arrived)


def main() -> None:
    dist.init_process_group("gloo")
    if dist.get_world_size() != RANKS:
        sys.exit(f"the page is about {RANKS} ranks: torchrun --nproc-per-node {RANKS} {sys.argv[0]}")
    show("rank", dist.get_rank())
    show("starts with", start())
    from_one_rank()
    to_one_rank()
    to_all_ranks()
    from_rank_to_rank()
    groups()
    # No rank leaves while another still talks to it.
    dist.barrier()
    dist.destroy_process_group()


if __name__ == "__main__":
    main()
