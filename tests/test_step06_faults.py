"""step06: checkpoints that are damaged, of another run, on a full disk, or cut off by kill -9."""

import io
import json
import os
import pickle
import re
import shutil
import threading
from functools import lru_cache
from pathlib import Path

import parity
import pytest
import torch
import torch.distributed as dist
from conftest import load_step
from ranks import RankFailed, run_ranks
from running import instrumented, train
from test_step06_checkpoint import _train, arguments, forget, same

from shared.config import UserError, parse

STEP = "step06_4d"


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
    # For which it no longer needs the old ones.
    old.rename(tmp_path / "moved")
    run_ranks(2, _train, [*args, str(old), "--steps", "6"])
    (tmp_path / "moved").rename(old)
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
        ("--seq-len 8", "seq_len 16 there, 8 here"),
    ],
)
def test_a_checkpoint_of_another_run(saved, tmp_path, options, message):
    args, _ = saved(tmp_path)
    with pytest.raises(RankFailed, match=f"UserError: .*step-000004 is of another run: .*{message}"):
        run_ranks(2, _train, [*args, *options.split()])
    assert (tmp_path / "step-000004").exists()


def test_a_checkpoint_of_another_dataset(saved, small_run, tmp_path):
    """As many tokens, but others."""
    args, _ = saved(tmp_path / "c")
    lines = Path(small_run[1]).read_text().splitlines(keepends=True)
    (tmp_path / "other.txt").write_text("".join(lines[::-1]))
    with pytest.raises(RankFailed, match=r"step-000004 is of another run: corpus \w{16} there"):
        run_ranks(2, _train, [*args, "--dataset", str(tmp_path / "other.txt")])


def _train_from_a_sick_file_server(args):
    module = load_step(STEP)
    from survive import durable

    # Which nobody can read.
    durable._sha256 = lambda path: Path("/proc/self/mem").read_bytes()
    module.train(parse(module.Config, [*args]))


def test_what_is_not_ours_runs_nothing(saved, tmp_path):
    """All checksums fit, but its pickle has a command for the reader."""
    args, _ = saved(tmp_path / "theirs")
    path, made = tmp_path / "theirs" / "step-000004", tmp_path / "made"

    class Command:
        def __reduce__(self):
            return os.mkdir, (str(made),)

    load_step(STEP)
    from survive import durable

    (path / ".metadata").write_bytes(pickle.dumps(Command()))
    manifest = durable.read_manifest(path)
    manifest["files"] |= durable.seal(path, ".metadata")
    (path / "manifest.json").write_text(json.dumps(manifest | {"sha256": durable._checksum(manifest)}))
    with pytest.raises(RankFailed, match=r"it would run posix\.mkdir"):
        run_ranks(2, _train, [*args, "--checkpoint-dir", str(tmp_path / "new"), "--resume-from", str(path)])
    assert not made.exists()


def test_what_cannot_be_read_for_now_is_not_damaged(saved, tmp_path):
    args, _ = saved(tmp_path)
    with pytest.raises(RankFailed, match=r"UserError: --checkpoint-dir: .*Input/output error"):
        run_ranks(2, _train_from_a_sick_file_server, args)
    assert {path.name for path in tmp_path.glob("*step*")} == {"step-000002", "step-000004"}


def test_only_what_is_ours_is_deleted(saved, tmp_path):
    args, _ = saved(tmp_path)
    for name in (".tmp-step-000006", ".tmp-notes"):
        (tmp_path / name).mkdir()
    run_ranks(2, _train, args)
    assert not (tmp_path / ".tmp-step-000006").exists() and (tmp_path / ".tmp-notes").exists()


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
    module = load_step(STEP)
    from survive import checkpoint_files

    save = checkpoint_files.dcp.save

    def save_on_full_disk(state, checkpoint_id, **options):
        if dist.get_rank() == full_rank and str(full_step) in checkpoint_id.name:
            (checkpoint_id / f"__{full_rank}_0.distcp").symlink_to("/dev/full")
        return save(state, checkpoint_id=checkpoint_id, **options)

    checkpoint_files.dcp.save = save_on_full_disk
    module.train(parse(module.Config, [*args]))


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
    from survive import durable

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


def _train_with_a_wrong_bit(args, name, rank):
    """After the first step one bit of a weight is another on this rank."""
    calls = []

    def prepare(trainer):
        weight = dict(trainer.model.named_parameters())[name]

        def flip(optimizer, *_):
            calls.append(1)
            if len(calls) == 1 and dist.get_rank() == rank:
                weight.data.view(torch.int32).view(-1)[5] ^= 1

        trainer.optimizer.register_step_post_hook(flip)

    train([*args], STEP, **instrumented(prepare))


@pytest.mark.parametrize(
    ("ranks", "layout", "name", "rank", "found"),
    [
        (3, "--global-batch-size 24", "model.layers.1.mlp.up_proj.weight", 1, "rank 1 is not that on ranks 0, 2"),
        # Which tensor-parallel ranks all hold; and four of them have copies of two key-value heads.
        (2, "--tp 2", "model.norm.weight", 1, "rank 1 is not that on rank 0|rank 0 is not that on rank 1"),
        (4, "--tp 4", "model.layers.0.self_attn.k_proj.weight", 2, "rank 2 is not that on rank 3|rank 3 is .* rank 2"),
    ],
)
def test_replicas_that_differ_are_named_and_not_saved(small_run, tmp_path, ranks, layout, name, rank, found):
    args = arguments(small_run, tmp_path, layout)
    with pytest.raises(RankFailed, match=rf"UserError: ranks that should .*{name} on ({found})"):
        run_ranks(ranks, _train_with_a_wrong_bit, args, name, rank)
    assert os.listdir(tmp_path) == []
