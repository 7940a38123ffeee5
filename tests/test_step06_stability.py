"""step06: steps that go wrong are skipped by all ranks or stop the run."""

import json
import math
from functools import lru_cache
from types import SimpleNamespace

import numpy as np
import pytest
import torch
import torch.distributed as dist
from conftest import load_step
from fake_ranks import check_ledgers
from ranks import run_ranks
from running import train, user_error

from shared.config import UserError, parse
from shared.corpus import Tokens
from shared.data import GlobalBatches, Mixture, Sequences

STEP = "step06_4d"
NAN, INF = float("nan"), float("inf")


def spoiled_norm(factor, steps, ranks):
    """A wrapper of clip_grad_norm: in these steps, these ranks find a norm that is no number."""
    count = 0

    def wrapper(original):
        def clip_grad_norm(*args):
            nonlocal count
            count += 1
            norm = original(*args)
            return norm * factor if count in steps and dist.get_rank() in ranks else norm

        return clip_grad_norm

    return {"clip_grad_norm": wrapper}


def spoiled_loss(step, rank):
    """A wrapper of micro_batch_loss: a micro-batch of this step gives NaN to this rank, and its gradients to all."""
    count = 0

    def wrapper(original):
        def micro_batch_loss(config, model, batch):
            nonlocal count
            count += 1
            loss = original(config, model, batch)
            micro_batches = config.global_batch_size // (config.micro_batch_size * (config.dp or 1))
            return loss * NAN if count == (step - 1) * micro_batches + 1 and dist.get_rank() == rank else loss

        return micro_batch_loss

    return {"micro_batch_loss": wrapper}


def without_steps(steps):
    """A wrapper of make_optimizer: its step does nothing in these steps."""

    def wrapper(original):
        def make_optimizer(*args):
            optimizer, count = original(*args), 0
            step = optimizer.step

            def counted():
                nonlocal count
                count += 1
                if count not in steps:
                    step()

            optimizer.step = counted
            return optimizer

        return make_optimizer

    return {"make_optimizer": wrapper}


def _trained(args, kind, *spoil):
    """The weights and the optimizer's state of this rank, after a run in which something is spoiled."""
    seen = []

    def keep(original):
        return lambda *args: seen.append(original(*args)) or seen[0]

    train(args, STEP, **kind(*spoil), Trainer=keep)
    (trainer,) = seen
    state = {i: p.detach() for i, p in enumerate(trainer.reducer.trained)}
    for i, values in enumerate(trainer.optimizer.state.values()):
        state |= {(i, name): value for name, value in values.items()}
    return state


@lru_cache
def without_the_second_step(ranks, *args):
    return run_ranks(ranks, _trained, [*args], without_steps, [2])


@pytest.mark.parametrize(
    ("ranks", "layout", "spoil"),
    [
        (2, "--dp 2", (spoiled_norm, NAN, [2], [1])),
        (2, "--dp 2 --zero 1 --dtype bfloat16", (spoiled_loss, 2, 1)),
        (2, "--dp 2 --dp-engine naive", (spoiled_loss, 2, 1)),
        (2, "--tp 2", (spoiled_norm, INF, [2], [0])),
        (2, "--tp 2", (spoiled_loss, 2, 1)),
        (2, "--pp 2", (spoiled_norm, NAN, [2], [0])),
        (2, "--pp 2", (spoiled_loss, 2, 0)),
        (2, "--cp 2", (spoiled_loss, 2, 1)),
        (8, "--dp 2 --tp 2 --pp 2 --micro-batch-size 2", (spoiled_norm, NAN, [2], [5])),
        (8, "--dp 2 --tp 2 --pp 2 --micro-batch-size 2", (spoiled_loss, 2, 7)),
    ],
)
def test_all_ranks_skip_what_one_finds_bad(small_run, ranks, layout, spoil):
    """And the step leaves no trace but its place in the schedule of the learning rate, and its data."""
    args = [*small_run, *layout.split(), "--eval-every", "0"]
    skipped = run_ranks(ranks, _trained, [*args, "--on-bad-step", "skip"], *spoil)
    for ours, theirs in zip(skipped, without_the_second_step(ranks, *args), strict=True):
        assert ours[0, "step"] == 3 and ours.keys() == theirs.keys()
        assert all(torch.equal(ours[name], tensor) for name, tensor in theirs.items())


def _decisions(losses_of_ranks, norms, on_bad_step, spike_factor):
    """What this rank says to steps of these losses and norms."""
    load_step(STEP)
    from survive import bad_steps

    dist.init_process_group("gloo")
    decides = bad_steps.BadSteps(bad_steps.Config(on_bad_step, spike_factor), None)
    losses = losses_of_ranks[dist.get_rank()]
    return [decides.accepts(*torch.tensor(pair)) for pair in zip(losses, norms, strict=True)], list(decides.good)


@pytest.mark.quick
def test_a_spike_on_one_rank_is_seen_by_all():
    good = [2.0, 1.0, 3.0, 2.0, 2.0]
    # Above 3 × the median on the first rank, on the second, and on none; a spike is no part of the median.
    first, second = [*good, 6.5, 1.0, 5.9, 6.5], [*good, 1.0, 6.5, 5.9, 1.0]
    norms = [1.0] * len(first)
    (says, history), other = run_ranks(2, _decisions, [first, second], norms, "stop", 3.0)
    assert says == [True] * 5 + [False, False, True, False] and (says, history) == other
    assert [loss for loss, _ in history] == pytest.approx([*good, 5.9])


def test_a_spike_of_the_norm_and_none_before_there_are_enough_steps():
    ones, norms = [1.0] * 8, [1.0, 90.0, 1.0, 1.0, 1.0, 3.1, 2.9, 3.1]
    ((says, _),) = run_ranks(1, _decisions, [ones], norms, "skip", 3.0)
    assert says == [True] * 5 + [False, True, False]


def test_the_median_is_of_the_last_steps():
    losses = [1.0] * 20 + [2.0] * 11 + [5.0]
    for loss, expected in ((5.0, True), (6.5, False)):
        losses[-1] = loss
        ((says, _),) = run_ranks(1, _decisions, [losses], [1.0] * 32, "stop", 3.0)
        assert says == [True] * 31 + [expected]


def test_without_a_factor_nothing_is_a_spike():
    """But what is no number on either rank is bad on both, though it is no larger than the other's."""
    first, second = ([1.0] * 10 + end for end in ([1e30, NAN, 1.0, -INF, 1.0], [1.0, 1.0, NAN, 1.0, 1.0]))
    for says, _ in run_ranks(2, _decisions, [first, second], [1.0] * 15, "skip", 0.0):
        assert says == [True] * 11 + [False] * 3 + [True]


def test_indices_are_those_of_the_batch_also_across_epochs():
    sequences = Mixture([Sequences(Tokens.from_array(np.arange(7 * 4 + 1)), 4)], [1.0])
    config = SimpleNamespace(seed=3, global_batch_size=6, micro_batch_size=1, seq_len=4, device="cpu")
    ranks = [GlobalBatches(sequences, config, rank, 2) for rank in range(2)]
    for _ in range(5):
        first_tokens = [int(batch.input_ids[0, 0]) for batches in ranks for batch in batches.next()]
        for batches in ranks:
            assert [4 * i for i in batches.indices()] == first_tokens


def _batches(args, replaced):
    """The token ids that this rank trained on in each step, and the training sequences."""
    seen, sequences = [], []

    def forward_backward(original):
        def observed(trainer, batches):
            seen.append(torch.cat([batch.input_ids for batch in batches]))
            return original(trainer, batches)

        return observed

    def trainer(original):
        def observed(*args):
            made = original(*args)
            (source,) = made.batches.sequences.sources
            sequences.extend(source[i] for i in range(len(source)))
            return made

        return observed

    wrappers = {"forward_backward": forward_backward, "Trainer": trainer}
    train(args, STEP, **spoiled_norm(*replaced), **wrappers)
    return [ids.numpy() for ids in seen], sequences


@pytest.mark.quick
def test_the_metrics_file_names_the_sequences_of_a_skipped_step(small_run, tmp_path, capfd):
    path = tmp_path / "metrics"
    options = ["--dp", "2", "--on-bad-step", "skip", "--metrics-file", str(path), "--eval-every", "0"]
    (first, sequences), (second, _) = run_ranks(2, _batches, [*small_run, *options], (NAN, [3], [1]))
    records = [json.loads(line) for line in path.read_text().splitlines()]
    assert [record["step"] for record in records] == [1, 2, 3, 4]
    assert records[2]["skipped"] == "gradient norm not a finite number" and "loss" not in records[2]
    named = np.stack([sequences[i][:-1] for i in records[2]["sequences"]])
    assert np.array_equal(named, np.concatenate((first[2], second[2])))
    assert f"step 3 | skipped: {records[2]['skipped']} | sequences {records[2]['sequences']}" in capfd.readouterr().out
    # The step has its place in the schedule.
    (every,) = run_ranks(1, _learning_rates, small_run)
    assert [record["lr"] for record in records if "lr" in record] == [every[0], every[1], every[3]]


def _learning_rates(args):
    from shared.optim import learning_rate

    config = parse(load_step(STEP).Config, args)
    return [learning_rate(config, step) for step in range(config.steps)]


def _user_error(args, *spoil):
    return user_error(args, STEP, **spoiled_norm(*spoil))


@pytest.mark.parametrize(
    ("options", "ranks"),
    [
        # All have the same number, so nobody asks.
        ("", [0, 1]),
        ("--spike-factor 3", [1]),
    ],
)
def test_stop_names_the_sequences_on_every_rank(small_run, tmp_path, options, ranks):
    args = [*small_run, "--dp", "2", "--eval-every", "0"]
    skipping = ["--on-bad-step", "skip", "--metrics-file", str(tmp_path / "metrics")]
    run_ranks(2, _user_error, [*args, *skipping], NAN, [2], [1])
    sequences = json.loads((tmp_path / "metrics").read_text().splitlines()[1])["sequences"]
    errors = run_ranks(2, _user_error, [*args, *options.split()], NAN, [2], ranks)
    expected = f"step 2: gradient norm not a finite number; training sequences {sequences}: lower --lr"
    assert len(sequences) == 8 and all(error.startswith(expected) for error in errors)
    if not options:
        # Seen later, it is not known whose they are.
        for error in run_ranks(2, _user_error, [*args, "--log-every", "3"], NAN, [2], ranks):
            assert "in this step or the 1 before" in error and "training sequences" not in error


@pytest.mark.parametrize(("bad", "stops"), [(range(2, 12), False), (range(2, 13), True)])
def test_too_many_bad_steps_in_a_row_end_the_run(small_run, bad, stops):
    args = [*small_run, "--dp", "2", "--eval-every", "0", "--steps", "14", "--on-bad-step", "skip"]
    for error in run_ranks(2, _user_error, args, NAN, [*bad, 14], [1]):
        assert (error or "").startswith("step 12: 11 bad steps in a row (gradient norm not" if stops else "")
        assert (error is not None) == stops


def test_bad_steps_in_a_row_are_counted_on_after_a_resume(small_run, tmp_path):
    args = [*small_run, "--eval-every", "0", "--steps", "14", "--on-bad-step", "skip"]
    args += ["--checkpoint-dir", str(tmp_path)]
    assert run_ranks(1, _user_error, [*args, "--stop-after", "7"], NAN, range(2, 8), [0]) == [None]
    (error,) = run_ranks(1, _user_error, args, NAN, range(1, 8), [0])
    assert error.startswith("step 12: 11 bad steps in a row")


@pytest.mark.parametrize("options", ["", "--on-bad-step skip", "--spike-factor 9"])
@pytest.mark.parametrize(("ranks", "layout"), [(2, "--dp 2"), (2, "--tp 2"), (2, "--pp 2"), (4, "--dp 2 --tp 2")])
def test_every_rank_sends_what_the_formula_says(small_run, ranks, layout, options):
    """What all ranks agree on is counted as the world's, also where an axis has them all."""
    for found in check_ledgers(ranks, [*small_run, *layout.split(), *options.split()], STEP):
        assert found["expected"].get(("world", "all-reduce")) == ((1, 8) if options else None)


@pytest.mark.parametrize(
    ("args", "message"),
    [
        ("--spike-factor 0.5", "--spike-factor 0.5 must be above 1"),
        (f"--spike-factor {math.nan}", "--spike-factor nan must be above 1"),
        ("--gc-every -1", "--gc-every must not be negative, but is -1"),
    ],
)
def test_errors_name_the_numbers(small_run, args, message):
    with pytest.raises(UserError, match=message):
        parse(load_step(STEP).Config, [*small_run, *args.split()])
