"""What the project's code says: of a training step, which one rank runs without the others, and of a drawn model.

It is step06 that is run. Without its options it is each earlier step, bit for bit.
"""

import sys
from collections.abc import Iterator
from contextlib import contextmanager, nullcontext
from functools import cache
from random import Random
from typing import Any, NamedTuple
from unittest.mock import patch

from torch.distributed.device_mesh import DeviceMesh

from labs import ROOT
from shared import distributed
from shared.ledger import Traffic

# step06 imports its files by plain name, as when it is run as a script.
sys.path.insert(0, str(ROOT / "step06_4d"))
import context_parallel  # noqa: F401
import pipeline_parallel  # noqa: F401
import tensor_parallel  # noqa: F401
import train
from context import fused_attention  # noqa: F401
from observe import dry_run

sys.path.remove(str(ROOT / "step06_4d"))


class Model(NamedTuple):
    """The sizes of a Llama whose embedding and head are two matrices."""

    layers: int
    h: int
    f: int
    heads: int
    kv_heads: int
    d: int
    vocab: int

    def __str__(self) -> str:
        return (
            f"A Llama has L = {self.layers} layers of hidden size h = {self.h}, an MLP of f = {self.f} columns, H = "
            f"{self.heads} query heads and K = {self.kv_heads} key-value heads of d = {self.d}, a vocabulary of V = "
            f"{self.vocab}, and an embedding of its own besides the head."
        )

    @property
    def options(self) -> dict[str, int | bool]:
        return {
            "num_hidden_layers": self.layers,
            "hidden_size": self.h,
            "intermediate_size": self.f,
            "num_attention_heads": self.heads,
            "num_key_value_heads": self.kv_heads,
            "vocab_size": self.vocab,
            "tie_word_embeddings": False,
        }

    @property
    def matrices_of_layer(self) -> int:
        return 2 * self.h * (self.heads + self.kv_heads) * self.d + 3 * self.h * self.f

    @property
    def matrices(self) -> int:
        """Numbers in all matrices, with embedding and head."""
        return self.layers * self.matrices_of_layer + 2 * self.vocab * self.h

    @property
    def norms(self) -> int:
        return (2 * self.layers + 1) * self.h

    @property
    def parameters(self) -> int:
        return self.matrices + self.norms


def draw_model(draw: Random, layers: tuple[int, ...] = (1, 2), kv_heads: tuple[int, ...] = (2, 4)) -> Model:
    """Of a size at which a step takes a moment."""
    heads, d = draw.choice((4, 8)), draw.choice((8, 16, 32))
    f, vocab = 32 * draw.randint(2, 16), 64 * draw.randint(4, 16)
    return Model(draw.choice(layers), heads * d, f, heads, draw.choice(kv_heads), d, vocab)


class Batches(NamedTuple):
    """What a rank sees of a step: m micro-batches of b sequences of s tokens."""

    m: int
    b: int
    s: int

    def __str__(self) -> str:
        return f"m = {self.m} micro-batches of b = {self.b} sequences of s = {self.s} tokens"

    def options(self, dp: int = 1) -> dict[str, int]:
        return {
            "dp": dp,
            "global_batch_size": dp * self.m * self.b,
            "micro_batch_size": self.b,
            "seq_len": self.s,
        }


def draw_batches(draw: Random, m: tuple[int, ...] = (1, 2), s: tuple[int, ...] = (32, 64)) -> Batches:
    return Batches(draw.choice(m), draw.choice((1, 2, 4)), draw.choice(s))


class Step(NamedTuple):
    """A training step of one rank whose other ranks do not exist: what it held, computed and sent."""

    audit: Any
    trainer: Any

    def sent(self, axis: str, kind: str) -> Traffic:
        """Calls and bytes of payload, as the ledger counted them."""
        return self.audit.ledger.counts[axis, kind]

    @property
    def kept(self) -> int:
        """Bytes that live between two steps."""
        return self.audit.static

    @property
    def activations(self) -> int:
        """Bytes that come on top when most is alive."""
        return self.audit.memory.peak - self.kept

    @property
    def parameters(self) -> int:
        return sum(p.numel() for p in self.trainer.model.parameters())


@contextmanager
def on_mesh(rank: int, **axes: int) -> Iterator[DeviceMesh]:
    """Be that rank of a mesh whose other ranks do not exist."""
    with dry_run.fake_rank(rank, **axes):
        yield distributed.start_mesh()[0]


@cache
def step(rank: int = 0, **options: object) -> Step:
    """The step of a rank of the mesh (pp, dp, cp, tp) with these options of step06's train.py."""
    config = train.Config(**{"device": "cpu", "dtype": "float32", "dp": 1} | options)
    config.validate()
    axes = {"pp": config.pp, "dp": config.dp, "cp": config.cp, "tp": config.tp}
    with (
        dry_run.fake_rank(rank, **axes),
        # On small tensors, which have numbers: faster than on fake ones.
        patch.object(dry_run, "FakeTensorMode", nullcontext),
        patch.object(dry_run.Audit, "report", lambda *found: Step(*found)),
    ):
        return dry_run.audited_step(config, train.Trainer)
