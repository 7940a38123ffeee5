"""plan.py: what it prints and writes, what it says of what is impossible, and that what it writes trains."""

import functools
import subprocess
import sys
from pathlib import Path
from unittest.mock import patch

import pytest
import torch
import yaml
from conftest import ROOT
from planner import sibling, train

from shared.config import UserError, parse
from shared.flops import PEAK_TFLOPS

SMALL = {"model": "tiny", "gpus": 8, "seq_len": 256, "global_batch_size": 32, "show": 3}


def plan(**options):
    module = sibling("plan")
    module.plan(module.PlanConfig(**options))


def test_prints_the_fastest_and_why_not_the_neighbours(capsys):
    plan(model="llama-3.1-8b", gpus=8, seq_len=4096, global_batch_size=64, show=4)
    out = capsys.readouterr().out
    lines = out.splitlines()
    assert lines[0].split()[:6] == ["GiB", "weight", "grad", "optim", "activ", "s/step"]
    seconds = [float(line.split()[5]) for line in lines[1:5]]
    assert seconds == sorted(seconds)
    # The parts are the whole, as far as they are printed.
    for line in lines[1:5]:
        numbers = [float(x) for x in line.split()[:13]]
        assert sum(numbers[1:5]) == pytest.approx(numbers[0], abs=0.3)
        assert sum(numbers[6:13]) == pytest.approx(numbers[5], abs=0.05)
    assert out.count("why not the neighbours") == 3 and "of the time" in out


def test_what_it_writes_is_a_run_that_fits_as_predicted(tmp_path, capsys):
    path = tmp_path / "run.yaml"
    large = SMALL | {"model": "llama-3.2-1b"}
    plan(**large, write=path, explain="dp=2 tp=2 pp=2 zero=1 sequence-parallel virtual-stages=2 micro-batch-size=4")
    out = capsys.readouterr().out
    assert "4 · 256 / cp 1 = 1,024 tokens; m = 32 / (dp 2 · 4) = 4" in out
    config = parse(train().Config, ["--config", str(path), "--device", "cpu"])
    assert (config.dp, config.tp, config.pp, config.zero, config.virtual_stages) == (2, 2, 2, 1, 2)
    observed = sibling("observe.dry_run")
    with observed.fake_rank(0, pp=2, dp=2, cp=1, tp=2):
        audit, trainer = observed.audited_steps(config, train().Trainer)
        held = {kind.split()[0]: nbytes / 2**30 for kind, nbytes in audit.held(trainer).items()}
    del held["peak"]
    printed = {line.split()[0]: float(line.split()[1]) for line in out.splitlines() if line.startswith("  ")}
    assert printed == pytest.approx(held, rel=0.02) and min(held.values()) > 0.3

    # The file alone says all of it.
    plan(config=path)
    assert capsys.readouterr().out == out


def test_a_config_of_train_whether_searched_or_not(tmp_path, capsys):
    path = tmp_path / "run.yaml"
    path.write_text("model: tiny\ndp: 2\ncp: 2\ncp-engine: all-to-all\nlr: 1e-3\n")
    plan(config=path)
    assert "micro-batch: 8 · 256 / cp 2 = 1,024 tokens; m = 16 / (dp 2 · 8) = 1" in capsys.readouterr().out
    # What train.py refuses is refused: for want of a number or a factor, or as it is no option.
    for text, message in (
        ("", "needs --dp"),
        ("dp: 4", "--global-batch-size 16"),
        ("dp: 1\ntp: 3", "tp"),
        ("dp: 2\npp: 2\nzero: 2\nmicro-batch-size: 1", "--zero 2"),
    ):
        path.write_text(f"model: tiny\n{text}\n")
        with pytest.raises(UserError, match=message):
            plan(config=path)
    with pytest.raises(UserError, match="leave out --explain, --write and --picture"):
        plan(config=path, write=tmp_path / "other.yaml")


def test_says_what_would_make_it_possible():
    for model, gpus in (("llama-3.1-8b", 4), ("llama-3.1-70b", 32)):
        with pytest.raises(UserError, match=rf"nothing fits: .* GiB.* What would do: --gpus {gpus}$"):
            plan(model=model, gpus=1, seq_len=8192, global_batch_size=64)


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"gpus": 0}, "--gpus must be at least 1, not 0"),
        ({"gpu": "h1"}, "--gpu h1 is not known: take one of a100, h100"),
        (
            {"gpus": 7, "global_batch_size": 5},
            "no layout splits --global-batch-size 5, .* What would do: --gpus 4 or --global-batch-size 7",
        ),
        ({"gpus": 7, "global_batch_size": 5, "explain": "dp=7"}, "no layout splits --global-batch-size 5"),
        ({"explain": "dp=3"}, "--explain 'dp=3' is none of the layouts of 8 GPUs"),
        ({"picture": Path("plan.txt")}, "--picture plan.txt must end in .svg or .png"),
        ({"calibrate": Path("missing/mine.yaml")}, "--calibrate missing/mine.yaml: No such file or directory"),
    ],
)
def test_errors_say_what_to_do(options, message):
    with pytest.raises(UserError, match=message):
        plan(**SMALL | options)


def test_peaks_are_those_that_mfu_is_taken_of():
    table = yaml.safe_load((ROOT / "step06_4d/planning/machines.yaml").read_text())
    del table["laptop"]
    assert {name: float(gpu["flops"]) / 1e12 for name, gpu in table.items()} == {
        name: PEAK_TFLOPS[name.upper()] for name in table
    }


def test_float32_is_slower(capsys):
    seconds = []
    for dtype in ("bfloat16", "float32"):
        plan(**SMALL | {"model": "llama-3.1-8b", "gpu": "b200", "seq_len": 4096}, dtype=dtype, explain="dp=8 zero=3")
        seconds.append(float(capsys.readouterr().out.rsplit(" s\n", 1)[0].rsplit(" ", 1)[1]))
    assert seconds[1] > 1.5 * seconds[0]


def test_a_machine_of_ones_own(tmp_path, capsys):
    table = yaml.safe_load((ROOT / "step06_4d/planning/machines.yaml").read_text())
    slow = tmp_path / "slow.yaml"
    slow.write_text(yaml.safe_dump(table["h100"] | {"flops": "1e12"}))
    tokens = []
    for gpu in ("h100", str(slow)):
        plan(**SMALL, gpu=gpu, explain="dp=8 zero=1")
        tokens.append(int(capsys.readouterr().out.rsplit("= ", 1)[1].split(";")[0].replace(",", "")))
    assert tokens[1] < tokens[0] / 2
    slow.write_text("flops: 1e12")
    with pytest.raises(UserError, match="needs exactly attention, bandwidth"):
        plan(**SMALL, gpu=str(slow))


def test_a_machine_that_is_measured(tmp_path, capsys):
    """By two ranks, of tiny matrices and messages: the file is one that --gpu takes."""
    path = tmp_path / "mine.yaml"
    forked = functools.partial(torch.multiprocessing.start_processes, start_method="fork")
    module = sibling("planning.calibrate")
    with patch.object(torch.multiprocessing, "spawn", forked), patch.multiple(module, SPAN=0.01, CACHE=2**12):
        module.calibrate(path, (32, 2**14))
    numbers = yaml.safe_load(path.read_text())
    assert 0 <= numbers["interference"] <= 1 and all(value >= 0 for value in numbers.values())
    plan(**SMALL | {"gpus": 2}, gpu=str(path))
    assert "GiB" in capsys.readouterr().out


def test_memory_traffic_and_time_need_no_torch():
    code = "import sys; sys.modules['torch'] = None; import planning.memory, planning.traffic, planning.time"
    paths = f"{ROOT}:{ROOT / 'step06_4d'}"
    done = subprocess.run([sys.executable, "-c", code], env={"PYTHONPATH": paths}, capture_output=True, text=True)
    assert done.returncode == 0, done.stderr
