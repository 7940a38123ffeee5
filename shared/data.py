"""Tokens -> sequences -> global batches. The whole state is one number: sequences consumed."""

from functools import lru_cache
from typing import NamedTuple

import numpy as np
import torch
from torch import Tensor

from shared.config import BaseConfig, UserError

# One sequence in this many is held out for validation: the end of the corpus.
HELD_OUT = 100


class Batch(NamedTuple):
    """A micro-batch: (b, s) int64 each. `labels` are the tokens that follow `input_ids`."""

    input_ids: Tensor
    labels: Tensor
    position_ids: Tensor

    def to(self, device: torch.device) -> "Batch":
        return Batch(*(tensor.to(device, non_blocking=True) for tensor in self))


class Sequences:
    """Sequences of seq_len + 1 tokens, cut from a token array (n,). Each starts at the last token of the one before,
    so every token but the first is predicted once."""

    def __init__(self, tokens: np.ndarray, seq_len: int) -> None:
        self.tokens, self.seq_len = tokens, seq_len

    def __len__(self) -> int:
        return (len(self.tokens) - 1) // self.seq_len

    def __getitem__(self, i: int) -> np.ndarray:
        return self.tokens[i * self.seq_len : (i + 1) * self.seq_len + 1]


def tokens_needed(config: BaseConfig) -> int:
    """Size of a corpus that lasts a run for exactly one epoch, held-out sequences included."""
    trained = config.steps * config.global_batch_size
    return (trained + max(trained // (HELD_OUT - 1) + 1, config.global_batch_size)) * config.seq_len + 1


def split_corpus(tokens: np.ndarray, config: BaseConfig) -> tuple[Sequences, Sequences]:
    """The training sequences and the held-out ones. Raises UserError if either cannot fill a global batch."""
    total = len(Sequences(tokens, config.seq_len))
    held_out = min(max(total // HELD_OUT, config.global_batch_size), total)
    boundary = (total - held_out) * config.seq_len
    train, validation = Sequences(tokens[: boundary + 1], config.seq_len), Sequences(tokens[boundary:], config.seq_len)
    if len(train) < config.global_batch_size:
        raise UserError(
            f"--dataset {config.dataset} is too small: its {len(tokens)} tokens make {total} sequences of "
            f"{config.seq_len}, but a global batch takes {config.global_batch_size} and as many are held out: "
            "lower --seq-len or --global-batch-size"
        )
    return train, validation


@lru_cache(maxsize=4)
def _order(n: int, seed: int, epoch: int) -> np.ndarray:
    # RandomState, because numpy promises that its stream never changes: a run can be resumed under any version.
    return np.random.RandomState([seed, epoch]).permutation(n)


class GlobalBatches:
    """Endless global batches in an order shuffled anew each epoch, which depends on nothing but the seed.

    `consumed` counts sequences of the whole run. Rank `rank` of `size` gets its contiguous share of each global batch,
    in micro-batches: however it is shared, a step sees the same sequences. Raises UserError if that does not divide.
    """

    def __init__(self, sequences: Sequences, config: BaseConfig, rank: int, size: int, consumed: int = 0) -> None:
        self.sequences, self.consumed, self.seed = sequences, consumed, config.seed
        self.global_batch_size, self.micro_batch_size = config.global_batch_size, config.micro_batch_size
        self.rank, self.size = rank, size
        self.micro_batches = config.global_batch_size // (size * config.micro_batch_size)
        # Of a micro-batch, on this rank.
        self.tokens = config.micro_batch_size * sequences.seq_len
        if config.global_batch_size % (size * config.micro_batch_size):
            raise UserError(
                f"--global-batch-size {config.global_batch_size} is not a multiple of {size} data-parallel ranks times "
                f"--micro-batch-size {config.micro_batch_size}"
            )

    def next(self) -> list[Batch]:
        """The micro-batches of this rank's share of the next global batch, on the CPU."""
        share = self.global_batch_size // self.size
        first = self.consumed + self.rank * share
        rows = torch.from_numpy(np.stack([self._sequence(i) for i in range(first, first + share)]).astype(np.int64))
        self.consumed += self.global_batch_size
        positions = torch.arange(self.sequences.seq_len).expand(self.micro_batch_size, -1)
        return [Batch(micro[:, :-1], micro[:, 1:], positions) for micro in rows.split(self.micro_batch_size)]

    def indices(self) -> list[int]:
        """Which of `sequences` the last global batch took, over all ranks."""
        return [self._index(i) for i in range(self.consumed - self.global_batch_size, self.consumed)]

    def _sequence(self, i: int) -> np.ndarray:
        return self.sequences[self._index(i)]

    def _index(self, i: int) -> int:
        epoch, position = divmod(i, len(self.sequences))
        return int(_order(len(self.sequences), self.seed, epoch)[position])
