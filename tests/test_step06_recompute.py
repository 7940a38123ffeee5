"""Activation recompute: what a layer keeps, and what is sent again. That it is right is in test_parity.py."""

import pytest
from conftest import load_step
from fake_ranks import check_ledgers
from test_step06_sequence_parallel import kept_by_a_layer

from shared.config import UserError, parse

STEP = "step06_4d"


@pytest.mark.parametrize(("tp", "options"), [(1, []), (2, []), (2, ["--sequence-parallel"])])
def test_bytes_that_a_layer_keeps(small_run, tp, options):
    """Per token selective keeps 2h fewer, full the h numbers of the input alone; with shared tokens, its part."""
    none, selective, full = (
        kept_by_a_layer(small_run, tp, "--recompute", kind, *options) for kind in ("none", "selective", "full")
    )
    bsh = 2 * 16 * 32 * 4 // (tp if options else 1)
    assert [a - b for a, b in zip(none, selective, strict=True)] == [2 * bsh] * tp
    assert full == [bsh] * tp


@pytest.mark.parametrize(
    ("ranks", "layout"),
    [
        (4, "--dp 2 --tp 2 --micro-batch-size 2"),
        (4, "--tp 4 --sequence-parallel --dtype bfloat16"),
        (4, "--pp 2 --cp 2 --micro-batch-size 2"),
        (2, "--cp 2 --cp-engine all-to-all"),
        (2, "--cp 2 --cp-engine all-gather --dtype bfloat16"),
        (4, "--zero 3 --dp 2 --tp 2"),
    ],
)
def test_every_rank_sends_what_the_formula_says(small_run, ranks, layout):
    check_ledgers(ranks, [*small_run, "--recompute", "full", *layout.split()], STEP)


def test_compile_and_selective(small_run):

    with pytest.raises(UserError, match="--compile chooses itself what to recompute"):
        parse(load_step(STEP).Config, [*small_run, "--compile", "--recompute", "selective"])
