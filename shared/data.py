"""Tokens -> sequences -> global batches. The whole state is one number: sequences consumed."""

from concurrent.futures import Future, ThreadPoolExecutor
from fractions import Fraction
from math import lcm
from typing import TYPE_CHECKING, NamedTuple

import numpy as np
import torch
from torch import Tensor

from shared.config import BaseConfig, UserError

if TYPE_CHECKING:
    from shared.corpus.corpus import Corpus, Source, Tokens

# One sequence in this many is held out for validation.
HELD_OUT = 100
# Sequences after which a mixture repeats which source comes next.
LONGEST_PERIOD = 10**5


class Batch(NamedTuple):
    """A micro-batch: (b, s) int64 each. `labels` are the tokens that follow `input_ids`."""

    input_ids: Tensor
    labels: Tensor
    position_ids: Tensor

    def to(self, device: torch.device) -> "Batch":
        return Batch(*(tensor.to(device, non_blocking=True) for tensor in self))

    def pin_memory(self) -> "Batch":
        return Batch(*(tensor.pin_memory() for tensor in self))


class Sequences:
    """Sequences of seq_len + 1 tokens, cut from the tokens from `start` to `stop`. Each starts at the last token of the
    one before, so every token but the first is predicted once."""

    def __init__(
        self, tokens: "Tokens", seq_len: int, start: int = 0, stop: int | None = None, in_order: bool = False
    ) -> None:
        self.tokens, self.seq_len, self.start = tokens, seq_len, start
        self.stop = len(tokens) if stop is None else stop
        # Whether the first epoch takes them in the order in which they are: their source is shuffled, and may grow.
        self.in_order = in_order

    def __len__(self) -> int:
        return max(self.stop - self.start - 1, 0) // self.seq_len

    def __getitem__(self, i: int) -> np.ndarray:
        first = self.start + i * self.seq_len
        return self.tokens[first : first + self.seq_len + 1]

    def document_begins(self, i: int) -> np.ndarray:
        """Positions in the i-th sequence, from 1 to seq_len, at which a document begins."""
        first = self.start + i * self.seq_len
        return self.tokens.begins(first + 1, first + self.seq_len + 1) - first

    def index(self, i: int, seed: int) -> int:
        """The i-th sequence in the order of training, which goes on for ever: each epoch is shuffled anew."""
        epoch, i = divmod(i, len(self))
        return i if self.in_order and epoch == 0 else shuffled(i, len(self), seed, epoch)


def shuffled(i: int, n: int, *seeds: int) -> int:
    """Where a pseudorandom permutation of range(n) sends i. It takes no memory, whatever n is.

    A Feistel network permutes the numbers of 2k bits, for any function of k bits (Luby and Rackoff 1988). What it sends
    beyond n is sent on until it comes back (cycle walking, Black and Rogaway 2002).
    """
    bits = max(((n - 1).bit_length() + 1) // 2, 1)
    mask, key = (1 << bits) - 1, _mixed(*seeds)
    while True:
        left, right = i >> bits, i & mask
        for round_ in range(6):
            left, right = right, left ^ (_mixed(key, round_, right) & mask)
        i = left << bits | right
        if i < n:
            return i


def _mixed(*numbers: int) -> int:
    """64 bits that look random, and depend on each number (SplitMix64, Steele et al. 2014)."""
    x = 0
    for number in numbers:
        x = (x ^ number) + 0x9E3779B97F4A7C15 & 0xFFFFFFFFFFFFFFFF
        x = (x ^ x >> 30) * 0xBF58476D1CE4E5B9 & 0xFFFFFFFFFFFFFFFF
        x = (x ^ x >> 27) * 0x94D049BB133111EB & 0xFFFFFFFFFFFFFFFF
        x ^= x >> 31
    return x


class Mixture:
    """Sequences of several sources, in proportion to their shares. After any number of them, each source is less than
    one sequence away from its share."""

    def __init__(self, sources: list[Sequences], shares: list[float]) -> None:
        self.sources = sources
        # As they were written: 0.1 is a tenth.
        fractions = [Fraction(str(share)) for share in shares]
        parts = [fraction / sum(fractions) for fraction in fractions]
        self.period = lcm(*(part.denominator for part in parts))
        if self.period > LONGEST_PERIOD:
            raise UserError(f"--dataset: shares {shares} repeat only after {self.period} sequences: give fewer digits")
        self.counts = [int(part * self.period) for part in parts]
        # The source of each sequence of a period, and how many of that source come before it there.
        self.order = _interleaved(self.counts, self.period)

    def __len__(self) -> int:
        return sum(map(len, self.sources))

    def locate(self, i: int, seed: int) -> tuple[Sequences, int]:
        """The i-th sequence of training: its source, and its index there."""
        periods, i = divmod(i, self.period)
        source, before = self.order[i]
        sequences = self.sources[source]
        return sequences, sequences.index(periods * self.counts[source] + before, seed)


def _interleaved(counts: list[int], period: int) -> list[tuple[int, int]]:
    """Earliest deadline first: the j-th of a source with count c is due from ⌊j period / c⌋ to ⌈(j + 1) period / c⌉,
    which can always be met (Baruah et al. 1996, proportionate progress)."""
    order, taken = [], [0] * len(counts)
    for i in range(period):
        due = [s for s, count in enumerate(counts) if taken[s] * period < (i + 1) * count]
        source = min(due, key=lambda s: -(-(taken[s] + 1) * period // counts[s]))
        order.append((source, taken[source]))
        taken[source] += 1
    return order


def held_out_tokens(config: BaseConfig) -> int:
    """Tokens that a run holds out of a stream, of which it cannot know the end."""
    trained = config.steps * config.global_batch_size
    return max(trained // (HELD_OUT - 1) + 1, config.global_batch_size) * config.seq_len


def split_corpus(corpus: "Corpus", config: BaseConfig) -> tuple[Mixture, dict[str, Mixture]]:
    """The training sequences, and by source those for validation: what is held out of it, or --validation-dataset.

    Raises UserError if one of them cannot fill a global batch.
    """
    train, held_out = [], {}
    for source in corpus.validation:
        held_out[source.name] = Sequences(source.tokens, config.seq_len, in_order=source.held_out is not None)
    for source in corpus.sources:
        sequences, rest = _split_source(source, config, hold_out=not corpus.validation)
        train.append(sequences)
        if not corpus.validation:
            held_out[source.name] = rest
            if len(rest) < config.global_batch_size and source.held_out is not None:
                raise UserError(
                    f"--dataset {source.name}: of this stream its first run has held out {source.held_out} tokens, and "
                    f"an evaluation takes {config.global_batch_size} · {config.seq_len}: name a --validation-dataset, "
                    "another --seed, or lower --global-batch-size or --seq-len"
                )
        if len(sequences) < config.global_batch_size:
            raise _too_small("--dataset", source, config, "" if corpus.validation else ", and as many are held out")
    for source in corpus.validation:
        if len(held_out[source.name]) < config.global_batch_size:
            raise _too_small("--validation-dataset", source, config, ", which an evaluation needs")
    return Mixture(train, [s.share for s in corpus.sources]), {n: Mixture([s], [1]) for n, s in held_out.items()}


def _split_source(source: "Source", config: BaseConfig, hold_out: bool) -> tuple[Sequences, Sequences]:
    """Its training sequences, and those that are held out: the end of the source, or the front of a stream."""
    whole = Sequences(source.tokens, config.seq_len)
    if source.held_out is not None:
        # Held out for good. A --validation-dataset that is named later must not change the order.
        train = Sequences(source.tokens, config.seq_len, source.held_out, in_order=True)
        held_out = Sequences(source.tokens, config.seq_len, 0, source.held_out + 1)
    elif not hold_out:
        return whole, Sequences(source.tokens, config.seq_len, 0, 0)
    else:
        kept = len(whole) - min(max(len(whole) // HELD_OUT, config.global_batch_size), len(whole))
        train = Sequences(source.tokens, config.seq_len, 0, kept * config.seq_len + 1)
        held_out = Sequences(source.tokens, config.seq_len, kept * config.seq_len, len(whole) * config.seq_len + 1)
    return train, held_out


def _too_small(option: str, source: "Source", config: BaseConfig, why: str) -> UserError:
    total = len(Sequences(source.tokens, config.seq_len))
    return UserError(
        f"{option} {source.name} is too small: its {len(source.tokens)} tokens make {total} sequences of "
        f"{config.seq_len}, but a global batch takes {config.global_batch_size}{why}: lower --seq-len or "
        "--global-batch-size"
    )


class GlobalBatches:
    """Endless global batches in an order that depends on nothing but the seed.

    `consumed` counts sequences of the whole run. Rank `rank` of `size` gets its contiguous share of each global batch,
    in micro-batches: however it is shared, a step sees the same sequences. Raises UserError if that does not divide.
    """

    def __init__(self, sequences: Mixture, config: BaseConfig, rank: int, size: int) -> None:
        self.sequences, self.consumed, self.seed = sequences, 0, config.seed
        self.global_batch_size, self.micro_batch_size = config.global_batch_size, config.micro_batch_size
        self.rank, self.size = rank, size
        # Of a sequence's tokens, those that are read.
        self.positions = torch.arange(config.seq_len)
        self.micro_batches = config.global_batch_size // (size * config.micro_batch_size)
        if config.global_batch_size % (size * config.micro_batch_size):
            raise UserError(
                f"--global-batch-size {config.global_batch_size} is not a multiple of {size} data-parallel ranks times "
                f"--micro-batch-size {config.micro_batch_size}: change one of the two"
            )
        # From pinned memory a GPU copies while the CPU goes on.
        self.pinned = config.device != "cpu" and torch.cuda.is_available()
        # A new thread would be at the first GPU, whichever is this process's.
        self.there = (torch.cuda.set_device, (torch.cuda.current_device(),)) if self.pinned else ()
        self.ahead: tuple[int, Future] | None = None

    @property
    def tokens(self) -> int:
        """Of a micro-batch, on this rank."""
        return self.micro_batch_size * len(self.positions)

    def next(self) -> list[Batch]:
        """The micro-batches of this rank's share of the next global batch, on the CPU.

        While a step trains on them, a thread makes the next ones, from the one number that is the state.
        """
        at, ahead = self.ahead or (None, None)
        batches = ahead.result() if at == self.consumed else self.make(self.consumed)
        self.consumed += self.global_batch_size
        thread = ThreadPoolExecutor(1, "batches", *self.there)
        self.ahead = (self.consumed, thread.submit(self.make, self.consumed))
        # It ends with its batch. A process that is forked later must not find a thread.
        thread.shutdown(wait=False)
        return batches

    def make(self, consumed: int) -> list[Batch]:
        """The micro-batches of the global batch that follows `consumed` sequences."""
        share, each = self.global_batch_size // self.size, self.micro_batch_size
        first = consumed + self.rank * share
        batches = [self.micro_batch(range(i, i + each)) for i in range(first, first + share, each)]
        return [batch.pin_memory() for batch in batches] if self.pinned else batches

    def micro_batch(self, places: range) -> Batch:
        """The sequences at these places in the order of training. Reads of each what this rank needs."""
        located = [self.sequences.locate(i, self.seed) for i in places]
        # One token more, for the labels.
        rows = [sequences[i] for sequences, i in located]
        input_ids, labels = (
            torch.from_numpy(np.stack([row[self.positions.numpy() + shift] for row in rows]).astype(np.int64))
            for shift in (0, 1)
        )
        return Batch(input_ids, labels, self.positions.repeat(len(places), 1))

    def indices(self) -> list[int | tuple[int, int]]:
        """Which sequences the last global batch took, over all ranks; of several sources, with the number of each."""
        places = range(self.consumed - self.global_batch_size, self.consumed)
        located = [self.sequences.locate(i, self.seed) for i in places]
        if len(self.sequences.sources) == 1:
            return [i for _, i in located]
        return [(self.sequences.sources.index(sequences), i) for sequences, i in located]
