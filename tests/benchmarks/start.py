"""How long a process of each step imports before it reads its options: `python tests/benchmarks/start.py [--rounds 3]`.

Every rank of a run does this, often from a file system that all share. The seconds are the least of some rounds, by the
package whose own files took them. `files` are those that were read, which is what a network file system feels.
"""

import subprocess
import sys
from collections import Counter
from pathlib import Path

import tyro

ROOT = Path(__file__).parent.parent.parent
STEPS = ("step01_single_gpu", "step06_4d")
# Nothing imports these before it needs them.
LATER = ("datasets", "matplotlib", "pandas", "pyarrow", "wandb")


def imported(step: str) -> list[tuple[str, float]]:
    """Each module that `train.py --help` imports, and its own seconds."""
    command = [sys.executable, "-X", "importtime", f"{step}/train.py", "--help"]
    lines = subprocess.run(command, cwd=ROOT, capture_output=True, text=True, check=True).stderr.splitlines()
    fields = [line.removeprefix("import time:").split("|") for line in lines if line.startswith("import time:")]
    # After a heading.
    return [(name.strip(), int(own) / 1e6) for own, _, name in fields[1:]]


def main(rounds: int = 3) -> None:
    for step in STEPS:
        found = [imported(step) for _ in range(rounds)]
        seconds, best = min((sum(own for _, own in modules), modules) for modules in found)
        early = [name for name, _ in best if name.split(".")[0] in LATER]
        print(f"{step}: {seconds:.1f} s, {len(best)} files" + (f", too early: {early[0]}" if early else ""))
        own, files = Counter(), Counter()
        for name, each in best:
            package = name.split(".")[0]
            own[package] += each
            files[package] += 1
        for package, each in own.most_common(8):
            print(f"  {package:<24}{each:>7.2f} s{files[package]:>7} files")


if __name__ == "__main__":
    tyro.cli(main)
