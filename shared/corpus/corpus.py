"""A prepared corpus: a directory of shards, the tokenizer, and a manifest that says what is in them.

Opening one asks no hub, takes no lock, and reads no token.
"""

import hashlib
import json
from functools import lru_cache
from itertools import accumulate
from pathlib import Path
from typing import NamedTuple, Self

import numpy as np
from transformers import PreTrainedTokenizerBase

from shared.config import UserError
from shared.corpus.indexed import Shard, index_bytes

MANIFEST, TOKENIZER = "manifest.json", "tokenizer"
# Counts up with the manifest's form, and when the same data set and tokenizer would become other tokens.
FORMAT = 2
# Shards that are mapped at a time: a process may have 1024 files open.
OPEN_SHARDS = 128


@lru_cache(OPEN_SHARDS)
def _opened(path: Path) -> Shard:
    return Shard.open(path)


class Tokens:
    """The tokens of shards, one after another, as one array (n,) that is never read as a whole."""

    def __init__(self, shards: list[Path | Shard], counts: list[int]) -> None:
        """`counts`: tokens of each shard, which is opened when it is first read."""
        self.shards, self.ends = shards, list(accumulate(counts))

    @classmethod
    def from_array(cls, tokens: np.ndarray, begins: list[int] | None = None) -> Self:
        """Of tokens in memory (n,), which are one document, or documents that begin at `begins`."""
        return cls([Shard.from_array(tokens, begins or [0])], [len(tokens)])

    def _open(self, i: int) -> Shard:
        shard = self.shards[i]
        return shard if isinstance(shard, Shard) else _opened(shard)

    def __len__(self) -> int:
        return self.ends[-1]

    def _parts(self, start: int, stop: int) -> list[tuple[int, int, int]]:
        """(shard, start, stop) for each shard that holds some of these tokens."""
        parts = []
        first = int(np.searchsorted(self.ends, start, "right"))
        for i in range(first, len(self.ends)):
            begin = self.ends[i - 1] if i else 0
            if begin >= stop:
                break
            parts.append((i, max(start - begin, 0), min(stop, self.ends[i]) - begin))
        return parts

    def __getitem__(self, key: slice) -> np.ndarray:
        """Contiguous tokens. Of one shard this is a view of its file: only what is used is read."""
        parts = [self._open(i).tokens[start:stop] for i, start, stop in self._parts(*key.indices(len(self))[:2])]
        return parts[0] if len(parts) == 1 else np.concatenate(parts)

    def begins(self, start: int, stop: int) -> np.ndarray:
        """Which tokens of `start` to `stop` are the first of a document."""
        parts = self._parts(start, stop)
        found = [self._open(i).begins(a, b) + (self.ends[i - 1] if i else 0) for i, a, b in parts]
        return np.concatenate(found) if found else np.empty(0, np.int64)


class Source(NamedTuple):
    """A prepared data set, and its share of a mixture."""

    name: str
    share: float
    tokens: Tokens
    # The same on every machine that has the same tokens, or of a stream, the same tokens as far as each has read it.
    fingerprint: str
    # Tokens at the front that are held out for validation. None: the end of the corpus is.
    held_out: int | None = None


class Corpus(NamedTuple):
    """What a run trains on, what it is evaluated on (empty: what is held out of `sources`), and their tokenizer."""

    sources: list[Source]
    validation: list[Source]
    tokenizer: PreTrainedTokenizerBase | None

    @classmethod
    def from_array(cls, tokens: np.ndarray, begins: list[int] | None = None) -> Self:
        """Of tokens in memory (n,), with documents that begin at `begins`."""
        return cls([Source("tokens", 1.0, Tokens.from_array(tokens, begins), "")], [], None)

    @property
    def fingerprint(self) -> str:
        """Of all that is trained on."""
        parts = [(s.share, s.fingerprint) for s in self.sources]
        return hashlib.sha256(json.dumps(parts).encode()).hexdigest()[:16]


def read_manifest(directory: Path) -> dict:
    """Raises UserError if it is not there, cannot be read, or is of another format."""
    try:
        manifest = json.loads((directory / MANIFEST).read_text())
    except (OSError, ValueError) as error:
        raise UserError(f"{directory / MANIFEST}: cannot be read ({error}): prepare the corpus anew") from error
    if manifest.get("format") != FORMAT:
        raise UserError(
            f"{directory} is a corpus of format {manifest.get('format')}, not {FORMAT}: prepare another one"
        )
    return manifest


def open_source(directory: Path, name: str, share: float) -> Source:
    """Open what was prepared in `directory`. Raises UserError if a shard is missing, cut off or was edited."""
    manifest = read_manifest(directory)
    written = (directory / MANIFEST).stat().st_mtime_ns
    for shard in manifest["shards"]:
        for ending, expected in (("idx", index_bytes(shard["documents"])), ("bin", shard["bytes"])):
            path = directory / f"{shard['name']}.{ending}"
            size = path.stat().st_size if path.exists() else None
            if size != expected:
                found = "is missing" if size is None else f"has {size:,} bytes instead of {expected:,}"
                raise UserError(f"{path} {found}: restore it, or delete {directory} and prepare the corpus anew")
        # What is younger than the manifest was copied or edited after it.
        if path.stat().st_mtime_ns > written:
            verify_shard(directory, shard)
    shards, counts = zip(*((directory / shard["name"], shard["tokens"]) for shard in manifest["shards"]), strict=True)
    hashes = " ".join(shard["sha256"] for shard in manifest["shards"])
    if manifest["streaming"]:
        # Which do not change as it grows.
        hashes = json.dumps([manifest[key] for key in ("request", "revision", "held_out")])
    fingerprint = hashlib.sha256(hashes.encode()).hexdigest()
    return Source(name, share, Tokens(list(shards), list(counts)), fingerprint, manifest["held_out"])


def verify_shard(directory: Path, shard: dict) -> None:
    """Raises UserError unless the shard's tokens have the checksum of the manifest."""
    with open(directory / f"{shard['name']}.bin", "rb") as file:
        if hashlib.file_digest(file, "sha256").hexdigest() != shard["sha256"]:
            raise UserError(
                f"{directory / shard['name']}.bin is not what was prepared: its checksum differs from the manifest's: "
                f"restore it, or delete {directory} and prepare the corpus anew"
            )
