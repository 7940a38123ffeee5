"""Interleaved 1F1B and zero bubble at work: what they train, send and hold, in which order, how they fail."""

import itertools
import json
from collections import Counter

import parity
import pytest
import torch
from fake_ranks import check_ledgers
from ranks import run_ranks
from running import instrumented, ledger_of, train, user_error
from torch.utils.flop_counter import FlopCounterMode

STEP = "step06_4d"
# 4 layers on 4 virtual stages, 9 on 9.
LONG = "--num-hidden-layers 4 --optimizer sgd --lr 0.5 --dtype float64 --steps 3 --eval-every 3"
NINE = "--num-hidden-layers 9 --global-batch-size 12"


@pytest.mark.parametrize(
    ("ranks", "layout", "model"),
    [
        (2, "--pp 2 --virtual-stages 2", ""),
        (2, "--pp 2 --virtual-stages 4 --micro-batch-size 1", "--num-hidden-layers 9"),
        (3, "--pp 3 --virtual-stages 3 --micro-batch-size 2", NINE),
        (8, "--dp 2 --pp 2 --tp 2 --virtual-stages 2 --micro-batch-size 1 --bucket-mib 0.01", ""),
        (4, "--dp 2 --pp 2 --pp-schedule zero-bubble --micro-batch-size 1 --bucket-mib 0.01", ""),
        (4, "--pp 2 --cp 2 --virtual-stages 2 --micro-batch-size 2 --dp-engine naive", "--vocab-size 301"),
        (3, "--pp 3 --pp-schedule zero-bubble --micro-batch-size 2", NINE),
        (4, "--pp 4 --pp-schedule zero-bubble", ""),
        (8, "--pp 2 --tp 4 --pp-schedule zero-bubble --micro-batch-size 2 --no-tp-overlap", ""),
        (4, "--pp 2 --cp 2 --pp-schedule zero-bubble --micro-batch-size 1 --dp-engine naive", "--vocab-size 301"),
    ],
)
def test_parity_of_longer_pipelines(small_run, ranks, layout, model):
    args = (*small_run, *LONG.split(), *model.split(), "--tie-word-embeddings")
    parity.check(STEP, ranks, layout, *((*args, tied) for tied in parity.tied_or_not(ranks)))


@pytest.mark.parametrize("dtype", ["float32", "bfloat16"])
def test_two_stages_are_bitwise_step05(small_run, dtype):
    args = (*small_run, "--pp", "2", "--micro-batch-size", "2", "--dtype", dtype)
    ours, theirs = (run_ranks(2, parity.record, step, args) for step in (STEP, "step05_context_parallel"))
    for a, b in zip(itertools.chain(*ours), itertools.chain(*theirs), strict=True):
        assert (a.loss, a.grad_norm) == (b.loss, b.grad_norm)
        assert all(torch.equal(a.gradients[name], b.gradients[name]) for name in b.gradients)
        assert all(torch.equal(a.weights[name], b.weights[name]) for name in b.weights)


@pytest.mark.parametrize(
    ("ranks", "layout"),
    [
        (2, "--pp 2 --virtual-stages 2 --tie-word-embeddings True"),
        (4, "--pp 2 --dp 2 --virtual-stages 2 --dtype bfloat16 --micro-batch-size 2"),
        (3, "--pp 3 --virtual-stages 2 --num-hidden-layers 7 --global-batch-size 12 --dtype float64"),
        (8, "--pp 2 --tp 4 --pp-schedule zero-bubble --dtype bfloat16"),
        (4, "--pp 2 --cp 2 --pp-schedule zero-bubble --tie-word-embeddings True"),
    ],
)
def test_every_rank_sends_what_the_formula_says(small_run, ranks, layout):
    check_ledgers(ranks, [*small_run, "--num-hidden-layers", "4", *layout.split()], STEP)


@pytest.mark.quick
def test_messages_by_hand(small_run):
    """2 micro-batches of (4, 16, 32) floats cross 3 borders of 4 virtual stages there and back: 6 messages each."""
    options = "--pp 2 --virtual-stages 2 --num-hidden-layers 4 --steps 1"
    for found in run_ranks(2, ledger_of, [*small_run, *options.split()], STEP):
        assert found["counts"]["pp", "send"] == found["counts"]["pp", "receive"] == (6, 6 * 4 * 16 * 32 * 4)


def observed(base, observe):
    """The class, calling `observe(self, action)` after each action."""

    class Observed(base):
        def _forward(self, action, batch):
            super()._forward(action, batch)
            observe(self, action)

        def _backward(self, action):
            super()._backward(action)
            observe(self, action)

        def _weight(self, action):
            super()._weight(action)
            observe(self, action)

    return Observed


def _held(args):
    """The most chunks of micro-batches held, and of them, those whose output still has its data."""
    held, with_data, pipelines = [], [], []

    def observe(self, action):
        pipelines.append(self)
        if self.trains:
            held.append(len(self.held) + len(self.late))
            outputs = [output for _, output in self.held.values()]
            with_data.append(sum(o.untyped_storage().nbytes() >= o.nbytes for o in outputs if o.ndim))

    train(args, STEP, Pipeline=lambda base: observed(base, observe))
    last = pipelines[-1]
    assert not last.held and not last.late
    for channel in (last.to_next, last.to_previous):
        assert channel.sending is channel.sent is channel.receiving is channel.received is None
    return max(held), max(with_data)


@pytest.mark.parametrize("options", ["--virtual-stages 2", "--pp-schedule zero-bubble"])
def test_a_stage_holds_no_more_than_it_must(small_run, options):
    sizes = "--pp 4 --num-hidden-layers 8 --steps 2 --eval-every 1 --micro-batch-size 1"
    for stage, (most, with_data) in enumerate(run_ranks(4, _held, [*small_run, *sizes.split(), *options.split()])):
        assert most == (4 if "zero" in options else 2 * 4 + 4 - 2 * stage - 1)
        # What has left is freed: only the output that is on its way exists.
        assert with_data == (0 if stage == 3 and "zero" in options else 1)


def _order(args):
    """Actions as they end, and buckets of gradients as they leave."""
    order = []

    def instrument(trainer):
        reducer = trainer.reducer
        launch, finish = reducer._launch, reducer.finish
        reducer._launch = lambda: order.append("reduce") or launch()
        reducer.finish = lambda: order.append("finish") or finish()

    def observe(self, action):
        if action.kind != "forward":
            order.append(f"{action.kind} {action.micro_batch}{'ab'[action.chunk]}")

    train(args, STEP, Pipeline=lambda base: observed(base, observe), **instrumented(instrument))
    return order


ORDERED = "--pp 2 --dp 2 --steps 1 --eval-every 0 --num-hidden-layers 4 --bucket-mib 0.001 --micro-batch-size 1"


def test_buckets_of_the_last_chunk_leave_before_the_first_chunk_has_finished(small_run):
    for order in run_ranks(4, _order, [*small_run, *ORDERED.split(), "--virtual-stages", "2"]):
        assert [word for word in order if word.startswith("backward")] == [
            f"backward {m}{c}" for group in ((0, 1), (2, 3)) for c in "ba" for m in group
        ]
        # A bucket leaves during the last backward that adds to it, which `order` has behind it.
        last = order.index("backward 2a")
        assert (
            0 < order[:last].count("reduce") < order.count("reduce") and "finish" == order[-1] != order[-3] == "reduce"
        )
        assert "reduce" not in order[: order.index("backward 2b")] and order[-2] == "backward 3a"


def test_buckets_leave_while_late_gradients_of_weights_are_computed(small_run):
    for order in run_ranks(4, _order, [*small_run, *ORDERED.split(), "--pp-schedule", "zero-bubble"]):
        actions = [word for word in order if word not in ("reduce", "finish")]
        late = actions.index("weight 0a") - 1
        assert actions == (
            ["input 0a", "weight 0a", "input 1a", "weight 1a", "input 2a", "weight 2a", "input 3a", "weight 3a"]
            if late == 0
            else ["input 0a", "input 1a", "weight 0a", "input 2a", "weight 1a", "input 3a", "weight 2a", "weight 3a"]
        )
        # Each bucket has some weights of the layers, so none leaves before the last, and none is left to the end.
        assert "reduce" not in order[: order.index("input 3a")] and order[-2:] == ["weight 3a", "finish"]
        assert order.count("reduce") > 3


def _late(args):
    """FLOPs of a step by kind of action, and whether the layers' matmul weights got their gradients in it."""
    flops, grads = Counter(), set()

    def pipeline(base):
        class Counted(base):
            def _counted(self, action, run):
                weights = [p for name, p in self.model.named_parameters() if "proj" in name]
                before = [p.grad.clone() for p in weights]
                with FlopCounterMode(display=False) as counter:
                    run()
                flops[action.kind] += counter.get_total_flops()
                changed = {not torch.equal(p.grad, old) for p, old in zip(weights, before, strict=True)}
                grads.add((action.kind, *changed))

            def _forward(self, action, batch):
                self._counted(action, lambda: super(Counted, self)._forward(action, batch))

            def _backward(self, action):
                self._counted(action, lambda: super(Counted, self)._backward(action))

            def _weight(self, action):
                self._counted(action, lambda: super(Counted, self)._weight(action))

        return Counted

    train([*args, "--steps", "1", "--eval-every", "0"], STEP, Pipeline=pipeline)
    return flops, grads


@pytest.mark.parametrize("dtype", ["float32", "bfloat16"])
def test_zero_bubble_computes_what_1f1b_does_and_weights_apart(small_run, dtype):
    args = [*small_run, "--pp", "2", "--dtype", dtype, "--micro-batch-size", "1"]
    plain, split = (run_ranks(2, _late, [*args, "--pp-schedule", name]) for name in ("1f1b", "zero-bubble"))
    for (expected, _), (flops, grads) in zip(plain, split, strict=True):
        assert flops["input"] + flops["weight"] == expected["backward"] and flops["forward"] == expected["forward"]
        assert grads == {("forward", False), ("input", False), ("weight", True)}
        # 2 FLOPs per weight and token: 8 sequences of 16 through one layer.
        assert flops["weight"] == 2 * 8 * 16 * (2 * 32 * 32 + 2 * 16 * 32 + 3 * 32 * 48)


def _hooked(args):
    """How often a rank's modules are called in a step."""
    calls = Counter()

    def instrument(trainer):
        inner = trainer.model.model
        named = {"embedding": inner.embed_tokens, "norm": inner.norm, **inner.layers}
        for name, module in named.items():
            module.register_forward_hook(lambda *_, name=name: calls.update([name]))

    train([*args, "--steps", "1", "--eval-every", "0"], STEP, **instrumented(instrument))
    return calls


@pytest.mark.quick
def test_chunks_call_the_modules_of_the_rank_s_model(small_run):
    options = "--pp 2 --virtual-stages 2 --num-hidden-layers 4 --micro-batch-size 2"
    # On other ranks, embedding and norm are identities, which each chunk may have of its own.
    first, last = run_ranks(2, _hooked, [*small_run, *options.split()])
    assert {name: first[name] for name in ("embedding", "0", "2")} == {"embedding": 4, "0": 4, "2": 4}
    assert {name: last[name] for name in ("norm", "1", "3")} == {"norm": 4, "1": 4, "3": 4}


@pytest.mark.parametrize(
    ("options", "kinds", "chunks", "theory"),
    [
        # Of (P − 1) / (M V + P − 1), and (P − 1) / (3 M + P − 1).
        ("--virtual-stages 2", ("forward", "backward"), 2, "20.0%"),
        ("--pp-schedule zero-bubble", ("forward", "input", "weight"), 1, "14.3%"),
    ],
)
def test_timeline(small_run, tmp_path, options, kinds, chunks, theory, capfd):
    path = tmp_path / "run.svg"
    args = [*small_run, "--pp", "2", "--num-hidden-layers", "4", "--timeline", str(path), *options.split()]
    run_ranks(2, train, args, STEP)
    trace = json.loads(path.with_suffix(".json").read_text())["traceEvents"]
    labels = [""] if chunks == 1 else [f" chunk {chunk}" for chunk in range(chunks)]
    assert sorted((e["tid"], e["name"]) for e in trace) == sorted(
        (stage, f"{kind} {m}{label}") for stage in range(2) for kind in kinds for m in range(2) for label in labels
    )
    assert f"in theory {theory}" in capfd.readouterr().out
    # Each kind has its color, and a later chunk is paler.
    assert path.read_text().count("opacity: 0.4" if chunks == 2 else "fill: #9ccc8f") > 0


@pytest.mark.parametrize(
    ("args", "message"),
    [
        ("--virtual-stages 2", "--virtual-stages 2 interleaves the 1f1b schedule of several ranks, but --pp is 1"),
        ("--pp 2 --virtual-stages 2 --pp-schedule zero-bubble", "--pp is 2 and --pp-schedule zero-bubble"),
        ("--pp 2 --virtual-stages 2 --pp-schedule afab", "--pp is 2 and --pp-schedule afab"),
        ("--pp 2 --virtual-stages 0", "--virtual-stages must be at least 1, not 0"),
        (
            "--pp 2 --virtual-stages 2",
            "--pp 2 times --virtual-stages 2 chunks need a layer each, but the model has 2: lower one",
        ),
        (
            "--pp 2 --virtual-stages 2 --num-hidden-layers 4 --micro-batch-size 8",
            "--virtual-stages 2 takes micro-batches in groups of --pp 2, but a step has 1 on each data-parallel rank",
        ),
    ],
)
def test_errors_name_the_sizes(small_run, args, message):
    assert all(message in error for error in run_ranks(2, user_error, [*small_run, *args.split()], STEP))
