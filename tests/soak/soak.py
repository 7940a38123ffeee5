"""Disturbs a run at random moments until it has ended anyway, and compares its weights with those of one in peace.

    python tests/soak/soak.py --ranks 8 --layout "--dp 2 --tp 2 --pp 2 --zero 1" --steps 300 --disturbances 20 --seed 1

The ranks are forked from this process. Fails if a bit differs, a step is reported twice, or a signal does not save.
"""

import argparse
import json
import random
import signal
import sys
import tempfile
import time
from collections.abc import Callable
from pathlib import Path

sys.path.insert(0, str(Path(__file__).parent.parent))

import torch
from launcher import Launch
from safetensors.torch import load_file

STEP = "step06_4d"
REQUEUE = 85
MODEL = """--num-hidden-layers 2 --hidden-size 32 --intermediate-size 48 --num-attention-heads 4 --num-key-value-heads 2
    --vocab-size 300 --seq-len 16 --global-batch-size 8 --micro-batch-size 2 --warmup-steps 2 --device cpu"""


def kill_one(run: Launch, rank: int) -> None:
    run.signal(signal.SIGKILL, rank)


def kill_all(run: Launch, rank: int) -> None:
    run.signal(signal.SIGKILL)


def tell_one(run: Launch, rank: int) -> None:
    run.signal(signal.SIGUSR1, rank)


def tell_all(run: Launch, rank: int) -> None:
    run.signal(signal.SIGTERM)


def tell_twice(run: Launch, rank: int) -> None:
    run.signal(signal.SIGUSR1, rank)
    time.sleep(0.05)
    run.signal(signal.SIGTERM)


def fail_after_telling(run: Launch, rank: int) -> None:
    """A rank dies while the others are saving, or about to."""
    run.signal(signal.SIGUSR1)
    time.sleep(0.02)
    run.signal(signal.SIGKILL, rank)


KILLS = [kill_one, kill_all, fail_after_telling]
DISTURBANCES = [*KILLS, tell_one, tell_all, tell_twice]


def lines(path: Path) -> list[dict]:
    """Those that are whole."""
    text = path.read_text() if path.exists() else ""
    return [json.loads(line) for line in text.splitlines(keepends=True) if line.endswith("\n")]


def soak(
    ranks: int,
    args: list[str],
    disturbances: list[Callable],
    seed: int,
    directory: Path,
    say: Callable[[str], None] = print,
) -> int:
    """Raises AssertionError unless the disturbed run ends as the other one does. Returns how many disturbances came
    while ranks were alive."""
    dice = random.Random(seed)
    expected = directory / "expected"
    peaceful = Launch(ranks, STEP, [*args, "--export-dir", str(expected)], directory / "peace")
    assert peaceful.wait(600) == [0] * ranks, peaceful.output()
    metrics, exported, checkpoints = (directory / name for name in ("metrics.jsonl", "exported", "checkpoints"))
    args = [*args, "--export-dir", str(exported), "--metrics-file", str(metrics), "--checkpoint-dir", str(checkpoints)]
    args += ["--heartbeat-timeout", "60"]
    attempt, left, met = 0, list(disturbances), 0
    while not exported.exists():
        attempt += 1
        run = Launch(ranks, STEP, args, directory / f"attempt-{attempt}")
        disturb, told = left.pop(0) if left else None, False
        if disturb:
            rank, steps, delay = dice.randrange(ranks), dice.randint(1, 12), dice.uniform(0, 0.1)
            while run.running() and run.steps() < steps:
                time.sleep(0.002)
            time.sleep(delay)
            told = run.running()
            met += told
            disturb(run, rank)
            say(f"attempt {attempt}: {disturb.__name__}, rank {rank}, {1000 * delay:.0f} ms after its step {steps}")
        codes = run.wait(600)
        errors = [line for line in run.output().splitlines() if "error" in line.lower() or "Traceback" in line]
        say(
            "".join(f"    {line}\n" for line in errors)
            + f"attempt {attempt}: exit codes {codes}, {lines(metrics)[-1]['step']} steps"
        )
        if told and disturb not in KILLS:
            # It may have been at its end.
            assert codes in ([REQUEUE] * ranks, [0] * ranks), run.output()
        elif not disturb:
            assert codes == [0] * ranks, run.output()
    ours, theirs = (load_file(path / "model.safetensors") for path in (exported, expected))
    assert ours.keys() == theirs.keys() and all(torch.equal(ours[name], theirs[name]) for name in ours)
    steps = [line["step"] for line in lines(metrics) if "loss" in line]
    assert steps == list(range(1, len(steps) + 1)), steps
    assert not list(checkpoints.glob("damaged-*"))
    return met


if __name__ == "__main__":
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--ranks", type=int, default=8)
    parser.add_argument("--layout", default="--dp 2 --tp 2 --pp 2 --zero 1")
    parser.add_argument("--steps", type=int, default=300)
    parser.add_argument("--disturbances", type=int, default=20)
    parser.add_argument("--seed", type=int, default=0)
    options = parser.parse_args()
    kinds = random.Random(options.seed)
    with tempfile.TemporaryDirectory() as directory:
        corpus = Path(directory) / "corpus.txt"
        corpus.write_text("".join(f"{i} plus {i % 7} makes {i + i % 7}, and that is all.\n" for i in range(400)))
        args = [*MODEL.split(), *options.layout.split(), "--dataset", str(corpus), "--steps", str(options.steps)]
        args += ["--save-every", "10", "--eval-every", "7"]
        soak(options.ranks, args, kinds.choices(DISTURBANCES, k=options.disturbances), options.seed, Path(directory))
    print("the weights are bit for bit those of a run in peace")
