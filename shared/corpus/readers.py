"""Reading the files of a data set: the texts in them, one after the other.

Local files and those of the Hugging Face hub are read alike, as streams: nothing is copied to the disk first.
"""

import csv
import io
import json
import time
from collections.abc import Callable, Iterable, Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any, BinaryIO, NamedTuple

import fsspec
from fsspec.compression import compr

from shared.config import UserError

# A text file is cut at line ends into documents of about this many characters.
DOCUMENT_CHARACTERS = 2**17
# Seconds before a file that could not be read is tried again.
RETRIES = (1, 2, 4, 8, 16)
# Records in which the column has to stand at least once.
FIRST = 100
_MISSING = object()
COMPRESSED = {".gz": "gzip", ".bz2": "bz2", ".xz": "xz", ".zst": "zstd"}


class File(NamedTuple):
    """A file of a data set, as fsspec opens it, and what tells of a local one whether it has changed."""

    url: str
    size: int
    modified: int


class Row(NamedTuple):
    """A document as it was found. `text` is None where there is none."""

    text: Any
    place: str


def is_text(file: Path) -> bool:
    """Whether it is read as a text, not as rows."""
    return READERS[kind(file.name)] == _read_text


def rows(file: File, column: str, progress: Callable[[int], None]) -> Iterator[Row]:
    """The documents of a file. What breaks off is opened again. `progress` is told how many bytes are read.

    Raises UserError for a file that is malformed, that has no such column, or that stays out of reach.
    """
    done, tries = 0, iter(RETRIES)
    while True:
        try:
            with _opened(file) as (raw, content):
                for i, row in enumerate(READERS[kind(file.url)](content, column, file.url)):
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


def kind(name: str) -> str:
    """The ending of a name, without that of a compression."""
    suffixes = Path(name).suffixes
    if suffixes and suffixes[-1].lower() in COMPRESSED:
        suffixes.pop()
    return suffixes[-1].lower() if suffixes else Path(name).name


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
    first, before = lines.readline(), 0
    while first.isspace():
        first, before = lines.readline(), before + 1
    if first.lstrip().startswith("["):
        yield from _records(json.loads(first + lines.read()), column, name, "record")
        return

    def parsed() -> Iterator[Any]:
        line, number = first, before + 1
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
    delimiter = "\t" if kind(name) == ".tsv" else ","
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

    # A stream, or a file of batches in any order, which begins with this.
    magic = content.read(6) if content.seekable() else b""
    if magic:
        content.seek(0)
    if magic == b"ARROW1":
        file = pyarrow.ipc.open_file(content)
        batches = map(file.get_batch, range(file.num_record_batches))
    else:
        batches = pyarrow.ipc.open_stream(content)
    yield from _records((record for batch in batches for record in batch.to_pylist()), column, name, "row")


def _records(records: Iterator[Any], column: str, name: str, unit: str) -> Iterator[Row]:
    """Raises UserError for a file whose first records all lack the column."""
    seen, columns = False, {}
    for number, record in enumerate(records, 1):
        if not isinstance(record, dict):
            raise UserError(f"{name}, {unit} {number} must be an object with a {column!r}, but is {record!r:.80}")
        # Where csv puts what is beyond the header.
        if None in record:
            raise UserError(f"{name}, {unit} {number} has more fields than the header: quote text with separators")
        value = _value(record, column)
        seen = seen or value is not _MISSING
        columns |= {} if seen else dict.fromkeys(record)
        if number == FIRST:
            _check_column(seen, column, columns, name)
        yield Row(None if value is _MISSING else value, f"{name}, {unit} {number}")
    _check_column(seen or not columns, column, columns, name)


def _value(record: dict, column: str) -> Any:
    """Of a column, also of a nested one: "meta.text" is `record["meta"]["text"]`."""
    if column in record:
        return record[column]
    root, _, rest = column.partition(".")
    return _value(record[root], rest) if rest and isinstance(record.get(root), dict) else _MISSING


def _check_column(there: bool, column: str, columns: Iterable[str], name: str) -> None:
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
