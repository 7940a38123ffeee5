"""The harness itself: results, and the three ways in which a rank can fail, each reported at once."""

import os
import time

import pytest
import torch
import torch.distributed as dist
from ranks import RankFailed, run_ranks


def _sum(value):
    dist.init_process_group("gloo")
    total = torch.tensor([value + dist.get_rank()])
    dist.all_reduce(total)
    return total


def test_results_come_in_rank_order():
    assert [total.item() for total in run_ranks(4, _sum, 10)] == [46] * 4


def _fail(how):
    dist.init_process_group("gloo")
    if dist.get_rank() == 1:
        if how == "dies":
            os._exit(7)
        if how == "calls one collective more":
            dist.all_reduce(torch.ones(1), async_op=True)
        if how == "raises":
            raise ArithmeticError("one rank's trouble")
        if how == "hangs":
            time.sleep(60)
    dist.all_reduce(torch.ones(1))


@pytest.mark.parametrize(
    ("how", "timeout", "message"),
    [
        ("raises", 600, "rank 1: (.|\n)*one rank's trouble"),
        ("dies", 600, "rank 1: the process died"),
        ("hangs", 3, "a deadlock?"),
        ("calls one collective more", 10, "rank 1: |a deadlock?"),
    ],
)
def test_failures_are_reported_at_once(how, timeout, message):
    start = time.monotonic()
    with pytest.raises(RankFailed, match=message):
        run_ranks(3, _fail, how, timeout=timeout)
    # The others would wait for rank 1 for minutes.
    assert time.monotonic() - start < 60
