"""Dataset -> documents -> tokens: prepared once, then memory-mapped from the user's cache directory."""

import hashlib
import json
import os
import shutil
import sysconfig
from collections.abc import Iterable, Iterator
from pathlib import Path
from typing import NamedTuple

import numpy as np
from datasets import Dataset, IterableDataset, load_dataset, load_dataset_builder
from datasets.exceptions import DatasetGenerationError
from filelock import FileLock
from tokenizers import ByteLevelBPETokenizer
from tqdm import tqdm
from transformers import AutoTokenizer, PreTrainedTokenizerBase, PreTrainedTokenizerFast

from shared.config import BaseConfig, UserError, check_writable
from shared.data import tokens_needed

EOS = "<|endoftext|>"
# A text file is cut at line ends into documents of about this many characters: no tokenizer meets a gigabyte at once.
DOCUMENT_CHARACTERS = 2**17
# Documents in memory at a time, per process: a token takes some hundred bytes on its way through Python.
BATCH_DOCUMENTS = 16
# The default tokenizer is trained on this much of the corpus.
BPE_CHARACTERS = 2**26
# File name ending -> builder of the datasets library; text files are read here.
BUILDERS = {".txt": None, ".jsonl": "json", ".json": "json", ".parquet": "parquet"}


class Corpus(NamedTuple):
    """The documents of a dataset, each followed by EOS, as one memory-mapped array of token ids (n,)."""

    tokens: np.ndarray
    tokenizer: PreTrainedTokenizerBase


def prepare_corpus(config: BaseConfig, vocab_size: int) -> Corpus:
    """Tokenize the dataset unless that was done before. `vocab_size` is the model's.

    Processes of one machine that call this together share the work: the first to take the file lock prepares, the
    others wait for as long as that takes. Raises UserError for a dataset or tokenizer that cannot be used.
    """
    source = _source(config)
    tokenizer_name = config.tokenizer or config.init_from or "bpe"
    tokenizer = None if tokenizer_name == "bpe" else _load_tokenizer(tokenizer_name)
    needed = tokens_needed(config) if config.streaming else None
    key = json.dumps([source.identity, config.text_column, needed, _fingerprint(tokenizer) or vocab_size])
    check_writable(cache_directory(), "the cache (XDG_CACHE_HOME)")
    directory = cache_directory() / hashlib.sha256(key.encode()).hexdigest()[:16]
    directory.parent.mkdir(parents=True, exist_ok=True)
    with FileLock(f"{directory}.lock"):
        if not directory.exists():
            temporary = directory.with_suffix(".partial")
            shutil.rmtree(temporary, ignore_errors=True)
            temporary.mkdir()
            try:
                tokenizer = tokenizer or _train_bpe(_texts(_documents(config, source), config), vocab_size)
                _check_vocabulary(tokenizer, tokenizer_name, vocab_size)
                _write_tokens(_documents(config, source), config, tokenizer, needed, temporary / "tokens.bin")
                tokenizer.save_pretrained(temporary)
            except BaseException:
                shutil.rmtree(temporary)
                raise
            temporary.rename(directory)
    tokenizer = tokenizer or AutoTokenizer.from_pretrained(directory)
    _check_vocabulary(tokenizer, tokenizer_name, vocab_size)
    return Corpus(np.memmap(directory / "tokens.bin", dtype=_token_dtype(tokenizer), mode="r"), tokenizer)


def cache_directory() -> Path:
    return Path(os.environ.get("XDG_CACHE_HOME") or Path.home() / ".cache") / "parallel-steps"


class _Source(NamedTuple):
    """Where documents come from: files of one kind, or a Hugging Face dataset (`files` is None)."""

    builder: str | None
    files: list[str] | None
    identity: list


def _source(config: BaseConfig) -> _Source:
    """Find the dataset and what identifies its content: names, sizes and times of files, or the hub's revision."""
    path = Path(config.dataset)
    if config.dataset == "stdlib":
        path = Path(sysconfig.get_path("stdlib"))
        skip = {"site-packages", "dist-packages", "test", "tests", "idle_test", "__pycache__"}
        files = [file for file in path.rglob("*.py") if not skip & set(file.relative_to(path).parts)]
        builder = None
    elif config.dataset and path.exists():
        files = [path] if path.is_file() else [f for f in path.rglob("*") if f.suffix in BUILDERS and f.is_file()]
        kinds = {BUILDERS.get(file.suffix, file.suffix) for file in files}
        if len(kinds) != 1 or kinds - set(BUILDERS.values()):
            raise UserError(
                f"--dataset {path} must be one kind of {', '.join(BUILDERS)}, "
                f"found {', '.join(sorted({file.suffix or file.name for file in files})) or 'no such file'}"
            )
        builder = kinds.pop()
    else:
        try:
            revision = load_dataset_builder(config.dataset, config.dataset_config).hash
        except Exception as error:  # the hub's errors, the network's and those of a malformed id share no base
            raise UserError(
                f"--dataset {config.dataset}: no such file or directory, and no Hugging Face dataset within reach "
                f"({' '.join(str(error).split())})"
            ) from error
        return _Source(config.dataset, None, [config.dataset, config.dataset_config, config.split, revision])
    # Ordered by the hash of their names, so that the held-out end of the corpus is a fair sample.
    files.sort(key=lambda file: hashlib.sha256(str(file.relative_to(path)).encode()).digest())
    stats = [(str(file), file.stat().st_size, file.stat().st_mtime_ns) for file in files]
    return _Source(builder, [str(file) for file in files], stats)


def _documents(config: BaseConfig, source: _Source) -> Dataset | IterableDataset:
    """The dataset with its text column. Raises UserError if it is empty or lacks the column."""
    try:
        if source.files is None:
            dataset = load_dataset(
                source.builder, config.dataset_config, split=config.split, streaming=config.streaming
            )
        elif source.builder is None:
            dataset = IterableDataset.from_generator(
                _read_text, gen_kwargs={"files": source.files, "column": config.text_column}
            )
        else:
            dataset = load_dataset(source.builder, data_files=source.files, split="train", streaming=config.streaming)
        first = next(iter(dataset), None)
    except UserError:
        raise
    except (DatasetGenerationError, OSError, ValueError) as error:
        raise UserError(f"--dataset {config.dataset}: {' '.join(str(error.__cause__ or error).split())}") from error
    if first is None:
        raise UserError(f"--dataset {config.dataset} holds no documents")
    if config.text_column not in first:
        raise UserError(
            f"--dataset {config.dataset} has no column {config.text_column!r}: choose --text-column from "
            f"{', '.join(first)}"
        )
    return dataset.select_columns([config.text_column])


def _read_text(files: list[str], column: str) -> Iterator[dict[str, str]]:
    for path in files:
        with open(path, encoding="utf-8", newline="") as file:
            try:
                while text := file.read(DOCUMENT_CHARACTERS):
                    yield {column: text + file.readline(DOCUMENT_CHARACTERS)}
            except UnicodeDecodeError as error:
                raise UserError(f"{path} is not UTF-8: {error}") from error


def _texts(dataset: Iterable[dict[str, str]], config: BaseConfig) -> Iterator[str]:
    return (text for document in dataset if (text := _checked(document[config.text_column], config)) is not None)


def _checked(text: object, config: BaseConfig) -> str | None:
    """A document as it is. None, which many data sets hold here and there, stands for a document to leave out."""
    if not isinstance(text, str | None):
        raise UserError(f"--text-column {config.text_column} must hold text, but holds {text!r}")
    return text


def _train_bpe(texts: Iterable[str], vocab_size: int) -> PreTrainedTokenizerFast:
    if vocab_size < 257:
        raise UserError(f"--vocab-size {vocab_size}: the bpe tokenizer needs at least 257, for 256 bytes and EOS")

    def head() -> Iterator[str]:
        characters = 0
        for text in texts:
            yield text
            characters += len(text)
            if characters >= BPE_CHARACTERS:
                return

    print(f"training a tokenizer of {vocab_size} tokens on the dataset (once) ...")
    tokenizer = ByteLevelBPETokenizer()
    tokenizer.train_from_iterator(head(), vocab_size, special_tokens=[EOS], show_progress=False)
    return PreTrainedTokenizerFast(tokenizer_object=tokenizer._tokenizer, eos_token=EOS, bos_token=EOS)


def _load_tokenizer(name: str) -> PreTrainedTokenizerBase:
    try:
        tokenizer = AutoTokenizer.from_pretrained(name)
    except Exception as error:  # the hub's errors, the network's and those of a malformed id share no base
        raise UserError(f"--tokenizer {name}: no tokenizer in that directory, or no id within reach") from error
    if tokenizer.eos_token_id is None:
        raise UserError(f"--tokenizer {name} has no end-of-sequence token, which must separate documents")
    return tokenizer


def _check_vocabulary(tokenizer: PreTrainedTokenizerBase, name: str, vocab_size: int) -> None:
    if len(tokenizer) > vocab_size:
        raise UserError(
            f"the tokenizer ({name}) has {len(tokenizer)} tokens, but the model's vocabulary only {vocab_size}: "
            f"choose another --tokenizer or pass --vocab-size {len(tokenizer)}"
        )


def _fingerprint(tokenizer: PreTrainedTokenizerBase | None) -> str | None:
    if tokenizer is None:
        return None
    content = tokenizer.backend_tokenizer.to_str() if tokenizer.is_fast else json.dumps(sorted(tokenizer.get_vocab()))
    return hashlib.sha256(f"{content} {tokenizer.eos_token_id}".encode()).hexdigest()


def _token_dtype(tokenizer: PreTrainedTokenizerBase) -> np.dtype:
    return np.dtype(np.uint16 if len(tokenizer) <= 2**16 else np.uint32)


def _write_tokens(
    dataset: Dataset | IterableDataset,
    config: BaseConfig,
    tokenizer: PreTrainedTokenizerBase,
    needed: int | None,
    path: Path,
) -> None:
    """Write the documents' tokens, each document followed by EOS, until `needed` are there (None: all)."""

    def tokenize(batch: dict[str, list[str]]) -> dict[str, list[list[int]]]:
        texts = [text for text in batch[config.text_column] if _checked(text, config) is not None]
        ids = tokenizer(texts, add_special_tokens=False)["input_ids"] if texts else []
        return {"tokens": [[*document, tokenizer.eos_token_id] for document in ids]}

    # A Dataset is tokenized by several processes, into the datasets library's own cache; a stream as it is read.
    workers = {"num_proc": os.cpu_count()} if isinstance(dataset, Dataset) else {}
    tokenized = dataset.map(
        tokenize, batched=True, batch_size=BATCH_DOCUMENTS, remove_columns=[config.text_column], **workers
    )
    with open(path, "wb") as file, tqdm(desc="tokenizing (once)", unit=" tokens", unit_scale=True) as bar:
        for batch in tokenized.iter(batch_size=BATCH_DOCUMENTS):
            tokens = np.concatenate([[], *batch["tokens"]]).astype(_token_dtype(tokenizer))
            if needed is not None:
                tokens = tokens[: needed - bar.n]
            tokens.tofile(file)
            bar.update(len(tokens))
            if bar.n == needed:
                break
