"""The layouts whose every rank is listened to: each step, each axis, each engine, each option that sends something."""

from typing import NamedTuple

from fake_ranks import run_rank
from order import Trace
from races import Races

# Step, ranks, options.
LAYOUTS = [
    ("step02_data_parallel", 2, "--dp-engine naive"),
    ("step02_data_parallel", 4, "--bucket-mib 0.0001 --micro-batch-size 2"),
    ("step03_tensor_parallel", 2, "--tp 2 --tp-engine naive"),
    ("step03_tensor_parallel", 2, "--tp 2 --no-tp-overlap --tie-word-embeddings True"),
    ("step03_tensor_parallel", 4, "--dp 2 --tp 2 --bucket-mib 0.01"),
    ("step03_tensor_parallel", 4, "--tp 4 --dtype bfloat16"),
    ("step04_pipeline_parallel", 2, "--pp 2 --pp-schedule afab --micro-batch-size 1"),
    ("step04_pipeline_parallel", 3, "--pp 3 --num-hidden-layers 3 --micro-batch-size 1"),
    ("step04_pipeline_parallel", 4, "--pp 4 --num-hidden-layers 4 --micro-batch-size 2 --tie-word-embeddings True"),
    ("step04_pipeline_parallel", 4, "--dp 2 --pp 2 --micro-batch-size 1 --bucket-mib 0.01"),
    ("step04_pipeline_parallel", 4, "--tp 2 --pp 2 --micro-batch-size 2"),
    ("step05_context_parallel", 2, "--cp 2 --cp-engine all-gather"),
    ("step05_context_parallel", 2, "--cp 2 --cp-engine all-to-all"),
    ("step05_context_parallel", 3, "--cp 3 --seq-len 18"),
    ("step05_context_parallel", 4, "--tp 4 --dtype bfloat16"),
    ("step05_context_parallel", 8, "--dp 2 --pp 2 --cp 2 --micro-batch-size 1"),
    ("step06_4d", 2, "--zero 1 --micro-batch-size 2"),
    ("step06_4d", 2, "--zero 2 --micro-batch-size 2 --tie-word-embeddings True"),
    ("step06_4d", 4, "--zero 3 --dp 2 --cp 2 --micro-batch-size 2 --recompute full"),
    ("step06_4d", 4, "--zero 3 --dp 2 --tp 2 --sequence-parallel --micro-batch-size 2 --recompute selective"),
    ("step06_4d", 4, "--zero 3 --shard 2 --micro-batch-size 1"),
    ("step06_4d", 2, "--pp 2 --pp-schedule zero-bubble --micro-batch-size 1"),
    ("step06_4d", 8, "--pp 2 --tp 4 --pp-schedule zero-bubble --zero 1 --dtype bfloat16 --micro-batch-size 2"),
    ("step06_4d", 2, "--pp 2 --virtual-stages 2 --num-hidden-layers 4 --micro-batch-size 2"),
    ("step06_4d", 3, "--pp 3 --virtual-stages 2 --num-hidden-layers 6 --micro-batch-size 1 --global-batch-size 6"),
    ("step06_4d", 2, "--cp 2 --mask-documents"),
    ("step06_4d", 2, "--tp 2 --on-bad-step skip --spike-factor 3"),
    ("step06_4d", 4, "--tp 2 --cp 2 --sequence-parallel"),
    ("step06_4d", 8, "--dp 2 --tp 2 --pp 2 --sequence-parallel --zero 1 --recompute full --micro-batch-size 1"),
]
IDS = [f"{step[:6]} {ranks} {options}" for step, ranks, options in LAYOUTS]


class Heard(NamedTuple):
    """Of a rank: its races, its trace, and what its ledger counted next to the formula."""

    races: list[str]
    trace: Trace
    ledger: dict


def listen(step: str, ranks: int, args: tuple[str, ...], **options: object) -> list[Heard]:
    """Every rank of a layout, one after the other; `options` are those of `run_rank`."""
    heard = []
    for rank in range(ranks):
        races, trace = Races(), Trace(rank)
        ledger = run_rank(step, rank, ranks, list(args), races, trace, **options)
        heard.append(Heard(races.end(), trace, ledger))
    return heard


def sizes(small_run: list[str]) -> list[str]:
    """Two steps, of which the second finds the state that the first has made, and an evaluation."""
    return [*small_run, "--steps", "2", "--eval-every", "2", "--eval-steps", "1"]
