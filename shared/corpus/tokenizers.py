"""The tokenizer of a run, and how a document becomes token ids: its text is data, whatever it spells."""

import hashlib
import json
from collections.abc import Iterable, Iterator
from pathlib import Path

import numpy as np
import tokenizers
from tokenizers import decoders, models, pre_tokenizers, trainers
from transformers import AutoTokenizer, PreTrainedTokenizerBase, PreTrainedTokenizerFast
from transformers.utils import cached_file

from shared.config import BaseConfig, UserError

EOS = "<|endoftext|>"
# The default tokenizer is trained on this much of the corpus.
BPE_CHARACTERS = 2**26
# Its words have at most this many bytes. Text without blanks would otherwise be one word, and cost the square of that.
WORD_BYTES = 64
# A longer document is tokenized in pieces, if that is the same: cut at blanks, or else anywhere. Threads share them.
PIECE_CHARACTERS = 2**18


def tokenizer_name(config: BaseConfig) -> str:
    return config.tokenizer or config.init_from or "bpe"


def train_bpe(texts: Iterable[str], vocab_size: int) -> PreTrainedTokenizerFast:
    """A byte-level BPE of `vocab_size` tokens. Raises UserError if the bytes and EOS do not fit."""
    if vocab_size < 257:
        raise UserError(f"--vocab-size {vocab_size}: the bpe tokenizer needs at least 257, for 256 bytes and EOS")

    def head() -> Iterator[str]:
        characters = 0
        for text in texts:
            yield text
            characters += len(text)
            if characters >= BPE_CHARACTERS:
                return

    print(f"training a tokenizer of {vocab_size} tokens on the dataset (once) ...", flush=True)
    tokenizer = tokenizers.Tokenizer(models.BPE())
    words = [pre_tokenizers.ByteLevel(add_prefix_space=False), pre_tokenizers.FixedLength(WORD_BYTES)]
    tokenizer.pre_tokenizer, tokenizer.decoder = pre_tokenizers.Sequence(words), decoders.ByteLevel()
    alphabet = pre_tokenizers.ByteLevel.alphabet()
    trainer = trainers.BpeTrainer(
        vocab_size=vocab_size, min_frequency=2, special_tokens=[EOS], initial_alphabet=alphabet, show_progress=False
    )
    tokenizer.train_from_iterator(head(), trainer)
    return PreTrainedTokenizerFast(tokenizer_object=tokenizer, eos_token=EOS, bos_token=EOS)


def load_tokenizer(name: str) -> PreTrainedTokenizerBase:
    """Raises UserError, with the cause, if there is none, or if it has no token that ends a document."""
    try:
        tokenizer = as_written(name)
    except Exception as error:  # the hub's errors, the network's and those of a malformed id share no base
        raise UserError(f"--tokenizer {name}: {_cause(name, error)}") from error
    if tokenizer.eos_token_id is None:
        raise UserError(f"--tokenizer {name} has no end-of-sequence token, which must separate documents")
    return tokenizer


def as_written(name: str | Path) -> PreTrainedTokenizerBase:
    """A tokenizer whose tokenizer.json, if it has one, is the whole truth: some classes of transformers 5 take only the
    vocabulary from there, and cut text in their own way."""
    tokenizer = AutoTokenizer.from_pretrained(name)
    if type(tokenizer) is PreTrainedTokenizerFast:
        return tokenizer
    try:
        cached_file(name, "tokenizer.json")
    except OSError:
        return tokenizer
    # What else is known to the class only.
    special = {role: token for role, token in tokenizer.special_tokens_map.items() if isinstance(token, str)}
    return PreTrainedTokenizerFast.from_pretrained(name, padding_side=tokenizer.padding_side, **special)


def _cause(name: str, error: Exception) -> str:
    text = " ".join(str(error).split())
    if Path(name).is_dir():
        hint = "no tokenizer that can be read in that directory"
        if (Path(name) / "tokenizer.model").exists():
            hint += ", and for a tokenizer.model alone, pip install sentencepiece protobuf"
    elif "gated" in text.lower():
        hint = f"accept its licence on the hub, and log in (hf auth login) or set HF_TOKEN: {name} is gated"
    else:
        hint = "no such directory, and no id of the hub within reach"
    return f"{hint} ({text[:300]})"


def fingerprint(tokenizer: PreTrainedTokenizerBase) -> str:
    """Of all that decides which ids a text becomes, but for what begins and ends it."""
    if tokenizer.is_fast:
        around = dict.fromkeys(("post_processor", "truncation", "padding"))
        content = json.dumps(json.loads(tokenizer.backend_tokenizer.to_str()) | around)
    else:
        content = json.dumps(sorted(tokenizer.get_vocab()))
    return hashlib.sha256(f"{content} {tokenizer.eos_token_id}".encode()).hexdigest()


def adds_bos(tokenizer: PreTrainedTokenizerBase) -> bool:
    """Whether it begins a text with a BOS by itself."""
    return tokenizer.bos_token_id is not None and tokenizer("a")["input_ids"][0] == tokenizer.bos_token_id


def largest_id(tokenizer: PreTrainedTokenizerBase) -> int:
    """Ids may have gaps: this can be more than their number."""
    return max(tokenizer.eos_token_id, *tokenizer.get_vocab().values())


def check_vocabulary(largest: int, name: str, vocab_size: int) -> None:
    if largest >= vocab_size:
        raise UserError(
            f"the tokenizer ({name}) has ids up to {largest}, but the model's vocabulary only {vocab_size} rows: "
            f"choose another --tokenizer or pass --vocab-size {largest + 1}, which with --init-from adds rows"
        )


class Encoder:
    """Turns documents into ids: BOS where it is asked for, the text, EOS."""

    def __init__(self, tokenizer: PreTrainedTokenizerBase, add_bos: bool | None) -> None:
        """`add_bos` None: as the tokenizer does. Raises UserError if it has none."""
        self.tokenizer, self.eos = tokenizer, tokenizer.eos_token_id
        if add_bos is None:
            add_bos = adds_bos(tokenizer)
        if add_bos and tokenizer.bos_token_id is None:
            raise UserError("--add-bos, but the tokenizer has no token for the beginning of a document")
        self.add_bos, self.prefix = add_bos, [tokenizer.bos_token_id] if add_bos else []
        if tokenizer.is_fast:
            self.backend = tokenizers.Tokenizer.from_str(tokenizer.backend_tokenizer.to_str())
            # Text that spells a special token is text.
            self.backend.encode_special_tokens = True
            self.backend.no_truncation()
            self.backend.no_padding()
        # Not if it puts a blank before what it is given, as Llama 2's does.
        try:
            ids = self._ids(["a b", "a", " b", "a文", "文"])
        except ValueError as error:  # Mistral's own, which have no tokenizer.json
            raise UserError(
                f"--tokenizer cannot take what spells a special token for text, choose another: {error}"
            ) from error
        self.by_pieces = ids[0] == ids[1] + ids[2] and ids[3] == ids[1] + ids[4]

    def encode(self, texts: list[str]) -> list[np.ndarray]:
        """The ids (n,) of each document, int32: no vocabulary is larger."""
        pieces = [list(_pieces(text)) if self.by_pieces else [text] for text in texts]
        ids = iter(self._ids([piece for document in pieces for piece in document]))
        documents = [[*self.prefix, *(i for _ in document for i in next(ids)), self.eos] for document in pieces]
        return [np.array(document, np.int32) for document in documents]

    def _ids(self, texts: list[str]) -> list[list[int]]:
        if self.tokenizer.is_fast:
            return [encoding.ids for encoding in self.backend.encode_batch_fast(texts, add_special_tokens=False)]
        return self.tokenizer(texts, add_special_tokens=False, split_special_tokens=True)["input_ids"]


def _pieces(text: str) -> Iterator[str]:
    """A blank goes with the word that follows it, as in most tokenizers' words."""
    start = 0
    while len(text) - start > PIECE_CHARACTERS:
        blank = text.rfind(" ", start + PIECE_CHARACTERS // 2, start + PIECE_CHARACTERS)
        stop = start + PIECE_CHARACTERS if blank < 0 else blank
        yield text[start:stop]
        start = stop
    yield text[start:]
