"""From any data set to tokens: README.md tells how. A run calls `prepare_corpus`, prepare.py calls `prepare_all`."""

import hashlib
import json
import os
import re
from collections.abc import Iterator
from contextlib import nullcontext
from math import ceil
from pathlib import Path

from shared.config import BaseConfig, UserError, check_writable, shares
from shared.corpus.corpus import (
    FORMAT,
    MANIFEST,
    TOKENIZER,
    Corpus,
    Source,
    Tokens,
    open_source,
    read_manifest,
)
from shared.corpus.files import one_after_the_other
from shared.corpus.others import open_tokens, token_files
from shared.corpus.preparation import Preparation
from shared.corpus.sources import list_files
from shared.corpus.tokenizers import check_vocabulary, fingerprint, load_tokenizer, tokenizer_name
from shared.data import held_out_tokens

__all__ = [
    "Corpus",
    "Source",
    "Tokens",
    "cache_directory",
    "check_configuration",
    "open_others",
    "prepare_all",
    "prepare_corpus",
]


def prepare_corpus(config: BaseConfig, vocab_size: int) -> Corpus:
    """Open the data sets of a run. What is not prepared is prepared now. `vocab_size` is the model's.

    Processes that call this together share the work, where their file system knows locks: the first prepares, the
    others wait. Raises UserError for a data set or tokenizer that cannot be used.
    """
    opened, saved, begin = {"dataset": [], "validation_dataset": []}, None, set()
    # Whether the tokenizer is one that nobody has named, which tokens of others cannot be of.
    trained, tokens_of_others = tokenizer_name(config) == "bpe", []
    for option, dataset, share, directory in prepare_all(config, vocab_size):
        if directory:
            trained = trained and read_manifest(directory)["tokenizer"]["name"] == "bpe"
            saved = saved or str(directory / TOKENIZER)
            check_vocabulary(read_manifest(directory)["largest_id"], dataset, vocab_size)
            begin.add(read_manifest(directory)["bos"])
            opened[option].append(open_source(directory, dataset, share))
        else:
            opened[option].append(open_others(dataset, share, vocab_size))
            tokens_of_others.append(dataset)
    name = saved or tokenizer_name(config)
    if len(begin) > 1:
        raise UserError("some data sets were prepared with a BOS token, others without: prepare all with one --add-bos")
    if trained and tokens_of_others:
        raise UserError(f"--dataset {' '.join(tokens_of_others)} is tokens already: name their --tokenizer")
    return Corpus(opened["dataset"], opened["validation_dataset"], load_tokenizer(name))


def prepare_all(
    config: BaseConfig, vocab_size: int, output: Path | None = None, part: int = 0, parts: int = 1
) -> Iterator[tuple[str, str, float, Path | None]]:
    """For each data set of a run: its option, its name, its share, and its directory, or None for tokens of others.

    Of several processes, each does its `part`, and the last one completes the whole. Raises UserError as above.
    """
    name = tokenizer_name(config)
    of_options = {option: shares(getattr(config, option), option) for option in ("dataset", "validation_dataset")}
    check_configuration(config)
    if config.validation_dataset:
        trained, apart = (_read_from(config, datasets) for datasets in of_options.values())
        if both := trained & apart:
            raise UserError(
                f"--dataset and --validation-dataset both read {min(both)}: name other data to evaluate on, or leave "
                "--validation-dataset out, and some is held out of training"
            )
    for option, datasets in of_options.items():
        for dataset, share in datasets:
            if output and (token_files(dataset) or (Path(dataset) / MANIFEST).is_file()):
                raise UserError(f"--dataset {dataset} is tokens already: leave --output {output} out")
            if token_files(dataset):
                yield option, dataset, share, None
                continue
            read = config.global_batch_size * config.eval_steps
            if option == "dataset":
                read = ceil(config.sequences * share / sum(share for _, share in datasets))
            directory = prepare(config, dataset, name, vocab_size, read, output, part, parts)
            # What is trained on the first data set serves all.
            name = str(directory / TOKENIZER) if name == "bpe" else name
            yield option, dataset, share, directory


def check_configuration(config: BaseConfig) -> None:
    """Raise UserError for a --dataset-config of data sets that have none, but may have several in a directory."""
    named = [
        name for option in ("dataset", "validation_dataset") for name, _ in shares(getattr(config, option), option)
    ]
    directories = [name for name in named if _is_raw(name) and Path(name).is_dir()]
    if config.dataset_config and directories and all(map(_is_local, named)):
        raise UserError(
            f"--dataset-config {config.dataset_config} is of data sets of the hub, and {' '.join(directories)} is "
            "local: name the directory of that configuration, with --dataset-config None"
        )


def _read_from(config: BaseConfig, datasets: list[tuple[str, float]]) -> set[Path]:
    """The files that are read, or what is named that is none."""
    found = set()
    for dataset, _ in datasets:
        urls = [file.url for file in list_files(config, dataset).files] if _is_raw(dataset) else [dataset]
        found |= {Path(url).resolve() for url in urls}
    return found


def _is_local(dataset: str) -> bool:
    return dataset == "stdlib" or Path(dataset).exists() or bool(token_files(dataset))


def _is_raw(dataset: str) -> bool:
    """Whether it is a local data set that is not tokens yet."""
    return _is_local(dataset) and not token_files(dataset) and not (Path(dataset) / MANIFEST).is_file()


def prepare(
    config: BaseConfig,
    dataset: str,
    tokenizer: str,
    vocab_size: int,
    read: int,
    output: Path | None,
    part: int,
    parts: int,
) -> Path:
    """The directory in which `dataset` is prepared, now if it was not before: `output`, or one of the cache.

    Of a stream, as much as lasts for `read` sequences.
    """
    if (Path(dataset) / MANIFEST).is_file():
        _check_prepared(Path(dataset), tokenizer, config.add_bos)
        return Path(dataset)
    request = _request(config, dataset, tokenizer, vocab_size)
    directory = output or cache_directory() / f"{re.sub('[^a-zA-Z0-9]+', '-', dataset)[-40:]}-{request[:12]}"
    needed = _needed(config, read, directory) if config.streaming else None
    if not _done(directory, request, needed):
        check_writable(directory, "the cache (XDG_CACHE_HOME)" if output is None else "--output")
        directory.mkdir(parents=True, exist_ok=True)
        with one_after_the_other(directory / ".lock") if parts == 1 else nullcontext():
            if not _done(directory, request, needed):
                Preparation(config, dataset, tokenizer, vocab_size, directory, request).run(part, parts, needed)
    return directory


def open_others(dataset: str, share: float, vocab_size: int) -> Source:
    """Open tokens that others have made. Raises UserError for an id beyond the model's vocabulary."""
    return open_tokens(token_files(dataset), dataset, share, vocab_size, cache_directory() / "others")


def cache_directory() -> Path:
    return Path(os.environ.get("XDG_CACHE_HOME") or Path.home() / ".cache") / "parallel-steps" / "corpora"


def _needed(config: BaseConfig, read: int, directory: Path) -> int:
    """Tokens of a stream with so many sequences. Its first run has decided how many of them are held out."""
    decided = (directory / MANIFEST).is_file()
    held_out = (read_manifest(directory)["held_out"] or 0) if decided else held_out_tokens(config)
    return read * config.seq_len + held_out + 1


def _done(directory: Path, request: str, needed: int | None) -> bool:
    if not (directory / MANIFEST).is_file():
        return False
    manifest = read_manifest(directory)
    if manifest["request"] != request:
        raise UserError(f"{directory} holds a corpus that was prepared with other options: choose another directory")
    return needed is None or manifest["complete"] or manifest["tokens"] >= needed


def _request(config: BaseConfig, dataset: str, tokenizer: str, vocab_size: int) -> str:
    """Identifies all that decides what a prepared corpus holds.

    Local files count by name, size and time. A data set of the hub counts by its name: what is prepared needs no hub.
    """
    source = list_files(config, dataset).files if _is_local(dataset) else dataset
    key = [FORMAT, source, config.dataset_config, config.split, config.text_column, config.add_bos]
    key += [_tokenizer_key(tokenizer, vocab_size), config.seed if config.streaming else None]
    return hashlib.sha256(json.dumps(key).encode()).hexdigest()


def _tokenizer_key(name: str, vocab_size: int) -> str:
    if name == "bpe":
        return f"bpe {vocab_size}"
    if not Path(name).is_dir():
        return name
    # All that a tokenizer may be saved as, and not the weights beside it.
    files = sorted(file for file in Path(name).iterdir() if file.suffix in (".json", ".txt", ".model"))
    return hashlib.sha256(b"".join(file.read_bytes() for file in files)).hexdigest()


def _check_prepared(directory: Path, name: str, add_bos: bool | None) -> None:
    """Raises UserError if what was prepared has another tokenizer, or other beginnings, than what is asked for."""
    manifest = read_manifest(directory)
    prepared = manifest["tokenizer"]
    if add_bos not in (None, manifest["bos"]):
        raise UserError(
            f"--dataset {directory} was prepared with {'a' if manifest['bos'] else 'no'} BOS token at the beginning of "
            f"documents, which --add-bos {add_bos} cannot change: prepare it anew, or leave --add-bos out"
        )
    # What is in a directory may be another one by now.
    known = name == "bpe" or (name == prepared["name"] and not Path(name).is_dir())
    if not known and fingerprint(load_tokenizer(name)) != prepared["fingerprint"]:
        raise UserError(
            f"--dataset {directory} was prepared with the tokenizer {prepared['name']}, and {name} is another one: "
            "prepare it with that, or leave --tokenizer out"
        )
