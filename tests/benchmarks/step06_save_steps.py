"""How much longer steps are while a checkpoint is written: `python tests/benchmarks/step06_save_steps.py [--rounds 2]`.

One rank trains, on one thread. A thread of its process writes its checkpoints, as in every run. Then another process
writes the same ones: what a save costs any neighbour on this machine, by its caches, its memory and its cores. What the
thread costs beyond that is its share of the interpreter. The time in which a thread would run, but others have the
cores, is taken off, as Linux counts it.
"""

import argparse
import multiprocessing
import sys
import tempfile
import threading
import time
from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor
from itertools import chain
from multiprocessing.synchronize import Event
from pathlib import Path
from statistics import median

sys.path.insert(0, str(Path(__file__).parent.parent))

from conftest import load_step, write_text
from ranks import run_ranks

from shared.config import parse

SIZES = "--num-hidden-layers 4 --hidden-size 512 --intermediate-size 1536 --num-attention-heads 8 --vocab-size 4096"
RUN = "--seq-len 8 --global-batch-size 2 --micro-batch-size 2 --steps 61 --eval-every 0"
SAVES = "--save-every 15 --keep 1 --checkpoint-dir"


def clock() -> float:
    """Seconds that do not pass while this thread waits for a core."""
    waited = Path(f"/proc/self/task/{threading.get_native_id()}/schedstat").read_text().split()[1]
    return time.perf_counter() - int(waited) / 1e9


def trained(args: list[str], writing: Event) -> tuple[list[float], list[float], list[float]]:
    """Seconds of the steps that a save overlaps from begin to end, of the others, and of a core that each save used."""
    module = load_step("step06_4d")
    checkpoint, run = sys.modules["survive.checkpoint"], module.survival.Run
    steps, used, write, steps_of = [], [], checkpoint.write, run.steps

    def observed_write(*args: object) -> int:
        writing.set()
        try:
            return write(*args)
        finally:
            used.append(time.thread_time())
            writing.clear()

    def observed_steps(running: object) -> Iterator[int]:
        for step in steps_of(running):
            before, start = writing.is_set(), clock()
            yield step
            steps.append((before, writing.is_set(), clock() - start))

    checkpoint.write, run.steps = observed_write, observed_steps
    module.train(parse(module.Config, args))
    # The first steps warm up.
    during, others = ([s for *when, s in steps[15:] if when == [same, same]] for same in (True, False))
    return during, others, used


def written(args: list[str], writing: Event, over: Event) -> None:
    """Write the checkpoint of an untrained model again and again, with as long a pause, until training is over."""
    module = load_step("step06_4d")
    run = module.survival.Run

    def saves(running: object) -> Iterator[int]:
        step = 0
        while not over.is_set():
            start, step = time.perf_counter(), step + 1
            writing.set()
            running.checkpoints.save(step)
            running.checkpoints.finish()
            writing.clear()
            time.sleep(time.perf_counter() - start)
        yield from ()

    run.steps = saves
    module.train(parse(module.Config, args))


def beside_a_process(args: list[str], saves: list[str], writing: Event) -> tuple[list[float], list[float], list[float]]:
    """What `trained` returns of a run without saves, while another process writes."""
    over = multiprocessing.Event()
    with ThreadPoolExecutor() as pool:
        writer = pool.submit(run_ranks, 1, written, [*args, *saves], writing, over, timeout=600)
        (result,) = run_ranks(1, trained, args, writing, timeout=600)
        over.set()
        writer.result()
    return result


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--rounds", type=int, default=2)
    writing, found = multiprocessing.Event(), {"a thread": [], "another process": []}
    for _ in range(parser.parse_args().rounds):
        with tempfile.TemporaryDirectory() as directory:
            args = [*SIZES.split(), *RUN.split(), "--dataset", str(write_text(Path(directory)))]
            saves = [*SAVES.split(), f"{directory}/run"]
            found["a thread"] += run_ranks(1, trained, [*args, *saves], writing, timeout=600)
            found["another process"].append(beside_a_process(args, [*saves[:-1], f"{directory}/other"], writing))
    for name, results in found.items():
        during, others, used = (list(chain.from_iterable(parts)) for parts in zip(*results, strict=True))
        if used:
            print(f"a save uses a core for {median(used):.2f} s")
        step, other = median(during), median(others)
        print(
            f"{name} writes: {len(during)} steps meanwhile {step:.3f} s, {len(others)} others {other:.3f} s: "
            f"{step / other:.3f} ×"
        )


if __name__ == "__main__":
    main()
