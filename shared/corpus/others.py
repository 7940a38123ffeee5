"""Tokens that others have made: Megatron-LM, NeMo, datatrove."""

import hashlib
import json
from contextlib import suppress
from pathlib import Path

import numpy as np

from shared.corpus.corpus import Source, Tokens
from shared.corpus.files import appear, one_after_the_other
from shared.corpus.indexed import Shard
from shared.errors import UserError

# Tokens that are read at a time.
CHUNK = 2**24


def token_files(dataset: str) -> list[Path]:
    """The shards of a data set that others have made into tokens. Empty if it is none."""
    if Path(f"{dataset}.idx").is_file() or Path(f"{dataset}.index").is_file():
        return [Path(dataset)]
    return sorted(index.with_suffix("") for index in Path(dataset).glob("*.ds.index"))


def open_tokens(files: list[Path], name: str, share: float, vocab_size: int, notes: Path) -> Source:
    """Open `token_files`. The first process reads all of them, for nothing else says how large their ids are, and notes
    in the directory `notes` what it has found.

    Raises UserError for an id beyond the model's vocabulary.
    """
    counts, fingerprint = [], hashlib.sha256()
    for file in files:
        tokens = Shard.open(file).tokens
        note = _note(file, tokens, notes)
        if note["largest_id"] >= vocab_size:
            raise UserError(
                f"--dataset {file} has the id {note['largest_id']}, but the model's vocabulary {vocab_size} rows: pass "
                f"--vocab-size {note['largest_id'] + 1}, or name the --model that it was made for"
            )
        counts.append(len(tokens))
        fingerprint.update(note["sha256"].encode())
    return Source(name, share, Tokens(files, counts), fingerprint.hexdigest())


def _note(file: Path, tokens: np.ndarray, notes: Path) -> dict:
    """The largest id and the checksum of a file's tokens, read again only if it has changed."""
    stat = (file if file.suffix == ".ds" else Path(f"{file}.bin")).stat()
    key = f"{file.resolve()} {stat.st_size} {stat.st_mtime_ns}"
    path = notes / f"{hashlib.sha256(key.encode()).hexdigest()}.json"
    if path.exists():
        return json.loads(path.read_text())
    # Without a cache that can be written to, each process reads.
    with suppress(OSError):
        notes.mkdir(parents=True, exist_ok=True)
    with one_after_the_other(notes / ".lock"):
        if path.exists():
            return json.loads(path.read_text())
        largest, checksum = 0, hashlib.sha256()
        for start in range(0, len(tokens), CHUNK):
            largest = max(largest, int(tokens[start : start + CHUNK].max()))
            checksum.update(tokens[start : start + CHUNK])
        note = {"file": str(file.resolve()), "largest_id": largest, "sha256": checksum.hexdigest()}
        with suppress(OSError):
            appear(path, note)
        return note
