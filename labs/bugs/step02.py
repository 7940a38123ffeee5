"""Bugs of data parallelism."""

from functools import partial
from types import ModuleType
from typing import Any

import torch
import torch.distributed as dist
from torch import Tensor

from labs.bugs import bug

bug = partial(bug, "step02_data_parallel")


@bug("", "data_parallel.py", "factor")
def averaged_twice(module: ModuleType) -> None:
    """The loss is divided by the global batch already, and the gradients are divided by the ranks again."""
    all_reduce = dist.all_reduce

    def mean(tensor: Tensor, *args: Any, **kwargs: Any) -> Any:
        # Not the loss, which is only logged, nor checksums.
        if tensor.ndim and tensor.is_floating_point():
            tensor /= dist.get_world_size()
        return all_reduce(tensor, *args, **kwargs)

    dist.all_reduce = mean


@bug("--dp-engine naive", "data_parallel.py", "missing-sum")
def parameter_reduced_instead_of_gradient(module: ModuleType) -> None:
    """The hook that runs after a gradient is complete receives the parameter, and that is what gets reduced."""

    def finish(self: Any) -> None:
        with torch.no_grad():
            for parameter in self.parameters:
                dist.all_reduce(parameter, group=self.group)
                parameter /= dist.get_world_size()

    module.data_parallel.Reducer.finish = finish


@bug("--dp-engine naive", "data_parallel.py", "missing-sum lost")
def only_the_last_micro_batch(module: ModuleType) -> None:
    """Only what the last micro-batch contributes is reduced; the sums over earlier ones stay local."""
    earlier = []

    def micro_batch_loss(config: Any, model: Any, batch: Any, loss: Any = module.micro_batch_loss) -> Tensor:
        # Until the next one overwrites it: the gradients without the last micro-batch.
        earlier[:] = [None if p.grad is None else p.grad.clone() for p in model.parameters()]
        return loss(config, model, batch)

    def finish(self: Any) -> None:
        for parameter, before in zip(self.parameters, earlier, strict=True):
            last = parameter.grad - before
            dist.all_reduce(last, group=self.group)
            parameter.grad = before + last

    module.micro_batch_loss = micro_batch_loss
    module.data_parallel.Reducer.finish = finish


@bug("", "data_parallel.py", "order missing-sum")
def reduced_after_the_first_micro_batch(module: ModuleType) -> None:
    """A bucket leaves as soon as each of its gradients has arrived once: what later micro-batches add stays local."""
    reducer = module.data_parallel.BucketedReducer

    def launch(self: Any, launch: Any = reducer._launch) -> None:
        launch(self)
        # Or the next micro-batch would add to numbers on their way, with another result each time.
        self.works[-1].wait()

    reducer.start = lambda self, micro_batches, start=reducer.start: start(self, 1)
    reducer._launch = launch


@bug("--dp-engine naive", "train.py", "order")
def clipped_before_reduction(module: ModuleType) -> None:
    """Each rank clips by the norm of its own gradients, and the clipped ones are summed."""
    reduce = module.data_parallel.Reducer.finish

    def finish(self: Any) -> None:
        torch.nn.utils.clip_grad_norm_(self.parameters, 0.5)
        reduce(self)

    module.data_parallel.Reducer.finish = finish


class Scaled(torch.autograd.Function):
    """The value as it is, its gradient times a factor."""

    @staticmethod
    def forward(ctx: Any, value: Tensor, factor: float) -> Tensor:
        ctx.factor = factor
        return value.clone()

    @staticmethod
    def backward(ctx: Any, grad: Tensor) -> tuple[Tensor, None]:
        return grad * ctx.factor, None


def scale_gradients(module: ModuleType, factor_of: Any) -> None:
    loss = module.micro_batch_loss
    module.micro_batch_loss = lambda config, *args: Scaled.apply(loss(config, *args), factor_of(config))


@bug("", "train.py", "factor")
def micro_batch_mean_not_divided(module: ModuleType) -> None:
    """Backward runs on each micro-batch's own mean loss; only the logged loss is divided by their number."""
    scale_gradients(module, lambda config: config.global_batch_size // config.micro_batch_size)


@bug("", "train.py", "factor")
def loss_never_divided(module: ModuleType) -> None:
    """Backward runs on the loss summed over all tokens; only the logged loss is divided by their number."""
    scale_gradients(module, lambda config: config.global_batch_size * config.seq_len)


@bug("", "train.py", "tokens")
def same_sequences_on_all_ranks(module: ModuleType) -> None:
    """Every rank reads the share of rank 0, as with a sampler that nobody has told the rank: half of each batch is
    never seen, and the other half counts twice."""

    class GlobalBatches(module.data.GlobalBatches):
        def __init__(self, sequences: Any, config: Any, rank: int, size: int) -> None:
            super().__init__(sequences, config, 0, size)

    module.data.GlobalBatches = GlobalBatches


@bug("--dp-engine naive", "train.py", "lost order")
def gradients_of_the_step_before(module: ModuleType) -> None:
    """Nobody sets the gradients to zero after a step: each step adds its own to those of all steps before."""

    def init(trainer: Any, *args: Any, real: Any = module.Trainer.__init__) -> None:
        real(trainer, *args)
        trainer.optimizer.zero_grad = lambda: None

    module.Trainer.__init__ = init


@bug("--dp-engine naive", "data_parallel.py", "rounding")
def reduced_in_bfloat16(module: ModuleType) -> None:
    """Gradients travel, and are summed, in bfloat16, whose numbers have 8 bits, though the parameters are exact."""

    def finish(self: Any) -> None:
        for parameter in self.parameters:
            short = parameter.grad.bfloat16()
            dist.all_reduce(short, group=self.group)
            parameter.grad.copy_(short)

    module.data_parallel.Reducer.finish = finish
