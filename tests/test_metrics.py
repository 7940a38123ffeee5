"""What a run reports, where, and when it reads numbers from the device for it."""

import io
import json
import re
import sys
from types import SimpleNamespace

import pytest
import running
import torch
from conftest import load_step
from corpora import TEXTS, write_rows
from ranks import run_ranks

from shared import metrics
from shared.config import UserError, parse
from shared.flops import flops_per_token
from shared.llama_configs import load_model_config

step01 = load_step("step01_single_gpu")


def train(args, *more):
    step01.train(parse(step01.Config, [*args, *map(str, more)]))


def records(path):
    return [json.loads(line) for line in path.read_text().splitlines()]


def test_a_loss_that_is_no_number_ends_the_run(small_run, tmp_path):
    diverging = ("--optimizer", "sgd", "--lr", "1e38", "--grad-clip", "0")
    with pytest.raises(UserError, match="step 2: gradient norm not a finite number: lower --lr"):
        train(small_run, *diverging, "--metrics-file", tmp_path / "a", "--export-dir", tmp_path / "out")
    assert len(records(tmp_path / "a")) == 1 and not (tmp_path / "out").exists()


def test_steps_between_two_reports_are_not_read(small_run, tmp_path, monkeypatch):
    """What is reported of a step does not depend on that, and its tokens per second are those of all since the last."""
    args = [*small_run, "--steps", "9", "--eval-every", "5", "--metrics-file"]
    train(args, tmp_path / "all")
    reads = []

    def counted(name, original):
        def read(tensor):
            if tensor.is_floating_point():
                reads.append((name, tensor.numel()))
            return original(tensor)

        return read

    for name in ("tolist", "item", "__float__", "__int__", "__bool__"):
        monkeypatch.setattr(torch.Tensor, name, counted(name, getattr(torch.Tensor, name)))
    monkeypatch.setattr(step01.Trainer, "evaluate", lambda trainer: {"text": 1.0})
    train(args, tmp_path / "some", "--log-every", "4")
    some, every = ({r["step"]: r for r in records(tmp_path / n) if "loss" in r} for n in ("some", "all"))
    assert list(some) == [1, 4, 5, 8, 9] and list(every) == [*range(1, 10)]
    assert reads == [("tolist", 4)] * 5
    for step, record in some.items():
        assert all(record[key] == every[step][key] for key in ("loss", "grad_norm", "lr", "tokens"))


@pytest.mark.parametrize("ranks", [1, 4])
def test_tokens_per_second_of_a_report_are_those_of_all_its_steps(small_run, tmp_path, monkeypatch, ranks):
    """By a clock on which a step takes a second and an evaluation a hundred."""
    now = [0.0]
    monkeypatch.setattr("shared.metrics.time.perf_counter", lambda: now[0])

    def taking(seconds, function):
        def call(*args):
            now[0] += seconds
            return function(*args)

        return call

    for name, seconds in (("forward_backward", 1), ("evaluate", 100)):
        monkeypatch.setattr(step01.Trainer, name, taking(seconds, getattr(step01.Trainer, name)))
    monkeypatch.setattr("shared.metrics.peak_flops", lambda *args: 1e12)

    def start(self, *args, start=metrics.Metrics.__init__, **options):
        start(self, *args, **options)
        self.world_size = ranks

    monkeypatch.setattr(metrics.Metrics, "__init__", start)
    options = ["--steps", "8", "--eval-every", "3", "--log-every", "4", "--metrics-file", tmp_path / "a"]
    train(small_run, *options)
    reports = {r["step"]: r for r in records(tmp_path / "a") if "loss" in r}
    assert list(reports) == [1, 3, 4, 6, 8]
    flops = flops_per_token(load_model_config(parse(step01.Config, small_run)), 16, causal=False)
    for report in reports.values():
        assert report["tokens_per_second"] == 8 * 16 == report["tokens_per_second_per_device"] * ranks
        assert report["mfu"] == pytest.approx(8 * 16 * flops / 1e12 / ranks)


def test_a_step_that_is_not_reported_may_not_be_a_number_either(small_run, monkeypatch):
    clip, calls = step01.Trainer.clip_grad_norm, []

    def spoiled(trainer):
        calls.append(clip(trainer))
        return calls[-1] * (float("nan") if len(calls) == 2 else 1)

    monkeypatch.setattr(step01.Trainer, "clip_grad_norm", spoiled)
    message = r"step 4: gradient norm not a finite number, in this step or the 2 before \(--log-every 1 tells which\)"
    with pytest.raises(UserError, match=message):
        train(small_run, "--steps", "9", "--eval-every", "0", "--log-every", "4")
    assert len(calls) == 4


def test_wandb_offline(small_run, tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    train(small_run, "--wandb", "--wandb-project", "tests", "--run-name", "first")
    assert list(tmp_path.glob("wandb/offline-run-*/run-*.wandb"))


def test_tensorboard(small_run, tmp_path, monkeypatch):
    """On a stand-in for torch's writer, which needs a package that the tests do not."""
    begun, written = [], []

    def writer(directory, purge_step):
        begun.append((directory, purge_step))
        return SimpleNamespace(
            add_scalar=lambda *scalar: written.append(scalar), close=lambda: written.append("closed")
        )

    monkeypatch.setattr(metrics, "find_spec", lambda name: name)
    monkeypatch.setitem(sys.modules, "torch.utils.tensorboard", SimpleNamespace(SummaryWriter=writer))
    train(small_run, "--tensorboard", tmp_path / "t", "--metrics-file", tmp_path / "a", "--eval-every", 4)
    assert begun == [(f"{tmp_path}/t", 1)] and written.pop() == "closed"
    # Dictionaries of a record too, such as a profile's: all numbers but the record's own step.
    nested = {"step": 3, "profile": {"step": {"mean": 1.5, "rank": 0}}, "text": "none"}
    assert list(metrics._scalars(nested)) == [("profile/step/mean", 1.5), ("profile/step/rank", 0)]
    # A run that goes on hides only what it trains again.
    metrics._start_tensorboard(tmp_path / "t", 2)
    assert begun.pop() == (f"{tmp_path}/t", 3)
    expected = [(key, each[key], each["step"]) for each in records(tmp_path / "a") for key in each if key != "step"]
    assert written == expected and ("validation_loss", 4) in {(name, step) for name, _, step in written}


def test_tensorboard_needs_its_package(small_run, tmp_path, monkeypatch):
    monkeypatch.setattr(metrics, "find_spec", lambda name: None)
    with pytest.raises(UserError, match="pip install tensorboard"):
        train(small_run, "--tensorboard", tmp_path / "t", "--metrics-file", tmp_path / "a")
    assert not (tmp_path / "a").exists()


def _evaluated(args, step, path):
    running.train([*args, "--metrics-file", str(path)], step)


def test_a_mixture_is_evaluated_source_by_source(small_run, tmp_path, capfd):
    """The same by every step."""
    for name in "abcd":
        write_rows(tmp_path / f"{name}.jsonl", [f"{name} {i} {text}" for i in range(4) for text in TEXTS])
    a, b, c, d = (f"{tmp_path}/{name}.jsonl" for name in "abcd")
    args = [*small_run, "--dataset", f"{a}:0.7", f"{b}:0.3", "--validation-dataset", c, d]
    args += ["--eval-every", "2", "--dtype", "float64"]
    losses = []
    for step, ranks in (("step01_single_gpu", 1), ("step02_data_parallel", 2), ("step06_4d", 2)):
        run_ranks(ranks, _evaluated, args, step, tmp_path / step)
        losses.append([record["validation_loss"] for record in records(tmp_path / step) if "validation_loss" in record])
        assert re.search(r"validation loss \S+c\.jsonl \d\.\d{4}, \S+d\.jsonl \d\.\d{4}\n", capfd.readouterr().out)
    (first, second), *others = losses
    assert first.keys() == second.keys() == {c, d} and second[c] != second[d]
    assert all(other == [pytest.approx(loss, abs=1e-9) for loss in (first, second)] for other in others)


def test_a_full_disk_ends_no_run(small_run, tmp_path, monkeypatch, capfd):
    """Neither behind the metrics file nor behind what is printed, nor does what else is lost."""
    enter, full = metrics.Metrics.__enter__, io.TextIOWrapper(io.FileIO("/dev/full", "w"), write_through=True)

    def dead(*args, **kwargs):
        raise RuntimeError("lost")

    def entered(reported):
        enter(reported).file = full
        reported.tensorboard = SimpleNamespace(add_scalar=dead, close=dead)
        reported.wandb = SimpleNamespace(log=dead, finish=dead)
        monkeypatch.setattr(sys, "stdout", full)
        return reported

    monkeypatch.setattr(metrics.Metrics, "__enter__", entered)
    train(small_run, "--metrics-file", tmp_path / "metrics")
    monkeypatch.undo()
    warnings = [line for line in capfd.readouterr().err.splitlines() if line.startswith("warning")]
    assert warnings == [
        "warning: --metrics-file may lack what is reported from now on: [Errno 28] No space left on device",
        "warning: --tensorboard may lack what is reported from now on: lost",
        "warning: --wandb may lack what is reported from now on: lost",
    ]


def test_training_goes_on_without_wandb(small_run, tmp_path, monkeypatch, capsys):
    import wandb

    def unreachable(**_):
        raise wandb.errors.CommError("no network")

    monkeypatch.setattr(wandb, "init", unreachable)
    train(small_run, "--wandb", "--metrics-file", tmp_path / "a")
    assert len(records(tmp_path / "a")) == 4
    assert "training goes on without Weights & Biases: no network" in capsys.readouterr().err
