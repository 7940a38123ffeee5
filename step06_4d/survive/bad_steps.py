"""Steps that go wrong: their loss or gradient norm is no number, or far above those of the steps before.

One such step can ruin the weights, and AdamW's moments for hundreds of steps after it. All ranks find it together,
before the optimizer steps, and name its sequences, so that someone can look at them.
"""

import math
from collections import deque
from dataclasses import dataclass
from statistics import median
from typing import Any, Literal

import torch
import torch.distributed as dist
from survive.agreement import with_agreement
from torch import Tensor

from shared.config import UserError
from shared.data import GlobalBatches
from shared.ledger import Traffic
from shared.metrics import Metrics, NotFinite

# The last good steps of which a spike is measured against the median, and how many of them there must be.
WINDOW, ENOUGH = 20, 5
# Bad steps in a row that are skipped: after so many, it is not the data.
MOST_IN_A_ROW = 10


@dataclass
class Config:
    """The options of steps that go wrong."""

    # What to do about a step whose loss or gradient norm is NaN or infinite. stop: the run ends. skip: weights and
    # moments stay as they are, and training goes on with the next batch.
    on_bad_step: Literal["stop", "skip"] = "stop"
    # A step is bad as well if its loss or gradient norm is above this many times the median of the last 20 good steps.
    # 0 looks for no such spikes.
    spike_factor: float = 0.0

    def validate(self) -> None:
        super().validate()
        if self.spike_factor != 0 and not 1 < self.spike_factor < math.inf:
            raise UserError(f"--spike-factor {self.spike_factor} must be above 1, for example 3, or 0 for none")

    @property
    def bad_steps_agreed(self) -> bool:
        """Whether ranks talk about each step before the optimizer takes it."""
        return self.on_bad_step == "skip" or self.spike_factor > 0

    def traffic(self, trainer: Any) -> dict[tuple[str, str], Traffic]:
        """Payload per step of a rank: an all-reduce of two floats over all ranks."""
        traffic = super().traffic(trainer)
        return with_agreement(traffic, 2 * torch.float32.itemsize) if self.bad_steps_agreed else traffic


class BadSteps:
    """Decides which steps are bad, the same on every rank, and reports them."""

    def __init__(self, config: Config, batches: GlobalBatches) -> None:
        self.config, self.batches = config, batches
        # (loss, gradient norm) of the last good steps.
        self.good: deque[tuple[float, float]] = deque(maxlen=WINDOW)
        self.trouble, self.in_a_row = "", 0

    def accepts(self, loss: Tensor, grad_norm: Tensor) -> bool:
        """Whether the optimizer may take this step. All-reduces two floats over all ranks, and waits for them.

        All ranks should have the same numbers. But a fault, or the last bit next to a threshold, may be one rank's. If
        it skipped alone, the replicas would drift apart, or wait for each other forever: so all judge the largest.
        With the default options there is nothing to decide here. `log` stops on what is no number, as in step05, at the
        next step that is reported.
        """
        if not self.config.bad_steps_agreed:
            return True
        worst = torch.stack((loss, grad_norm)).float()
        # A maximum may lose a NaN, but no infinity.
        worst = worst.where(worst.isfinite(), math.inf)
        dist.all_reduce(worst, dist.ReduceOp.MAX)
        values = tuple(worst.tolist())
        self.trouble = self._trouble(*values)
        if self.trouble:
            self.in_a_row += 1
        else:
            self.in_a_row = 0
            self.good.append(values)
        return not self.trouble

    def _trouble(self, *values: float) -> str:
        """What is wrong with a loss and gradient norm. Empty if nothing is."""
        found, limits, factor = [], [math.inf, math.inf], self.config.spike_factor
        if factor and len(self.good) >= ENOUGH:
            limits = [factor * median(column) for column in zip(*self.good, strict=True)]
        for name, value, limit in zip(("loss", "gradient norm"), values, limits, strict=True):
            if not math.isfinite(value):
                found.append(f"{name} not a finite number")
            elif value > limit:
                found.append(f"{name} {value:.4g}, above {limit:.4g}, {factor:g} times the median")
        return ", ".join(found)

    def log(self, metrics: Metrics, step: int, loss: Tensor, grad_norm: Tensor, lr: float) -> None:
        """`metrics.log`, if the step was good. Raises UserError if it was not and the run is to stop."""
        trouble, known = self.trouble, True
        if not trouble:
            try:
                return metrics.log(step, loss, grad_norm, lr)
            except NotFinite as error:
                # It may be one of several steps, whose sequences are forgotten.
                trouble, known = error.what, metrics.steps == 1
        sequences = self.batches.indices()
        named = f"; training sequences {sequences}" if known else ""
        if self.config.on_bad_step == "stop":
            raise UserError(
                f"step {step}: {trouble}{named}: lower --lr, raise --warmup-steps, or leave such steps out with "
                "--on-bad-step skip"
            )
        metrics.note(step, f"skipped: {trouble} | sequences {sequences}", skipped=trouble, sequences=sequences)
        if self.in_a_row > MOST_IN_A_ROW:
            raise UserError(
                f"step {step}: {self.in_a_row} bad steps in a row ({trouble}): lower --lr, raise --warmup-steps or "
                "--spike-factor, or go back to an earlier checkpoint"
            )
