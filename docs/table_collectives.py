"""The numbers behind "collectives": what step00 leaves on each rank, and what its ring sends turn by turn."""

import multiprocessing
import queue
import sys
import tempfile
import threading
from collections import defaultdict
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from types import SimpleNamespace
from typing import Any
from unittest.mock import patch

import torch
import torch.distributed as dist
from torch import Tensor

ROOT = Path(__file__).parent.parent
sys.path.append(str(ROOT / "step00_collectives"))

import collectives as step00
import ring

RANKS = step00.RANKS
SIZES = range(2, 9)
# A tensor that each of these sizes divides.
NUMBERS = 840


def collectives() -> dict[str, Any]:
    """`calls`: of each collective its frames. `rings`: of each number of ranks, an all-reduce turn by turn."""
    return {
        "calls": {what: frames(held) for what, held in after().items()},
        "rings": {ranks: ring_all_reduce(ranks) for ranks in SIZES},
    }


def after() -> dict[str, list[list[int] | None]]:
    """What collectives.py shows of each collective: the numbers of each rank, or None."""
    with tempfile.TemporaryDirectory() as directory, multiprocessing.get_context("fork").Pool(RANKS) as pool:
        args = [(rank, f"file://{directory}/store") for rank in range(RANKS)]
        everyones = pool.starmap(_shown, args, chunksize=1)
    return {what: [mine[what] for mine in everyones] for what in everyones[0]}


def _shown(rank: int, store: str) -> dict[str, list[int] | None]:
    found: dict[str, list[int] | None] = {}
    step00.show = lambda what, mine: found.setdefault(what, None if mine is None else mine.tolist())
    dist.init_process_group("gloo", init_method=store, rank=rank, world_size=RANKS)
    for calls in (step00.from_one_rank, step00.to_one_rank, step00.to_all_ranks, step00.from_rank_to_rank):
        calls()
    dist.barrier()
    dist.destroy_process_group()
    return found


def frames(held: list[list[int] | None]) -> list[dict[str, list]]:
    """From what ranks start with to what a collective leaves, if in turn t each sends to the rank t further.

    Whose a number was, it says itself: rank r starts with 10 r to 10 r + 3, and what no rank starts with is a sum. A
    frame has `messages`, each [from, to, numbers], and `held`, of each rank a list of [number, ranks it is of].
    """
    starts = [[10 * rank + i for i in range(RANKS)] for rank in range(RANKS)]
    total = sum(10 * rank for rank in range(RANKS))

    def shares(number: int) -> dict[int, int]:
        """Of each rank that a number is of, what that adds."""
        if any(number in start for start in starts):
            return {number // 10: number}
        return {rank: 10 * rank + (number - total) // RANKS for rank in range(RANKS)}

    found = [{"messages": [], "held": [[[number, [rank]] for number in start] for rank, start in enumerate(starts)]}]
    slots = [[shares(number) for number in numbers or []] for numbers in held]
    for turn in range(1, RANKS):
        messages = []
        for rank, own in enumerate(slots):
            source = (rank - turn) % RANKS
            if numbers := [share[source] for share in own if source in share]:
                messages.append([source, rank, numbers])
        seen = [
            [{r: n for r, n in share.items() if (rank - r) % RANKS <= turn} for share in own]
            for rank, own in enumerate(slots)
        ]
        if messages:
            so_far = [[[sum(share.values()), list(share)] for share in own if share] for own in seen]
            found.append({"messages": messages, "held": so_far})
    return found


def ring_all_reduce(ranks: int) -> dict[str, Any]:
    """ring.py's all-reduce of `ranks` ranks, each a thread here, over a tensor whose numbers say who has added to them.

    `held[turn][rank][part]`: the ranks whose numbers are in the sum. `passes[turn][rank]`: the part it sends in that
    turn. `sent[turn]`: bytes that a rank has sent before it.
    """
    channels, me = defaultdict(queue.Queue), threading.local()
    held = [[None] * ranks for _ in range(2 * ranks - 1)]
    passes, sent = [[None] * ranks for _ in range(2 * ranks - 2)], [0]

    def note() -> None:
        held[me.turn][me.rank] = [[r for r in range(ranks) if part[0] >> r & 1] for part in me.x.tensor_split(ranks)]

    def isend(tensor: Tensor, to: int) -> Any:
        note()
        passes[me.turn][me.rank] = tensor.storage_offset() * ranks // NUMBERS
        channels[me.rank, to].put(tensor.clone())
        me.turn += 1
        if me.rank == 0:
            sent.append(sent[-1] + tensor.nbytes)
        return SimpleNamespace(wait=lambda: None)

    def irecv(tensor: Tensor, source: int) -> Any:
        channel = channels[source, me.rank]
        return SimpleNamespace(wait=lambda: tensor.copy_(channel.get()))

    def run(rank: int) -> int:
        me.rank, me.turn, me.x = rank, 0, torch.full((NUMBERS,), 1 << rank)
        nbytes = ring.ring_all_reduce(me.x)
        note()
        return nbytes

    stand_in = SimpleNamespace(get_rank=lambda: me.rank, get_world_size=lambda: ranks, isend=isend, irecv=irecv)
    with patch.object(ring, "dist", stand_in), ThreadPoolExecutor(ranks) as threads:
        # What the function itself says that it has sent.
        totals = set(threads.map(run, range(ranks)))
    assert totals == {sent[-1]}
    return {"bytes": NUMBERS * 8, "held": held, "passes": passes, "sent": sent}
