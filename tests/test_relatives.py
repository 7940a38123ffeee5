"""Llama's relatives: each is transformers' own class of it, and every layout trains the same model."""

import random
import sys
from functools import lru_cache

import parity
import pytest
import torch
import torch.nn.functional as F
from fake_ranks import check_ledgers
from ranks import run_ranks
from relatives import RELATIVES, ROPES, random_model, relative, saved
from running import instrumented, train
from transformers import modeling_rope_utils

from shared.loss import linear_cross_entropy
from shared.model import LlamaForCausalLM


def float64_transformers(monkeypatch, model):
    """Lift what transformers computes in float32 whatever the model's dtype, as in test_model.py."""

    def norm(self, x):
        return self.weight * (x * torch.rsqrt(x.pow(2).mean(-1, keepdim=True) + self.variance_epsilon))

    monkeypatch.setattr(type(model.model.norm), "forward", norm)


class Float64:
    """torch, in which float32 is float64."""

    float = float32 = torch.float64

    def __getattr__(self, name):
        return getattr(torch, name)


def random_sizes(seed):
    draw = random.Random(seed)
    kv_heads, groups, head_dim = draw.choice([1, 2, 3]), draw.choice([1, 2]), draw.choice([8, 10, 12])
    layers, heads = draw.choice([1, 2, 3]), kv_heads * groups
    return {
        "vocab_size": draw.randint(40, 120),
        "hidden_size": heads * draw.choice([6, 8, 12]),
        "intermediate_size": draw.randint(10, 60),
        "num_hidden_layers": layers,
        "num_attention_heads": heads,
        "num_key_value_heads": kv_heads,
        "head_dim": head_dim,
        "tie_word_embeddings": draw.random() < 0.5,
        "rms_norm_eps": 10 ** draw.uniform(-6, -3),
        **({"no_rope_layers": [draw.randint(0, 1) for _ in range(layers)]}),
    }


@pytest.mark.parametrize("rope", ROPES)
@pytest.mark.parametrize("name", RELATIVES)
def test_float64_equals_transformers(monkeypatch, name, rope):
    """Logits, loss and every gradient, at positions beyond the original context, with random sizes."""
    sizes = random_sizes(f"{name} {rope}")
    sizes = sizes if name == "smollm3" else {key: value for key, value in sizes.items() if key != "no_rope_layers"}
    config = relative(name, **sizes, rope_parameters=dict(ROPES[rope]))
    monkeypatch.setattr(torch, "float", torch.float64)
    monkeypatch.setattr(modeling_rope_utils, "torch", Float64())
    theirs = random_model(config).double()
    float64_transformers(monkeypatch, theirs)
    ours = LlamaForCausalLM(config).double()
    ours.load_state_dict(theirs.state_dict())
    assert list(ours.state_dict()) == list(theirs.state_dict())

    ids = torch.randint(config.vocab_size, (2, 97))
    inputs, labels, positions = ids[:, :-1], ids[:, 1:], torch.arange(96).expand(2, -1) + 20
    logits = theirs(input_ids=inputs, position_ids=positions).logits
    torch.testing.assert_close(ours(inputs, positions), logits, rtol=1e-10, atol=1e-12)
    their_loss = F.cross_entropy(logits.flatten(0, 1), labels.flatten())
    loss = linear_cross_entropy(ours.model(inputs, positions), ours.lm_head.weight, labels) / labels.numel()
    torch.testing.assert_close(loss, their_loss, rtol=1e-10, atol=0)
    loss.backward(), their_loss.backward()
    for (key, p), q in zip(ours.named_parameters(), theirs.parameters(), strict=True):
        torch.testing.assert_close(p.grad, q.grad, rtol=1e-10, atol=1e-12, msg=lambda m, key=key: f"{key}: {m}")


@pytest.fixture(scope="session")
def run_of(tmp_path_factory):
    """Arguments of a run in float64 from a checkpoint of each family, on packed documents."""
    directory = tmp_path_factory.mktemp("relatives")
    (directory / "texts").mkdir()
    for i in range(200):
        (directory / "texts" / f"{i}.txt").write_text(" ".join(str(i * j) for j in range(1 + i % 5 * (i % 4))))
    options = (
        f"--dataset {directory / 'texts'} --tokenizer bpe --dtype float64 --seq-len 16 --global-batch-size 8 "
        "--micro-batch-size 4 --steps 2 --eval-every 0 --warmup-steps 0 --device cpu --optimizer sgd --lr 0.5"
    )
    models = {name: saved(directory, name, torch.float64) for name in RELATIVES}
    return {name: (*options.split(), "--init-from", str(path)) for name, path in models.items()}


@lru_cache
def of_one_rank(args):
    """step01 knows no documents."""
    return run_ranks(1, parity.record, "step06_4d", args)[0] if "--mask-documents" in args else parity.reference(args)


@pytest.mark.parametrize(("step", "ranks", "layout", "names"), parity.LAYOUTS_OF_RELATIVES)
def test_parity(run_of, step, ranks, layout, names):
    """As in test_parity.py. A layout's ranks train one model after the other."""
    alike = [option for option in layout.split() if option == "--mask-documents"]
    runs = [run_of[name] for name in names.split()]
    of_ranks = run_ranks(ranks, parity.record_each, step, [(*args, *layout.split()) for args in runs])
    for rank, of_runs in enumerate(of_ranks):
        for records, args, name in zip(of_runs, runs, names.split(), strict=True):
            error, where = parity.difference(records, of_one_rank((*args, *alike)))
            assert error <= parity.TOLERANCE, f"{name}, rank {rank}: {where} is off by {error:.1e}"


@pytest.mark.parametrize("dtype", ["float32", "bfloat16"])
@pytest.mark.parametrize("name", ["qwen2", "qwen3"])
def test_one_tensor_parallel_rank_is_bitwise_step02(run_of, name, dtype):
    args = (*run_of[name], "--dtype", dtype)
    (expected,), (records,) = (
        run_ranks(1, parity.record, step, args) for step in ("step02_data_parallel", "step03_tensor_parallel")
    )
    for ours, theirs in zip(records, expected, strict=True):
        assert (ours.loss, ours.grad_norm) == (theirs.loss, theirs.grad_norm)
        assert all(torch.equal(ours.weights[key], weight) for key, weight in theirs.weights.items())


@pytest.mark.parametrize(
    ("step", "ranks", "layout", "name"),
    [
        ("step03_tensor_parallel", 4, "--tp 4", "qwen2"),
        ("step03_tensor_parallel", 2, "--tp 2 --tp-engine naive", "qwen3"),
        ("step06_4d", 2, "--tp 2 --zero 2", "qwen3"),
        ("step06_4d", 4, "--tp 4 --sequence-parallel", "llama"),
    ],
)
def test_every_rank_sends_what_the_formula_says(run_of, step, ranks, layout, name):
    check_ledgers(ranks, [*run_of[name], *layout.split()], step)


def _whole_parameters(args):
    """Those of which every tensor-parallel rank has the whole, after training."""
    seen = []
    train(args, "step06_4d", **instrumented(seen.append))
    split = sys.modules["tensor_parallel"].sharded_modules(seen[0].model)
    return {name: p.detach() for name, p in seen[0].model.named_parameters() if name not in split}


@pytest.mark.parametrize("options", ["", "--sequence-parallel"])
@pytest.mark.parametrize(("name", "count"), [("llama", 5 + 2 * 2), ("qwen3", 5 + 2 * 2)])
def test_what_several_ranks_hold_stays_bitwise_the_same(run_of, name, count, options):
    """In bfloat16, with masters in the optimizer's shard: norms, norms of heads, and biases of o and down."""
    args = [*run_of[name], "--dtype", "bfloat16", "--tp", "2", "--zero", "1", *options.split()]
    ours, theirs = run_ranks(2, _whole_parameters, args)
    assert len(ours) == count and all(torch.equal(p, theirs[key]) for key, p in ours.items())
