"""Steps as torchrun starts them, and what they print. Others, and compiled and other engines, on forked ranks."""

import re
import subprocess
import sys

import parity
import pytest
import torch.distributed as dist
import torch.distributed.run
from conftest import ROOT
from launcher import Launch, run_command

STARTED = [
    # By plain python.
    ("step01_single_gpu", 0, ""),
    ("step01_single_gpu", 1, ""),
    ("step04_pipeline_parallel", 2, "--pp 2 --timeline {here}/run.png"),
    ("step06_4d", 2, "--tp 2 --sequence-parallel --zero 1"),
]
FORKED = [
    ("step02_data_parallel", ""),
    ("step03_tensor_parallel", "--tp 2"),
    ("step05_context_parallel", "--cp 2"),
    ("step05_context_parallel", "--cp 2 --cp-engine all-to-all"),
    # By torch's code generator, which takes long: what else is compiled is in test_compiled_layers.py.
    ("step06_4d", "--tp 2 --sequence-parallel --compile"),
]


def options(small_run, directory, layout):
    """A run that prints its ledger, unless it is compiled, and exports its model."""
    ledger = [] if "--compile" in layout else ["--ledger"]
    outputs = ["--metrics-file", str(directory / "metrics"), "--export-dir", str(directory / "out")]
    return [*small_run, *ledger, *outputs, *layout.format(here=directory).split()]


def check(small_run, directory, printed):
    """The losses are step01's, to the digits that are printed, and the ledger agrees with the formula."""
    losses = [float(loss) for loss in re.findall(r"\| loss ([\d.]+)", printed)]
    assert losses == pytest.approx([record.loss for record in parity.reference(tuple(small_run))], abs=2e-4)
    assert len((directory / "metrics").read_text().splitlines()) >= 4
    assert "≠" not in printed and (directory / "out" / "model.safetensors").exists()
    # It would be printed by every rank.
    assert "Warning" not in printed


def start(ranks, *command):
    """By torchrun, of which only the first process is a fork, or by plain python."""
    if ranks:
        return run_command(torch.distributed.run.main, "--nproc-per-node", ranks, *command)
    return subprocess.run([sys.executable, *map(str, command)], capture_output=True, text=True, timeout=300)


@pytest.mark.parametrize(("step", "ranks", "layout"), STARTED)
def test_a_step_is_started(small_run, tmp_path, step, ranks, layout):
    result = start(ranks, ROOT / step / "train.py", *options(small_run, tmp_path, layout))
    assert result.returncode == 0, result.stderr
    check(small_run, tmp_path, result.stdout + result.stderr)
    if "timeline" in layout:
        assert "bubble of the last step" in result.stdout and (tmp_path / "run.png").exists()


@pytest.mark.parametrize(("step", "layout"), FORKED)
def test_compiled_and_with_other_engines(small_run, tmp_path, monkeypatch, step, layout):
    generated = tmp_path / "generated"
    monkeypatch.setenv("TORCHINDUCTOR_CACHE_DIR", str(generated))
    run = Launch(2, step, options(small_run, tmp_path, layout), tmp_path / "logs")
    assert run.wait(300) == [0, 0], run.output()
    check(small_run, tmp_path, run.output())
    assert ("first step" in run.output()) == any(generated.rglob("*.cpp")) == ("--compile" in layout)


def test_one_rank_fails(small_run, tmp_path):
    """torchrun stops the others, the error shown is the rank's own, and nothing is half-written."""
    script = tmp_path / "train.py"
    script.write_text(
        f"""
import os, sys
sys.path.insert(0, {str(ROOT / "step02_data_parallel")!r})
import train
clip_grad_norm = train.Trainer.clip_grad_norm
def broken(trainer):
    if os.environ["RANK"] == "1":
        raise ArithmeticError("one rank's trouble")
    return clip_grad_norm(trainer)
train.Trainer.clip_grad_norm = broken
train.main()
"""
    )
    result = start(2, script, *small_run, "--steps", 1000, "--export-dir", tmp_path / "out")
    assert result.returncode != 0 and "ArithmeticError: one rank's trouble" in result.stderr
    assert not (tmp_path / "out").exists() and not list(tmp_path.glob(".*"))


FAILING = [
    # The other waits in a layer, for a message.
    ("step03_tensor_parallel", "--tp 2", "shared.model", "LlamaMLP", "forward", 7),
    ("step04_pipeline_parallel", "--pp 2", "pipeline_parallel", "Pipeline", "_backward", 3),
]


@pytest.mark.parametrize(("step", "layout", "module", "owner", "name", "call"), FAILING)
def test_one_rank_fails_in_the_middle_of_a_step(small_run, tmp_path, step, layout, module, owner, name, call):
    def prepare(_):
        of = getattr(sys.modules[module], owner)
        function, calls = getattr(of, name), []

        def broken(*args):
            calls.append(args)
            if dist.get_rank() == 1 and len(calls) == call:
                raise ArithmeticError("one rank's trouble")
            return function(*args)

        setattr(of, name, broken)

    args = [*small_run, *layout.split(), "--steps", "1000", "--export-dir", str(tmp_path / "out")]
    run = Launch(2, step, args, tmp_path / "logs", prepare)
    assert 0 not in run.wait() and "ArithmeticError: one rank's trouble" in run.output()
    assert not (tmp_path / "out").exists() and not list(tmp_path.glob(".*"))
