"""step06: a checkpoint of any layout is taken up by any other, and by the same one bit by bit."""

import io
import json
import os
import re
import shutil
import signal
import subprocess
import sys
import threading
import time
from functools import lru_cache
from pathlib import Path

import parity
import pytest
import torch
from conftest import ROOT, load_step
from ranks import RankFailed, run_ranks
from safetensors.torch import load_file
from test_step04 import _counts, train
from test_step06_stability import spoiled_norm
from transformers import AutoModelForCausalLM, AutoTokenizer

from shared.config import UserError, parse

STEP = "step06_4d"
FOUR_STEPS = ["--steps", "4", "--warmup-steps", "2", "--eval-every", "0"]
SGD, TIED = "--optimizer sgd --lr 0.5", "--tie-word-embeddings True"
ODD = "--vocab-size 301 --num-hidden-layers 3"


def arguments(small_run, directory, *options):
    saving = ["--save-every", "2", "--checkpoint-dir", str(directory)]
    return (*small_run, *FOUR_STEPS, *saving, *(word for option in options for word in option.split()))


def forget(directory, *steps):
    """As if a run had been killed before these were saved."""
    for step in steps:
        shutil.rmtree(directory / f"step-{step:06}")


PAIRS = [
    (2, "", 2, "--tp 2", ""),
    (3, "--zero 1", 2, "--pp 2 --micro-batch-size 4", "--global-batch-size 24"),
    # Two key-value heads on four ranks: copies, of which one is saved and all are loaded.
    (2, "--zero 3", 4, "--tp 4", ""),
    (4, "--tp 4 --zero 1", 2, "--zero 2", ""),
    (2, "--pp 2", 1, "", TIED),
    (4, "--dp 2 --pp 2 --zero 1", 3, "--zero 3", f"{TIED} --global-batch-size 24 --micro-batch-size 4"),
    (2, "--pp 2 --virtual-stages 2 --micro-batch-size 2", 2, "--cp 2", "--num-hidden-layers 4"),
    (8, "--zero 1 --dp 2 --tp 2 --pp 2 --micro-batch-size 2", 1, "", ODD),
    (1, "", 8, "--zero 3 --dp 2 --tp 2 --cp 2 --micro-batch-size 2", SGD),
    (4, "--tp 4 --sequence-parallel", 4, "--zero 3 --dp 4 --micro-batch-size 2", f"{SGD} {ODD}"),
    (4, "--zero 2 --dp 2 --tp 2", 2, "--pp 2", f"{SGD} {TIED}"),
]


@pytest.mark.parametrize(("ranks", "layout", "new_ranks", "new_layout", "model"), PAIRS)
def test_another_layout_goes_on_as_one_device_would(small_run, tmp_path, ranks, layout, new_ranks, new_layout, model):
    args = arguments(small_run, tmp_path, "--dtype float64", model)
    run_ranks(ranks, parity.record, STEP, (*args, *layout.split()))
    forget(tmp_path, 4)
    expected = parity.reference((*small_run, *FOUR_STEPS, "--dtype", "float64", *model.split()))[2:]
    for records in run_ranks(new_ranks, parity.record, STEP, (*args, *new_layout.split())):
        assert len(records) == 2
        error, where = parity.difference(records, expected)
        assert error <= parity.TOLERANCE, f"{where} is off by {error:.1e}"


def same(records, expected):
    for ours, theirs in zip(records, expected, strict=True):
        assert (ours.loss, ours.grad_norm) == (theirs.loss, theirs.grad_norm)
        for kind in ("gradients", "weights"):
            for name, tensor in getattr(theirs, kind).items():
                assert torch.equal(getattr(ours, kind)[name], tensor), name


@pytest.mark.parametrize(
    ("ranks", "layout"),
    [
        (1, "--dtype bfloat16 --optimizer sgd"),
        (2, "--zero 1 --dtype bfloat16"),
        (4, "--zero 3 --dp 2 --tp 2 --dtype bfloat16"),
        (4, "--pp 2 --tp 2 --micro-batch-size 2"),
    ],
)
def test_the_same_layout_goes_on_bit_by_bit(small_run, tmp_path, ranks, layout):
    args = arguments(small_run, tmp_path, layout)
    expected = run_ranks(ranks, parity.record, STEP, args)
    forget(tmp_path, 4)
    for ours, theirs in zip(run_ranks(ranks, parity.record, STEP, args), expected, strict=True):
        assert len(ours) == 2
        same(ours, theirs[2:])


def _trained(args, **replaced):
    """This rank's bad steps and weights after training."""
    seen = {}

    def observed(name):
        return {name: lambda original: lambda *args: seen.setdefault(name, original(*args))}

    train([*args], STEP, **observed("BadSteps"), **observed("build_model"), **replaced)
    weights = {name: p.detach().clone() for name, p in seen["build_model"].named_parameters()}
    return list(seen["BadSteps"].good), weights


def _trained_with_a_bad_step(args):
    return _trained(args, **spoiled_norm(float("nan"), {2}, {0}))


def test_skipped_steps_stay_skipped(small_run, tmp_path):
    """AdamW has counted one step fewer; and what a spike is measured against is what it was."""
    args = arguments(small_run, tmp_path, "--on-bad-step skip --spike-factor 1000 --save-every 3")
    ((history, expected),) = run_ranks(1, _trained_with_a_bad_step, args)
    forget(tmp_path, 4)
    ((good, weights),) = run_ranks(1, _trained, args)
    assert good == history and len(good) == 3
    assert all(torch.equal(weights[name], weight) for name, weight in expected.items())


def _train(args):
    train([*args], STEP)


def test_a_master_is_not_rounded_and_the_export_is_what_training_exports(small_run, tmp_path, monkeypatch):
    """From bfloat16 weights to float32: what is loaded is the optimizer's, and export.py finds the same."""
    checkpoints, trained, own = (tmp_path / name for name in ("checkpoints", "trained", "own"))
    args = arguments(small_run, checkpoints)
    run_ranks(2, _train, [*args, "--zero", "1", "--dtype", "bfloat16", "--export-dir", str(tmp_path / "rounded")])
    run_ranks(1, _train, [*args, "--export-dir", str(trained)])
    command = [sys.executable, f"{STEP}/export.py", str(checkpoints)]
    small_files = [*command, str(own), "--dtype", "float32", "--max-shard-gb", "0.00004"]
    subprocess.run(small_files, cwd=ROOT, check=True, timeout=120)
    assert len(list(own.glob("*.safetensors"))) > 2
    ours, theirs = (AutoModelForCausalLM.from_pretrained(path).state_dict() for path in (own, trained))
    assert ours.keys() == theirs.keys()
    for name, weight in theirs.items():
        assert ours[name].dtype == torch.float32 and torch.equal(ours[name], weight), name
    assert not torch.equal(weight, weight.bfloat16().float())
    tokenizers = [AutoTokenizer.from_pretrained(path).get_vocab() for path in (own, trained)]
    assert tokenizers[0] == tokenizers[1]
    # The default is bfloat16, as the first run's own weights are.
    load_step(STEP)
    monkeypatch.syspath_prepend(str(ROOT / STEP))
    import export

    export.export_checkpoint(export.ExportConfig(checkpoints / "latest", tmp_path / "again"))
    again, rounded = (load_file(tmp_path / name / "model.safetensors") for name in ("again", "rounded"))
    assert again.keys() == rounded.keys() and all(torch.equal(again[name], rounded[name]) for name in rounded)


def _train_with_a_slow_disk(args):
    """Training in which the first checkpoint is written only once the step after it is done."""
    events, done = [], threading.Event()

    def checkpoints(original):
        import checkpoint

        write = checkpoint.write

        def slow(group, final, *args):
            events.append(f"writes {final.name}")
            assert done.wait(30) or final.name != "step-000002"
            nbytes = write(group, final, *args)
            events.append(f"has written {final.name}")
            return nbytes

        checkpoint.write = slow
        return original

    def bad_steps(original):
        class Observed(original):
            def log(self, metrics, step, *args):
                super().log(metrics, step, *args)
                events.append(step)
                if step == 3:
                    done.set()

        return Observed

    train([*args], STEP, Checkpoints=checkpoints, BadSteps=bad_steps)
    return events


def test_training_goes_on_while_a_checkpoint_is_written(small_run, tmp_path):
    """And what is written is what the weights were, though the optimizer has changed them since."""
    args = arguments(small_run, tmp_path)
    expected = run_ranks(2, parity.record, STEP, (*small_run, *FOUR_STEPS))
    for events in run_ranks(2, _train_with_a_slow_disk, args):
        assert events.index("writes step-000002") < events.index(3) < events.index("has written step-000002")
        # The next waits for it.
        assert events.index("has written step-000002") < events.index("writes step-000004")
    forget(tmp_path, 4)
    same(run_ranks(2, parity.record, STEP, args)[0], expected[0][2:])


def test_a_step_sends_four_bytes_for_checkpoints(small_run, tmp_path):
    for found in run_ranks(2, _counts, [*arguments(small_run, tmp_path, "--save-every 1 --zero 1")], STEP):
        steps = found["steps"]
        counts = {key: (t.calls / steps, t.bytes / steps) for key, t in found["counts"].items()}
        assert steps == 3 and counts == {key: tuple(t) for key, t in found["expected"].items()}


def test_what_is_kept_and_which_is_the_latest(small_run, tmp_path):
    run_ranks(1, _train, arguments(small_run, tmp_path, "--save-every 1 --keep 3"))
    assert sorted(os.listdir(tmp_path)) == ["latest", "step-000002", "step-000003", "step-000004"]
    assert os.readlink(tmp_path / "latest") == "step-000004"


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
    # Two lines per step: its own, and its evaluation.
    assert [line["step"] for line in second] == [1, 1, 2, 2, 3, 3, 4, 4]
    for before, after in zip(first, second, strict=True):
        for key in ("loss", "grad_norm", "lr", "tokens", "validation_loss"):
            assert before.get(key) == after.get(key)
    # A run without checkpoints would write over it.
    with pytest.raises(UserError, match="exists already"):
        parse(load_step(STEP).Config, [*small_run, "--metrics-file", str(metrics)])


@lru_cache
def _one_run(small_run, directory):
    args = arguments(small_run, directory)
    return args, run_ranks(2, parity.record, STEP, args)


@pytest.fixture
def saved(small_run, tmp_path_factory):
    """Copies the checkpoints of one run. Returns the arguments to continue it from the copy, and its records."""

    def copy(directory):
        original = tmp_path_factory.getbasetemp() / "checkpoints"
        args, records = _one_run(tuple(small_run), original)
        shutil.copytree(original, directory, symlinks=True, dirs_exist_ok=True)
        return tuple(str(directory) if word == str(original) else word for word in args), records

    return copy


# Faults


def truncate(path):
    path.write_bytes(path.read_bytes()[:-1])


def flip_a_bit(path):
    data = bytearray(path.read_bytes())
    data[len(data) // 2] ^= 4
    path.write_bytes(data)


@pytest.mark.parametrize("damage", [truncate, flip_a_bit, Path.unlink])
@pytest.mark.parametrize("name", ["__1_0.distcp", ".metadata", "manifest.json", "tokenizer/tokenizer.json"])
def test_a_damaged_checkpoint_is_named_and_the_one_before_taken(saved, tmp_path, capfd, name, damage):
    args, expected = saved(tmp_path)
    damage(tmp_path / "step-000004" / name)
    records = run_ranks(2, parity.record, STEP, args)
    same(records[0], expected[0][2:])
    (warning,) = (line for line in capfd.readouterr().err.splitlines() if line.startswith("warning"))
    assert f"step-000004/{name}" in warning and "renamed to damaged-step-000004" in warning
    assert {path.name for path in tmp_path.glob("*step*")} == {"damaged-step-000004", "step-000002", "step-000004"}


def test_none_is_whole(saved, tmp_path):
    args, _ = saved(tmp_path)
    for step in (2, 4):
        truncate(tmp_path / f"step-{step:06}" / "__0_0.distcp")
    with pytest.raises(
        RankFailed, match=r"UserError: no checkpoint .*step-000004/__0_0.distcp has \d+ bytes, but"
    ) as e:
        run_ranks(2, _train, args)
    assert "step-000002/__0_0.distcp" in str(e.value)
    # Nothing is renamed, or the next attempt would start from nothing.
    assert (tmp_path / "step-000004").exists()


def test_resume_from_another_directory(saved, tmp_path):
    old, new = tmp_path / "old", tmp_path / "new"
    args, expected = saved(old)
    args = [*args, "--checkpoint-dir", str(new), "--resume-from"]
    same(run_ranks(2, parity.record, STEP, (*args, str(old / "step-000002")))[0], expected[0][2:])
    # Started again, it goes on from its own.
    forget(new, 4)
    run_ranks(2, _train, [*args, str(old), "--steps", "6", "--save-every", "1", "--keep", "9"])
    assert [int(name[5:]) for name in sorted(os.listdir(new)) if name[:5] == "step-"] == [5, 6]
    truncate(old / "step-000004" / "__0_0.distcp")
    shutil.rmtree(new)
    with pytest.raises(RankFailed, match="UserError: no checkpoint to resume from is whole"):
        run_ranks(2, _train, [*args, str(old)])


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ("--seed 1", "seed 0 there, 1 here"),
        ("--hidden-size 64", "hidden_size 32 there, 64 here"),
        ("--optimizer sgd", "optimizer adamw there, sgd here"),
        ("--seq-len 8", "seq_len 16 there, 8 here; training sequences"),
    ],
)
def test_a_checkpoint_of_another_run(saved, tmp_path, options, message):
    args, _ = saved(tmp_path)
    with pytest.raises(RankFailed, match=f"UserError: .*step-000004 is of another run: .*{message}"):
        run_ranks(2, _train, [*args, *options.split()])
    assert (tmp_path / "step-000004").exists()


def test_options_that_cannot_be(small_run, tmp_path):
    config = load_step(STEP).Config
    (tmp_path / "file").write_text("")
    for options, message in [
        (f"--checkpoint-dir {tmp_path}/file/x", "--checkpoint-dir: cannot write to"),
        (f"--checkpoint-dir {tmp_path}/x --keep 0", "must be at least 0 and 1"),
        (f"--resume-from {tmp_path}", "holds no complete checkpoint"),
    ]:
        with pytest.raises(UserError, match=re.escape(message)):
            parse(config, [*small_run, *options.split()])


def test_going_back_needs_another_directory(saved, tmp_path):
    args, _ = saved(tmp_path)
    with pytest.raises(UserError, match="save to another --checkpoint-dir"):
        parse(load_step(STEP).Config, [*args, "--resume-from", f"{tmp_path}/step-000002"])


def _train_on_a_full_disk(args, full_rank, full_step):
    """The kernel has no space left for this rank's file of this step."""

    def checkpoints(original):
        import checkpoint_files
        import torch.distributed as dist

        save = checkpoint_files.dcp.save

        def save_on_full_disk(state, checkpoint_id, process_group):
            if dist.get_rank() == full_rank and str(full_step) in checkpoint_id.name:
                (checkpoint_id / f"__{full_rank}_0.distcp").symlink_to("/dev/full")
            return save(state, checkpoint_id=checkpoint_id, process_group=process_group)

        checkpoint_files.dcp.save = save_on_full_disk
        return original

    train([*args], STEP, Checkpoints=checkpoints)


@pytest.mark.skipif(not os.path.exists("/dev/full"), reason="needs /dev/full")
@pytest.mark.parametrize("rank", [0, 1])
def test_a_full_disk(small_run, tmp_path, capfd, rank):
    args = arguments(small_run, tmp_path)
    run_ranks(2, _train_on_a_full_disk, args, rank, 2)
    (warning,) = (line for line in capfd.readouterr().err.splitlines() if line.startswith("warning"))
    assert f"step 2 could not be saved (rank {rank}: " in warning and "No space left on device" in warning
    # No trace of it, and the next is complete.
    assert sorted(os.listdir(tmp_path)) == ["latest", "step-000004"]
    shutil.rmtree(tmp_path)
    with pytest.raises(RankFailed, match="UserError: --checkpoint-dir: step 2 could not be saved"):
        run_ranks(2, _train_on_a_full_disk, [*args, "--on-save-error", "stop"], rank, 2)
    assert os.listdir(tmp_path) == []


# On files and directories, besides opening one to write it.
OPERATIONS = ["fsync", "rename", "replace", "mkdir", "unlink", "rmdir", "symlink"]


def _train_and_die(args, n):
    """Train, and end the process before the n-th operation on files of a save. Returns how many there were."""
    count = 0

    def counted(function, counts=lambda *args: True):
        def operation(*args, **kwargs):
            nonlocal count
            if counts(*args) and threading.current_thread().name == "checkpoint":
                if count == n:
                    os._exit(9)
                count += 1
            return function(*args, **kwargs)

        return operation

    for name in OPERATIONS:
        setattr(os, name, counted(getattr(os, name)))
    # What Path.open calls.
    io.open = counted(io.open, lambda path, mode="r", *args: mode[0] == "w")
    train([*args], STEP)
    return count


def test_killed_at_every_operation_on_files(saved, tmp_path):
    args, _ = saved(tmp_path / "saved")
    forget(tmp_path / "saved", 4)
    (tmp_path / "saved" / "latest").unlink()
    (tmp_path / "saved" / "latest").symlink_to("step-000002")
    directory = tmp_path / "checkpoints"
    args = [str(directory) if word == str(tmp_path / "saved") else word for word in (*args, "--keep", "1")]
    load_step(STEP)
    import durable

    def attempt(n):
        shutil.rmtree(directory, ignore_errors=True)
        shutil.copytree(tmp_path / "saved", directory, symlinks=True)
        try:
            return run_ranks(1, _train_and_die, args, n)[0]
        except RankFailed as error:
            assert "the process died" in str(error)

    count, found = attempt(-1), []
    assert count > 20
    for n in range(count):
        assert attempt(n) is None
        complete = durable.complete(directory)
        for path in (*complete, directory / "latest"):
            manifest = durable.read_manifest(path)
            durable.verify(path, manifest["files"])
        found.append(durable.read_manifest(complete[0])["step"])
    # First the old one, then the new one.
    assert found == sorted(found) and set(found) == {2, 4}
    # What the killed runs have left does not disturb the next.
    run_ranks(1, _train, args)
    assert sorted(os.listdir(directory)) == ["latest", "step-000004"]


@pytest.mark.skipif(sys.platform != "linux", reason="looks for processes in /proc")
def test_killed_in_the_middle_and_started_again(small_run, tmp_path):
    """Twice the same command, the first time with kill -9."""
    directory, exported = tmp_path / "checkpoints", tmp_path / "exported"
    base = [*small_run, "--warmup-steps", "2", "--eval-every", "0", "--steps", "60", "--zero", "1"]
    run_ranks(2, _train, [*base, "--export-dir", str(tmp_path / "expected")])
    args = [*base, "--checkpoint-dir", str(directory), "--save-every", "5", "--export-dir", str(exported)]
    command = [sys.executable, "-m", "torch.distributed.run", "--nproc-per-node", "2", f"{STEP}/train.py", *args]
    environment = os.environ | {"OMP_NUM_THREADS": "1"}
    pipes = {"stdout": subprocess.PIPE, "stderr": subprocess.PIPE}
    first = subprocess.Popen(command, cwd=ROOT, env=environment, **pipes)
    try:
        deadline = time.monotonic() + 120
        while not (directory / "latest").exists():
            assert first.poll() is None and time.monotonic() < deadline
            time.sleep(0.005)
    finally:
        # Its workers are in sessions of their own.
        workers = Path(f"/proc/{first.pid}/task/{first.pid}/children").read_text().split()
        for pid in (first.pid, *map(int, workers)):
            os.kill(pid, signal.SIGKILL)
        first.communicate()
    assert not exported.exists(), "it had finished"
    second = subprocess.run(command, cwd=ROOT, env=environment, capture_output=True, text=True, timeout=120)
    assert second.returncode == 0 and "resumed from" in second.stdout, second.stderr
    ours, theirs = (load_file(path / "model.safetensors") for path in (exported, tmp_path / "expected"))
    assert all(torch.equal(ours[name], weight) for name, weight in theirs.items()) and ours.keys() == theirs.keys()
