"""Where documents come from: which files a data set has, and the texts in them, file by file.

Local files and those of the Hugging Face hub are read alike, as streams: nothing is copied to the disk first.
"""

import csv
import hashlib
import io
import json
import os
import re
import sysconfig
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any, BinaryIO, NamedTuple

import fsspec
from fsspec.compression import compr

from shared.config import BaseConfig, UserError

# A text file is cut at line ends into documents of about this many characters.
DOCUMENT_CHARACTERS = 2**17
# Seconds before a file that could not be read is tried again.
RETRIES = (1, 2, 4, 8, 16)
_MISSING = object()
COMPRESSED = {".gz": "gzip", ".bz2": "bz2", ".xz": "xz", ".zst": "zstd"}
# Words by which file names tell of a split. Others are part of no split.
SPLITS = {
    "train": ("train", "training"),
    "validation": ("validation", "valid", "val", "dev"),
    "test": ("test", "testing", "eval", "evaluation"),
}


class File(NamedTuple):
    """A file of a data set, as fsspec opens it, and what tells of a local one whether it has changed."""

    url: str
    size: int
    modified: int


class Row(NamedTuple):
    """A document as it was found. `text` is None where there is none."""

    text: Any
    place: str


class Listing(NamedTuple):
    """The files of a data set in the order in which they are read, and its revision on the hub."""

    files: list[File]
    revision: str | None


def list_files(config: BaseConfig, dataset: str) -> Listing:
    """Raises UserError if there is no such data set, or if it has nothing that can be read for the split."""
    path = Path(dataset)
    if dataset == "stdlib":
        path = Path(sysconfig.get_path("stdlib"))
        skip = {"site-packages", "dist-packages", "test", "tests", "idle_test", "__pycache__"}
        found = [file for file in path.rglob("*.py") if not skip & set(file.relative_to(path).parts)]
    elif path.is_file():
        if _kind(dataset) not in READERS:
            raise UserError(f"--dataset {dataset}: read are only {', '.join(READERS)}, also with .gz, .bz2, .xz, .zst")
        found = [path]
    elif path.is_dir():
        found = _local_split(config, path)
    else:
        return _hub_files(config, dataset)
    stats = {str(file.relative_to(path)): (file.absolute(), file.stat()) for file in found}
    files = {name: File(str(file), stat.st_size, stat.st_mtime_ns) for name, (file, stat) in stats.items()}
    return Listing(_ordered(files, config), None)


def _ordered(files: dict[str, File], config: BaseConfig) -> list[File]:
    """By the hash of their names, so that neither the held-out end of a corpus nor the part of it that a stream reaches
    is what happens to be sorted there. The seed draws the part that is streamed."""
    salt = f"{config.seed} " if config.streaming else ""
    return [files[name] for name in sorted(files, key=lambda name: hashlib.sha256((salt + name).encode()).digest())]


def _local_split(config: BaseConfig, directory: Path) -> list[Path]:
    """The files of --split in a directory."""
    if (directory / "state.json").exists() and (directory / "dataset_info.json").exists():
        # Of `Dataset.save_to_disk`, which names its files in state.json.
        state = json.loads((directory / "state.json").read_text())
        return [directory / data["filename"] for data in state["_data_files"]]
    if (directory / "dataset_dict.json").exists():
        return _local_split(config, directory / config.split)
    files = [
        file
        for root, _, names in os.walk(directory, followlinks=True)
        for file in map(Path(root).joinpath, names)
        if file.is_file()
        and _kind(file.name) in READERS
        and not any(part.startswith(".") for part in file.relative_to(directory).parts)
        and file.name not in ("dataset_infos.json", "dataset_info.json")
    ]
    if any(READERS[_kind(file.name)] != _read_text for file in files):
        files = [file for file in files if file.stem not in ("README", "LICENSE")]
    kinds = {READERS[_kind(file.name)] for file in files}
    if len(kinds) != 1:
        found = ", ".join(sorted({_kind(file.name) for file in files})) or "no such file"
        raise UserError(f"--dataset {directory} must hold one kind of {', '.join(READERS)}, found {found}")
    by_split = {}
    for file in files:
        by_split.setdefault(_split_of(str(file.relative_to(directory))), []).append(file)
    # Texts may be named after what they are about: only a whole directory that is divided counts as divided.
    if set(by_split) == {None} or (None in by_split and kinds == {_read_text}):
        by_split = {"train": files}
    if config.split not in by_split:
        raise UserError(f"--dataset {directory} has no --split {config.split}, but {', '.join(map(str, by_split))}")
    if None in by_split:
        raise UserError(
            f"--dataset {directory}: {len(by_split[None])} files tell no split by their names "
            f"({by_split[None][0].name}), but others do ({by_split[config.split][0].name}): move those to leave out"
        )
    return by_split[config.split]


def _split_of(name: str) -> str | None:
    """The split that a file's name, or a directory's that it lies in, tells of: the last one counts."""
    words = re.split(r"[^a-zA-Z]+", name.lower())
    return next((split for word in reversed(words) for split, names in SPLITS.items() if word in names), None)


def _hub_files(config: BaseConfig, dataset: str) -> Listing:
    """The files that the hub's data set has for the split, at its newest revision: by the datasets library, which knows
    how people name them."""
    from datasets import load_dataset_builder
    from huggingface_hub import HfFileSystem

    try:
        builder = load_dataset_builder(dataset, config.dataset_config)
        data_files = builder.config.data_files or {}
        urls, filesystem = [str(url) for url in data_files.get(config.split, [])], HfFileSystem()
        # Their names without the revision.
        files = {re.sub("@[^/]*", "", url): File(url, filesystem.info(url)["size"], 0) for url in urls}
    except Exception as error:  # the hub's errors, the network's and those of a malformed id share no base
        raise UserError(
            f"--dataset {dataset}: no such file or directory, and no Hugging Face dataset within reach "
            f"({' '.join(str(error).split())})"
        ) from error
    if not files:
        raise UserError(
            f"--dataset {dataset} has no --split {config.split}, but {', '.join(map(str, data_files)) or 'none'}"
        )
    if kinds := {_kind(url) for url in urls} - set(READERS):
        raise UserError(f"--dataset {dataset} has {', '.join(sorted(kinds))} files: read are only {', '.join(READERS)}")
    revision = re.search(r"@([0-9a-f]{40})", urls[0])
    return Listing(_ordered(files, config), revision.group(1) if revision else None)


def _kind(name: str) -> str:
    """The ending of a name, without that of a compression."""
    suffixes = Path(name).suffixes
    if suffixes and suffixes[-1].lower() in COMPRESSED:
        suffixes.pop()
    return suffixes[-1].lower() if suffixes else Path(name).name


def rows(file: File, column: str, progress: Callable[[int], None]) -> Iterator[Row]:
    """The documents of a file. What breaks off is opened again. `progress` is told how many bytes are read.

    Raises UserError for a file that is malformed, that has no such column, or that stays out of reach.
    """
    done, tries = 0, iter(RETRIES)
    while True:
        try:
            with _opened(file) as (raw, content):
                for i, row in enumerate(READERS[_kind(file.url)](content, column, file.url)):
                    if i >= done:
                        yield row
                        done, tries = i + 1, iter(RETRIES)
                        progress(raw.tell())
            return
        except UserError:
            raise
        except Exception as error:  # the network's errors, those of pyarrow and of decompression share no base
            # A local file does not become readable by waiting.
            wait = next(tries, None) if "://" in file.url else None
            if wait is None:
                raise UserError(f"{file.url}: {' '.join(str(error).split()) or type(error).__name__}") from error
            print(f"{file.url}: {' '.join(str(error).split())[:200]}: again in {wait} s", flush=True)
            time.sleep(wait)


@contextmanager
def _opened(file: File) -> Iterator[tuple[BinaryIO, BinaryIO]]:
    """The file as it is stored, and what is in it."""
    suffix = Path(file.url).suffix.lower()
    with fsspec.open(file.url, "rb") as raw:
        if suffix == ".zst":
            import pyarrow

            # zstandard's own reader, which fsspec takes, ends without an error where the file was cut off.
            yield raw, pyarrow.CompressedInputStream(raw, "zstd")
        else:
            yield raw, compr[COMPRESSED[suffix]](raw, mode="rb") if suffix in COMPRESSED else raw


# Readers: of an open file, the name of its text column, and its name, to its documents


def _read_text(content: BinaryIO, column: str, name: str) -> Iterator[Row]:
    # Bytes that are no UTF-8 become lone surrogates, which the caller judges. A byte order mark is no text.
    text = io.TextIOWrapper(content, encoding="utf-8-sig", errors="surrogateescape", newline="")
    line = 1
    while part := text.read(DOCUMENT_CHARACTERS):
        part += text.readline(DOCUMENT_CHARACTERS)
        yield Row(part, f"{name}, from line {line}")
        line += part.count("\n")


def _read_json(content: BinaryIO, column: str, name: str) -> Iterator[Row]:
    """JSON lines, or one list."""
    lines = io.TextIOWrapper(content, encoding="utf-8-sig", errors="surrogateescape")
    first = lines.readline()
    if first.lstrip().startswith("["):
        yield from _records(json.loads(first + lines.read()), column, name, "record")
        return

    def parsed() -> Iterator[Any]:
        line, number = first, 1
        while line:
            if line.strip():
                try:
                    yield json.loads(line)
                except ValueError as error:
                    raise UserError(f"{name}, line {number}: no JSON ({error})") from error
            line, number = lines.readline(), number + 1

    yield from _records(parsed(), column, name, "line")


def _read_csv(content: BinaryIO, column: str, name: str) -> Iterator[Row]:
    csv.field_size_limit(2**31 - 1)
    text = io.TextIOWrapper(content, encoding="utf-8-sig", errors="surrogateescape", newline="")
    delimiter = "\t" if _kind(name) == ".tsv" else ","
    yield from _records(csv.DictReader(text, delimiter=delimiter, strict=True), column, name, "record")


def _read_parquet(content: BinaryIO, column: str, name: str) -> Iterator[Row]:
    from pyarrow.parquet import ParquetFile

    file = ParquetFile(content)
    # A nested column is read by the name of its root.
    root = column if column in file.schema_arrow.names else column.partition(".")[0]
    _check_column(root in file.schema_arrow.names, column, file.schema_arrow.names, name)
    batches = file.iter_batches(batch_size=1024, columns=[root])
    yield from _records((record for batch in batches for record in batch.to_pylist()), column, name, "row")


def _read_arrow(content: BinaryIO, column: str, name: str) -> Iterator[Row]:
    import pyarrow

    with pyarrow.ipc.open_stream(content) as stream:
        yield from _records((record for batch in stream for record in batch.to_pylist()), column, name, "row")


def _records(records: Iterator[Any], column: str, name: str, unit: str) -> Iterator[Row]:
    for number, record in enumerate(records, 1):
        if not isinstance(record, dict):
            raise UserError(f"{name}, {unit} {number} must be an object with a {column!r}, but is {record!r:.80}")
        if number == 1:
            _check_column(_value(record, column) is not _MISSING, column, list(record), name)
        value = _value(record, column)
        yield Row(None if value is _MISSING else value, f"{name}, {unit} {number}")


def _value(record: dict, column: str) -> Any:
    """Of a column, also of a nested one: "meta.text" is `record["meta"]["text"]`."""
    if column in record:
        return record[column]
    root, _, rest = column.partition(".")
    return _value(record[root], rest) if rest and isinstance(record.get(root), dict) else _MISSING


def _check_column(there: bool, column: str, columns: list[str], name: str) -> None:
    if not there:
        raise UserError(f"{name} has no column {column!r}: choose --text-column from {', '.join(columns)}")


READERS = {
    ".txt": _read_text,
    ".md": _read_text,
    ".py": _read_text,
    ".jsonl": _read_json,
    ".ndjson": _read_json,
    ".json": _read_json,
    ".csv": _read_csv,
    ".tsv": _read_csv,
    ".parquet": _read_parquet,
    ".arrow": _read_arrow,
}
