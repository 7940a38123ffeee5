"""A prepared corpus names itself, is the same however it was made, and cannot be mistaken for another."""

import json
import os
import shutil
import sys
from pathlib import Path

import numpy as np
import pytest
from conftest import ROOT
from corpora import TEXTS, all_tokens, documents, prepared, save_tokenizer, source, with_eos, write, write_rows

from shared.config import UserError, parse
from shared.corpus import others, preparation, readers
from shared.corpus.indexed import Shard, ShardWriter

sys.path.append(str(ROOT))
import prepare


@pytest.fixture
def command(monkeypatch):
    """prepare.py with these options."""

    def call(*args):
        prepare.main(parse(prepare.Config, [str(arg) for arg in args], known_only=True))

    return call


def plan(directory: Path) -> dict:
    """With the names of files in the place of their numbers."""
    plan = json.loads((directory / "plan.json").read_text())
    plan["units"] = [[Path(plan["files"][i][0]).name for i in unit] for unit in plan["units"]]
    return plan


def contents(directory: Path) -> dict[str, bytes]:
    """Of all files but hidden ones and those of the tokenizer."""
    return {path.name: path.read_bytes() for path in directory.iterdir() if path.is_file() and path.name[0] != "."}


@pytest.fixture
def data(tmp_path, monkeypatch):
    """Ten files, each a unit of several shards."""
    monkeypatch.setattr(preparation, "UNIT_BYTES", 100)
    monkeypatch.setattr(preparation, "SHARD_TOKENS", 300)
    monkeypatch.setattr(preparation, "BATCH_CHARACTERS", 200)
    (tmp_path / "data").mkdir()
    for i in range(10):
        write_rows(tmp_path / "data" / f"{i}.jsonl", [f"{i} {text}" for text in TEXTS[: 7 * i + 1]])
    return tmp_path / "data"


@pytest.mark.quick
def test_the_same_for_any_number_of_processes(data, tmp_path, command, capsys):
    options = ("--dataset", data, "--vocab-size", 300)
    for parts in (1, 3, 20):
        for part in reversed(range(parts)):
            assert not (tmp_path / str(parts) / "manifest.json").exists()
            command(*options, "--output", tmp_path / str(parts), "--shard", f"{part}/{parts}")
    one, three, twenty = (contents(tmp_path / str(parts)) for parts in (1, 3, 20))
    assert one == three == twenty and len(one) > 40
    corpus = prepared(tmp_path / "3")
    texts = [f"{i} {text}" for i in range(10) for text in TEXTS[: 7 * i + 1]]
    assert sorted(documents(corpus)) == sorted(with_eos(texts))
    assert "2/3 is done, others are not yet" in capsys.readouterr().out


def test_a_prepared_corpus_is_a_dataset_and_moves(data, tmp_path, command):
    command("--dataset", data, "--vocab-size", 300, "--output", tmp_path / "out")
    expected = all_tokens(prepared(tmp_path / "out"))
    shutil.copytree(tmp_path / "out", tmp_path / "copy")
    shutil.rmtree(data), shutil.rmtree(tmp_path / "out")
    corpus = prepared(tmp_path / "copy")
    assert np.array_equal(all_tokens(corpus), expected) and len(corpus.tokenizer) == 300
    # Any part of it, across shards.
    tokens = corpus.sources[0].tokens
    for start, stop in ((0, 5), (290, 310), (100, 1500), (len(expected) - 3, len(expected))):
        assert np.array_equal(tokens[start:stop], expected[start:stop])
        begins = [0, *(np.flatnonzero(expected == 0) + 1)[:-1]]
        assert tokens.begins(start, stop).tolist() == [b for b in begins if start <= b < stop]


def test_what_breaks_off_goes_on(data, tmp_path, command, monkeypatch):
    options = ("--dataset", data, "--vocab-size", 300, "--output", tmp_path / "out")
    read, rows = [], readers.rows

    def broken(file, *args):
        for row in rows(file, *args):
            read.append(row.place)
            # For the second time: the first was the tokenizer's.
            if row.place.endswith("9.jsonl, line 55") and read.count(row.place) == 2:
                raise UserError("the line is dead")
            yield row

    with monkeypatch.context() as patch:
        patch.setattr(preparation, "rows", broken)
        with pytest.raises(UserError, match="the line is dead"):
            command(*options)
        (unit,) = (i for i, files in enumerate(plan(tmp_path / "out")["units"]) if "9.jsonl" in files[0])
        assert len(list((tmp_path / "out").glob(f"{unit:05}-*.idx"))) > 1
        command(*options)
    command("--dataset", data, "--vocab-size", 300, "--output", tmp_path / "whole")
    assert contents(tmp_path / "out") == contents(tmp_path / "whole")
    # No unit that was whole is read again.
    again = {place.split(",")[0] for place in read if read.count(place) > 2}
    assert [Path(name).name for name in again] == ["9.jsonl"]


def test_other_options_are_not_taken_for_these(data, tmp_path, command):
    command("--dataset", data, "--vocab-size", 300, "--output", tmp_path / "out")
    with pytest.raises(UserError, match="prepared with other options"):
        command("--dataset", data, "--vocab-size", 301, "--output", tmp_path / "out")
    with pytest.raises(UserError, match=r"was prepared with the tokenizer bpe, and .* is another one"):
        prepared(tmp_path / "out", tokenizer=save_tokenizer(tmp_path / "t"))
    # Which has its name from where it was.
    command("--dataset", data, "--tokenizer", tmp_path / "t", "--output", tmp_path / "named")
    assert prepared(tmp_path / "named", tokenizer=str(tmp_path / "t")).sources
    save_tokenizer(tmp_path / "t", eos_id=299)
    with pytest.raises(UserError, match=r"was prepared with the tokenizer .*/t, and .*/t is another one"):
        prepared(tmp_path / "named", tokenizer=str(tmp_path / "t"))
    with pytest.raises(UserError, match=r"prepared with no BOS token .*, which --add-bos True cannot change"):
        prepared(tmp_path / "out", add_bos=True)
    assert prepared(tmp_path / "out", add_bos=False).sources
    with pytest.raises(UserError, match=r"out is tokens already: leave --output .*new out"):
        command("--dataset", tmp_path / "out", "--vocab-size", 300, "--output", tmp_path / "new")
    with pytest.raises(UserError, match="ids up to 299, but the model's vocabulary only 299"):
        prepared(tmp_path / "out", vocab_size=299)
    manifest = tmp_path / "out" / "manifest.json"
    manifest.write_text(manifest.read_text().replace('"format": 2', '"format": 0'))
    with pytest.raises(UserError, match="of format 0, not 2"):
        prepared(tmp_path / "out")


def test_a_mixture_begins_its_documents_alike(data, tmp_path, command):
    tokenizer = save_tokenizer(tmp_path / "t")
    for bos in ("True", "False"):
        command("--dataset", data, "--tokenizer", tokenizer, "--add-bos", bos, "--output", tmp_path / bos)
    with pytest.raises(UserError, match="some data sets were prepared with a BOS token, others without"):
        prepared((f"{tmp_path / 'True'}:1", f"{tmp_path / 'False'}:1"), tokenizer=tokenizer)


def test_damage_is_named(data, tmp_path, command):
    command("--dataset", data, "--vocab-size", 300, "--output", tmp_path / "out")
    shard = sorted((tmp_path / "out").glob("*.bin"))[3]
    content, index = shard.read_bytes(), shard.with_suffix(".idx").read_bytes()
    for path in (shard, shard.with_suffix(".idx")):
        path.rename(tmp_path / "lost")
        with pytest.raises(UserError, match=rf"{path.name} is missing"):
            prepared(tmp_path / "out")
        (tmp_path / "lost").rename(path)
    shard.write_bytes(content[:-2])
    with pytest.raises(UserError, match=rf"{shard.name} has \d+ bytes instead of \d+"):
        prepared(tmp_path / "out")
    shard.write_bytes(bytes(content[:-2]) + b"\x07\x00")
    with pytest.raises(UserError, match=rf"{shard.name} is not what was prepared"):
        prepared(tmp_path / "out")
    # Made to look old, only reading all finds it.
    os.utime(shard, (0, 0))
    prepared(tmp_path / "out")
    with pytest.raises(UserError, match=rf"{shard.name} is not what was prepared"):
        command("--dataset", tmp_path / "out", "--verify")
    shard.write_bytes(content)
    shard.with_suffix(".idx").write_bytes(index[:-8])
    with pytest.raises(UserError, match=r"\.idx has [\d,]+ bytes instead of"):
        prepared(tmp_path / "out")


def test_a_document_without_tokens_is_no_second_beginning():
    shard = Shard.from_array(np.arange(9), [0, 4, 4, 7])
    assert shard.begins(0, 9).tolist() == [0, 4, 7] and shard.begins(4, 7).tolist() == [4]


def test_megatrons_files_are_read(tmp_path, monkeypatch):
    """Documents of several sequences, as Megatron writes sentences, and ids of four bytes."""
    writer = ShardWriter(tmp_path / "data", np.dtype("<i4"))
    for length in (3, 4, 5):
        writer.add(np.arange(length))
    writer.publish()
    index = bytearray((tmp_path / "data.idx").read_bytes())
    # Of three sequences, the first two are one document.
    header, documents = index[:26], np.array([0, 2, 3], "<i8").tobytes()
    (tmp_path / "data.idx").write_bytes(bytes(header) + (3).to_bytes(8, "little") + bytes(index[34:-32]) + documents)
    shard = Shard.open(tmp_path / "data")
    assert shard.begins(0, 12).tolist() == [0, 7] and shard.tokens.tolist() == [0, 1, 2, 0, 1, 2, 3, 0, 1, 2, 3, 4]
    index = (tmp_path / "data.idx").read_bytes()
    (tmp_path / "data.idx").write_bytes(index[:-8])
    with pytest.raises(UserError, match=r"\.idx has \d+ bytes, but says that it has"):
        Shard.open(tmp_path / "data")
    (tmp_path / "data.idx").write_bytes(index)
    tokenizer = save_tokenizer(tmp_path / "t")
    part = source(tmp_path / "data", tokenizer=tokenizer)
    assert part.tokens[2:9].tolist() == [2, 0, 1, 2, 3, 0, 1]
    with monkeypatch.context() as patch:
        patch.setattr(others, "appear", lambda *_: pytest.fail("read again"))
        assert source(tmp_path / "data", tokenizer=tokenizer).fingerprint == part.fingerprint
    # Nor do they take the one that is trained on other data of the run.
    text = write_rows(tmp_path / "text.jsonl", TEXTS)
    for datasets in ((str(tmp_path / "data"),), (f"{tmp_path / 'data'}:1", f"{text}:1")):
        with pytest.raises(UserError, match="data is tokens already: name their --tokenizer"):
            prepared(datasets)
    with pytest.raises(UserError, match="has the id 4, but the model's vocabulary 4 rows"):
        prepared(tmp_path / "data", vocab_size=4, tokenizer=tokenizer)


@pytest.mark.parametrize("width", [2, 4])
def test_datatroves_files_are_read(tmp_path, width):
    tokenizer, directory = save_tokenizer(tmp_path / "t"), tmp_path / "tokens"
    directory.mkdir()
    for name, lengths in (("00000_a", (3, 1, 5)), ("00001_a", (2, 4))):
        ids = np.concatenate([np.arange(length) for length in lengths])
        (directory / f"{name}.ds").write_bytes(ids.astype(f"<u{width}").tobytes())
        (directory / f"{name}.ds.index").write_bytes(np.cumsum(lengths).astype("<u8").tobytes())
    part = source(directory, tokenizer=tokenizer)
    assert part.tokens[0:15].tolist() == [0, 1, 2, 0, 0, 1, 2, 3, 4, 0, 1, 0, 1, 2, 3]
    assert part.tokens.begins(0, 15).tolist() == [0, 3, 4, 9, 11]
    assert len(source(directory / "00001_a.ds", tokenizer=tokenizer).tokens) == 6
    with pytest.raises(UserError, match="has the id 4, but the model's vocabulary 4 rows"):
        prepared(directory, vocab_size=4, tokenizer=tokenizer)
    with open(directory / "00001_a.ds", "ab") as file:
        file.write(b"\0")
    with pytest.raises(UserError, match="bytes, but its index tells of 6 tokens"):
        prepared(directory, tokenizer=tokenizer)


def test_options_of_a_training_run_are_left_unread(tmp_path, command, capsys):
    write(tmp_path, "jsonl")
    (tmp_path / "metrics").touch()
    (tmp_path / "run.yaml").write_text(
        f"dataset: {tmp_path / 'data.jsonl'}\nvocab-size: 300\nzero: 1\nshard: 2\ndp: 4\n"
        f"metrics-file: {tmp_path / 'metrics'}\n"
    )
    command("--config", tmp_path / "run.yaml")
    assert "tokens in" in capsys.readouterr().out


@pytest.mark.parametrize(
    ("args", "message"),
    [
        ("--shard 2/2", "must be I/N with I from 0 to N - 1"),
        ("--shard half", "must be I/N"),
        ("--dataset a:0.5 b:0.5 --output x", "prepare those of a mixture one by one"),
        ("--streaming --shard 0/2", "it has no parts"),
    ],
)
def test_impossible_commands(command, args, message):
    with pytest.raises(UserError, match=message):
        command(*args.split())
