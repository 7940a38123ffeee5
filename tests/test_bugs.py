"""Bugs that still train: put back into step02, each passes the eye test and fails the parity check.

The bugs are real, found in other people's trainers; tests/README.md tells the story of each.
"""

import parity
import pytest

from labs.bugs.step02 import (
    averaged_twice,
    clipped_before_reduction,
    loss_never_divided,
    micro_batch_mean_not_divided,
    only_the_last_micro_batch,
    parameter_reduced_instead_of_gradient,
)

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
    parity.check_bug("step02_data_parallel", "--dp-engine naive", (*small_run, "--micro-batch-size", "2"), bug)
