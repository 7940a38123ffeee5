"""Data sets of the hub: it is asked once, by one process, and never again for what is prepared."""

import json
import os
import re
import subprocess
import sys
from pathlib import Path

import pytest
from conftest import ROOT
from corpora import TEXTS, write_rows
from hub_server import Hub

# Small shards, and no patience.
SMALL = """
import runpy, sys
from shared.corpus import preparation, readers
preparation.UNIT_BYTES, preparation.SHARD_TOKENS, preparation.BATCH_CHARACTERS = 100, 300, 200
readers.RETRIES = (0, 0)
sys.argv = sys.argv[1:]
runpy.run_path(sys.argv[0], run_name="__main__")
"""

# As many processes as the argument says open the same data set at once.
AT_ONCE = """
import multiprocessing, sys
from shared.config import BaseConfig
from shared.corpus import prepare_corpus

def prepare(_):
    return len(prepare_corpus(BaseConfig(dataset=("org/texts",)), 300).sources[0].tokens)

processes = int(sys.argv[1])
with multiprocessing.get_context("fork").Pool(processes) as pool:
    assert len(set(pool.map(prepare, range(processes), chunksize=1))) == 1
"""


@pytest.fixture
def hub(tmp_path):
    directory = tmp_path / "hub" / "org" / "texts"
    directory.mkdir(parents=True)
    for split in ("train", "test"):
        for i in range(5):
            write_rows(directory / f"{split}-{i:05}.jsonl", [f"{split} {i} {text}" for text in TEXTS])
    with Hub(tmp_path / "hub") as hub:
        yield hub


def launch(hub: Hub | None, tmp_path: Path, *command: object, code: str = SMALL) -> subprocess.CompletedProcess:
    """Run a script with caches of its own; without a hub, there is no network."""
    network = hub.environment if hub else {"HF_ENDPOINT": "http://127.0.0.1:9", "HF_HUB_OFFLINE": "0"}
    caches = {"HF_HOME": f"{tmp_path}/huggingface", "XDG_CACHE_HOME": f"{tmp_path}/cache"}
    paths = {"PYTHONPATH": str(ROOT)}
    arguments = [sys.executable, "-c", code, *map(str, command)]
    return subprocess.run(arguments, env=os.environ | network | caches | paths, capture_output=True, text=True)


def manifest(tmp_path: Path) -> dict:
    (path,) = (tmp_path / "cache").rglob("manifest.json")
    return json.loads(path.read_text())


OPTIONS = ("--dataset", "org/texts", "--vocab-size", 300)


def test_what_is_prepared_needs_no_hub(hub, tmp_path):
    assert launch(hub, tmp_path, ROOT / "prepare.py", *OPTIONS).returncode == 0
    found = manifest(tmp_path)
    assert (found["documents"], found["revision"], found["split"]) == (300, "a" * 40, "train")
    # Not by each process, nor for each file.
    infos = [
        request for request in hub.requests if re.fullmatch(r"GET /api/datasets/org/texts(/revision/\w+)?", request)
    ]
    assert 1 <= len(infos) <= 3
    # A newer commit is another data set, which nobody has asked for.
    hub.commit = "b" * 40
    hub.requests.clear()
    sizes = "--num-hidden-layers 1 --hidden-size 32 --intermediate-size 48 --num-attention-heads 4"
    training = f"{sizes} --num-key-value-heads 2 --seq-len 16 --global-batch-size 4 --micro-batch-size 2 --steps 2"
    for there in (hub, None):
        run = launch(there, tmp_path, ROOT / "step01_single_gpu" / "train.py", *OPTIONS, *training.split())
        assert run.returncode == 0 and "step 2 | loss" in run.stdout, run.stderr
    assert [request for request in hub.requests if "texts" in request] == []


def test_a_commit_that_is_named(hub, tmp_path):
    run = launch(hub, tmp_path, ROOT / "prepare.py", "--dataset", f"org/texts@{'c' * 40}", *OPTIONS[2:])
    assert run.returncode == 0 and manifest(tmp_path)["revision"] == "c" * 40, run.stderr


def test_one_of_eight_processes_asks(hub, tmp_path):
    asked = []
    for processes in (1, 8):
        hub.requests.clear()
        run = launch(hub, tmp_path / str(processes), processes, code=AT_ONCE)
        assert run.returncode == 0, run.stderr
        asked.append(sorted(hub.requests))
    assert asked[0] and asked[1] == asked[0]


def test_a_connection_that_breaks(hub, tmp_path):
    """Is tried again; and then what was prepared is kept, at the commit that it began with."""
    hub.breaks_after, hub.breaks = 1000, 1
    assert launch(hub, tmp_path / "once", ROOT / "prepare.py", *OPTIONS).returncode == 0
    whole = manifest(tmp_path / "once")

    # The tokenizer is trained on all five files. Then they are read once more.
    hub.down_after_files = 8
    broken = launch(hub, tmp_path / "twice", ROOT / "prepare.py", *OPTIONS)
    assert broken.returncode == 1 and "Traceback" not in broken.stderr and "train-0000" in broken.stderr
    notes = list((tmp_path / "twice").rglob("?????-?????.json"))
    assert len(notes) >= 2
    hub.down_after_files, hub.commit = None, "b" * 40
    assert launch(hub, tmp_path / "twice", ROOT / "prepare.py", *OPTIONS).returncode == 0
    assert manifest(tmp_path / "twice")["shards"] == whole["shards"]
    assert manifest(tmp_path / "twice")["revision"] == "a" * 40


def test_a_gated_tokenizer_and_a_missing_split_name_the_cause(hub, tmp_path):
    (tmp_path / "hub" / "org" / "model").mkdir()
    hub.gated.add("org/model")
    run = launch(hub, tmp_path, ROOT / "prepare.py", *OPTIONS, "--tokenizer", "org/model")
    assert run.returncode == 1 and "accept its licence on the hub" in run.stderr
    run = launch(hub, tmp_path, ROOT / "prepare.py", *OPTIONS, "--split", "validation")
    assert run.returncode == 1 and "has no --split validation, but train, test" in run.stderr
