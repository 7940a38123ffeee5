"""step06: what a run keeps, and what it finds when it is started again: checkpoints, metrics, a run of W&B."""

import json
import os
import sys
from types import SimpleNamespace

import pytest
from conftest import load_step
from ranks import run_ranks
from running import train
from test_step06_checkpoint import STEP, _train, arguments, forget

from shared.config import UserError, parse


@pytest.mark.parametrize(
    ("options", "kept"),
    [
        ("--save-every 1 --keep 3", [2, 3, 4]),
        pytest.param("--save-every 1 --keep 1 --keep-every 3 --steps 7", [3, 6, 7], marks=pytest.mark.quick),
    ],
)
def test_what_is_kept_and_which_is_the_latest(small_run, tmp_path, options, kept):
    run_ranks(1, _train, arguments(small_run, tmp_path, options))
    assert sorted(os.listdir(tmp_path)) == ["latest", *(f"step-{step:06}" for step in kept)]
    assert os.readlink(tmp_path / "latest") == f"step-{kept[-1]:06}"


def test_what_is_kept_for_good_is_kept_by_all_runs(small_run, tmp_path):
    args = arguments(small_run, tmp_path, "--save-every 1 --keep 1")
    run_ranks(1, _train, (*args, "--keep-every", "2", "--steps", "3"))
    run_ranks(1, _train, (*args, "--steps", "5"))
    assert sorted(os.listdir(tmp_path)) == ["latest", "step-000002", "step-000005"]


def test_a_finished_run_started_again(small_run, tmp_path, capfd):
    """Makes the export that it was not asked for before, and leaves one that is there as it is."""
    args, exported = arguments(small_run, tmp_path / "c"), tmp_path / "exported"
    run_ranks(2, _train, args)
    written = []
    for _ in range(2):
        capfd.readouterr()
        run_ranks(2, _train, (*args, "--export-dir", str(exported)))
        assert f"finished already: step 4 is in {tmp_path}/c/step-000004" in capfd.readouterr().out
        written.append((exported / "config.json").stat().st_mtime_ns)
    assert written[0] == written[1] and not list(tmp_path.glob(".*"))
    # As long as it has not finished, or to another directory that holds something, it does not write.
    for more in (["--steps", "8"], ["--export-dir", str(tmp_path / "c")]):
        with pytest.raises(UserError, match="is not empty"):
            parse(load_step(STEP).Config, [*args, "--export-dir", str(exported), *more])


def test_a_stream_lasts_for_what_was_read_by_larger_batches(small_run, tmp_path):
    args = [*small_run, "--steps", "4", "--streaming", "--checkpoint-dir", str(tmp_path)]
    parsed = load_step(STEP).Config
    assert parse(parsed, args).sequences == 4 * 8
    run_ranks(1, _train, args)
    smaller = ["--steps", "6", "--global-batch-size", "4", "--micro-batch-size", "2"]
    assert parse(parsed, [*args, *smaller]).sequences == 4 * 8 + 2 * 4
    others = ["--resume-from", str(tmp_path), "--checkpoint-dir", str(tmp_path) + "-2", *smaller]
    assert parse(parsed, [*args, *others]).sequences == 4 * 8 + 2 * 4
    assert parse(parsed, [*args, *others, "--new-stage"]).sequences == 6 * 4
    run_ranks(1, _train, [*args, *smaller, "--metrics-file", str(tmp_path / "metrics")])
    records = [json.loads(line) for line in (tmp_path / "metrics").read_text().splitlines()]
    assert [r["tokens"] for r in records if "tokens" in r] == [(4 * 8 + 4) * 16, (4 * 8 + 8) * 16]


def _train_with_wandb(args):
    """Training with a stand-in for wandb. Returns how its run was begun."""
    begun, logged = [], []

    def init(project, name, config, **options):
        begun.append((project, name, config["lr"], options))
        axes = {}
        return SimpleNamespace(
            id="a1b2",
            define_metric=lambda name, step_metric: axes.update({name: step_metric}),
            log=lambda record: logged.append(record[axes["*"]]),
            finish=lambda exit_code: None,
        )

    sys.modules["wandb"] = SimpleNamespace(init=init)
    train([*args, "--wandb", "--wandb-project", "p", "--run-name", "r", "--lr", "0.25"], STEP)
    return begun, logged


def test_a_run_that_goes_on_is_one_run_of_wandb(small_run, tmp_path):
    args = arguments(small_run, tmp_path)
    ((begun, logged), others) = run_ranks(2, _train_with_wandb, args)
    assert begun == [("p", "r", "0.25", {})] and {1, 2, 3, 4} == set(logged) and others == ([], [])
    ((begun, logged), others) = run_ranks(2, _train_with_wandb, (*args, "--steps", "5"))
    assert begun == [("p", "r", "0.25", {"id": "a1b2", "resume": "allow"})]
    assert set(logged) == {5} and others == ([], [])


def _writes_more(args):
    """Training as under another version of transformers, which writes more about a model, and other defaults."""
    from transformers import LlamaConfig

    def to_dict(config, to_dict=LlamaConfig.to_dict):
        written = to_dict(config)
        written["rope_parameters"] |= {"partial_rotary_factor": 1.0}
        return written | {"something_new": 3, "use_cache": False, "pad_token_id": 7}

    LlamaConfig.to_dict = to_dict
    train([*args], STEP)


def test_another_version_of_transformers_makes_no_other_run(small_run, tmp_path, capfd):
    args = arguments(small_run, tmp_path)
    run_ranks(1, _writes_more, args)
    run_ranks(1, _train, (*args, "--steps", "5"))
    run_ranks(1, _writes_more, (*args, "--steps", "6"))
    assert "resumed from" in capfd.readouterr().out


@pytest.mark.quick
def test_metrics_are_continued(small_run, tmp_path, capfd):
    directory, metrics = tmp_path / "checkpoints", tmp_path / "metrics.jsonl"
    args = arguments(small_run, directory, f"--metrics-file {metrics}", "--eval-every 1")
    run_ranks(2, _train, args)
    first = [json.loads(line) for line in metrics.read_text().splitlines()]
    forget(directory, 4)
    with metrics.open("a") as file:
        file.write('{"step": 5, "lo')
    capfd.readouterr()
    run_ranks(2, _train, args)
    assert "step-000002 | step 2 | saved by 2 ranks" in capfd.readouterr().out
    second = [json.loads(line) for line in metrics.read_text().splitlines()]
    dropped = (tmp_path / "metrics.jsonl.dropped").read_text().splitlines()
    assert dropped == [*(json.dumps(line) for line in first[4:]), '{"step": 5, "lo']
    # Two lines per step: its own, and its evaluation.
    assert [line["step"] for line in second] == [1, 1, 2, 2, 3, 3, 4, 4]
    for before, after in zip(first, second, strict=True):
        for key in ("loss", "grad_norm", "lr", "tokens", "validation_loss"):
            assert before.get(key) == after.get(key)
    # A run without checkpoints would write over it.
    with pytest.raises(UserError, match="exists already"):
        parse(load_step(STEP).Config, [*small_run, "--metrics-file", str(metrics)])
