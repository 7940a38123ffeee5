"""labs: each bug still trains, and parity sees it."""

from functools import cache

import parity
import pytest

from labs import ROOT, seen
from labs.bugs import BUGS, REASONS

STEPS = 6


@cache
def check_right(step, ranks, options):
    """That the layout without a bug trains the model of a single device."""
    bug = next(b for b in BUGS.values() if (b.step, b.ranks, b.options) == (step, ranks, options))
    for rank in seen.run(bug, planted=False, steps=STEPS):
        error, where = parity.difference(rank.records, seen.single_device(bug, STEPS))
        assert error <= parity.TOLERANCE, where
        assert rank.replicas is None and rank.impossible is None
        counts = {key: tuple(n / rank.ledger["steps"] for n in t) for key, t in rank.ledger["counts"].items()}
        assert counts == {key: tuple(t) for key, t in rank.ledger["expected"].items()}


@pytest.mark.parametrize("bug", BUGS.values(), ids=BUGS)
def test_a_bug_trains_and_parity_sees_it(bug):
    check_right(bug.step, bug.ranks, bug.options)
    expected, ranks = seen.single_device(bug, STEPS), seen.run(bug, steps=STEPS)
    error, where = max(parity.difference(rank.records, expected) for rank in ranks)
    assert error > 1e-3, where
    losses = [record.loss for record in ranks[0].records]
    # Of what the right loss falls by.
    fall = (losses[0] - losses[-1]) / (expected[0].loss - expected[-1].loss)
    print(f"{bug.name}: error {error:.0e} in {where}; the loss falls {fall:.0%} of what it should")
    assert fall > 0.4


def test_there_are_bugs_of_every_step_and_kind():
    assert len(BUGS) >= 20
    assert {bug.step[:6] for bug in BUGS.values()} == {"step02", "step03", "step04", "step05", "step06"}
    assert {reason for bug in BUGS.values() for reason in bug.reasons} == set(REASONS)
    for bug in BUGS.values():
        assert bug.what and all((ROOT / bug.step / file).is_file() for file in bug.files)
