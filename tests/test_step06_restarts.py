"""step06: killed and started again, a run ends as one in peace, bit for bit."""

import os
import signal
import subprocess
import sys
import time
from pathlib import Path

import pytest
import torch
from conftest import ROOT, small_options
from launcher import Launch
from safetensors.torch import load_file
from soak.soak import kill_one, lines, soak, tell_one, tell_twice

STEP = "step06_4d"


@pytest.fixture(scope="module")
def in_peace(text_file, tmp_path_factory):
    """The options of a run, and the weights that it exports if nothing disturbs it."""
    directory, args = tmp_path_factory.mktemp("peace"), [*small_options(text_file), "--steps", "60", "--zero", "1"]
    run = Launch(2, STEP, [*args, "--export-dir", str(directory / "exported")], directory / "logs")
    assert run.wait(300) == [0, 0], run.output()
    return args, load_file(directory / "exported" / "model.safetensors")


def same_weights(directory, theirs):
    ours = load_file(directory / "model.safetensors")
    return ours.keys() == theirs.keys() and all(torch.equal(ours[name], theirs[name]) for name in ours)


@pytest.mark.skipif(sys.platform != "linux", reason="looks for processes in /proc")
def test_torchrun_starts_it_again(in_peace, tmp_path):
    """A rank dies of kill -9, and the same command goes on by itself.

    With a store of its own for each attempt, or it would find the addresses of the last one.
    """
    directory, exported, metrics = (tmp_path / name for name in ("c", "exported", "metrics.jsonl"))
    args, expected = in_peace
    command = [sys.executable, "-m", "torch.distributed.run", "--standalone", "--nproc-per-node", "2"]
    command += ["--max-restarts", "1", f"{STEP}/train.py", *args, "--checkpoint-dir", str(directory)]
    command += ["--save-every", "5", "--export-dir", str(exported), "--metrics-file", str(metrics)]
    pipes = {"stdout": subprocess.PIPE, "stderr": subprocess.STDOUT, "text": True}
    environment = os.environ | {"OMP_NUM_THREADS": "1", "TORCH_DISABLE_SHARE_RDZV_TCP_STORE": "1"}
    run = subprocess.Popen(command, cwd=ROOT, env=environment, **pipes)
    try:
        deadline = time.monotonic() + 120
        while not (directory / "latest").exists():
            assert run.poll() is None and time.monotonic() < deadline
            time.sleep(0.005)
        workers = Path(f"/proc/{run.pid}/task/{run.pid}/children").read_text().split()
        os.kill(max(map(int, workers)), signal.SIGKILL)
        output, _ = run.communicate(timeout=120)
    finally:
        run.kill()
    assert run.returncode == 0 and output.count("resumed from") == 1, output
    assert same_weights(exported, expected)
    assert [line["step"] for line in lines(metrics) if "loss" in line] == list(range(1, 61))


def test_killed_in_the_middle_and_started_again(in_peace, tmp_path):
    """Twice the same command, the first time with kill -9 of all ranks, while files are written."""
    directory, exported = tmp_path / "checkpoints", tmp_path / "exported"
    args, expected = in_peace
    saving = [*args, "--checkpoint-dir", str(directory), "--save-every", "5", "--export-dir", str(exported)]
    first = Launch(2, STEP, saving, tmp_path / "first")
    while not (directory / "latest").exists():
        assert first.running()
        time.sleep(0.005)
    first.signal(signal.SIGKILL)
    assert first.wait() == [-signal.SIGKILL] * 2 and not exported.exists()
    second = Launch(2, STEP, saving, tmp_path / "second")
    assert second.wait() == [0, 0] and "resumed from" in second.output(), second.output()
    assert same_weights(exported, expected)


def test_a_short_soak(small_run, tmp_path):
    """More of it: tests/soak/soak.py."""
    args = [*small_run, "--dp", "2", "--tp", "2", "--micro-batch-size", "2", "--zero", "1"]
    args += ["--steps", "60", "--save-every", "6", "--eval-every", "7"]
    assert soak(4, args, [tell_one, kill_one, tell_twice], 3, tmp_path) == 3
