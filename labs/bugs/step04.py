"""Bugs of pipeline parallelism."""

import re
from functools import partial
from types import ModuleType
from typing import Any

from torch import Tensor

from labs.bugs import bug

bug = partial(bug, "step04_pipeline_parallel")


@bug("--pp 2", "pipeline_parallel.py train.py", "factor")
def micro_batch_loss_not_divided(module: ModuleType) -> None:
    """The last stage back-propagates the mean loss of each micro-batch; only the logged one is divided by their
    number."""
    run = module.pipeline_parallel.Pipeline.run

    def wrong(self: Any, batches: list, micro_batch_loss: Any, tokens: int) -> Tensor:
        return run(self, batches, micro_batch_loss, tokens // len(batches)) / len(batches)

    module.pipeline_parallel.Pipeline.run = wrong


@bug("--pp 2", "pipeline_parallel.py train.py", "missing-sum")
def tied_gradients_not_summed(module: ModuleType) -> None:
    """The first and the last stage each keep what they have of a tied embedding's gradient: the copies drift apart."""
    module.pipeline_parallel.Pipeline.sum_tied_gradients = lambda self: None


@bug("--pp 2", "train.py", "missing-sum")
def norm_of_own_stage(module: ModuleType) -> None:
    """The norm is not summed over the stages: each clips by the norm of its own layers, so the gradient turns."""

    def norm_over_ranks(norm: Tensor, group: Any, real: Any = module.tensor_parallel.norm_over_ranks) -> Tensor:
        return norm if group.group_desc.endswith("pp") else real(norm, group)

    module.tensor_parallel.norm_over_ranks = norm_over_ranks


@bug("--pp 2", "pipeline_parallel.py train.py", "weights")
def stages_start_alike(module: ModuleType) -> None:
    """Each stage numbers its layers from 0 when it draws their weights, so all stages draw the same."""

    def materialize(model: Any, weights: Any, *args: Any, real: Any = module.materialize) -> None:
        first = min(map(int, model.model.layers))
        real(model, lambda name: weights(re.sub(r"\d+", lambda i: str(int(i[0]) - first), name)), *args)

    module.materialize = materialize


@bug("--pp 2 --pp-schedule afab", "pipeline_parallel.py channels.py", "lost")
def activations_overwritten(module: ModuleType) -> None:
    """All activations arrive in the same buffer, and by the time of backward it holds those of a later micro-batch."""

    def start(self: Any, messages: int, new_buffer: Any, real: Any = module.pipeline_parallel.Channel.start) -> None:
        buffer = new_buffer()
        real(self, messages, buffer.detach)

    module.pipeline_parallel.Channel.start = start


@bug("--pp 2 --pp-schedule afab", "schedules.py", "order")
def gradients_in_reverse(module: ModuleType) -> None:
    """The last stage goes through its backwards from the last micro-batch to the first, and the other from the first
    on: each gradient is taken for another micro-batch's."""

    def schedule(
        name: str, stage: int, stages: int, *args: Any, real: Any = module.pipeline_parallel.make_schedule
    ) -> list:
        actions = real(name, stage, stages, *args)
        backwards = [action for action in actions if action.kind == "backward"]
        if stage == stages - 1:
            backwards.reverse()
        return [action for action in actions if action.kind == "forward"] + backwards

    module.pipeline_parallel.make_schedule = schedule
