"""Which files of a data set are read: all of the split that is asked for, each once, and nothing else."""

import os
from pathlib import Path

import datasets
import pyarrow
import pyarrow.parquet
import pytest
from corpora import TEXTS, documents, prepared, with_eos, write_rows

from shared.config import UserError


def test_directories_that_are_links(tmp_path):
    for name in ("here", "there"):
        (tmp_path / name).mkdir()
        write_rows(tmp_path / name / f"{name}.jsonl", [name])
    (tmp_path / "here" / "more").symlink_to(tmp_path / "there")
    assert sorted(documents(prepared(tmp_path / "here"))) == sorted(with_eos(["here", "there"]))


def test_a_directory_of_save_to_disk(tmp_path):
    datasets.Dataset.from_dict({"text": TEXTS, "id": list(range(60))}).save_to_disk(tmp_path / "one")
    assert documents(prepared(tmp_path / "one")) == with_eos(TEXTS)
    parts = {name: datasets.Dataset.from_dict({"text": [name]}) for name in ("train", "test")}
    datasets.DatasetDict(parts).save_to_disk(tmp_path / "two")
    assert documents(prepared(tmp_path / "two", split="test")) == with_eos(["test"])


def test_a_cloned_dataset_of_the_hub(tmp_path):
    """Metadata and documentation lie beside the data, and the splits in one directory."""
    (tmp_path / "data").mkdir()
    for split in ("train", "validation", "test"):
        texts = [f"{split} {i}" for i in range(30)]
        pyarrow.parquet.write_table(
            pyarrow.table({"text": texts}), tmp_path / "data" / f"{split}-00000-of-00001.parquet"
        )
    (tmp_path / "dataset_infos.json").write_text('{"default": {"features": {}}}')
    (tmp_path / "README.md").write_text("---\nlicense: mit\n---\nAbout it.")
    (tmp_path / ".gitattributes").touch()
    for split in ("train", "validation", "test"):
        assert documents(prepared(tmp_path, split=split)) == with_eos([f"{split} {i}" for i in range(30)])
    with pytest.raises(UserError, match="has no --split dev, but"):
        prepared(tmp_path, split="dev")


def test_files_of_no_split_beside_those_of_one(tmp_path):
    write_rows(tmp_path / "train.jsonl", TEXTS)
    write_rows(tmp_path / "more.jsonl", TEXTS)
    with pytest.raises(UserError, match=r"1 files tell no split by their names \(more.jsonl\), but others do"):
        prepared(tmp_path)
    # Of texts, the names may tell what they are about.
    (tmp_path / "texts").mkdir()
    for name in ("test of courage.txt", "a.md"):
        (tmp_path / "texts" / name).write_text(name)
    assert sorted(documents(prepared(tmp_path / "texts"))) == with_eos(["a.md", "test of courage.txt"])


def test_documentation_beside_texts_of_a_split(tmp_path):
    """As in every clone of such a data set."""
    for name in ("README.md", "train.txt", "valid.txt", "test.txt"):
        (tmp_path / name).write_text(name)
    assert documents(prepared(tmp_path)) == with_eos(["train.txt"])
    assert documents(prepared(tmp_path, split="validation")) == with_eos(["valid.txt"])
    # Where nothing is divided, it is a text as others are.
    (tmp_path / "texts").mkdir()
    for name in ("README.md", "guide.md", "test of courage.md"):
        (tmp_path / "texts" / name).write_text(name)
    expected = with_eos(["README.md", "guide.md", "test of courage.md"])
    assert sorted(documents(prepared(tmp_path / "texts"))) == expected


def test_a_directory_is_read_once(tmp_path):
    """By whatever links one comes to it."""
    (tmp_path / "v1").mkdir()
    write_rows(tmp_path / "v1" / "a.jsonl", TEXTS)
    (tmp_path / "current").symlink_to("v1")
    (tmp_path / "v1" / "up").symlink_to("..")
    assert documents(prepared(tmp_path)) == with_eos(TEXTS)
    # Also where a link tells a split.
    (tmp_path / "rows" / "2024").mkdir(parents=True)
    write_rows(tmp_path / "rows" / "2024" / "train.jsonl", TEXTS)
    (tmp_path / "rows" / "training").symlink_to("2024")
    assert documents(prepared(tmp_path / "rows")) == with_eos(TEXTS)
    (tmp_path / "texts" / "source").mkdir(parents=True)
    (tmp_path / "texts" / "source" / "a.txt").write_text("a")
    (tmp_path / "texts" / "dev").symlink_to("source")
    assert documents(prepared(tmp_path / "texts")) == with_eos(["a"])


def test_links_may_tell_a_split(tmp_path):
    for year in ("2023", "2024"):
        (tmp_path / "data" / year).mkdir(parents=True)
        write_rows(tmp_path / "data" / year / "a.jsonl", [year] * 3)
    (tmp_path / "sets").mkdir()
    for split, year in (("train", "2024"), ("test", "2023"), ("validation", "2023")):
        (tmp_path / "sets" / split).symlink_to(tmp_path / "data" / year)
        assert documents(prepared(tmp_path / "sets", split=split)) == with_eos([year] * 3)
    # Beside what they lead to, that is of no split.
    (tmp_path / "train").symlink_to("data/2024")
    with pytest.raises(UserError, match="files tell no split by their names"):
        prepared(tmp_path)


def test_rows_about_licenses_are_data(tmp_path):
    for name in ("license", "readme"):
        write_rows(tmp_path / f"{name}.jsonl", [name])
    assert sorted(documents(prepared(tmp_path))) == with_eos(["license", "readme"])


def test_what_is_out_of_reach_is_not_left_out(tmp_path, monkeypatch):
    write_rows(tmp_path / "a.jsonl", TEXTS)
    (tmp_path / "b.jsonl").symlink_to(tmp_path / "unmounted" / "b.jsonl")
    with pytest.raises(UserError, match=r"b\.jsonl is a link that leads nowhere"):
        prepared(tmp_path)
    # Of another split, it is not missed.
    (tmp_path / "a.jsonl").rename(tmp_path / "train.jsonl")
    (tmp_path / "b.jsonl").rename(tmp_path / "test.jsonl.bz2")
    (tmp_path / "talk.mp4").symlink_to(tmp_path / "unmounted")
    assert documents(prepared(tmp_path)) == with_eos(TEXTS)
    for name in ("more", "more.1"):
        (tmp_path / name).symlink_to(tmp_path / "unmounted" / name)
        with pytest.raises(UserError, match=rf"{name} is a link that leads nowhere"):
            prepared(tmp_path)
        (tmp_path / name).unlink()
    (tmp_path / "closed").mkdir()
    (tmp_path / "lost+found").mkdir()
    scan = os.scandir

    def refused(path):
        if Path(path).name in ("closed", "lost+found"):
            raise PermissionError(13, "Permission denied", path)
        return scan(path)

    # Which root would be allowed.
    monkeypatch.setattr(os, "scandir", refused)
    with pytest.raises(UserError, match=r"cannot read .*/closed \(Permission denied\)"):
        prepared(tmp_path)


def test_configurations_are_the_hubs(tmp_path):
    """Or those of a clone would be mixed."""
    for configuration in ("small", "large"):
        (tmp_path / "data" / configuration).mkdir(parents=True)
        write_rows(tmp_path / "data" / configuration / "train.jsonl", [configuration] * 3)
    with pytest.raises(UserError, match="is local: name the directory of that configuration"):
        prepared(tmp_path, dataset_config="small")


def test_directories_by_split(tmp_path):
    for split in ("train", "dev"):
        (tmp_path / split).mkdir()
        write_rows(tmp_path / split / "0.jsonl", [split] * 3)
    assert documents(prepared(tmp_path, split="validation")) == with_eos(["dev"] * 3)


def test_directories_named_like_files(tmp_path):
    (tmp_path / "part.txt").mkdir()
    (tmp_path / "part.txt" / "a.txt").write_text("text")
    assert documents(prepared(tmp_path)) == with_eos(["text"])
