"""Bugs that biases, norms of heads and scaled rope invite, and that still train: put back into step03, on two ranks.

As in test_bugs.py: each passes the eye test and fails the parity check.
"""

import parity
import pytest
import torch.nn.functional as F
from ranks import run_ranks
from relatives import relative

from shared import rope


def gradient_of_head_norms_not_summed(module):
    """Each rank trains its copy of the norm of heads on what its own heads say: the copies drift apart."""
    tensor_parallel = module.tensor_parallel
    tensor_parallel.HeadNorm.forward = tensor_parallel.RMSNorm.forward


def bias_added_by_each_rank(module):
    """A row-parallel linear adds its bias before the sum over ranks: where one was meant, two are added."""
    sum_over_ranks = module.tensor_parallel.SumOverRanks

    def forward(self, x):
        return sum_over_ranks.apply(F.linear(x, self.weight, self.bias), self.group)

    module.tensor_parallel.RowParallelLinear.forward = forward


def yarn_factor_applied_twice(module):
    """To cos and sin, and to what has been rotated by them."""
    rope.attention_factor = lambda parameters, once=rope.attention_factor: once(parameters) ** 2


# Each in a model that has what it is about.
BUGS = {
    gradient_of_head_norms_not_summed: "qwen3",
    bias_added_by_each_rank: "llama",
    yarn_factor_applied_twice: "qwen2",
}


@pytest.mark.parametrize("bug", BUGS, ids=lambda bug: bug.__name__)
def test_loss_barely_notices_and_parity_does(small_run, tmp_path, bug):
    relative(BUGS[bug]).save_pretrained(tmp_path)
    common = (*small_run, "--model", str(tmp_path), "--dtype", "float64", "--eval-every", "0")
    args = (*common, "--tp", "2", "--tp-engine", "naive")

    long = ("--steps", "60", "--optimizer", "adamw")
    losses = [r.loss for r in run_ranks(2, parity.record, "step03_tensor_parallel", (*args, *long), bug)[0]]
    expected = [r.loss for r in parity.record("step01_single_gpu", (*common, *long))]
    fall = expected[0] - expected[-1]
    assert abs(losses[-1] - expected[-1]) < 0.05 * fall, (losses[-1], expected[-1], fall)

    short = ("--steps", "3", "--optimizer", "sgd", "--lr", "0.5")
    reference = parity.record("step01_single_gpu", (*common, *short))
    records = run_ranks(2, parity.record, "step03_tensor_parallel", (*args, *short), bug)
    error, where = max(parity.difference(r, reference) for r in records)
    print(f"{bug.__name__}: final loss {losses[-1]:.3f} ({expected[-1]:.3f}), largest error {error:.0e}, in {where}")
    assert error > 1e-3
