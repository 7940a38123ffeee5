"""step04: what it sends, what it holds, when it reduces, how it fails. That it is right is in test_parity.py."""

import itertools
import json

import parity
import pytest
import torch
from conftest import load_step, tiny_config
from fake_ranks import check_ledgers
from ranks import run_ranks
from running import instrumented, ledger_of, train, user_error
from safetensors.torch import load_file
from torch.utils._python_dispatch import TorchDispatchMode

from shared.config import parse
from shared.flops import flops_per_token
from shared.live_bytes import LiveBytes

STEP = "step04_pipeline_parallel"
# 5 layers on up to 5 stages, 3 micro-batches of 2 on each of 2 data-parallel ranks, 6 on one.
LONG = """--num-hidden-layers 5 --global-batch-size 12 --micro-batch-size 2 --dtype float64 --steps 3 --eval-every 3
          --optimizer sgd --lr 0.5"""


@pytest.mark.parametrize(
    ("ranks", "layout"),
    [
        (3, "--pp 3"),
        (4, "--pp 4"),
        (5, "--pp 5 --micro-batch-size 12"),
        (4, "--pp 4 --pp-schedule afab --micro-batch-size 1"),
        (8, "--pp 4 --dp 2"),
        (8, "--pp 4 --tp 2"),
        (16, "--pp 4 --dp 2 --tp 2"),
    ],
)
def test_parity_of_longer_pipelines(small_run, ranks, layout):
    args = (*small_run, *LONG.split(), "--tie-word-embeddings")
    parity.check(STEP, ranks, layout, *((*args, tied) for tied in parity.tied_or_not(ranks)))


@pytest.mark.parametrize("layers", [4, 7, 12])
@pytest.mark.parametrize("vocab_size", [64, 5000, 100_000])
@pytest.mark.parametrize("stages", [1, 2, 3, 4])
def test_no_other_split_has_a_cheaper_worst_stage(layers, vocab_size, stages):
    load_step(STEP)
    from stages import split_layers

    config = tiny_config(num_hidden_layers=layers, vocab_size=vocab_size)
    split = split_layers(config, 16, stages)
    assert [i for of_stage in split for i in of_stage] == list(range(layers)) and all(split)
    head = 6 * config.hidden_size * vocab_size
    layer = (flops_per_token(config, 16, causal=True) - head) / layers

    def worst(counts):
        costs = [count * layer for count in counts]
        costs[0] += config.hidden_size
        costs[-1] += head
        return max(costs)

    every = (c for c in itertools.product(range(1, layers + 1), repeat=stages) if sum(c) == layers)
    assert worst([len(of_stage) for of_stage in split]) == pytest.approx(min(worst(counts) for counts in every))


@pytest.mark.parametrize(
    ("ranks", "layout"),
    [
        (2, "--pp 2"),
        (2, "--pp 2 --pp-schedule afab --micro-batch-size 1 --tie-word-embeddings True"),
        (4, "--pp 2 --dp 2 --dtype bfloat16"),
        (4, "--pp 4 --num-hidden-layers 4 --tie-word-embeddings True --dtype float64"),
    ],
)
def test_every_rank_sends_what_the_formula_says(small_run, ranks, layout):
    check_ledgers(ranks, [*small_run, *layout.split()], STEP)


def test_bytes_between_two_stages(small_run):
    """By hand: 2 micro-batches of (4, 16, 32) floats one way, and their gradients back."""
    for found in run_ranks(2, ledger_of, [*small_run, "--pp", "2", "--steps", "1"], STEP):
        assert found["counts"]["pp", "send"] == found["counts"]["pp", "receive"] == (2, 2 * 4 * 16 * 32 * 4)


class _Copies(TorchDispatchMode):
    """Counts the copies in bfloat16 that are made of weights of row-parallel linears, (32, 48)."""

    def __init__(self):
        super().__init__()
        self.made = 0

    def __torch_dispatch__(self, func, types, args=(), kwargs=None):
        out = func(*args, **(kwargs or {}))
        self.made += func._opname == "_to_copy" and out.dtype == torch.bfloat16 and out.shape == (32, 48)
        return out


def _copies(args):
    with _Copies() as copies:
        train(args, STEP)
    return copies.made


@pytest.mark.parametrize("schedule", ["1f1b", "afab"])
def test_micro_batches_under_way_share_the_copies_of_weights_in_bfloat16(small_run, schedule):
    """2 steps of 8 micro-batches through a layer with 2 such linears. (They are copied again, where backward computes
    what it needs of the MLP, if they are not shared.)"""
    options = "--dtype bfloat16 --pp 2 --micro-batch-size 1 --steps 2 --eval-every 0 --head-dim 12 --lr 0 "
    options += f"--min-lr 0 --pp-schedule {schedule}"
    assert run_ranks(2, _copies, [*small_run, *options.split()]) == [2 * 2, 2 * 2]


def _held(args):
    """Micro-batches held after each action, and the largest number of them whose output still has its data."""
    held, with_data = [], []

    def pipeline(original):
        class Observed(original):
            def _observe(self):
                held.append(len(self.held))
                outputs = [output for _, output in self.held.values()]
                with_data.append(sum(o.untyped_storage().nbytes() >= o.nbytes for o in outputs if o.ndim))

            def _forward(self, *args):
                super()._forward(*args)
                if self.trains:
                    self._observe()

            def _backward(self, *args):
                super()._backward(*args)
                self._observe()

            def _execute(self, *args):
                total = super()._execute(*args)
                # Nothing is left over, neither of a step nor of an evaluation.
                assert not self.held
                for channel in (self.to_next, self.to_previous):
                    assert channel.sending is channel.sent is channel.receiving is channel.received is None
                return total

        return Observed

    train(args, STEP, Pipeline=pipeline)
    return max(held), held[-1], max(with_data)


@pytest.mark.parametrize("micro_batches", [1, 2, 8])
@pytest.mark.parametrize("schedule", ["afab", "1f1b"])
def test_a_stage_holds_no_more_micro_batches_than_it_must(small_run, schedule, micro_batches):
    sizes = f"--pp 4 --num-hidden-layers 4 --steps 2 --eval-every 1 --micro-batch-size {8 // micro_batches}"
    observed = run_ranks(4, _held, [*small_run, *sizes.split(), "--pp-schedule", schedule])
    for stage, (most, last, with_data) in enumerate(observed):
        assert most == (micro_batches if schedule == "afab" else min(4 - stage, micro_batches))
        assert last == 0
        # What has left is freed: at most the output that is on its way exists, and none on the last stage.
        assert with_data == (0 if stage == 3 else 1)


def _bytes_in_flight(args):
    """Peak bytes of live tensors of a step."""
    memory = LiveBytes()

    def pipeline(original):
        class Observed(original):
            def _execute(self, *args):
                with memory:
                    return super()._execute(*args)

        return Observed

    train(args, STEP, Pipeline=pipeline)
    return memory.peak


def test_micro_batches_in_flight_share_the_weights(small_run):
    """In bfloat16 as well: a micro-batch under way costs no more than in float32, whose weights need no copies."""
    grows = {}
    for dtype in ("float32", "bfloat16"):
        options = f"--pp 2 --pp-schedule afab --steps 1 --eval-every 0 --hidden-size 64 --dtype {dtype}"
        options += " --intermediate-size 512"
        few, many = (
            run_ranks(2, _bytes_in_flight, [*small_run, *options.split(), *sizes.split()])[0]
            for sizes in (
                "--micro-batch-size 1 --global-batch-size 2 --seq-len 8",
                "--micro-batch-size 1 --global-batch-size 8 --seq-len 8",
            )
        )
        grows[dtype] = many - few
    assert grows["bfloat16"] < grows["float32"]


def _order(args):
    """Backwards of micro-batches, and all-reduces over dp, in the order in which they start."""
    order = []

    def pipeline(original):
        class Observed(original):
            def _backward(self, action):
                order.append(f"backward {action.micro_batch}")
                super()._backward(action)

            def sum_tied_gradients(self):
                order.append("tied")
                super().sum_tied_gradients()

        return Observed

    def observe(trainer):
        reducer = trainer.reducer
        launch, finish = reducer._launch, reducer.finish
        reducer._launch = lambda: order.append("reduce") or launch()
        reducer.finish = lambda: finish() or order.append("reduced")

    train(args, STEP, Pipeline=pipeline, **instrumented(observe))
    return order


def test_reduction_starts_with_the_last_backward_of_a_stage_and_tied_gradients_follow_it(small_run):
    sizes = "--pp 2 --dp 2 --steps 1 --micro-batch-size 1 --bucket-mib 0.001 --tie-word-embeddings True --eval-every 0"
    for order in run_ranks(4, _order, [*small_run, *sizes.split()]):
        assert order[:4] == [f"backward {m}" for m in range(4)]
        assert order[4:] == ["reduce"] * (len(order) - 6) + ["reduced", "tied"] and len(order) > 8


def _parameters(args):
    seen = []
    train(args, STEP, **instrumented(seen.append))
    return {name: p.untyped_storage().nbytes() for name, p in seen[0].model.named_parameters()}


@pytest.mark.parametrize("tied", ["True", "False"])
def test_a_stage_holds_its_own_parameters_only(small_run, tied):
    args = [*small_run, "--steps", "1", "--num-hidden-layers", "3", "--tie-word-embeddings", tied]
    (whole,) = run_ranks(1, _parameters, args)
    first, second, third = run_ranks(3, _parameters, [*args, "--pp", "3"])
    assert whole == {**first, **second, **third}
    shared = {"model.embed_tokens.weight"} if tied == "True" else set()
    assert first.keys() & third.keys() == shared and not second.keys() & (first.keys() | third.keys())


def test_export_equals_step01(small_run, tmp_path):
    """Also with a tied embedding, which two stages hold, and a vocabulary that tp does not divide."""
    args = (*small_run, "--dtype", "float64", "--tie-word-embeddings", "True", "--vocab-size", "301")
    step01 = load_step("step01_single_gpu")
    step01.train(parse(step01.Config, [*args, "--export-dir", str(tmp_path / "one")]))
    run_ranks(4, train, [*args, "--pp", "2", "--tp", "2", "--export-dir", str(tmp_path / "four")], STEP)
    one, four = (load_file(tmp_path / name / "model.safetensors") for name in ("one", "four"))
    assert one.keys() == four.keys()
    for name, tensor in one.items():
        torch.testing.assert_close(four[name], tensor, rtol=0, atol=1e-10)
    assert {p.name for p in (tmp_path / "one").iterdir()} == {p.name for p in (tmp_path / "four").iterdir()}
    # And it can be gone on from, at another layout.
    more = [*args, "--init-from", str(tmp_path / "four"), "--steps", "1", "--export-dir", str(tmp_path / "more")]
    run_ranks(2, train, [*more, "--pp", "2"], STEP)


@pytest.mark.quick
@pytest.mark.parametrize("schedule", ["afab", "1f1b"])
def test_timeline(small_run, tmp_path, schedule, capfd):
    path = tmp_path / "pictures" / "run.svg"
    run_ranks(
        2,
        train,
        [*small_run, "--pp", "2", "--pp-schedule", schedule, "--timeline", str(path), "--eval-every", "2"],
        STEP,
    )
    assert path.read_text().startswith("<?xml")
    trace = json.loads(path.with_suffix(".json").read_text())["traceEvents"]
    assert sorted((e["tid"], e["name"]) for e in trace) == sorted(
        (stage, f"{kind} {m}") for stage in range(2) for kind in ("forward", "backward") for m in range(2)
    )
    for stage in range(2):
        mine = sorted((e["ts"], e["ts"] + e["dur"]) for e in trace if e["tid"] == stage)
        assert all(before[1] <= after[0] for before, after in itertools.pairwise(mine))
    # (P − 1) / (M + P − 1) = 1/3
    assert "in theory 33.3%" in capfd.readouterr().out


@pytest.mark.parametrize(
    ("args", "message"),
    [
        ("--pp 4", "4 pipeline stages need a layer each, but the model has 2: lower --pp"),
        ("--pp 3", "pp 3 · dp any · tp 1 does not make 4 processes"),
        ("--pp 2 --dp 2 --tp 2", "pp 2 · dp 2 · tp 2 does not make 4 processes"),
        ("--pp 2 --dp 2 --micro-batch-size 8", "8 is not a multiple of 2 data-parallel ranks"),
        ("--pp 2 --timeline run.pdf", "--timeline run.pdf must end in .svg or .png"),
        ("--pp 2 --timeline {here}/run.png", "run.json exists already"),
        ("--pp 2 --timeline {here}/new.png --metrics-file {here}/new.json", "new.json exists already or is --metrics"),
    ],
)
def test_errors_name_the_sizes(small_run, tmp_path, args, message):
    (tmp_path / "run.json").touch()
    errors = run_ranks(4, user_error, [*small_run, *args.format(here=tmp_path).split()], STEP)
    assert all(message in error for error in errors)


def test_unknown_schedule(small_run, capsys):
    with pytest.raises(SystemExit):
        parse(load_step(STEP).Config, [*small_run, "--pp-schedule", "2f2b"])
    assert "2f2b" in capsys.readouterr().err
