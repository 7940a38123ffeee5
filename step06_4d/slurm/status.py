"""What runs are doing: python step06_4d/slurm/status.py RUN...

From Slurm the state, from a run's files the rest. Where there is no Slurm, or it has forgotten the job, files must do.
"""

import json
import subprocess
import sys
from dataclasses import dataclass
from pathlib import Path
from statistics import median
from typing import Annotated

import tyro

COLUMNS = ("run", "job", "state", "step", "loss", "tokens/s", "MFU", "ETA")


@dataclass
class Status:
    """A table of what runs are doing."""

    # Directories of runs, or of sweeps, whose runs are listed.
    runs: Annotated[tuple[Path, ...], tyro.conf.Positional]


def ask(*command: str) -> dict[str, str]:
    """Job ids to states, from lines of `id|state`. Empty where the command is missing or refuses."""
    try:
        result = subprocess.run(command, capture_output=True, text=True)
    except FileNotFoundError:
        return {}
    return dict(line.split("|", 1) for line in result.stdout.splitlines() if "|" in line)


def states(jobs: set[str]) -> dict[str, str]:
    """Of those that Slurm knows: "PENDING (Priority)", "RUNNING (None)", ..."""
    known = ask("squeue", "--noheader", "--array", "--states=all", "--me", "--format=%i|%T (%r)")
    forgotten = jobs - known.keys()
    if forgotten:
        known |= ask("sacct", "-X", "-n", "-P", "-j", ",".join(sorted(forgotten)), "-o", "JobID,State")
    return {job: state.removesuffix(" (None)") for job, state in known.items()}


def last_records(run: Path, count: int = 20) -> list[dict]:
    """The latest training steps of the latest attempt that has made any."""
    for file in sorted((run / "metrics").glob("*.jsonl"), key=lambda path: path.stat().st_mtime, reverse=True):
        records = [json.loads(line) for line in file.read_text().splitlines(keepends=True) if line.endswith("\n")]
        if steps := [record for record in records if "loss" in record]:
            return steps[-count:]
    return []


def job_of(run: Path, known: dict[str, str]) -> str:
    """Of all jobs that this run was submitted as: the one that runs, else the first that waits, else the last."""
    jobs = read_lines(run / "jobs")
    for state in ("RUNNING", "COMPLETING", "PENDING"):
        for job in jobs:
            if known.get(job, "").startswith(state):
                return job
    return jobs[-1] if jobs else "-"


def read_lines(path: Path) -> list[str]:
    return path.read_text().split() if path.exists() else []


def duration(seconds: float) -> str:
    minutes = round(seconds / 60)
    days, hours = minutes // 1440, minutes // 60 % 24
    return f"{days}d {hours:02}h" if days else f"{hours}h {minutes % 60:02}m"


def row(run: Path, known: dict[str, str]) -> tuple[str, ...]:
    info, job, records = json.loads((run / "run.json").read_text()), job_of(run, known), last_records(run)
    finished = (run / "finished").exists()
    state = "FINISHED" if finished else known.get(job, "unknown")
    if not records:
        return info["name"], job, state, f"0/{info['steps']}", "-", "-", "-", "-"
    last = records[-1]
    # Medians: the first step waits for a compiler, and any may be slow by chance.
    tokens_per_second, mfu = (median(record[name] for record in records) for name in ("tokens_per_second", "mfu"))
    first = records[0] if len(records) > 1 else {"step": 0, "tokens": 0}
    tokens_per_step = (last["tokens"] - first["tokens"]) / (last["step"] - first["step"])
    left = (info["steps"] - last["step"]) * tokens_per_step / tokens_per_second
    return (
        info["name"],
        job,
        state,
        f"{last['step']}/{info['steps']}",
        f"{last['loss']:.4f}",
        f"{tokens_per_second:,.0f}",
        f"{mfu:.1%}",
        "-" if finished else duration(left),
    )


def table(runs: tuple[Path, ...]) -> str:
    """A line for each run. Raises FileNotFoundError, with the path, for a directory without any."""
    # A sweep's own directory has no run.json.
    found = [path.parent for run in runs for path in sorted([*run.glob("run.json"), *run.glob("*/run.json")])]
    for run in runs:
        if not any(path.is_relative_to(run) for path in found):
            raise FileNotFoundError(f"no run in {run}: there is no run.json")
    known = states({job for run in found for job in read_lines(run / "jobs")})
    rows = [COLUMNS, *(row(run, known) for run in found)]
    widths = [max(len(cells[i]) for cells in rows) for i in range(len(COLUMNS))]
    lines = ("  ".join(cell.ljust(width) for cell, width in zip(cells, widths, strict=True)) for cells in rows)
    return "\n".join(line.rstrip() for line in lines)


def main() -> None:
    try:
        print(table(tyro.cli(Status).runs))
    except FileNotFoundError as error:
        sys.exit(f"error: {error}")


if __name__ == "__main__":
    main()
