"""What a user can get wrong ends in one line, and nothing is written."""

import sys

import pytest
import torch
from conftest import load_step

from shared.command import run
from shared.config import parse
from shared.corpus import prepare_corpus
from shared.llama_configs import load_model_config

step01 = load_step("step01_single_gpu")

ERRORS = {
    "--model llama-3.1-9b": "did you mean llama-3.1-8b",
    "--init-from {here}/truncated": "cannot read model.safetensors",
    "--init-from {here}/empty": "It is no preset",
    "--vocab-size 280 --tokenizer {here}/tokenizer": "the model's vocabulary only 280",
    "--vocab-size 100": "needs at least 257",
    "--dataset {here}/empty": "no such file",
    "--dataset {here}/nothing.txt": "holds no documents",
    "--dataset {here}/nowhere.txt": "no such file or directory",
    "--dataset {here}/rows.jsonl": "no column 'text': choose --text-column from body",
    "--seq-len 2048 --max-position-embeddings 2048": "is too small",
    "--global-batch-size 9": "not a multiple",
    "--hidden-size 30": "not a multiple of the number of attention heads",
    "--export-dir {here}/tokenizer": "is not empty",
    "--metrics-file {here}/rows.jsonl": "exists already",
    "--metrics-file /proc/a": "cannot write to /proc",
    "--device cuda": "no GPU",
}


@pytest.fixture
def here(small_run, text_file, tmp_path):
    """A directory of things to get wrong."""
    (tmp_path / "empty").mkdir()
    (tmp_path / "nothing.txt").touch()
    (tmp_path / "rows.jsonl").write_text('{"body": "x"}\n')
    config = parse(step01.Config, small_run)
    prepare_corpus(config, 300).tokenizer.save_pretrained(tmp_path / "tokenizer")
    (tmp_path / "truncated").mkdir()
    load_model_config(config).save_pretrained(tmp_path / "truncated")
    (tmp_path / "truncated" / "model.safetensors").write_bytes(b"\x10\0\0\0\0\0\0\0{")
    return tmp_path


@pytest.mark.parametrize("args", ERRORS)
def test_errors_are_one_line_and_write_nothing(small_run, here, monkeypatch, args, capsys):
    if args == "--device cuda" and torch.cuda.is_available():
        pytest.skip("there is a GPU")
    outputs = [] if "-file" in args else ["--metrics-file", f"{here}/metrics"]
    outputs += [] if "-dir" in args else ["--export-dir", f"{here}/export"]
    before = sorted(here.rglob("*"))
    monkeypatch.setattr(sys, "argv", ["train.py", *small_run, *outputs, *args.format(here=here).split()])
    with pytest.raises(SystemExit) as exit:
        run(step01.train, step01.Config)
    assert exit.value.code.startswith("error: ") and ERRORS[args] in exit.value.code
    assert "\n" not in exit.value.code
    assert sorted(here.rglob("*")) == before
