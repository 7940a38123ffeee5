"""Every rank of every layout, listened to once: no race, no hang, and what is sent is what the formula says."""

import pytest
from conftest import small_options
from layouts import IDS, LAYOUTS, listen, sizes
from order import replay


@pytest.fixture(scope="module", params=LAYOUTS, ids=IDS)
def everyones(request, text_file):
    step, ranks, options = request.param
    return listen(step, ranks, (*sizes(small_options(text_file)), *options.split()))


def test_there_are_no_races(everyones):
    for heard in everyones:
        assert heard.races == []


def test_all_ranks_end(everyones):
    replay([heard.trace for heard in everyones])


def test_ledgers_equal_the_formula(everyones):
    for heard in everyones:
        counted = {key: (calls / 2, nbytes / 2) for key, (calls, nbytes) in heard.ledger["counts"].items()}
        assert heard.ledger["steps"] == 2 and counted == heard.ledger["expected"]
