"""How much longer steps are while a thread writes a checkpoint: `python tests/benchmarks/step06_save_steps.py`.

One rank trains, on one thread. The time in which it would run, but others have the cores, is taken off, as Linux counts
it: so this is what a machine with cores to spare would show, and what the thread's share of the interpreter costs.
"""

import statistics
import sys
import tempfile
import threading
import time
from pathlib import Path

sys.path.insert(0, str(Path(__file__).parent.parent))

from conftest import load_step, write_text
from ranks import run_ranks

from shared.config import parse

SIZES = "--num-hidden-layers 4 --hidden-size 512 --intermediate-size 1536 --num-attention-heads 8 --vocab-size 4096"
RUN = "--seq-len 8 --global-batch-size 2 --micro-batch-size 2 --steps 61 --save-every 15 --eval-every 0 --keep 1"


def clock() -> float:
    """Seconds that do not pass while this thread waits for a core."""
    waited = Path(f"/proc/self/task/{threading.get_native_id()}/schedstat").read_text().split()[1]
    return time.perf_counter() - int(waited) / 1e9


def measured(args: list[str]) -> tuple[list[float], list[float], list[float]]:
    """Seconds of the steps that a save overlaps from begin to end, and of those that none does. Of the core that each
    save has used."""
    module = load_step("step06_4d")
    checkpoint, run = sys.modules["survive.checkpoint"], module.survival.Run
    steps, used, write, steps_of = [], [], checkpoint.write, run.steps
    writing = threading.Event()

    def observed_write(*args: object) -> int:
        writing.set()
        try:
            return write(*args)
        finally:
            used.append(time.thread_time())
            writing.clear()

    def observed_steps(running: object) -> object:
        for step in steps_of(running):
            before, start = writing.is_set(), clock()
            yield step
            steps.append((before, writing.is_set(), clock() - start))

    checkpoint.write, run.steps = observed_write, observed_steps
    module.train(parse(module.Config, args))
    # The first steps warm up.
    during, others = ([s for *when, s in steps[15:] if when == [same, same]] for same in (True, False))
    return during, others, used


def main() -> None:
    with tempfile.TemporaryDirectory() as directory:
        text = write_text(Path(directory))
        args = [*SIZES.split(), *RUN.split(), "--dataset", str(text), "--checkpoint-dir", f"{directory}/run"]
        ((during, others, used),) = run_ranks(1, measured, args, timeout=600)
    step, other = statistics.median(during), statistics.median(others)
    print(f"a save uses a core for {statistics.median(used):.2f} s")
    print(f"{len(during)} steps meanwhile {step:.3f} s, {len(others)} others {other:.3f} s: {step / other:.3f} ×")


if __name__ == "__main__":
    main()
