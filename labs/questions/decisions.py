"""Decisions: a model, so many GPUs, and a layout to defend. The dry run says whether it fits and what it sends."""

import math
import shlex
from collections.abc import Callable
from dataclasses import replace
from typing import Any, NamedTuple
from unittest.mock import patch

from labs.questions.project import Step, dry_run, pipeline_parallel, train
from shared.config import UserError, parse
from shared.timeline import bubble, simulate

# Of 80 GB, which are 74.5 GiB: kernels, NCCL and fragmentation take the rest.
GIB = 67
NODE = 8


class Verdict(NamedTuple):
    good: bool
    text: str

    def __str__(self) -> str:
        return f"{'yes' if self.good else 'NO ':<4}{self.text}"


class Ranks(NamedTuple):
    """What a layout's first and last rank hold and send."""

    config: Any
    steps: list[Step]

    @property
    def peak(self) -> float:
        """GiB, of the rank that needs most."""
        return max(step.audit.memory.peak for step in self.steps) / 2**30

    def sent(self, axis: str) -> float:
        """GB of payload over an axis per step, of the rank that sends most, by the formula that ledgers are held to."""
        return max(
            sum(t.bytes for (of, kind), t in self._traffic(step).items() if of == axis and kind != "receive") / 1e9
            for step in self.steps
        )

    def _traffic(self, step: Step) -> dict:
        # Of as many micro-batches as there are.
        step.trainer.batches.micro_batches = self.micro_batches
        return self.config.traffic(step.trainer)

    @property
    def micro_batches(self) -> int:
        return self.config.global_batch_size // (self.config.dp * self.config.micro_batch_size)

    @property
    def idle(self) -> float:
        """The pipeline's bubble, simulated."""
        c = self.config
        schedules = (
            pipeline_parallel.make_schedule(c.pp_schedule, stage, c.pp, self.micro_batches, c.virtual_stages)
            for stage in range(c.pp)
        )
        return bubble(simulate(list(schedules)))


class Decision(NamedTuple):
    text: str
    # Options of step06 that are given.
    given: str
    gpus: int
    criteria: Callable[[Ranks], list[Verdict]]

    def judge(self, options: str) -> list[Verdict]:
        """Whether the layout of these options can run, fits, and meets the criteria."""
        try:
            config = parse(train.Config, [*shlex.split(options), *self.given.split(), "--device", "cpu"])
            ranks = self._dry_run(config)
        except UserError as error:
            return [Verdict(False, f"it cannot run: {error}")]
        fits = Verdict(ranks.peak <= GIB, f"fits: {ranks.peak:.1f} GiB at most, of {GIB} that may be taken")
        return [fits, *self.criteria(ranks)]

    def _dry_run(self, config: Any) -> Ranks:
        axes = {"pp": config.pp, "dp": config.dp, "cp": config.cp, "tp": config.tp}
        size = math.prod(axes.values())
        if size != self.gpus:
            raise UserError(f"{' · '.join(f'{axis} {n}' for axis, n in axes.items())} is {size} GPUs, not {self.gpus}")
        each = config.dp * config.micro_batch_size
        if config.global_batch_size % each:
            raise UserError(f"--global-batch-size {config.global_batch_size} is not a multiple of {each}")
        # From so many micro-batches on, more hold no more, and take longer.
        enough = config.pp if config.virtual_stages == 1 else 2 * config.pp
        fewer = replace(config, global_batch_size=each * min(enough, config.global_batch_size // each))
        steps = []
        # Without stages no rank holds more than the first.
        for rank in [0, size - 1] if config.pp > 1 else [0]:
            with dry_run.fake_rank(rank, **axes), patch.object(dry_run.Audit, "report", lambda *found: Step(*found)):
                steps.append(dry_run.audited_step(fewer, train.Trainer))
        return Ranks(config, steps)


def in_node(tp: int) -> Verdict:
    return Verdict(NODE % tp == 0, f"tp {tp} stays within a node of {NODE}")


def at_most(what: str, gigabytes: float, limit: float) -> Verdict:
    return Verdict(
        gigabytes <= limit, f"{what}: a payload of {gigabytes:,.1f} GB per step and rank, at most {limit:,.0f}"
    )


def _dp(ranks: Ranks) -> list[Verdict]:
    others = [axis for axis in ("tp", "pp", "cp") if getattr(ranks.config, axis) > 1]
    return [
        Verdict(not others, f"no axis but dp{': but ' + ', '.join(others) if others else ''}"),
        at_most("dp", ranks.sent("dp"), 64),
    ]


def _tp(ranks: Ranks) -> list[Verdict]:
    tp, pp = ranks.config.tp, ranks.config.pp
    return [
        Verdict(tp > 1 and pp == 1, f"tp {tp} splits the matrices, and pp is {pp}"),
        in_node(tp),
        at_most("dp", ranks.sent("dp"), 250),
        Verdict(True, f"tp: a payload of {ranks.sent('tp'):,.1f} GB per step and rank"),
    ]


def _pp(ranks: Ranks) -> list[Verdict]:
    return [
        Verdict(ranks.config.pp > 1, f"pp {ranks.config.pp}: {ranks.sent('pp'):,.1f} GB per step and rank in messages"),
        in_node(ranks.config.tp),
        Verdict(ranks.idle <= 0.1, f"bubble {ranks.idle:.1%}, at most 10 %"),
    ]


def _cp(ranks: Ranks) -> list[Verdict]:
    return [
        Verdict(ranks.config.cp > 1, f"cp {ranks.config.cp} pieces of a sequence"),
        in_node(ranks.config.tp),
        at_most("cp", ranks.sent("cp"), 160),
    ]


_TRIED = "Options of step06's train.py, such as --dp 8 --zero 1 --recompute full --micro-batch-size 1:"
DECISIONS = {
    "dp": Decision(
        "Llama 3.1 8B, 8 GPUs of 80 GB in a node, bfloat16, 64 sequences of 8,192 tokens per step. By data "
        f"parallelism alone: it has to fit {GIB} GiB, and dp may have a payload of 64 GB per step and rank, 8 bytes "
        f"per parameter. {_TRIED}",
        "--model llama-3.1-8b --seq-len 8192 --global-batch-size 64 --dtype bfloat16",
        8,
        _dp,
    ),
    "tp": Decision(
        "Llama 3.1 70B, 64 GPUs of 80 GB in nodes of 8, bfloat16, 64 sequences of 8,192 tokens per step. With tp and "
        f"without pp: it has to fit {GIB} GiB, tp has to stay within a node, and dp may have a payload of 250 GB per "
        f"step and rank. {_TRIED}",
        "--model llama-3.1-70b --seq-len 8192 --global-batch-size 64 --dtype bfloat16",
        64,
        _tp,
    ),
    "pp": Decision(
        "Llama 3.1 70B, 64 GPUs of 80 GB in nodes of 8, bfloat16, 128 sequences of 8,192 tokens per step. With "
        f"stages: it has to fit {GIB} GiB, tp has to stay within a node, and the bubble may be 10 %. {_TRIED}",
        "--model llama-3.1-70b --seq-len 8192 --global-batch-size 128 --dtype bfloat16",
        64,
        _pp,
    ),
    "cp": Decision(
        "Llama 3.1 8B, 64 GPUs of 80 GB in nodes of 8, bfloat16, 16 sequences of 131,072 tokens per step. With "
        f"sequences in pieces: it has to fit {GIB} GiB, tp has to stay within a node, and cp may have a payload of "
        f"160 GB per step and rank. {_TRIED}",
        "--model llama-3.1-8b --seq-len 131072 --global-batch-size 16 --dtype bfloat16",
        64,
        _cp,
    ),
}
