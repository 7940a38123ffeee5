"""The table of runs, from their files and from what Slurm says."""

import json
import os

import pytest
from scripts import load


@pytest.fixture(scope="module")
def status():
    return load("status")


def make_run(directory, jobs=(), **attempts):
    """A run of 100 steps of 50 tokens, whose attempts have logged these steps."""
    (directory / "metrics").mkdir(parents=True)
    (directory / "run.json").write_text(json.dumps({"name": directory.name, "steps": 100}))
    (directory / "jobs").write_text("".join(f"{job}\n" for job in jobs))
    for time, (attempt, steps) in enumerate(attempts.items()):
        file = directory / "metrics" / f"{attempt}.jsonl"
        records = [
            {"step": s, "loss": 10 - s, "tokens": 50 * s + 9000, "tokens_per_second": 25.0, "mfu": 0.4} for s in steps
        ] + [{"step": steps[-1], "validation_loss": 1.0}]
        # An attempt's first step waits for a compiler.
        records[0] |= {"tokens_per_second": 1.0, "mfu": 0.016} if len(steps) > 2 else {}
        file.write_text("".join(json.dumps(record) + "\n" for record in records))
        os.utime(file, (time, time))
    return directory


def cells(table):
    return [line.split("  ") for line in table.splitlines()]


def rows(status, *runs):
    return [[cell.strip() for cell in line if cell] for line in cells(status.table(runs))][1:]


@pytest.mark.quick
def test_from_files_alone(status, tmp_path, monkeypatch):
    monkeypatch.setenv("PATH", str(tmp_path))
    trained = make_run(tmp_path / "trained", ["7"], a=[1, 2, 3], b=[2, 3, 4])
    with (trained / "metrics" / "b.jsonl").open("a") as file:
        # Still being written.
        file.write('{"step": 5, "lo')
    finished = make_run(tmp_path / "finished", ["8"], a=[99, 100])
    (finished / "finished").touch()
    waiting = make_run(tmp_path / "waiting")
    assert rows(status, trained, finished, waiting) == [
        # The newest attempt; (100 - 4) steps of 50 tokens at 25 tokens/s.
        ["trained", "7", "unknown", "4/100", "6.0000", "25", "40.0%", "0h 03m"],
        ["finished", "8", "FINISHED", "100/100", "-90.0000", "25", "40.0%", "-"],
        ["waiting", "-", "unknown", "0/100", "-", "-", "-", "-"],
    ]
    with pytest.raises(FileNotFoundError, match=f"no run in {tmp_path / 'bin'}"):
        status.table((tmp_path / "bin",))


def test_states_from_slurm(status, tmp_path, monkeypatch):
    bin = tmp_path / "bin"
    bin.mkdir()
    (bin / "squeue").write_text("#!/bin/sh\necho '5_0|RUNNING (None)\n5_1|PENDING (Priority)\n12|RUNNING (None)'\n")
    (bin / "sacct").write_text("#!/bin/sh\necho \"$5\" >>calls\necho '9|TIMEOUT'\n")
    for path in bin.iterdir():
        path.chmod(0o755)
    monkeypatch.setenv("PATH", f"{bin}:{os.environ['PATH']}")
    monkeypatch.chdir(tmp_path)
    sweep = tmp_path / "sweep"
    make_run(sweep / "lr=1", ["5_0"], a=[1])
    make_run(sweep / "lr=2", ["5_1"])
    chain = make_run(tmp_path / "chain", ["11", "12", "13"], a=[1])
    late = make_run(tmp_path / "late", ["9"], a=[1])
    found = rows(status, sweep, chain, late)
    assert [row[:3] for row in found] == [
        ["lr=1", "5_0", "RUNNING"],
        ["lr=2", "5_1", "PENDING (Priority)"],
        ["chain", "12", "RUNNING"],
        ["late", "9", "TIMEOUT"],
    ]
    # Only what squeue has forgotten.
    assert (tmp_path / "calls").read_text() == "11,13,9\n"


def test_duration(status):
    assert [status.duration(s) for s in (29, 3600, 86400 * 2 + 3 * 3600)] == ["0h 00m", "1h 00m", "2d 03h"]
