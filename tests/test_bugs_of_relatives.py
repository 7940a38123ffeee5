"""Bugs that biases, norms of heads and scaled rope invite, and that still train: put back into step03, on two ranks.

As in test_bugs.py: each passes the eye test and fails the parity check.
"""

import parity
import pytest
import torch.nn.functional as F
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
    args = (*small_run, "--model", str(tmp_path))
    parity.check_bug("step03_tensor_parallel", "--tp 2 --tp-engine naive", args, bug)
