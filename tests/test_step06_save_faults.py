"""step06: a save that finds a full disk, is cut off by kill -9 at any operation, or has replicas that differ."""

import io
import os
import resource
import shutil
import threading

import parity
import pytest
import test_step06_faults
import torch
import torch.distributed as dist
from conftest import load_step
from ranks import RankFailed, run_ranks
from running import instrumented, train
from test_step06_checkpoint import STEP, _train, arguments, forget, same

from shared.config import parse

# A fixture.
saved = test_step06_faults.saved


def _train_on_a_full_disk(args, full_rank, full_step):
    """The kernel has no space left for this rank's file of this step."""
    module = load_step(STEP)
    from survive import checkpoint_files

    save = checkpoint_files.dcp.save

    def save_on_full_disk(state, checkpoint_id, **options):
        if dist.get_rank() == full_rank and checkpoint_id.name.startswith(f".tmp-step-{full_step:06}"):
            (checkpoint_id / f"__{full_rank}_0.distcp").symlink_to("/dev/full")
        return save(state, checkpoint_id=checkpoint_id, **options)

    checkpoint_files.dcp.save = save_on_full_disk
    module.train(parse(module.Config, [*args]))


@pytest.mark.skipif(not os.path.exists("/dev/full"), reason="needs /dev/full")
@pytest.mark.parametrize("rank", [0, pytest.param(1, marks=pytest.mark.quick)])
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
    # Whoever has no checkpoint of the last step must not count as finished, but has its export.
    with pytest.raises(RankFailed, match="UserError: the last step could not be saved"):
        run_ranks(2, _train_on_a_full_disk, [*args, "--export-dir", f"{tmp_path}/exported"], rank, 4)
    assert (tmp_path / "exported" / "model.safetensors").exists() and (tmp_path / "step-000002").exists()


def _train_with_short_files(args):
    resource.setrlimit(resource.RLIMIT_FSIZE, (50_000, resource.RLIM_INFINITY))
    train(args, STEP)


def test_a_file_that_takes_no_more(small_run, tmp_path, capfd):
    """The system takes a part of what is written, and torch does not say why. A run of which nothing is left fails."""
    with pytest.raises(RankFailed, match="UserError: the last step could not be saved"):
        run_ranks(1, _train_with_short_files, arguments(small_run, tmp_path))
    assert "step 2 could not be saved (rank 0: a file takes no more, as on a full disk)" in capfd.readouterr().err


def _train_beside_another_run(args):
    """Which saves each step while this run does, and is always faster."""
    module = load_step(STEP)
    from survive import checkpoint, checkpoint_files

    save, write = checkpoint_files.save, checkpoint.write

    def overtaken(*of_step):
        def save_late(*args, **options):
            checkpoint_files.save = save
            write(*of_step)
            save(*args, **options)

        checkpoint_files.save = save_late
        return write(*of_step)

    checkpoint.write = overtaken
    module.train(parse(module.Config, [*args]))


def test_two_runs_in_one_directory(small_run, tmp_path, capfd):
    with pytest.raises(RankFailed, match="UserError: the last step could not be saved"):
        run_ranks(1, _train_beside_another_run, arguments(small_run, tmp_path))
    warnings = [line for line in capfd.readouterr().err.splitlines() if line.startswith("warning")]
    assert len(warnings) == 2 and "step-000002 is there already: does another run save to" in warnings[0]
    load_step(STEP)
    from survive import durable

    assert sorted(os.listdir(tmp_path)) == ["latest", "step-000002", "step-000004"]
    for path in durable.complete(tmp_path):
        durable.verify(path, durable.read_manifest(path)["files"])


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


def _note_what_is_forced(args):
    """Paths, as they are forced to disk, and pairs of what is renamed."""
    noted = []

    def noting(function, what):
        return lambda *args: (noted.append(what(*args)), function(*args))[1]

    os.fsync = noting(os.fsync, lambda descriptor: os.readlink(f"/proc/self/fd/{descriptor}"))
    os.rename = noting(os.rename, lambda old, new: (str(old), str(new)))
    train([*args], STEP)
    return noted


@pytest.mark.skipif(not os.path.exists("/proc/self/fd"), reason="needs /proc")
def test_a_checkpoint_is_on_disk_before_it_counts(small_run, tmp_path):
    """So that it is whole when the power fails, too."""
    (noted,) = run_ranks(1, _note_what_is_forced, arguments(small_run, tmp_path))
    last = tmp_path / "step-000004"
    ((at, temporary),) = ((i, what[0]) for i, what in enumerate(noted) if what[1] == str(last))
    paths = [last, *last.rglob("*")]
    assert len(paths) > 3
    assert {f"{temporary}{str(path).removeprefix(str(last))}" for path in paths} <= set(noted[:at])
    assert str(tmp_path) in noted[at:]


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


def test_killed_in_the_first_save_of_a_new_stage(saved, tmp_path):
    """The same command starts the stage again, from the same weights."""
    args, _ = saved(tmp_path / "old")
    before = sorted((tmp_path / "old").rglob("*"))

    def stage(name):
        stage = ["--checkpoint-dir", f"{tmp_path}/{name}", "--new-stage", "--steps", "2"]
        return (*args, *stage, "--resume-from", f"{tmp_path}/old/step-000004")

    (expected,) = run_ranks(1, parity.record, STEP, stage("whole"))
    for n in (0, 4, 8, 16):
        with pytest.raises(RankFailed, match="the process died"):
            run_ranks(1, _train_and_die, stage(f"killed-{n}"), n)
        (records,) = run_ranks(1, parity.record, STEP, stage(f"killed-{n}"))
        same(records, expected)
        assert sorted(os.listdir(tmp_path / f"killed-{n}")) == ["latest", "step-000002"]
    assert sorted((tmp_path / "old").rglob("*")) == before


def _train_with_a_wrong_bit(args, name, rank):
    """After the first step one bit of a weight is another on this rank: not the last one, which may be rounded off."""
    calls = []

    def prepare(trainer):
        weight = dict(trainer.model.named_parameters())[name]

        def flip(optimizer, *_):
            calls.append(1)
            if len(calls) == 1 and dist.get_rank() == rank:
                weight.data.view(torch.int32).view(-1)[5] ^= 1 << 12

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
