"""The numbers behind "memory over one step": the live bytes of a small model, operator by operator, in its dry run."""

import contextlib
import dataclasses
import gc
import itertools
import multiprocessing
import os
import sys
from collections.abc import Callable, Iterator
from functools import cache
from pathlib import Path
from typing import Any

import torch

ROOT = Path(__file__).parent.parent
sys.path.append(str(ROOT / "step06_4d"))

import train
from observe import dry_run
from observe.phases import replaced

from shared.config import parse

MODEL = "--num-hidden-layers 2 --hidden-size 64 --intermediate-size 192 --vocab-size 256 --seq-len 128"
# As many sequences for each of four data-parallel ranks, in one micro-batch or in two.
SHARED = f"--device cpu --model tiny --dtype float32 --dp 4 --global-batch-size 8 --micro-batch-size 1 {MODEL}"
CHOICES = {
    "micro-batch": (1, 2),
    "recompute": ("none", "full"),
    "zero": (0, 1, 3),
    "tensor": ("1", "2", "2 and sequence parallel"),
}
KINDS = ("weights", "optimizer", "gradients", "activations and buffers")
# Columns of the picture. Of the operators in one, the one is shown that leaves most.
COLUMNS = 96


def steps() -> dict[str, Any]:
    """Of each choice, bytes by kind along a step of the first rank, and what goes on: `traced`."""
    choices = list(itertools.product(*CHOICES.values()))
    with multiprocessing.get_context("fork").Pool(os.cpu_count(), _start) as pool:
        found = pool.starmap(traced, choices, chunksize=1)
    keys = (" ".join(map(str, choice)) for choice in choices)
    return {"choices": CHOICES, "kinds": KINDS, "steps": dict(zip(keys, found, strict=True))}


def _start() -> None:
    torch.set_num_threads(1)
    # Nothing is freed at another time in the next build.
    gc.disable()


def configuration(micro_batch: int, recompute: str, zero: int, tensor: str) -> train.Config:
    tp, *sequence_parallel = tensor.split(" and ")
    return dataclasses.replace(
        _shared(),
        micro_batch_size=micro_batch,
        recompute=recompute,
        zero=zero,
        tp=int(tp),
        sequence_parallel=bool(sequence_parallel),
    )


@cache
def _shared() -> train.Config:
    return parse(train.Config, SHARED.split())


def traced(*choice: Any) -> dict[str, list]:
    """`phases` are names of what a rank does, each with its first column, and `bytes` of each column those by kind."""
    samples = audited(configuration(*choice))[0].samples
    phases, columns = [], []
    for phase, group in itertools.groupby(samples, key=lambda sample: sample[0]):
        of_phase = [nbytes for _, nbytes in group]
        size = -(-len(of_phase) * COLUMNS // len(samples))
        phases.append([phase, len(columns)])
        columns += [
            max(of_phase[i * len(of_phase) // size : (i + 1) * len(of_phase) // size], key=sum) for i in range(size)
        ]
    return {"phases": phases, "bytes": columns}


def audited(config: train.Config) -> tuple["Traced", Any]:
    """The dry run of a configuration, whose audit has noted each operator, and its trainer.

    Its tensors have numbers: small ones are faster than fake ones, and as large.
    """

    def make_trainer(*args: Any) -> Any:
        trainer = train.Trainer(*args)
        Traced.current.follow(trainer)
        return trainer

    axes = {"pp": config.pp, "dp": config.dp, "cp": config.cp, "tp": config.tp}
    with (
        replaced(dry_run, "Audit", Traced),
        replaced(dry_run, "FakeTensorMode", contextlib.nullcontext),
        dry_run.fake_rank(0, **axes),
    ):
        return dry_run.audited_steps(config, make_trainer)


class Traced(dry_run.Audit):
    """An audit that notes, after each operator of a step, the live bytes by kind."""

    current: "Traced"

    def __init__(self, memory: Any) -> None:
        self.trainer, self.phase = None, ""
        Traced.current = self
        super().__init__(memory)

    def follow(self, trainer: Any) -> None:
        self.trainer = trainer
        pipeline, optimizer = trainer.pipeline, trainer.optimizer
        pipeline._recorded = lambda action: self._during(f"{action.kind} {action.micro_batch}")
        optimizer.step = self._named("optimizer", optimizer.step)

    def _named(self, phase: str, function: Callable) -> Callable:
        def named(*args: Any) -> Any:
            with self._during(phase):
                return function(*args)

        return named

    @contextlib.contextmanager
    def _during(self, phase: str) -> Iterator[None]:
        self.phase = phase
        yield
        self.phase = "reduce, clip" if phase != "optimizer" else "gather"

    def begin_step(self) -> None:
        super().begin_step()
        self.samples: list[tuple[str, list[int]]] = []
        self.phase = "start"
        if self.trainer:
            reducer, state = self.trainer.reducer, self.trainer.optimizer.state.values()
            self.units = getattr(reducer, "units", [])
            self.weights = _keys([*self.trainer.model.parameters(), *(unit.shard for unit in self.units)])
            states = _keys([*reducer.trained, *(value for values in state for value in values.values())])
            self.states = states - self.weights
            self.buckets = [bucket.flat for bucket in getattr(reducer, "buckets", [])]

    def __torch_dispatch__(self, func, types, args=(), kwargs=None) -> Any:  # noqa: ANN001 (torch's own signature)
        out = super().__torch_dispatch__(func, types, args, kwargs)
        if self.trainer:
            self.samples.append((self.phase, self._by_kind()))
        return out

    def _by_kind(self) -> list[int]:
        gradients = [*self.buckets, *(g for unit in self.units for g in (unit.flat_gradient, unit.shard_gradient))]
        kinds = (self.weights, self.states, _keys(gradients))
        found = [sum(self.memory.live.get(key, 0) for key in keys) for keys in kinds]
        return [*found, self.memory.now - sum(found)]


def _keys(tensors: list) -> set[int]:
    return {t.untyped_storage()._cdata for t in tensors if isinstance(t, torch.Tensor)}
