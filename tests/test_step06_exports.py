"""step06: an export is written file by file from shards, and is what the whole model in one memory would give."""

import json
import os
import sys
from types import SimpleNamespace

import pytest
import torch
import torch.distributed as dist
from ranks import RankFailed, run_ranks
from running import instrumented, train
from safetensors.torch import load_file
from torch.distributed.checkpoint.api import CheckpointException

from shared.live_bytes import LiveBytes
from shared.weights import export

STEP = "step06_4d"
# More than the largest tensor of a small run, and far less than all.
FILE = 40_000


def _train_and_export(args, directory):
    """Train, write --export-dir and, from one memory, `directory`. Returns the bytes that the former took at most."""
    peaks = []

    def prepare(trainer):
        survival, exports = sys.modules["survive.survival"], sys.modules["survive.exports"]
        exports.MAX_FILE_BYTES = FILE

        def both(running, export_shards=survival.Run.export):
            weights = trainer.whole(dict(trainer.model.named_parameters()))
            export(weights, trainer.model.model.config, running.checkpoints.corpus.tokenizer, directory)
            del weights
            with LiveBytes() as memory:
                memory.track([*trainer.model.parameters(), *trainer.reducer.trained])
                before = memory.now
                export_shards(running)
            peaks.append(memory.peak - before)

        survival.Run.export = both

    train([*args], STEP, **instrumented(prepare))
    return peaks[0]


def same_exports(ours, theirs):
    """Another division into files, and all else the same."""
    index = json.loads((ours / "model.safetensors.index.json").read_text())
    files = {path.name: load_file(path) for path in ours.glob("*.safetensors")}
    (whole,) = map(load_file, theirs.glob("*.safetensors"))
    assert index["weight_map"] == {name: file for file, tensors in files.items() for name in tensors}
    assert index["weight_map"].keys() == whole.keys()
    assert index["metadata"]["total_size"] == sum(tensor.nbytes for tensor in whole.values())
    for tensors in files.values():
        assert sum(tensor.nbytes for tensor in tensors.values()) <= FILE
        for name, tensor in tensors.items():
            assert tensor.dtype == whole[name].dtype and torch.equal(tensor, whole[name]), name
    others = [
        {path.name for path in directory.iterdir() if "safetensors" not in path.name} for directory in (ours, theirs)
    ]
    assert others[0] == others[1]
    assert all((ours / name).read_bytes() == (theirs / name).read_bytes() for name in others[0])
    return len(files)


@pytest.mark.parametrize(
    ("ranks", "options"),
    [
        pytest.param(4, "--zero 3 --dp 2 --tp 2 --dtype bfloat16 --vocab-size 301", marks=pytest.mark.quick),
        (4, "--pp 2 --tp 2 --micro-batch-size 2 --tie-word-embeddings True"),
        (2, "--tp 2 --checkpoint-dir {}/checkpoints"),
    ],
)
def test_export_of_shards(small_run, tmp_path, ranks, options):
    args = [*small_run, "--steps", "2", "--num-hidden-layers", "4", *options.format(tmp_path).split()]
    own, whole = tmp_path / "own", tmp_path / "whole"
    peaks = run_ranks(ranks, _train_and_export, [*args, "--export-dir", str(own)], whole)
    assert same_exports(own, whole) > ranks // 2
    # A file, and a box of the checkpoint that is being read. The whole model has more.
    assert max(peaks) < 2 * FILE < sum(path.stat().st_size for path in whole.glob("*.safetensors"))
    assert {path.name for path in tmp_path.iterdir()} <= {"own", "whole", "checkpoints"}


def _fail(args, rank, how):
    def prepare(trainer):
        exports = sys.modules["survive.exports"]
        exports.MAX_FILE_BYTES = FILE

        def save_file(tensors, path, metadata, save=exports.save_file):
            save(tensors, path, metadata)
            if dist.get_rank() == rank:
                how()

        exports.save_file = save_file

    train([*args], STEP, **instrumented(prepare))


def _fail_to_read(args):
    def prepare(trainer):
        def load(*loaded, **options):
            raise CheckpointException("read", {0: (OSError(5, "Input/output error"), None)})

        exports = sys.modules["survive.exports"]
        exports.MAX_FILE_BYTES = FILE
        if dist.get_rank() == 1:
            exports.dcp = SimpleNamespace(load=load)

    train([*args], STEP, **instrumented(prepare))


def _no_space():
    raise OSError(28, "No space left on device")


def test_an_export_that_fails_or_is_killed_is_not_there(small_run, tmp_path):
    args = [*small_run, "--steps", "1", "--export-dir", str(tmp_path / "own")]
    with pytest.raises(RankFailed, match=r"UserError: the model could not be exported \(rank 1: .*No space left"):
        run_ranks(2, _fail, args, 1, _no_space)
    assert list(tmp_path.iterdir()) == []
    with pytest.raises(RankFailed, match=r"UserError: the model could not be exported \(rank 1: .*Input/output error"):
        run_ranks(2, _fail_to_read, args)
    assert list(tmp_path.iterdir()) == []
    with pytest.raises(RankFailed, match="the process died"):
        run_ranks(2, _fail, args, 1, lambda: os._exit(9))
    assert not (tmp_path / "own").exists()
    # What it has left does not disturb the next.
    run_ranks(2, train, args, STEP)
    assert (tmp_path / "own" / "model.safetensors").exists()


def _train_on_a_disk_of_its_own(args, option, directory):
    train([*args, option, f"{directory}/{os.environ['RANK']}/own"], STEP)


def test_machines_that_see_other_directories(small_run, tmp_path):
    """Told before the training that would be lost."""
    with pytest.raises(RankFailed, match=r"UserError: --export-dir is written by all ranks.*rank 1: .*No such file"):
        run_ranks(2, _train_on_a_disk_of_its_own, small_run, "--export-dir", tmp_path)
    assert list((tmp_path / "0").iterdir()) == []
    # A rank with a checkpoint of old has drawn no weights.
    run_ranks(1, train, [*small_run, "--steps", "1", "--checkpoint-dir", str(tmp_path / "1" / "own")], STEP)
    with pytest.raises(RankFailed, match=r"UserError: --checkpoint-dir .*/1/own is not what rank 0 sees: share it"):
        run_ranks(2, _train_on_a_disk_of_its_own, small_run, "--checkpoint-dir", tmp_path)
