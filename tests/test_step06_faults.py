"""step06: checkpoints that are damaged, of another run, on a full disk, or cut off by kill -9."""

import json
import os
import pickle
import re
import shutil
from functools import lru_cache
from pathlib import Path

import parity
import pytest
from conftest import load_step
from ranks import RankFailed, run_ranks
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
        run_ranks(2, _train, [*args, str(old), "--steps", "6"])


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ("--seed 1", "seed 0 there, 1 here"),
        ("--hidden-size 64", "hidden_size 32 there, 64 here"),
        ("--optimizer sgd", "optimizer adamw there, sgd here"),
        ("--seq-len 8", "seq_len 16 there, 8 here"),
        # The corpus is small: more of it is held out for a larger batch.
        ("--global-batch-size 16", r"training sequences \[\d+\] there, \[\d+\] here"),
    ],
)
def test_a_checkpoint_of_another_run(saved, tmp_path, options, message):
    args, _ = saved(tmp_path)
    with pytest.raises(RankFailed, match=f"UserError: .*step-000004 is of another run: .*{message}"):
        run_ranks(2, _train, [*args, *options.split()])
    assert (tmp_path / "step-000004").exists()


def test_what_is_no_directory_is_no_checkpoint(tmp_path):
    load_step(STEP)
    from survive import durable

    (tmp_path / "manifest.json").write_text("{}")
    with pytest.raises(UserError, match="choose another checkpoint"):
        durable.opened(tmp_path / "manifest.json")


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
    with pytest.raises(RankFailed, match=r"UserError: --resume-from: .*it would run posix\.mkdir"):
        others = ["--checkpoint-dir", str(tmp_path / "new"), "--resume-from", str(path), "--steps", "6"]
        run_ranks(2, _train, [*args, *others])
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
