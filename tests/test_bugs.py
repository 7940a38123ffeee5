"""Bugs that still train: put back into step02, each passes the eye test and fails the parity check.

The bugs are real, found in other people's trainers; tests/README.md tells the story of each.
"""

import parity
import pytest
import torch
import torch.distributed as dist
from ranks import run_ranks

RANKS = 2


def averaged_twice(module):
    """The loss is divided by the global batch already, and the gradients are divided by the ranks again."""
    all_reduce = dist.all_reduce

    def mean(tensor, *args, **kwargs):
        if tensor.ndim:  # Not the loss, which is only logged.
            tensor /= RANKS
        return all_reduce(tensor, *args, **kwargs)

    dist.all_reduce = mean


def parameter_reduced_instead_of_gradient(module):
    """The hook that runs after a gradient is complete receives the parameter, and that is what gets reduced."""

    def finish(self):
        with torch.no_grad():
            for parameter in self.parameters:
                dist.all_reduce(parameter, group=self.group)
                parameter /= RANKS

    module.data_parallel.Reducer.finish = finish


def only_the_last_micro_batch(module):
    """Only what the last micro-batch contributes is reduced; the sums over earlier ones stay local."""
    earlier = []

    def micro_batch_loss(config, model, batch, loss=module.micro_batch_loss):
        # Until the next one overwrites it: the gradients without the last micro-batch.
        earlier[:] = [None if p.grad is None else p.grad.clone() for p in model.parameters()]
        return loss(config, model, batch)

    def finish(self):
        for parameter, before in zip(self.parameters, earlier, strict=True):
            last = parameter.grad - before
            dist.all_reduce(last, group=self.group)
            parameter.grad = before + last

    module.micro_batch_loss = micro_batch_loss
    module.data_parallel.Reducer.finish = finish


def clipped_before_reduction(module):
    """Each rank clips by the norm of its own gradients, and the clipped ones are summed."""
    reduce = module.data_parallel.Reducer.finish

    def finish(self):
        torch.nn.utils.clip_grad_norm_(self.parameters, 0.5)
        reduce(self)

    module.data_parallel.Reducer.finish = finish


class Scaled(torch.autograd.Function):
    """The value as it is, its gradient times a factor."""

    @staticmethod
    def forward(ctx, value, factor):
        ctx.factor = factor
        return value.clone()

    @staticmethod
    def backward(ctx, grad):
        return grad * ctx.factor, None


def scale_gradients(module, factor):
    loss = module.micro_batch_loss
    module.micro_batch_loss = lambda *args: Scaled.apply(loss(*args), factor)


def micro_batch_mean_not_divided(module):
    """Backward runs on each micro-batch's own mean loss; only the logged loss is divided by their number."""
    scale_gradients(module, 4)


def loss_never_divided(module):
    """Backward runs on the loss summed over all tokens; only the logged loss is divided by their number."""
    scale_gradients(module, 8 * 16)


BUGS = [
    averaged_twice,
    parameter_reduced_instead_of_gradient,
    only_the_last_micro_batch,
    clipped_before_reduction,
    micro_batch_mean_not_divided,
    loss_never_divided,
]


@pytest.mark.parametrize("bug", [None, *BUGS], ids=lambda bug: bug.__name__ if bug else "correct")
def test_loss_barely_notices_and_parity_does(small_run, bug):
    args = (*small_run, "--dtype", "float64", "--dp-engine", "naive", "--micro-batch-size", "2", "--eval-every", "0")
    common = (*small_run, "--dtype", "float64", "--micro-batch-size", "2", "--eval-every", "0")

    long = ("--steps", "60", "--optimizer", "adamw")
    losses = [r.loss for r in run_ranks(RANKS, parity.record, "step02_data_parallel", (*args, *long), bug)[0]]
    expected = [r.loss for r in parity.reference((*common, *long))]
    fall = expected[0] - expected[-1]
    # Over the run, the curve with the bug falls within 5 % of what the right one falls.
    assert abs(losses[-1] - expected[-1]) < 0.05 * fall, (losses[-1], expected[-1], fall)

    short = ("--steps", "3", "--optimizer", "sgd", "--lr", "0.5")
    records = run_ranks(RANKS, parity.record, "step02_data_parallel", (*args, *short), bug)
    error, where = max(parity.difference(r, parity.reference((*common, *short))) for r in records)
    name = bug.__name__ if bug else "correct"
    print(f"{name}: final loss {losses[-1]:.3f} ({expected[-1]:.3f}), largest error {error:.0e}, in {where}")
    assert error <= parity.TOLERANCE if bug is None else error > 1e-3
