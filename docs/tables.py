"""The numbers behind the pictures one can play with, from the functions that train."""

import itertools
import json
import sys
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import numpy as np
import torch

ROOT = Path(__file__).parent.parent
sys.path.append(str(ROOT / "step06_4d"))

import context_parallel
import table_costs
from context.documents import document_begins, document_blocks
from pipeline import schedules as pipeline_schedules
from planning.layout import Layout, Place
from planning.memory import memory

from shared.timeline import bubble, simulate

STAGES = (2, 3, 4, 6, 8)
MICRO_BATCHES = (1, 2, 3, 4, 6, 8, 12, 16)
CHUNKS = (1, 2, 3)
RINGS = list(itertools.product(("zigzag", "contiguous"), (2, 4, 8)))
# In the order of the mesh: neighbours differ in tp first.
AXES = ("pp", "dp", "cp", "tp")
# Whose ranks the mesh shows.
MODEL = "llama-3.1-8b"


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
    """For each way to lay 16 ranks out: the groups of each axis, which are lists of ranks, and what each rank has."""
    found, ranks = {}, {}
    for sizes in itertools.product((1, 2, 4, 8, 16), repeat=4):
        if sizes[0] * sizes[1] * sizes[2] * sizes[3] == 16:
            name = " ".join(map(str, sizes))
            found[name] = {axis: groups(sizes, i) for i, axis in enumerate(AXES)}
            ranks[name] = [has(sizes, Place(*place)) for place in itertools.product(*map(range, sizes))]
    return {"axes": AXES, "layouts": found, "ranks": ranks, "node": table_costs.NODE}


def has(sizes: tuple[int, ...], place: Place) -> list:
    """What a rank has of MODEL and of its batch: [layers, columns of a hidden state in the MLP, tokens, sequences],
    each as text; bytes that it holds; and bytes that it sends in a step by axis."""
    layout = Layout(
        **dict(zip(AXES, sizes, strict=True)),
        zero=1,
        sequence_parallel=sizes[3] > 1,
        global_batch_size=table_costs.GLOBAL_BATCH_SIZE,
        seq_len=table_costs.SEQ_LEN,
    )
    model, split = table_costs.model_of(MODEL), table_costs.split(MODEL, layout.pp)
    config = SimpleNamespace(cp=layout.cp, seq_len=layout.seq_len, zigzag=layout.cp > 1)
    tokens = context_parallel.local_positions(config, place.cp).tolist()
    jumps = [i for i in range(1, len(tokens)) if tokens[i] != tokens[i - 1] + 1]
    pieces = [(tokens[i], tokens[j - 1]) for i, j in itertools.pairwise([0, *jumps, len(tokens)])]
    chunks, first = [split[place.pp]], sum(split[: place.pp])
    ffn, sequences = model.intermediate_size // layout.tp, layout.global_batch_size // layout.dp
    sent = table_costs.on_wires(model, layout, place, sum(chunks))
    return [
        [
            f"{first}–{first + chunks[0] - 1}",
            f"{place.tp * ffn}–{(place.tp + 1) * ffn - 1}",
            ", ".join(f"{begin}–{end}" for begin, end in pieces),
            f"{sequences}",
        ],
        memory(model, layout, place, chunks).total,
        [round(sent[axis]) for axis in AXES],
    ]


def rings() -> dict[str, Any]:
    """Of each "split cp", in pieces of which a sequence has 2 cp: those of each rank, and by hop and rank the pairs of
    pieces (of queries, of keys) that are computed."""
    return {f"{split} {ranks}": _ring(split, ranks, [0]) for split, ranks in RINGS}


def document_rings() -> dict[str, Any]:
    """The same of "split cp documents": three documents, of which no query sees another. They begin at `documents`."""
    return {
        f"{split} {ranks} documents": _ring(split, ranks, [0, ranks // 2, 3 * ranks // 2]) for split, ranks in RINGS
    }


def _ring(split: str, ranks: int, firsts: list[int]) -> dict[str, Any]:
    # A sequence whose pieces are single tokens.
    config = SimpleNamespace(cp=ranks, seq_len=2 * ranks, zigzag=split == "zigzag")
    pieces = [context_parallel.local_positions(config, rank) for rank in range(ranks)]
    begins = document_begins([np.array(firsts)], config.seq_len)
    blocks = [document_blocks(config, rank, begins) for rank in range(ranks)]
    return {
        "documents": firsts,
        "pieces": [own.tolist() for own in pieces],
        "hops": [[_pairs(pieces, blocks, rank, (rank - hop) % ranks) for rank in range(ranks)] for hop in range(ranks)],
    }


def _pairs(pieces: list, blocks: list, rank: int, source: int) -> list[list[int]]:
    """What a rank computes while it has the keys of `source`."""
    return [
        [q, k]
        for block in blocks[rank][source]
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
