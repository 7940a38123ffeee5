"""Small data sets, and what their corpora hold."""

import json
from itertools import pairwise
from pathlib import Path

import numpy as np
import pyarrow
import pyarrow.parquet
import tokenizers
from tokenizers import models, pre_tokenizers
from transformers import PreTrainedTokenizerFast

from shared.config import BaseConfig
from shared.corpus import Corpus, Source, prepare_corpus

TEXTS = [f"document {i} of many, with {i * i} in it" for i in range(60)]


def make_config(**overrides):
    """Options of a small run. `dataset` may be one name."""
    if isinstance(dataset := overrides.get("dataset", ()), str | Path):
        overrides["dataset"] = (str(dataset),)
    elif not dataset:
        overrides.pop("dataset", None)
    return BaseConfig(**{"seq_len": 8, "global_batch_size": 6, "micro_batch_size": 3} | overrides)


def prepared(dataset: object, vocab_size: int = 300, **overrides: object) -> Corpus:
    return prepare_corpus(make_config(dataset=dataset, **overrides), vocab_size)


def source(dataset: object, **overrides: object) -> Source:
    return prepared(dataset, **overrides).sources[0]


def all_tokens(corpus: Corpus) -> np.ndarray:
    tokens = corpus.sources[0].tokens
    return tokens[0 : len(tokens)]


def documents(corpus: Corpus) -> list[str]:
    """Their texts, by the index; special tokens included."""
    tokens = corpus.sources[0].tokens
    begins = [*tokens.begins(0, len(tokens)), len(tokens)]
    return [corpus.tokenizer.decode(tokens[a:b]) for a, b in pairwise(begins)]


def with_eos(texts: list[str]) -> list[str]:
    return [text + "<|endoftext|>" for text in texts]


def write_rows(path: Path, texts: list) -> Path:
    path.write_text("".join(json.dumps({"text": text, "id": 1}) + "\n" for text in texts))
    return path


def write(directory: Path, kind: str) -> Path:
    """TEXTS as a data set of each kind."""
    if kind == "txt":
        for i, text in enumerate(TEXTS):
            (directory / f"{i:02}.txt").write_text(text)
    elif kind == "jsonl":
        write_rows(directory / "data.jsonl", TEXTS)
    elif kind == "json":
        (directory / "data.json").write_text(json.dumps([{"text": text} for text in TEXTS]))
    elif kind == "csv":
        rows = "".join(f'{i},"{text}"\n' for i, text in enumerate(TEXTS))
        (directory / "data.csv").write_text("id,text\n" + rows)
    elif kind == "parquet":
        for part in (0, 1):
            table = pyarrow.table({"text": TEXTS[part::2], "id": list(range(30))})
            pyarrow.parquet.write_table(table, directory / f"{part}.parquet")
    return directory


def save_tokenizer(directory: Path, eos_id: int | None = None, template: bool = False) -> str:
    """Of bytes, whose EOS has this id, and that begins texts with a BOS."""
    alphabet = sorted(pre_tokenizers.ByteLevel.alphabet())
    vocabulary = {character: i for i, character in enumerate(alphabet)} | {"<eos>": eos_id or 256, "<bos>": 257}
    tokenizer = tokenizers.Tokenizer(models.BPE(vocabulary, []))
    tokenizer.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    tokenizer.decoder = tokenizers.decoders.ByteLevel()
    if template:
        tokenizer.post_processor = tokenizers.processors.TemplateProcessing("<bos> $A", None, [("<bos>", 257)])
    PreTrainedTokenizerFast(tokenizer_object=tokenizer, eos_token="<eos>", bos_token="<bos>").save_pretrained(directory)
    return str(directory)
