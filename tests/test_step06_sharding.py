"""step06 --zero: what it sends and holds, in which order, how it fails. That it is right is in test_parity.py, and what
bfloat16 does to it in test_step06_bfloat16.py."""

import sys

import parity
import pytest
import torch
import torch.distributed as dist
from conftest import load_step
from fake_ranks import check_ledgers
from ranks import RankFailed, run_ranks
from running import instrumented, ledger_of, train

import shared.weights
from shared.config import UserError, parse
from shared.weights import full_weights

STEP = "step06_4d"
LEVELS = [1, 2, 3]


@pytest.mark.parametrize("zero", LEVELS)
@pytest.mark.parametrize(
    ("ranks", "layout"),
    [
        (2, "--micro-batch-size 2"),
        (2, "--micro-batch-size 1 --dtype float64 --tie-word-embeddings True"),
        (2, "--micro-batch-size 2 --dtype bfloat16"),
        # Evaluation leaves nothing gathered that a step would have to gather.
        (2, "--micro-batch-size 2 --eval-every 1"),
        (3, "--global-batch-size 24"),
        (4, "--dp 2 --cp 2 --micro-batch-size 2"),
        (4, "--dp 2 --tp 2 --micro-batch-size 2 --dtype float64"),
        (4, "--shard 2 --micro-batch-size 1 --dtype bfloat16"),
    ],
)
def test_every_rank_sends_what_the_formula_says(small_run, zero, ranks, layout):
    check_ledgers(ranks, [*small_run, *layout.split(), "--zero", str(zero)], STEP)


# What of its payload each of D ranks sends around a ring, times D.
RING = {"all-reduce": lambda d: 2 * (d - 1), "reduce-scatter": lambda d: d - 1, "all-gather": lambda d: d - 1}


def test_zero_1_sends_what_an_all_reduce_of_the_gradients_does(small_run):
    """By hand: a reduce-scatter and an all-gather of N parameters; without --zero, an all-reduce of them."""
    n = 2 * 300 * 32 + 32 + 2 * (2 * 32 * 32 + 2 * 16 * 32 + 3 * 48 * 32 + 2 * 32)
    args, sent = [*small_run, "--steps", "1", "--tie-word-embeddings", "False"], []
    for zero in (0, 1):
        found, _ = run_ranks(2, ledger_of, [*args, "--zero", str(zero)], STEP)
        counts = {kind: traffic.bytes for (axis, kind), traffic in found["counts"].items() if axis == "dp"}
        # The loss; the norm of the gradients.
        counts["all-reduce"] -= 4 * (1 + zero)
        sent.append(sum(RING[kind](2) * nbytes for kind, nbytes in counts.items()))
        assert {kind: nbytes for kind, nbytes in counts.items() if nbytes} == (
            {"reduce-scatter": 4 * n, "all-gather": 4 * n} if zero else {"all-reduce": 4 * n}
        )
    assert sent[0] == sent[1]


def observed(args, instrument):
    """Run train(), and show its model, reducer and optimizer to `instrument` before the first step. Returns them."""
    seen = {}

    def init(original):
        def made(trainer, *args):
            original(trainer, *args)
            seen.update(model=trainer.model, reducer=trainer.reducer, optimizer=trainer.optimizer)
            instrument(**seen)

        return made

    train(args, STEP, __init__=init)
    return seen


def _start(args):
    """Whether a rank starts with its numbers of what step01 starts with, and how many rows of each it has asked for."""
    equal, asked = [], {}

    def noting(initial_weights):
        def noted(*args):
            weights = initial_weights(*args)

            def weight(name, rows):
                asked[name] = rows.stop - rows.start
                return weights(name, rows)

            return weight

        return noted

    def compare(trainer):
        full, model, reducer = full_weights(trainer.config, trainer.model.model.config), trainer.model, trainer.reducer
        modules = sys.modules["tensor_parallel"].sharded_modules(model)
        for name, p in model.named_parameters():
            part = modules[name].shard_of(full(name)) if name in modules else full(name)
            if reducer.zero < 3:
                equal.append(torch.equal(p, part.to(p.dtype)))
            trained, first = reducer.trained_of(p)
            if trained is not None:
                equal.append(torch.equal(trained.flatten(), part.flatten()[first : first + trained.numel()]))

    train([*args, "--steps", "1"], STEP, initial_weights=noting, **instrumented(compare))
    return all(equal) and len(equal), asked


@pytest.mark.parametrize("zero", LEVELS)
def test_a_rank_draws_its_own_rows(small_run, monkeypatch, zero):
    # Of a row each: as if these matrices were large.
    monkeypatch.setattr(shared.weights, "TILE", 32)
    args = [*small_run, "--dp", "2", "--tp", "2", "--dtype", "bfloat16", "--zero", str(zero)]
    ranks = run_ranks(4, _start, args)
    assert all(equal for equal, _ in ranks)
    for name, rows in {"model.embed_tokens.weight": 300, "model.layers.0.self_attn.o_proj.weight": 2 * 32}.items():
        # Both ranks of tp cut their columns out of whole rows. The shards of dp's may end within the same row.
        assert rows <= sum(asked.get(name, 0) for _, asked in ranks) <= rows + 2


def _events(args):
    events = []

    def instrument(model, reducer, optimizer):
        def note(function, event, condition=lambda: True):
            def noted(*args, **kwargs):
                if condition():
                    events.append(event)
                return function(*args, **kwargs)

            return noted

        # The norm before the head is called with a hook, which the head is not.
        modules = [model.model.embed_tokens, *model.model.layers.values(), model.model.norm]
        for i, (unit, module) in enumerate(zip(reducer.units, modules, strict=True)):
            unit.gather = note(unit.gather, f"gather-{i}", lambda unit=unit: not unit.is_whole)
            unit.wait = note(unit.wait, f"wait-{i}", lambda unit=unit: unit.gathering or not unit.is_whole)
            unit.reduce = note(unit.reduce, f"reduce-{i}")
            module.forward = note(module.forward, f"forward-{i}")
            # Of each unit, the gradients that come first and last.
            for name, p in (model.lm_head if i == 4 else module).named_parameters():
                if name in ("weight", "mlp.down_proj.weight", "input_layernorm.weight"):
                    p.register_hook(lambda gradient, i=i: events.append(f"backward-{i}"))
        optimizer.step = note(optimizer.step, "optimizer")

    observed([*args, "--num-hidden-layers", "3", "--tie-word-embeddings", "False", "--eval-every", "0"], instrument)
    return events


# Units: 0 the embedding, 1 to 3 the layers, the last with the norm, 4 the head.
BACKWARD = """backward-4 reduce-4
    backward-3 backward-3 reduce-3 backward-2 backward-2 reduce-2 backward-1 backward-1 reduce-1 backward-0 reduce-0"""


def test_zero_1_reduces_during_backward_and_gathers_during_forward(small_run):
    args = [*small_run, "--zero", "1", "--steps", "2"]
    forward = "forward-0 forward-1 forward-2 forward-3 forward-4"
    gathers = "gather-0 gather-1 gather-2 gather-3 gather-4"
    waits = "wait-0 forward-0 wait-1 forward-1 wait-2 forward-2 wait-3 forward-3 wait-4 forward-4"
    expected = f"{forward} {BACKWARD} optimizer {gathers} {waits} {BACKWARD} optimizer {gathers}".split()
    for events in run_ranks(2, _events, args):
        # Then all weights are waited for.
        assert events[: len(expected)] == expected and events[len(expected) :] == [f"wait-{i}" for i in range(5)]


def test_zero_3_gathers_the_next_unit_while_one_computes(small_run):
    args = [*small_run, "--zero", "3", "--steps", "1"]
    forward = """wait-0 gather-0 gather-1 forward-0 wait-1 gather-2 forward-1 wait-2 gather-3 forward-2
        wait-3 gather-4 forward-3 wait-4 forward-4"""
    # The last layer and the head are still there; an embedding's gradient does not need its weights.
    backward = """backward-4 reduce-4 gather-2 backward-3 backward-3 reduce-3
        wait-2 gather-1 backward-2 backward-2 reduce-2 wait-1 backward-1 backward-1 reduce-1 backward-0 reduce-0"""
    expected = f"{forward} {backward} optimizer".split()
    for events in run_ranks(2, _events, args):
        # And never again all of them, which may not fit: nothing is exported here.
        assert events == expected


def _reductions(args):
    """What is launched in a step to sum gradients, in order."""
    launched = []

    def noted(call):
        def note(*args, **kwargs):
            if kwargs.get("async_op"):
                launched.append(f"{call.__name__} {kwargs['group'].group_desc}")
            return call(*args, **kwargs)

        return note

    def instrument(model, reducer, optimizer):
        dist.reduce_scatter_single, dist.all_reduce = noted(dist.reduce_scatter_single), noted(dist.all_reduce)

    observed([*args, "--steps", "1", "--eval-every", "0"], instrument)
    return launched


@pytest.mark.parametrize("zero", LEVELS)
def test_shards_are_summed_over_their_replicas_once_per_step_unit_by_unit(small_run, zero):
    args = [*small_run, "--zero", str(zero), "--shard", "2", "--micro-batch-size", "1"]
    for launched in run_ranks(4, _reductions, args):
        scatter, across = "reduce_scatter_single shard", "all_reduce replicas"
        # Of two micro-batches the replicas see the sum. Units: two layers, and the embedding, which is the head.
        first = [] if zero == 1 else 3 * [scatter]
        assert launched == [*first, *(3 * [scatter, across])]


def _spoiled(args):
    """Train, and change a number of one rank's shard before the check at the end."""

    def check(original):
        def spoil_and_check(reducer):
            if dist.get_rank() == 3:
                reducer.trained[0].data.view(-1)[0] += 1e-3
            original(reducer)

        return spoil_and_check

    module = load_step(STEP)
    reducer = module.sharded_optimizer.ShardedReducer
    reducer.check_replicas = check(reducer.check_replicas)
    module.train(parse(module.Config, args))


@pytest.mark.parametrize("layout", ["--zero 3", "--zero 1 --dtype bfloat16"])
def test_replicas_of_a_shard_that_differ_are_found(small_run, layout):
    """Though the weights are not whole, or have not changed yet."""
    args = [*small_run, *layout.split(), "--shard", "2", "--micro-batch-size", "2", "--steps", "1"]
    with pytest.raises(RankFailed, match=r"the replicas of parameters \[0\] have diverged"):
        run_ranks(4, _spoiled, args)


EXTRA = [
    # Padded, and several micro-batches.
    (3, "--global-batch-size 24 --micro-batch-size 2"),
    # More ranks than the final norm, a unit of its own under a tied head, has elements.
    (16, "--global-batch-size 16 --micro-batch-size 1 --hidden-size 8 --tie-word-embeddings True"),
    # A model of one layer: nothing of it is gathered for backward.
    (2, "--num-hidden-layers 1"),
]


@pytest.mark.parametrize(("ranks", "options"), EXTRA)
def test_parity_of_padded_shards_with_evaluation_between_steps(small_run, ranks, options):
    sgd = "--dtype float64 --steps 3 --eval-every 1 --optimizer sgd --lr 0.5"
    args = (*small_run, *sgd.split(), *options.split())
    parity.check_each(STEP, ranks, [(args, f"--zero {zero}") for zero in LEVELS])


@pytest.mark.parametrize("zero", [2, 3])
def test_pipelines_need_gradients_of_the_whole_step(small_run, zero):
    message = f"--zero {zero} reduces gradients after each micro-batch, of which --pp 2 needs many: take --zero 1"
    with pytest.raises(UserError, match=message):
        parse(load_step(STEP).Config, [*small_run, "--pp", "2", "--zero", str(zero)])


@pytest.mark.parametrize("schedule", ["afab", "zero-bubble"])
@pytest.mark.parametrize("zero", [2, 3])
def test_gradients_that_come_late_are_refused(small_run, zero, schedule):
    """One rank can have any schedule. The late gradients of a tied model were lost in the reduction under way."""
    with pytest.raises(UserError, match=f"--zero {zero} takes one micro-batch after the other: leave out --pp-sch"):
        parse(load_step(STEP).Config, [*small_run, "--pp-schedule", schedule, "--zero", str(zero)])
    assert parse(load_step(STEP).Config, [*small_run, "--pp-schedule", schedule, "--zero", "1"]).zero == 1


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ("--dp 2 --shard 2", "--shard 2 spreads what --zero divides: add --zero"),
        ("--dp 2 --zero 1 --shard 1", "--shard 1 divides nothing: take at least 2"),
        ("--dp 2 --zero 1 --dp-engine naive", "--zero 1 is an engine of its own: leave out --dp-engine naive"),
        ("--dp 3 --cp 2 --zero 1 --shard 4", "--shard 4 does not divide dp · cp = 3 · 2: take a divisor"),
    ],
)
def test_shards_that_cannot_be(small_run, options, message):
    module = load_step(STEP)
    with pytest.raises(UserError, match=message):
        module.train(parse(module.Config, [*small_run, *options.split(), "--global-batch-size", "24", "--dry-run"]))
