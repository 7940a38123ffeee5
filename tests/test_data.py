"""Every token is seen once per epoch, in an order that depends on nothing but the seed, whatever the layout."""

from collections import Counter

import numpy as np
import pytest
import torch
from corpora import make_config
from hypothesis import given
from hypothesis import strategies as st

from shared.config import UserError, shares
from shared.corpus import Corpus, Source, Tokens
from shared.data import GlobalBatches, Mixture, Sequences, shuffled, split_corpus


def sequences_of(n, seq_len=8):
    """Of tokens 0, 1, 2, ..."""
    return Sequences(Tokens.from_array(np.arange(n)), seq_len)


def batches_of(n, config=None, rank=0, size=1):
    return GlobalBatches(Mixture([sequences_of(n)], [1.0]), config or make_config(), rank, size)


def rows(batches, steps):
    """Input tokens of the next steps, (steps, sequences of this rank, s)."""
    return np.stack([torch.cat([batch.input_ids for batch in batches.next()]).numpy() for _ in range(steps)])


def test_sequences_predict_every_token_once():
    sequences = sequences_of(8 * 5 + 4)
    labels = np.concatenate([sequence[1:] for sequence in (sequences[i] for i in range(len(sequences)))])
    assert len(sequences) == 5 and np.array_equal(labels, np.arange(1, 41))


def test_batch_holds_shifted_labels_and_positions():
    batch = batches_of(1000).next()[1]
    assert batch.input_ids.shape == batch.labels.shape == batch.position_ids.shape == (3, 8)
    assert torch.equal(batch.input_ids + 1, batch.labels)
    assert torch.equal(batch.position_ids, torch.arange(8).expand(3, -1))
    assert batch.input_ids.dtype == torch.int64


@pytest.mark.quick
def test_an_epoch_is_a_permutation_and_the_next_another():
    # 25 sequences and batches of 6: an epoch ends within a batch, and no sequence is dropped there.
    first = rows(batches_of(25 * 8 + 1), 25)[:, :, 0].flatten() // 8
    epochs = first.reshape(6, 25)
    assert all(sorted(epoch) == list(range(25)) for epoch in epochs)
    assert len({tuple(epoch) for epoch in epochs}) == 6


@given(st.integers(1, 3000), st.integers(0, 2**32 - 1), st.integers(0, 5))
def test_the_formula_is_a_permutation(n, seed, epoch):
    assert sorted(shuffled(i, n, seed, epoch) for i in range(n)) == list(range(n))


def test_the_formula_shuffles_as_well_as_a_random_order():
    """Of neighbours, where they come to lie, and of places, who comes there: as often as chance would have it."""
    n, seeds = 64, range(4000)
    orders = np.array([[shuffled(i, n, seed, 0) for i in (0, 1, 31)] for seed in seeds])
    for column in (*orders.T, (orders[:, 1] - orders[:, 0]) % n):
        counts = np.bincount(column, minlength=n)
        expected = len(seeds) / n
        # χ² with 63 degrees of freedom is above 120 once in 10⁵ draws. A difference is never 0.
        assert ((counts[counts > 0] - expected) ** 2 / expected).sum() < 120


def test_a_corpus_of_a_trillion_tokens_needs_no_table():
    n = 10**12 // 2048
    assert len({shuffled(i, n, 0, 0) for i in range(1000)}) == 1000
    assert max(shuffled(i, n, 0, 0) for i in range(1000)) > 0.99 * n


@pytest.mark.parametrize("size", [2, 3, 6])
def test_ranks_share_the_same_global_batches(size):
    whole = rows(batches_of(1000), 5)
    shares = [rows(batches_of(1000, make_config(micro_batch_size=1), rank, size), 5) for rank in range(size)]
    assert np.array_equal(np.concatenate(shares, axis=1), whole)


def test_a_rank_reads_its_positions_of_each_sequence():
    whole, parts = batches_of(1000).next(), []
    for part in ([0, 1, 6, 7], [2, 3, 4, 5]):
        batches = batches_of(1000)
        batches.positions = torch.tensor(part)
        parts.append(batches.next())
    for batch, first, second in zip(whole, *parts, strict=True):
        for a, b, c in zip(batch, first, second, strict=True):
            assert torch.equal(a[:, [0, 1, 6, 7]], b) and torch.equal(a[:, 2:6], c)


def test_micro_batches_of_a_rank():
    """Their number, which schedules and buckets count on, and their size."""
    config = make_config(global_batch_size=24, micro_batch_size=2)
    batches = batches_of(1000, config, rank=1, size=3)
    assert batches.micro_batches == len(batches.next()) == 4 and batches.tokens == 16


def test_state_is_the_number_of_sequences_consumed():
    """Also where a batch was made ahead for another state."""
    uninterrupted = batches_of(300)
    rows(uninterrupted, 9)
    resumed = batches_of(300, make_config(micro_batch_size=2))
    rows(resumed, 2)
    resumed.consumed = uninterrupted.consumed
    assert uninterrupted.consumed == 54
    assert np.array_equal(rows(resumed, 4), rows(uninterrupted, 4))


def test_the_next_batch_is_made_while_this_one_is_used():
    batches = batches_of(1000)
    batches.next()
    at, ahead = batches.ahead
    assert at == 6 and batches.next() is ahead.result()


def test_an_error_of_the_thread_reaches_the_step():
    batches = batches_of(1000)
    batches.next()
    batches.ahead[1].result()
    batches.micro_batch = lambda places: 1 / 0
    batches.next()
    with pytest.raises(ZeroDivisionError):
        batches.next()


def test_global_batch_must_divide():
    with pytest.raises(UserError, match="6 is not a multiple of 4 data-parallel ranks times --micro-batch-size 3"):
        batches_of(1000, rank=0, size=4)


def test_seed_changes_the_order():
    assert not np.array_equal(*(rows(batches_of(1000, make_config(seed=seed)), 1) for seed in (0, 1)))


def test_order_never_changes():
    """A promise across versions, which a resumed run relies on."""
    first = rows(batches_of(1000), 1)[0, :, 0] // 8
    assert first.tolist() == [48, 7, 80, 77, 73, 14]


def split(*sources, validation=(), **overrides):
    return split_corpus(Corpus(list(sources), list(validation), None), make_config(**overrides))


def numbers(name, share, n, held_out=None):
    return Source(name, share, Tokens.from_array(np.arange(n)), "", held_out)


def test_held_out_sequences_are_not_trained_on():
    train, validation = split(numbers("a", 1.0, 8 * 1000 + 5))
    (train,), (validation,) = train.sources, validation["a"].sources
    assert (len(train), len(validation)) == (990, 10)
    assert train[989][-1] == validation[0][0]


def test_too_small_a_dataset_names_the_numbers():
    with pytest.raises(UserError, match=r"its 89 tokens make 11 sequences of 8, but .* as many are held out"):
        split(numbers("a", 1.0, 89))
    with pytest.raises(UserError, match=r"its 9 tokens make 1 sequences of 8, but a global batch takes \d+: lower"):
        split(numbers("a", 1.0, 9), validation=[numbers("b", 1.0, 400)])
    with pytest.raises(UserError, match="--validation-dataset b is too small: its 20 tokens"):
        split(numbers("a", 1.0, 800), validation=[numbers("b", 1.0, 20)])


def test_a_validation_dataset_leaves_all_to_training():
    train, validation = split(numbers("a", 1.0, 801), validation=[numbers("b", 1.0, 401), numbers("c", 1.0, 161)])
    assert len(train) == 100 and {name: len(part) for name, part in validation.items()} == {"b": 50, "c": 20}


@pytest.mark.parametrize("apart", [False, True])
def test_a_stream_that_grows_keeps_its_order(apart):
    """The front is held out, and the first epoch goes on where a shorter one ended, whatever it is evaluated on."""
    validation = [numbers("b", 1.0, 8 * 20 + 1, held_out=48)] if apart else []
    short, long = (split(numbers("a", 1.0, n, held_out=48), validation=validation) for n in (8 * 30 + 1, 8 * 60 + 1))
    assert [len(part) for part in (short[0], long[0])] == [24, 54]
    assert {name: len(part) for name, part in long[1].items()} == ({"b": 20} if apart else {"a": 6})
    assert not apart or [long[1]["b"].locate(i, 0)[1] for i in range(20)] == list(range(20))
    first = [[train.locate(i, 0)[1] for i in range(24)] for train, _ in (short, long)]
    assert first[0] == first[1] == list(range(24))
    sequences, i = long[0].locate(0, 0)
    assert sequences[i][0] == 48
    # A second epoch is shuffled.
    assert sorted(again := [short[0].locate(24 + i, 0)[1] for i in range(24)]) == list(range(24)) != again


@given(st.lists(st.integers(1, 40), min_size=2, max_size=5), st.integers(1, 500))
def test_a_mixture_keeps_its_proportions_over_every_prefix(weights, steps):
    sizes = [3 + i for i in range(len(weights))]
    mixture = Mixture([sequences_of(8 * size + 1) for size in sizes], weights)
    taken, seen = Counter(), {}
    for i in range(steps):
        sequences, index = mixture.locate(i, seed=0)
        source = mixture.sources.index(sequences)
        seen.setdefault(source, []).append(index)
        taken[source] += 1
        for s, weight in enumerate(weights):
            assert abs(taken[s] - (i + 1) * weight / sum(weights)) < 1
    # A source that runs out begins its next epoch.
    for source, indices in seen.items():
        size = sizes[source]
        for start in range(0, len(indices) - size + 1, size):
            assert sorted(indices[start : start + size]) == list(range(size))


def test_shares():
    assert shares(("a",), "dataset") == shares(("a",), "validation_dataset") == [("a", 1.0)]
    assert shares(("a:0.7", "b/c:0.3"), "dataset") == [("a", 0.7), ("b/c", 0.3)]
    assert shares(("x:y",), "dataset") == [("x:y", 1.0)]
    # Each is evaluated apart.
    assert shares(("a", "b"), "validation_dataset") == [("a", 1.0), ("b", 1.0)]
    for wrong in (("a", "b"), ("a:0.5", "b"), ("a:0", "b:1"), ("a:-1", "b:2"), ("a:nan", "b:1")):
        with pytest.raises(UserError, match="with a share above 0"):
            shares(wrong, "dataset")
    with pytest.raises(UserError, match="--validation-dataset a a: name each once"):
        shares(("a", "a"), "validation_dataset")
    with pytest.raises(UserError, match="give fewer digits"):
        Mixture([sequences_of(100)] * 2, [0.123456789, 0.5])


def test_all_ranks_see_the_same_mixture():
    train, _ = split(numbers("a", 0.7, 4001), numbers("b", 0.3, 4001))
    whole = rows(GlobalBatches(train, make_config(), 0, 1), 5)
    config = make_config(micro_batch_size=1)
    parts = [rows(GlobalBatches(train, config, rank, 2), 5) for rank in range(2)]
    assert np.array_equal(np.concatenate(parts, axis=1), whole)


def test_which_sequences_a_batch_took():
    batches = GlobalBatches(split(numbers("a", 1.0, 801))[0], make_config(), 0, 1)
    tokens = rows(batches, 1)[0]
    assert [8 * i for i in batches.indices()] == tokens[:, 0].tolist()
    mixed = GlobalBatches(split(numbers("a", 0.5, 801), numbers("b", 0.5, 801))[0], make_config(), 0, 1)
    tokens = rows(mixed, 1)[0]
    assert [8 * i for _, i in mixed.indices()] == tokens[:, 0].tolist()
    assert Counter(source for source, _ in mixed.indices()) == {0: 3, 1: 3}
