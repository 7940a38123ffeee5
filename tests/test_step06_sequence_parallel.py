"""Sequence parallelism: what it sends, keeps and overlaps, how it fails. That it is right is in test_parity.py."""

import re
from types import SimpleNamespace
from unittest.mock import patch

import parity
import pytest
import torch
import torch.distributed as dist
from conftest import load_step, make_trainer
from fake_ranks import check_ledgers, run_fake_ranks
from ranks import run_ranks
from running import ledger_of, user_error
from test_step03 import random_batch
from torch.utils._python_dispatch import TorchDispatchMode

from shared.config import parse
from shared.live_bytes import LiveBytes

STEP = "step06_4d"
ON = "--sequence-parallel"


def build(args):
    """What train() makes first."""
    module = load_step(STEP)
    # Without the hooks of buckets, which belong to a step.
    trainer = make_trainer(module, [*args, "--dp-engine", "naive"])
    return module, trainer.config, trainer.model


@pytest.mark.parametrize(
    ("ranks", "layout"),
    [
        (2, "--tp 2"),
        (2, "--tp 2 --dtype bfloat16 --no-tp-overlap"),
        (4, "--tp 4 --dtype bfloat16 --tie-word-embeddings True"),
        (4, "--pp 2 --tp 2 --micro-batch-size 2"),
        (4, "--cp 2 --tp 2 --dtype float64"),
        # 8 · 18 tokens: the loss takes them in two chunks.
        (2, "--tp 2 --seq-len 18 --micro-batch-size 8"),
        (4, "--tp 4 --tp-engine naive --recompute full --dtype bfloat16 --zero 1"),
    ],
)
def test_every_rank_sends_what_the_formula_says(small_run, ranks, layout):
    check_ledgers(ranks, [*small_run, ON, *layout.split()], STEP)


def test_bytes_by_hand(small_run):
    """2 micro-batches of (4, 16, 32) floats, 2 layers."""
    for found in run_ranks(2, ledger_of, [*small_run, "--tp", "2", ON, "--steps", "1"], STEP):
        bsh = 4 * 16 * 32 * 4
        # Behind the embedding, attention and MLP, and on the way back before attention, MLP and head.
        assert found["counts"]["tp", "reduce-scatter"] == (2 * 10, 2 * 10 * bsh)
        # The same the other way round, and the inputs of attention and MLP a second time.
        assert found["counts"]["tp", "all-gather"] == (2 * 14, 2 * 14 * bsh)
        # Three numbers per token for the loss; once per step the gradients of 5 norms, and the norm of all gradients.
        assert found["counts"]["tp", "all-reduce"] == (2 * 2 + 2, 4 * (2 * 3 * 4 * 16 + 5 * 32 + 1))


def test_a_stage_sends_its_part_of_the_tokens(small_run):
    """2 micro-batches of (4, 16 / 2, 32) floats one way, and their gradients back."""
    for found in run_ranks(4, ledger_of, [*small_run, "--tp", "2", "--pp", "2", ON, "--steps", "1"], STEP):
        assert found["counts"]["pp", "send"] == found["counts"]["pp", "receive"] == (2, 2 * 4 * 8 * 32 * 4)


def kept(args):
    """Bytes that a micro-batch leaves behind between forward and backward."""
    module, config, model = build(args)
    memory = LiveBytes()
    memory.track(list(model.parameters()))
    weights = memory.now
    with memory:
        # Its graph lives as long as the loss.
        loss = module.micro_batch_loss(config, model, random_batch(2, 16, 300))
        assert loss.requires_grad
        return memory.now - weights


def kept_by_a_layer(small_run, tp, *options):
    """On each rank. No message holds it any longer, as gloo's thread would: nothing is sent."""
    args = [*small_run, "--tp", tp, *options, "--num-hidden-layers"]
    few, many = (run_fake_ranks(tp, STEP, kept, [*args, layers]) for layers in (2, 3))
    return [b - a for a, b in zip(few, many, strict=True)]


def test_activations_of_a_layer_are_divided_by_tp(small_run):
    """Exact: the two norms keep their input, a number per token and their output; attention q, k, v, its output and
    a number per head and token; the MLP gate and up. 4 heads and 2 key-value heads of 8, t = 2."""
    bs, h, heads, kv_heads, d, f, t = 2 * 16, 32, 4, 2, 8, 48, 2
    norms, split = 2 * (2 * h + 1), 2 * (heads + kv_heads) * d + heads + 2 * f
    with_it = kept_by_a_layer(small_run, 2, ON)
    assert with_it == [4 * bs * (norms + split) // t] * 2
    assert kept_by_a_layer(small_run, 2) == [4 * bs * (norms + split // t)] * 2


def _events(args):
    """In the backward of q, k and v of a layer: shapes of matmuls, and when collectives leave and are waited for."""
    _, _, model = build(args)
    attention, x, events = model.model.layers["0"].self_attn, torch.randn(2, 3, 32, requires_grad=True), []

    class Matmuls(TorchDispatchMode):
        def __torch_dispatch__(self, func, types, args=(), kwargs=None):
            out = func(*args, **(kwargs or {}))
            if func is torch.ops.aten.mm.default:
                events.append(tuple(out.shape))
            return out

    def observed(name):
        real = getattr(dist, name)

        def collective(*args, **kwargs):
            events.append(name)
            work = real(*args, **kwargs)
            return work and SimpleNamespace(wait=lambda: events.append(f"wait {name}") or work.wait())

        return patch.object(dist, name, collective)

    loss = sum(linear(x).sum() for linear in (attention.q_proj, attention.k_proj, attention.v_proj))
    with observed("all_gather_single"), observed("reduce_scatter_single"), Matmuls():
        loss.backward()
    return events


def test_what_travels_while_gradients_are_computed(small_run):
    # Of 2 · 6 tokens, 6 on each rank.
    of_input, of_weights = [(12, 32)] * 3, [(16, 32), (8, 32), (8, 32)]
    args = [*small_run, "--tp", "2", ON]
    gather, scatter = "all_gather_single", "reduce_scatter_single"
    overlapped = [gather, *of_input, scatter, f"wait {gather}", *of_weights, f"wait {scatter}"]
    assert run_ranks(2, _events, args) == [overlapped] * 2
    blocking = [gather, *of_input, scatter, *of_weights]
    assert run_ranks(2, _events, [*args, "--no-tp-overlap"]) == [blocking] * 2


def _norm_gradients(args):
    """How many all-reduces over tp sum the norms' gradients of a step, and the norms' weights at the end."""
    module, models, counts = load_step(STEP), [], []

    def observed(config, model, reducer, real=module.sequence_parallel.sum_partial_gradients):
        models.append(model)
        with patch.object(dist, "all_reduce", wraps=dist.all_reduce) as all_reduce:
            real(config, model, reducer)
        counts.append(all_reduce.call_count)

    module.sequence_parallel.sum_partial_gradients = observed
    module.train(parse(module.Config, list(args)))
    return counts, {name: p.detach() for name, p in models[0].named_parameters() if "norm" in name}


@pytest.mark.parametrize("dtype", ["float32", "bfloat16"])
def test_norms_stay_bitwise_the_same(small_run, dtype):
    args = [*small_run, "--tp", "4", ON, "--dtype", dtype]
    (counts, weights), *others = run_ranks(4, _norm_gradients, args)
    assert counts == [1] * 4 and len(weights) == 5
    for _, theirs in others:
        for name, weight in weights.items():
            assert torch.equal(weight, theirs[name]) and not torch.equal(weight, torch.ones_like(weight)), name


def _sums(args, elements):
    """How many all-reduces, and what they make of gradients of which this rank has the first elements: 1, 2, ..."""
    module, config, model = build(args)
    parts = {p: torch.arange(1.0, elements + 1) for p in model.parameters()}
    with patch.object(dist, "all_reduce", wraps=dist.all_reduce) as all_reduce:
        module.sequence_parallel.sum_partial_gradients(config, model, SimpleNamespace(gradient=parts.get))
    changed = [
        name for name, p in model.named_parameters() if not torch.equal(parts[p], torch.arange(1.0, elements + 1))
    ]
    norm = parts[model.model.layers["0"].input_layernorm.weight]
    return all_reduce.call_count, all("norm" in name for name in changed), len(changed), norm.tolist()


def test_gradients_of_which_a_rank_has_a_part_or_nothing(small_run):
    """As a sharded optimizer has them."""
    args = [*small_run, "--tp", "2", ON]
    assert run_ranks(2, _sums, args, 3) == [(1, True, 5, [2, 4, 6])] * 2
    assert run_ranks(2, _sums, args, 0) == [(0, True, 0, [])] * 2


def _bug(module):
    module.sequence_parallel.sum_partial_gradients = lambda *args: None


def test_a_missing_sum_of_norm_gradients_is_found(small_run):
    args = (*small_run, "--dtype", "float64", "--steps", "1")
    for records in run_ranks(2, parity.record, STEP, (*args, "--tp", "2", ON), _bug):
        error, where = parity.difference(records, parity.reference(args))
        assert error > 1e-3 and "gradients" in where and "norm.weight" in where


def test_bfloat16_trains_as_without(small_run):
    args = (*small_run, "--dtype", "bfloat16", "--steps", "4", "--tp", "2")
    (plain, _), (sharded, _) = (run_ranks(2, parity.record, STEP, (*args, *more)) for more in ((), (ON,)))
    for ours, theirs in zip(sharded, plain, strict=True):
        assert ours.loss == pytest.approx(theirs.loss, rel=1e-3)
        assert ours.grad_norm == pytest.approx(theirs.grad_norm, rel=1e-2)


@pytest.mark.parametrize(
    ("ranks", "args", "message"),
    [
        (2, "--tp 2 --seq-len 17", "--seq-len 17 is not a multiple of 2, --cp 1 times --tp 2: try 16"),
        (4, "--tp 4 --seq-len 2", "--seq-len 2 is not a multiple of 4, --cp 1 times --tp 4: try 4"),
        # In zigzag, a multiple of 4 · 2 as well.
        (2, "--tp 3 --cp 4 --seq-len 32", "not a multiple of 12, --cp 4 times --tp 3: try 24"),
        (2, "--tp 0", "tp 0 does not make 2 processes"),
        (2, "--tp 2 --cp 0", "cp 0 · tp 2 does not make 2 processes"),
        (2, "--tp 2 --tp-engine naive --pp-schedule zero-bubble", "zero-bubble does: take --tp-engine fan-out, or"),
    ],
)
def test_errors_name_the_sizes(small_run, ranks, args, message):
    errors = run_ranks(ranks, user_error, [*small_run, ON, *args.split()], STEP)
    assert all(re.search(message, error) for error in errors), errors
