"""step03: what it sends, what it holds, how it fails. That it is right is in test_parity.py."""

import os
import re
from collections import Counter
from types import SimpleNamespace
from unittest.mock import patch

import parity
import pytest
import torch
import torch.distributed as dist
from conftest import load_step, make_trainer
from fake_ranks import check_ledgers
from ranks import run_ranks
from running import user_error
from safetensors.torch import load_file
from torch.utils._python_dispatch import TorchDispatchMode

from shared.config import parse
from shared.data import Batch
from shared.ledger import Ledger, Traffic
from shared.live_bytes import LiveBytes, live_state
from shared.llama_configs import load_model_config
from shared.model import LlamaForCausalLM

STEP = "step03_tensor_parallel"


def train(args, step=STEP):
    module = load_step(step)
    module.train(parse(module.Config, list(map(str, args))))


def build(args):
    """What train() makes first."""
    module = load_step(STEP)
    # Without the hooks of buckets, which belong to a step.
    return module, make_trainer(module, [*args, "--dp-engine", "naive"])


def full_shapes(args):
    """Of step01's parameters."""
    with torch.device("meta"):
        model = LlamaForCausalLM(load_model_config(parse(load_step("step01_single_gpu").Config, args)))
    return {name: p.shape for name, p in model.named_parameters()}


def part_of(name, full, tp, rank, kv_heads=2):
    """What a rank has to hold of a full tensor, written a second time."""
    if "norm" in name:
        return full
    count = min(tp, kv_heads) if "k_proj" in name or "v_proj" in name else tp
    dim = 1 if "o_proj" in name or "down_proj" in name else 0
    size, larger = divmod(full.shape[dim], count)
    return full.split([size + (i < larger) for i in range(count)], dim)[rank * count // tp]


def random_batch(sequences, seq_len, vocab_size):
    torch.manual_seed(0)
    ids = torch.randint(vocab_size, (sequences, seq_len + 1))
    return Batch(ids[:, :-1], ids[:, 1:], torch.arange(seq_len).expand(sequences, -1))


@pytest.mark.parametrize(
    ("ranks", "options"),
    [
        (2, "--tp 2"),
        (2, "--dp 1 --tp 2 --dtype bfloat16"),
        (4, "--dp 2 --tp 2"),
        (2, "--tp 2 --dtype float64 --micro-batch-size 2"),
        (2, "--tp 2 --tie-word-embeddings True"),
        # 8 · 18 tokens: the loss takes them in two chunks.
        (2, "--tp 2 --seq-len 18 --micro-batch-size 8 --no-tp-overlap"),
        (4, "--tp 4 --tp-engine naive --dtype bfloat16"),
        # Each rank is alone, and sums no hidden states.
        (2, "--dp 2 --tp 1"),
    ],
)
def test_every_rank_sends_what_the_formula_says(small_run, ranks, options):
    check_ledgers(ranks, [*small_run, "--eval-every", "2", *options.split()], STEP)


def _sent(args):
    """Shapes of the all-reduces of forward and of backward, and all that a ledger sees."""
    module, trainer = build(args)
    sent = []

    def all_reduce(tensor, *args, real=dist.all_reduce, **kwargs):
        sent.append(tuple(tensor.shape))
        return real(tensor, *args, **kwargs)

    with patch.object(dist, "all_reduce", all_reduce), Ledger() as ledger:
        loss = module.micro_batch_loss(trainer.config, trainer.model, random_batch(4, 16, 300))
        forward = sent[:]
        loss.backward()
    return forward, sent[len(forward) :], ledger.counts


@pytest.mark.parametrize(("engine", "summed_in_backward"), [("naive", 5), ("fan-out", 2)])
@pytest.mark.parametrize("tp", [2, 4])
def test_what_a_micro_batch_sends_counted_by_hand(small_run, tp, engine, summed_in_backward):
    bsh, layers = (4, 16, 32), 3
    options = ["--num-hidden-layers", layers, "--tp", tp, "--tp-engine", engine]
    for forward, backward, counts in run_ranks(tp, _sent, [*small_run, *options]):
        # The embedding, attention and MLP of each layer, and of the loss a number per token, then two: no logits.
        assert forward == [bsh] * (1 + 2 * layers) + [(64, 1), (64, 2)]
        # The head; q, k, v, gate and up, each alone, or as two fan-outs. With 4 ranks, 2 hold the same key-value head:
        # keys and values, (d, h).
        copies = 2 * layers if tp == 4 else 0
        assert Counter(backward) == Counter({bsh: 1 + summed_in_backward * layers, (8, 32): copies})
        elements = (2 + (2 + summed_in_backward) * layers) * 4 * 16 * 32 + 3 * 64 + copies * 8 * 32
        assert counts == {("tp", "all-reduce"): Traffic(len(forward + backward), 4 * elements)}


def _state_bytes(args):
    _, trainer = build(args)
    trainer.forward_backward([random_batch(4, 16, 301)])
    trainer.optimizer.step()
    memory = LiveBytes()
    memory.track(live_state(trainer.model, trainer.optimizer))
    return memory.now


@pytest.mark.parametrize("tp", [1, 2, 4])
def test_bytes_of_the_state(small_run, tp):
    """Of storages: a part that is a view of the full tensor would keep all of it."""
    shapes = full_shapes([*small_run, "--vocab-size", "301"])
    for rank, nbytes in enumerate(run_ranks(tp, _state_bytes, [*small_run, "--vocab-size", "301", "--tp", tp])):
        numel = [part_of(name, torch.empty(shape, device="meta"), tp, rank).numel() for name, shape in shapes.items()]
        # Parameter, gradient, two moments; and AdamW counts its steps once for each tensor.
        assert nbytes == 4 * 4 * sum(numel) + 4 * len(numel)


@pytest.mark.parametrize("options", ["", "--vocab-size 301", "--tie-word-embeddings True"])
def test_export_is_that_of_step01_and_starts_a_run(small_run, tmp_path, options):
    args = [*small_run, "--steps", "3", "--dtype", "float64", *options.split()]
    one, two = tmp_path / "one", tmp_path / "two"
    train([*args, "--export-dir", one], "step01_single_gpu")
    run_ranks(2, train, [*args, "--tp", 2, "--export-dir", two])
    assert sorted(os.listdir(one)) == sorted(os.listdir(two))
    assert (one / "config.json").read_text() == (two / "config.json").read_text()
    expected, tensors = load_file(one / "model.safetensors"), load_file(two / "model.safetensors")
    assert tensors.keys() == expected.keys()
    for name, tensor in expected.items():
        # Also compares shapes: no rows of padding.
        torch.testing.assert_close(tensors[name], tensor, rtol=1e-10, atol=1e-10)
    args = (*args, "--init-from", str(one))
    parity.check(STEP, 2, "--tp 2", args)
    for tp in (2, 4):
        for rank, parts in enumerate(run_ranks(tp, _parameters, [*args, "--tp", tp])):
            for name, part in parts.items():
                assert torch.equal(part, part_of(name, expected[name], tp, rank)), name


def _parameters(args):
    _, trainer = build(args)
    return {name: p.detach() for name, p in trainer.model.named_parameters()}


@pytest.mark.parametrize(("heads", "kv_heads", "tp"), [(6, 3, 3), (6, 3, 6), (4, 1, 2), (4, 1, 4), (12, 2, 6)])
def test_parity_of_shared_key_value_heads(small_run, heads, kv_heads, tp):
    sizes = f"--hidden-size 48 --num-attention-heads {heads} --num-key-value-heads {kv_heads}"
    options = f"{sizes} --dtype float64 --steps 3 --optimizer sgd --lr 0.5"
    parity.check(STEP, tp, f"--tp {tp}", (*small_run, *options.split()))


def _counted(args):
    module, trainer = build(args)
    counted = set(module.tensor_parallel.counted(trainer.model))
    return {name: p.numel() for name, p in trainer.model.named_parameters() if p in counted}


@pytest.mark.parametrize("options", ["", "--tie-word-embeddings True", "--vocab-size 301"])
@pytest.mark.parametrize("tp", [2, 4])
def test_each_number_of_the_model_is_counted_on_one_rank(small_run, tp, options):
    args = [*small_run, *options.split()]
    counted = sum((Counter(rank) for rank in run_ranks(tp, _counted, [*args, "--tp", tp])), Counter())
    assert counted == {name: shape.numel() for name, shape in full_shapes(args).items()}


def _held_after_training(args):
    module = load_step(STEP)
    seen, build = [], module.Trainer.build_model
    module.Trainer.build_model = lambda *args: seen.append(build(*args)) or seen[0]
    module.train(parse(module.Config, args))
    return dict(seen[0].named_parameters())


def test_what_several_ranks_hold_stays_bitwise_the_same(small_run):
    ranks = run_ranks(4, _held_after_training, [*small_run, "--tp", "4"])
    for name, p in ranks[0].items():
        # Norms on all, keys and values on two neighbours each.
        same = {"norm": [1, 2, 3], "k_proj": [1], "v_proj": [1]}
        for rank in next((others for part, others in same.items() if part in name), []):
            assert torch.equal(p, ranks[rank][name]), name


def _events(args):
    """In the backward of q, k and v of a layer: shapes of matmuls, and when the all-reduce leaves and is waited for."""
    _, trainer = build(args)
    attention, x, events = trainer.model.model.layers["0"].self_attn, torch.randn(2, 3, 32, requires_grad=True), []

    class Matmuls(TorchDispatchMode):
        def __torch_dispatch__(self, func, types, args=(), kwargs=None):
            out = func(*args, **(kwargs or {}))
            if func is torch.ops.aten.mm.default:
                events.append(tuple(out.shape))
            return out

    def all_reduce(*args, real=dist.all_reduce, **kwargs):
        events.append("launch")
        work = real(*args, **kwargs)
        return work and SimpleNamespace(wait=lambda: events.append("wait") or work.wait())

    loss = sum(linear(x).sum() for linear in (attention.q_proj, attention.k_proj, attention.v_proj))
    with patch.object(dist, "all_reduce", all_reduce), Matmuls():
        loss.backward()
    return events


def test_the_sum_over_ranks_runs_while_weights_get_their_gradients(small_run):
    of_input, of_weights = [(6, 32)] * 3, [(16, 32), (8, 32), (8, 32)]
    args = [*small_run, "--tp", "2"]
    assert run_ranks(2, _events, args) == [[*of_input, "launch", *of_weights, "wait"]] * 2
    assert run_ranks(2, _events, [*args, "--no-tp-overlap"]) == [[*of_input, "launch", *of_weights]] * 2


@pytest.mark.parametrize(
    ("ranks", "args", "message"),
    [
        (3, "--tp 3", "4 heads, 2 key-value heads and intermediate size 48: tp must divide .* so be one of 1, 2, 4$"),
        (4, "--tp 4 --intermediate-size 50", "intermediate size 50: .* one of 1, 2$"),
        (6, "--tp 6 --hidden-size 48 --num-attention-heads 12 --num-key-value-heads 4", "one of 1, 2, 4, 12$"),
        (2, "--dp 2 --tp 2", "dp 2 · tp 2 does not make 2 processes"),
        (2, "--tp 4", "dp any · tp 4 does not make 2 processes"),
        (2, "--tp 0", "tp 0 does not make 2 processes"),
    ],
)
def test_errors_name_the_sizes(small_run, ranks, args, message):
    assert all(re.search(message, error) for error in run_ranks(ranks, user_error, [*small_run, *args.split()], STEP))
