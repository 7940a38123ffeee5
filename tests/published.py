"""What others have measured, next to what step06's planner predicts: `PYTHONPATH=.:tests python tests/published.py`.

Their software is not this one: one factor for each peer, GPU and precision is fitted on every other row, and the rows
between are predicted. published.csv has the rows whose layout is published as a whole, each with its source.
"""

import csv
import math
import re
import statistics
from dataclasses import replace
from itertools import combinations
from typing import NamedTuple

from conftest import ROOT
from planner import sibling

from shared.llama_configs import PRESETS


class Row(NamedTuple):
    source: str
    model: str
    gpu: str
    precision: str
    seq: int
    gpus: int
    dp: int
    tp: int
    pp: int
    cp: int
    vp: int
    # Sequences of a micro-batch, and of a step.
    mbs: int
    gbs: int
    recompute: str
    tokens_per_second: float

    @property
    def peer(self) -> tuple[str, str, str]:
        return self.source.split()[0], self.gpu, self.precision


def rows() -> list[Row]:
    with (ROOT / "tests/published.csv").open() as file:
        return [
            Row(*(kind(value) for kind, value in zip(Row.__annotations__.values(), line, strict=True)))
            for line in list(csv.reader(file))[1:]
        ]


def model_of(name: str) -> object:
    """A preset, or one of nanotron's: `nt-` and layers, hidden size, feed-forward size, tied or not."""
    shapes = sibling("planning.layout")
    if found := re.fullmatch(r"nt-(\d+)-(\d+)-(\d+)-(un)?tied", name):
        layers, h, f = map(int, found.groups()[:3])
        return shapes.Model(h, f, layers, h // 64, h // 64, 64, 131072, not found[4])
    return shapes.Model.of(PRESETS[name])


def predicted(row: Row) -> float:
    """Tokens/s of a GPU."""
    shapes, timing, machines = sibling("planning.layout"), sibling("planning.time"), sibling("planning.machines")
    model, machine = model_of(row.model), machines.load_machine(row.gpu, 8)
    if row.precision == "fp8":
        # Its matmuls are twice as fast.
        machine = replace(machine, flops=2 * machine.flops, attention=machine.attention / 2)
    layout = shapes.Layout(
        dp=row.dp,
        tp=row.tp,
        pp=row.pp,
        cp=row.cp,
        # torchtitan's FSDP gathers weights for each micro-batch, if there is no pipeline; others shard the optimizer.
        zero=3 if row.source.startswith("torchtitan") and row.pp == 1 else 1,
        sequence_parallel=row.tp > 1,
        virtual_stages=row.vp,
        recompute="full" if row.recompute == "full" else "none",
        micro_batch_size=row.mbs,
        global_batch_size=row.gbs,
        seq_len=row.seq,
    )
    # torchtitan's selective recompute runs every other matmul again. All have fused kernels, or compile.
    recomputed = 0.5 if row.recompute == "every other" else None
    times = timing.Times(model, layout, machine, recomputed=recomputed, fused=True)
    split = sibling("pipeline.stages").split_layers(model, row.seq, row.pp * row.vp)
    chunks = [[len(layers) for layers in split[stage :: row.pp]] for stage in range(row.pp)]
    seconds = timing.step_time(times, chunks, simulated=row.pp > 1 and layout.global_batch_size % row.pp == 0).total
    return row.gbs * row.seq / seconds / row.gpus


def compared() -> list[tuple[Row, float, bool]]:
    """Each row, what is predicted with the peer's factor, and whether the row was held out from fitting that."""
    raw = {row: predicted(row) for row in rows()}
    found = []
    for peer in dict.fromkeys(row.peer for row in raw):
        mine = [row for row in raw if row.peer == peer]
        factor = math.exp(statistics.median(math.log(row.tokens_per_second / raw[row]) for row in mine[::2]))
        found += [(row, raw[row] * factor, i % 2 == 1) for i, row in enumerate(mine)]
    return found


def errors(found: list[tuple[Row, float, bool]]) -> list[float]:
    """Of the rows that were held out."""
    return [abs(guess / row.tokens_per_second - 1) for row, guess, held_out in found if held_out]


def tau(pairs: list[tuple[float, float]]) -> float:
    """Kendall's: the share of pairs in the same order, less that of the others."""
    signs = [math.copysign(1, (a[0] - b[0]) * (a[1] - b[1])) for a, b in combinations(pairs, 2)]
    return sum(signs) / len(signs)


def families(found: list[tuple[Row, float, bool]]) -> dict[str, list[tuple[float, float]]]:
    """Rows of one peer and model that differ in their layout: published and predicted."""
    of: dict[str, list[tuple[float, float]]] = {}
    seen = set()
    for row, guess, _ in found:
        if (layout := row[1:-2]) in seen:
            # By other software, or compiled.
            continue
        seen.add(layout)
        kind = "tp alone" if row.source.startswith("nanotron scripts") else row.precision
        of.setdefault(f"{row.peer[0]} {row.model} {row.gpu} {kind}", []).append((row.tokens_per_second, guess))
    return {name: pairs for name, pairs in of.items() if len(pairs) > 2}


def main() -> None:
    found = compared()
    for row, guess, held_out in found:
        error = guess / row.tokens_per_second - 1
        layout = f"dp {row.dp} tp {row.tp} pp {row.pp} cp {row.cp} vp {row.vp} mbs {row.mbs}"
        print(
            f"{row.peer[0]:<12}{row.model:<26}{row.gpu:<6}{row.precision:<5}{row.seq:>7} {layout:<42}"
            f"{row.tokens_per_second:>9,.0f}{guess:>9,.0f}{error:>+8.1%}{'  held out' * held_out}"
        )
    held = errors(found)
    print(f"held out: {len(held)} rows, median error {statistics.median(held):.1%}, worst {max(held):.1%}")
    for name, pairs in families(found).items():
        print(f"{name:<60}{len(pairs):>3} rows, Kendall's tau {tau(pairs):+.2f}")


if __name__ == "__main__":
    main()
