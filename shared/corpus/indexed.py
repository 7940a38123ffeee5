"""Shards of tokens on disk, in the format of Megatron-LM's indexed data sets: `NAME.bin` and `NAME.idx`.

NAME.bin holds nothing but token ids. NAME.idx says where documents begin:

    9 bytes   "MMIDIDX", two zeros
    8 bytes   version 1
    1 byte    code of the ids' dtype
    8 bytes   number of sequences, s
    8 bytes   number of documents + 1, d
    4 s       int32: the length of each sequence, in tokens
    8 s       int64: where each sequence begins in NAME.bin, in bytes
    8 d       int64: the first sequence of each document; the last one is s

All numbers are little-endian. Megatron may cut a document into sequences, sentences say. Here each document is one.

datatrove's files are read as well: NAME.ds holds nothing but token ids, of two or four bytes, and NAME.ds.index, in
8 bytes each, where documents end, in tokens.
"""

import hashlib
import os
import struct
from bisect import bisect_left
from pathlib import Path
from typing import Self

import numpy as np

from shared.config import UserError

MAGIC = b"MMIDIDX\x00\x00"
HEADER = struct.Struct("<9sQBQQ")
DTYPES = {1: "u1", 2: "i1", 3: "<i2", 4: "<i4", 5: "<i8", 8: "<u2"}
CODES = {np.dtype(dtype): code for code, dtype in DTYPES.items()}


def token_dtype(largest_id: int) -> np.dtype:
    """The smallest type of the format that holds every id: it knows no uint32."""
    return np.dtype("<u2" if largest_id < 2**16 else "<i4")


def index_bytes(documents: int) -> int:
    """Of a shard's index: the length and start of each document, and which sequence it begins with."""
    return HEADER.size + (4 + 8) * documents + 8 * (documents + 1)


class Shard:
    """The tokens of some documents (n,), and where those begin. Neither is read before it is asked for."""

    def __init__(self, tokens: np.ndarray, starts: np.ndarray, documents: np.ndarray) -> None:
        """`starts`: the byte at which each sequence begins; `documents`: the first sequence of each."""
        self.tokens, self._starts, self._documents = tokens, starts, documents

    @classmethod
    def from_array(cls, tokens: np.ndarray, begins: list[int]) -> Self:
        """Of tokens in memory, with documents that begin at `begins`."""
        return cls(tokens, np.array(begins, np.int64) * tokens.itemsize, np.arange(len(begins) + 1))

    @classmethod
    def open(cls, path: Path) -> Self:
        """`path` is without an ending, or ends with .ds. Raises UserError if the files are missing, cut off, or of
        another format."""
        if path.suffix == ".ds":
            return cls._open_datatrove(path)
        try:
            with open(f"{path}.idx", "rb") as file:
                magic, version, code, sequences, documents = HEADER.unpack(file.read(HEADER.size))
            if magic != MAGIC or version != 1 or code not in DTYPES:
                raise UserError(f"{path}.idx is no index of version 1 of token ids")
            index = np.memmap(f"{path}.idx", mode="r")
            # A file without a byte cannot be mapped.
            size = os.path.getsize(f"{path}.bin")
            tokens = np.memmap(f"{path}.bin", DTYPES[code], mode="r") if size else np.empty(0, DTYPES[code])
        except (OSError, struct.error, ValueError) as error:
            raise UserError(f"{path}: a shard of tokens that cannot be read ({error})") from error
        starts = HEADER.size + 4 * sequences
        firsts, end = starts + 8 * sequences, starts + 8 * sequences + 8 * documents
        if len(index) != end:
            raise UserError(f"{path}.idx has {len(index)} bytes, but says that it has {end}: restore it")
        lengths, starts = index[HEADER.size : starts].view("<i4"), index[starts:firsts].view("<i8")
        indexed = int(starts[-1]) + int(lengths[-1]) * tokens.itemsize if sequences else 0
        if indexed != size:
            raise UserError(f"{path}.bin has {size} bytes, but its index tells of {indexed}: restore it")
        return cls(tokens, starts, index[firsts:end].view("<i8"))

    @classmethod
    def _open_datatrove(cls, path: Path) -> Self:
        try:
            ends = np.fromfile(f"{path}.index", "<u8").astype("<i8")
            size = os.path.getsize(path)
            width = size // int(ends[-1])
            if width not in (2, 4) or width * int(ends[-1]) != size:
                raise UserError(f"{path} has {size} bytes, but its index tells of {ends[-1]} tokens: restore it")
        except (OSError, IndexError, ZeroDivisionError) as error:
            raise UserError(f"{path}: a shard of tokens that cannot be read ({error})") from error
        tokens = np.memmap(path, f"<u{width}", mode="r")
        return cls(tokens, np.append(0, ends[:-1]) * width, np.arange(len(ends) + 1))

    def begins(self, start: int, stop: int) -> np.ndarray:
        """Which tokens of `start` to `stop` are the first of a document."""
        size = self.tokens.itemsize
        # numpy's own search would copy an index that is not aligned, as a file's is not.
        first, last = (bisect_left(self._starts, at * size) for at in (start, stop))
        first, last = (bisect_left(self._documents, sequence) for sequence in (first, last))
        # A document without tokens begins where the next one does.
        return np.unique(self._starts[self._documents[first:last]]) // size


class ShardWriter:
    """Writes one shard under a name of its own. `publish` makes it appear, whole."""

    def __init__(self, path: Path, dtype: np.dtype) -> None:
        self.path, self.dtype = path, dtype
        self.lengths: list[int] = []
        self.tokens, self.largest_id = 0, -1
        self.temporary = path.with_name(f".{path.name}.{os.uname().nodename}.{os.getpid()}")
        self.file, self.hash = open(f"{self.temporary}.bin", "wb"), hashlib.sha256()  # noqa: SIM115 (closed below)

    def add(self, document: np.ndarray) -> None:
        """Append the token ids (n,) of a document."""
        content = document.astype(self.dtype).tobytes()
        self.file.write(content)
        self.hash.update(content)
        self.lengths.append(len(document))
        self.tokens += len(document)
        self.largest_id = max(self.largest_id, int(document.max()))

    def publish(self) -> None:
        self.file.close()
        lengths, count = np.array(self.lengths, "<i4"), len(self.lengths)
        ends = np.cumsum(lengths, dtype="<i8") * self.dtype.itemsize
        with open(f"{self.temporary}.idx", "wb") as file:
            file.write(HEADER.pack(MAGIC, 1, CODES[self.dtype], count, count + 1))
            file.write(lengths.tobytes())
            file.write((ends - lengths.astype("<i8") * self.dtype.itemsize).tobytes())
            file.write(np.arange(count + 1, dtype="<i8").tobytes())
        for ending in ("bin", "idx"):
            os.replace(f"{self.temporary}.{ending}", f"{self.path}.{ending}")

    def discard(self) -> None:
        self.file.close()
        Path(f"{self.temporary}.bin").unlink(missing_ok=True)
