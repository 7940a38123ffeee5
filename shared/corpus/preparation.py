"""Preparing a corpus: documents to shards, by any number of processes and machines, none of which needs another.

The first process to come writes the plan: which files, in which order, cut into units. A unit becomes shards, one after
the other, and each shard appears whole, with a note of what it holds. A process that starts again goes on after the
last one. What a shard holds depends on the plan alone, so two processes that happen to prepare the same one do no harm.
(Of a stream, also on how long it is to be, so a lock keeps them apart.) Who finds all units done writes the manifest.
"""

import json
import shutil
from collections.abc import Iterator
from contextlib import suppress
from pathlib import Path
from typing import Any

from tqdm import tqdm
from transformers import PreTrainedTokenizerBase

from shared.config import BaseConfig, UserError
from shared.corpus.corpus import FORMAT, MANIFEST, TOKENIZER
from shared.corpus.encoding import encode_batches
from shared.corpus.files import appear, here
from shared.corpus.indexed import ShardWriter, token_dtype
from shared.corpus.readers import File, rows
from shared.corpus.sources import list_files
from shared.corpus.tokenizers import (
    Encoder,
    adds_bos,
    check_vocabulary,
    fingerprint,
    largest_id,
    load_tokenizer,
    train_bpe,
)
from shared.data import HELD_OUT, held_out_tokens

PLAN = "plan.json"
# Small files are read as one unit of about this many bytes.
UNIT_BYTES = 2**26
# A shard ends with the document that brings it to this many tokens: what an interruption costs at most.
SHARD_TOKENS = 2**26
# Documents are tokenized together once they have this many characters.
BATCH_CHARACTERS = 2**20
SHARD_KEYS = ("name", "documents", "tokens", "bytes", "sha256")
COUNTS = ("rows", "documents", "tokens", "without_text", "empty", "replaced")


class Preparation:
    """The preparation of one data set in one directory."""

    def __init__(
        self, config: BaseConfig, dataset: str, tokenizer: str, vocab_size: int, directory: Path, request: str
    ) -> None:
        """Make the plan, or take the one that is there. `request` identifies what was asked for.

        Raises UserError for a data set or tokenizer that cannot be used, or a directory that is of another request.
        """
        self.config, self.directory = config, directory
        self.dataset, self.tokenizer_name, self.vocab_size, self.request = dataset, tokenizer, vocab_size, request
        self.plan = self._plan()
        self.files = [File(*file) for file in self.plan["files"]]
        self.tokenizer = self._tokenizer()
        self.encoder = Encoder(self.tokenizer, config.add_bos)
        self.dtype = token_dtype(largest_id(self.tokenizer))

    def _plan(self) -> dict:
        path = self.directory / PLAN
        if not path.exists():
            files, revision = list_files(self.config, self.dataset)
            plan = {"request": self.request, "revision": revision, "files": files, "units": _units(files)}
            self.directory.mkdir(parents=True, exist_ok=True)
            appear(path, plan)
        plan = json.loads(path.read_text())
        if plan["request"] != self.request:
            raise UserError(f"{self.directory} is being prepared with other options: choose another directory")
        return plan

    def _tokenizer(self) -> PreTrainedTokenizerBase:
        """The one that was saved with the plan, or the one that the options ask for."""
        saved, name = self.directory / TOKENIZER, self.tokenizer_name
        if not saved.exists():
            texts = (text for unit in range(len(self.plan["units"])) for text in self._texts(unit))
            tokenizer = train_bpe(texts, self.vocab_size) if name == "bpe" else load_tokenizer(name)
            check_vocabulary(largest_id(tokenizer), name, self.vocab_size)
            if self.config.add_bos not in (None, adds_bos(tokenizer)):
                # A prompt is to begin as the documents did that a model was trained on.
                tokenizer.add_bos_token = self.config.add_bos
            temporary = self.directory / f".{TOKENIZER}.{here()}"
            tokenizer.save_pretrained(temporary)
            # Another process may have saved the same by now.
            with suppress(OSError):
                temporary.rename(saved)
            shutil.rmtree(temporary, ignore_errors=True)
        return load_tokenizer(str(saved))

    def run(self, part: int = 0, parts: int = 1, needed: int | None = None) -> None:
        """Prepare every `parts`-th unit from `part`, until `needed` tokens are there (None: all), and finish."""
        units = range(part, len(self.plan["units"]), parts)
        total = sum(self.files[i].size for unit in units for i in self.plan["units"][unit])
        tokens = 0
        with tqdm(total=total, desc="tokenizing (once)", unit="B", unit_scale=True) as bar:
            for unit in units:
                if needed is not None and tokens >= needed:
                    break
                tokens += self._prepare_unit(unit, None if needed is None else needed - tokens, bar)
        self._finish(needed)

    def _prepare_unit(self, unit: int, needed: int | None, bar: tqdm) -> int:
        """Write the shards that it lacks. Returns the tokens of all."""
        notes = self._notes(unit)
        tokens, read = sum(note["tokens"] for note in notes), sum(note["rows"] for note in notes)
        bar.update(sum(self.files[i].size for i in self.plan["units"][unit]) if notes and notes[-1]["last"] else 0)
        if notes and notes[-1]["last"]:
            return tokens
        batches, last = self._batches(unit, read, bar), False
        while not last and (needed is None or tokens < needed):
            name = f"{unit:05}-{len(notes):05}"
            limit = SHARD_TOKENS if needed is None else min(SHARD_TOKENS, needed - tokens)
            notes.append(self._prepare_shard(name, batches, limit))
            tokens, last = tokens + notes[-1]["tokens"], notes[-1]["last"]
        return tokens

    def _prepare_shard(self, name: str, batches: Iterator[tuple[list, dict]], limit: int) -> dict:
        """Write documents until there are `limit` tokens. Returns the shard's note."""
        writer, note = ShardWriter(self.directory / name, self.dtype), dict.fromkeys(COUNTS, 0)
        last = True
        try:
            for documents, counts in batches:
                for document in documents:
                    writer.add(document)
                note |= {key: note[key] + counts[key] for key in counts}
                if writer.tokens >= limit:
                    last = False
                    break
            check_vocabulary(writer.largest_id, self.tokenizer_name, self.vocab_size)
            note |= {"name": name, "last": last, "documents": len(writer.lengths), "tokens": writer.tokens}
            note |= {"bytes": writer.tokens * self.dtype.itemsize, "sha256": writer.hash.hexdigest()}
            writer.publish()
        finally:
            writer.discard()
        # The note last: with it, the shard is done.
        appear(self.directory / f"{name}.json", note)
        return note

    def _batches(self, unit: int, skip: int, bar: tqdm | None) -> Iterator[tuple[list, dict]]:
        """Documents as ids, some at a time, and counts of what was read for them."""
        batches = self._text_batches(unit, skip, bar)
        # Of what is small, processes would take longer to start.
        if 0 < sum(self.files[i].size for i in self.plan["units"][unit]) < 2 * BATCH_CHARACTERS:
            return ((self.encoder.encode(texts), counts) for texts, counts in batches)
        return encode_batches(self.encoder, batches)

    def _text_batches(self, unit: int, skip: int, bar: tqdm | None) -> Iterator[tuple[list[str], dict]]:
        texts, characters, counts = [], 0, dict.fromkeys(COUNTS, 0)
        for text, what in self._cleaned(unit, skip, bar):
            counts["rows"] += 1
            if what:
                counts[what] += 1
            if text:
                texts.append(text)
                characters += len(text)
            if characters >= BATCH_CHARACTERS:
                yield texts, counts
                texts, characters, counts = [], 0, dict.fromkeys(COUNTS, 0)
        if counts["rows"]:
            yield texts, counts

    def _texts(self, unit: int) -> Iterator[str]:
        return (text for text, _ in self._cleaned(unit, 0, None) if text)

    def _cleaned(self, unit: int, skip: int, bar: tqdm | None) -> Iterator[tuple[str, str]]:
        """The text of each row of a unit after the first `skip`, and what is to be counted of it."""
        for i in self.plan["units"][unit]:
            file, before = self.files[i], bar.n if bar is not None else 0

            def progress(read: int, before: int = before, size: int = file.size) -> None:
                if bar is not None:
                    bar.update(max(before + min(read, size) - bar.n, 0))

            for row in rows(file, self.config.text_column, progress):
                if skip:
                    skip -= 1
                    continue
                yield self._clean(row.text, row.place)
            progress(file.size)

    def _clean(self, text: Any, place: str) -> tuple[str, str]:
        if text is None:
            return "", "without_text"
        if not isinstance(text, str):
            raise UserError(
                f"--text-column {self.config.text_column} must hold text, but holds {text!r:.80} in {place}"
            )
        if not text:
            return "", "empty"
        try:
            text.encode()
        except UnicodeEncodeError as error:
            if self.config.invalid_text == "refuse":
                raise UserError(
                    f"{place}: no valid Unicode ({error.reason}, {error.object[error.start]!r}): repair it, or take "
                    "--invalid-text replace"
                ) from error
            return text.encode("utf-8", "replace").decode(), "replaced"
        return text, ""

    def _notes(self, unit: int) -> list[dict]:
        """Of the shards of a unit that are done."""
        notes = []
        while (path := self.directory / f"{unit:05}-{len(notes):05}.json").exists():
            notes.append(json.loads(path.read_text()))
        return notes

    def _finish(self, needed: int | None) -> None:
        """Write the manifest if all units are done, or as many tokens as needed. Raises UserError if there are none."""
        notes = [self._notes(unit) for unit in range(len(self.plan["units"]))]
        done = all(unit and unit[-1]["last"] for unit in notes)
        shards = [note for unit in notes for note in unit]
        counts = {key: sum(note[key] for note in shards) for key in COUNTS}
        if not done and (needed is None or counts["tokens"] < needed):
            return
        if not counts["tokens"]:
            # What the hub has tomorrow may be better.
            for name in (PLAN, *(f"{note['name']}.json" for note in shards)):
                (self.directory / name).unlink(missing_ok=True)
            raise UserError(
                f"--dataset {self.dataset} holds no documents: of {counts['rows']} rows {counts['without_text']} have "
                f"no text in --text-column {self.config.text_column}, {counts['empty']} an empty one"
            )
        held_out = None if needed is None else self._held_out(counts["tokens"] if done else None)
        manifest = {
            "format": FORMAT,
            "request": self.request,
            "dataset": self.dataset,
            "revision": self.plan["revision"],
            "split": self.config.split,
            "text_column": self.config.text_column,
            "tokenizer": {"name": self.tokenizer_name, "fingerprint": fingerprint(self.tokenizer)},
            "largest_id": largest_id(self.tokenizer),
            "bos": self.encoder.add_bos,
            "streaming": needed is not None,
            # Whether the source has nothing more.
            "complete": done,
            "held_out": held_out,
            **counts,
            "shards": [{key: note[key] for key in SHARD_KEYS} for note in shards],
        }
        appear(self.directory / MANIFEST, manifest, replace=True)
        _report(counts)

    def _held_out(self, tokens: int | None) -> int:
        """Tokens at the front of a stream that are never trained on. Once decided, a longer stream keeps them.

        `tokens`: all of one that has ended. Several epochs hold out no more of it than one does.
        """
        manifest, config = self.directory / MANIFEST, self.config
        if manifest.exists():
            return json.loads(manifest.read_text())["held_out"]
        held_out = held_out_tokens(config)
        if tokens is None:
            return held_out
        return min(held_out, max(tokens // config.seq_len // HELD_OUT, config.global_batch_size) * config.seq_len)


def _units(files: list[File]) -> list[list[int]]:
    """Consecutive files, cut into groups of about UNIT_BYTES or one file."""
    units, size = [[]], 0
    for i, file in enumerate(files):
        if units[-1] and size + file.size > UNIT_BYTES:
            units.append([])
            size = 0
        units[-1].append(i)
        size += file.size
    return units


def _report(counts: dict[str, int]) -> None:
    reasons = {"without_text": "rows without text", "empty": "empty rows", "replaced": "rows with characters replaced"}
    others = [f", {counts[key]:,} {reason}" for key, reason in reasons.items() if counts[key]]
    print(f"{counts['tokens']:,} tokens in {counts['documents']:,} documents", *others, sep="", flush=True)
