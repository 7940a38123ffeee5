"""The numbers behind the pictures one can play with, from the functions that train."""

import itertools
import json
import sys
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import torch

ROOT = Path(__file__).parent.parent
sys.path.append(str(ROOT / "step06_4d"))

import context_parallel
from pipeline import schedules as pipeline_schedules

from shared.timeline import bubble, simulate

STAGES = (2, 3, 4, 6, 8)
MICRO_BATCHES = (1, 2, 3, 4, 6, 8, 12, 16)
CHUNKS = (1, 2, 3)
# In the order of the mesh: neighbours differ in tp first.
AXES = ("pp", "dp", "cp", "tp")


def schedules() -> dict[str, Any]:
    """Of each schedule "name P M V": its bubble, the micro-batches held at once, and the events of each stage.

    An event is [kind, micro-batch, chunk, start, end], in units of a forward.
    """
    found = {}
    for stages, micro_batches, chunks in itertools.product(STAGES, MICRO_BATCHES, CHUNKS):
        names = ["interleaved"] if chunks > 1 else list(pipeline_schedules.SCHEDULES)
        if chunks > 1 and micro_batches % stages:
            continue
        for name in names:
            actions = [
                pipeline_schedules.make_schedule(name, stage, stages, micro_batches, chunks) for stage in range(stages)
            ]
            events = simulate(actions)
            by_stage = [[list(_short(e)) for e in events if e.stage == stage] for stage in range(stages)]
            found[f"{name} {stages} {micro_batches} {chunks}"] = {
                "bubble": round(bubble(events), 4),
                "held": [held(schedule) for schedule in actions],
                "events": by_stage,
            }
    return {"stages": STAGES, "microBatches": MICRO_BATCHES, "chunks": CHUNKS, "schedules": found}


def _short(event: Any) -> tuple:
    return event.kind[0], event.micro_batch, event.chunk, event.start, event.end


def held(schedule: list) -> int:
    """The most chunks of activations that a stage holds at once: from a forward to its backward or weight gradient."""
    now = most = 0
    splits = any(action.kind == "weight" for action in schedule)
    for action in schedule:
        now += (action.kind == "forward") - (action.kind == ("weight" if splits else "backward"))
        most = max(most, now)
    return most


def meshes() -> dict[str, Any]:
    """For each way to lay 16 ranks out, the groups of each axis: lists of ranks."""
    found = {}
    for sizes in itertools.product((1, 2, 4, 8, 16), repeat=4):
        if sizes[0] * sizes[1] * sizes[2] * sizes[3] == 16:
            found[" ".join(map(str, sizes))] = {axis: groups(sizes, i) for i, axis in enumerate(AXES)}
    return {"axes": AXES, "layouts": found}


def rings() -> dict[str, Any]:
    """Of each "split cp", in pieces of which a sequence has 2 cp: those of each rank, and by hop and rank the pairs of
    pieces (of queries, of keys) that are computed."""
    found = {}
    for split, ranks in itertools.product(("zigzag", "contiguous"), (2, 4, 8)):
        # A sequence whose pieces are single tokens.
        config = SimpleNamespace(cp=ranks, seq_len=2 * ranks, zigzag=split == "zigzag")
        pieces = [context_parallel.local_positions(config, rank) for rank in range(ranks)]
        found[f"{split} {ranks}"] = {
            "pieces": [own.tolist() for own in pieces],
            "hops": [
                [_pairs(config, pieces, rank, (rank - hop) % ranks) for rank in range(ranks)] for hop in range(ranks)
            ],
        }
    return found


def _pairs(config: Any, pieces: list, rank: int, source: int) -> list[list[int]]:
    """What a rank computes while it has the keys of `source`."""
    return [
        [q, k]
        for block in context_parallel.visible(config, rank, source)
        for q in pieces[rank][block.queries[-1]].tolist()
        for k in pieces[source][block.keys[-1]].tolist()
        if k <= q or not block.causal
    ]


def groups(sizes: tuple[int, ...], axis: int) -> list[list[int]]:
    """The ranks that differ along one axis only, as `init_device_mesh` numbers them."""
    ranks = torch.arange(torch.tensor(sizes).prod().item()).view(sizes)
    return ranks.movedim(axis, -1).reshape(-1, sizes[axis]).tolist()


def write_page(path: Path, name: str, table: dict[str, Any]) -> None:
    """The page of a picture: its text, and its numbers, which a page opened from a disk could not load."""
    text = (Path(__file__).parent / "pages" / path.name).read_text()
    data = json.dumps(table, separators=(",", ":"))
    path.write_text(f'{text}\n```{{raw}} html\n<script type="application/json" id="{name}-data">{data}</script>\n```\n')
