"""step05: what it computes, sends and holds, how it fails. That layouts train the same model is in test_parity.py."""

import re
import subprocess
import sys
from types import SimpleNamespace
from unittest.mock import patch

import parity
import pytest
import torch
import torch.distributed as dist
import torch.nn.functional as F
from conftest import ROOT, load_step
from live_bytes import LiveBytes
from ranks import run_ranks
from test_step04 import _counts
from torch._subclasses.fake_tensor import FakeTensorMode

from shared.config import UserError, parse

STEP = "step05_context_parallel"
README = (ROOT / STEP / "README.md").read_text()
TORCHRUN = [sys.executable, "-m", "torch.distributed.run", "--nproc-per-node", "2", f"{STEP}/train.py"]
ENGINES = ["ring zigzag", "ring contiguous", "all-to-all contiguous"]


def start(cp):
    load_step(STEP)
    import context_parallel

    from shared.distributed import start_mesh

    mesh, _ = start_mesh(SimpleNamespace(device="cpu", timeout=60), cp=cp)
    return context_parallel, mesh.get_group("cp")


def tensors(s, heads=8, kv_heads=4, dtype=torch.float64):
    """q, k, v and a gradient of the output, of 2 sequences."""
    generator = torch.Generator().manual_seed(0)
    return [
        torch.randn(2, h, s, 16, dtype=torch.float64, generator=generator).to(dtype)
        for h in (heads, kv_heads, kv_heads, heads)
    ]


def whole(q, k, v, grad):
    """Output and gradients of attention over the whole sequence."""
    q, k, v = (x.clone().requires_grad_() for x in (q, k, v))
    out = F.scaled_dot_product_attention(q, k, v, is_causal=True, enable_gqa=True)
    out.backward(grad)
    return [out.detach(), q.grad, k.grad, v.grad]


def _attention(cp, engine, s, dtype):
    """The same, of this rank's part, and the positions of that."""
    context_parallel, group = start(cp)
    kind, split = engine.split()
    positions = context_parallel.local_positions(s, dist.get_rank(group), cp, split == "zigzag")
    *qkv, grad = (x[:, :, positions] for x in tensors(s, dtype=dtype))
    q, k, v = (x.clone().requires_grad_() for x in qkv)
    if kind == "ring":
        out = context_parallel.ring_attention(q, k, v, group, split == "zigzag")
    else:
        out = context_parallel.all_to_all_attention(q, k, v, group)
    out.backward(grad)
    return positions, [out.detach(), q.grad, k.grad, v.grad]


def put_together(parts, s):
    order = torch.cat([positions for positions, _ in parts]).argsort()
    return [torch.cat(column, 2)[:, :, order] for column in zip(*(part for _, part in parts), strict=True)]


@pytest.mark.parametrize("engine", ENGINES)
@pytest.mark.parametrize("cp", [1, 2, 3, 4])
def test_attention_is_exact(cp, engine):
    if "all-to-all" in engine and cp == 3:
        pytest.skip("4 key-value heads cannot be shared by 3 ranks")
    parts = run_ranks(cp, _attention, cp, engine, 24, torch.float64)
    for ours, theirs in zip(put_together(parts, 24), whole(*tensors(24)), strict=True):
        torch.testing.assert_close(ours, theirs, rtol=0, atol=1e-13)


@pytest.mark.parametrize("engine", ENGINES)
def test_bfloat16_is_as_accurate_as_attention_over_the_whole_sequence(engine):
    """Errors against float64, root mean square: at most 1.2 times those of torch's own attention in bfloat16."""
    s, rounded = 512, [x.double() for x in tensors(512, dtype=torch.bfloat16)]
    exact, theirs = whole(*rounded), whole(*(x.bfloat16() for x in rounded))
    ours = put_together(run_ranks(4, _attention, 4, engine, s, torch.bfloat16), s)
    for name, a, b, reference in zip(("out", "dq", "dk", "dv"), ours, theirs, exact, strict=True):
        error, allowed = ((x.double() - reference).square().mean().sqrt() for x in (a, b))
        assert error <= 1.2 * allowed, (name, error / allowed)


@pytest.mark.parametrize("cp", [2, 3, 4, 8])
def test_zigzag_gives_every_rank_the_same_scores_and_each_score_once(cp):
    load_step(STEP)
    from context_parallel import local_positions, visible

    s = 4 * cp
    for zigzag in (True, False):
        seen, work = torch.zeros(s, s, dtype=torch.int), []
        for rank in range(cp):
            mine = local_positions(s, rank, cp, zigzag)
            work.append(0)
            for source in range(cp):
                part = visible(rank, source, len(mine), zigzag)
                if part:
                    queries, keys, causal = part
                    rows, columns = mine[queries], local_positions(s, source, cp, zigzag)[keys]
                    block = torch.ones(len(rows), len(columns), dtype=torch.int)
                    block = block.tril() if causal else block
                    seen[rows.unsqueeze(1), columns] += block
                    work[-1] += int(block.sum())
        assert torch.equal(seen, torch.ones(s, s, dtype=torch.int).tril())
        if zigzag:
            assert len(set(work)) == 1
        else:
            assert work[-1] > 2 * work[0]


def _peak(s):
    context_parallel, group = start(2)
    q, k, v, grad = (x.requires_grad_() for x in tensors(s, dtype=torch.float32))
    with LiveBytes() as memory:
        context_parallel.ring_attention(q, k, v, group, True).backward(grad)
    return memory.peak


def test_memory_grows_linearly_with_the_sequence():
    small, large = (run_ranks(2, _peak, s) for s in (512, 2048))
    # A matrix of scores would make it 16 times as much.
    for a, b in zip(small, large, strict=True):
        assert b == pytest.approx(4 * a, rel=0.05)
        # And less than one such matrix would take: 2 sequences, 8 heads.
        assert b < 2 * 8 * 2048**2 * 4 / 8


def _hops(travels):
    """The order in which blocks leave, are computed, and are waited for."""
    context_parallel, group = start(3)
    q, k, v, _ = tensors(12)
    events = []

    class Passing(context_parallel.Passing):
        def __init__(self, *args):
            events.append("leave")
            super().__init__(*args)

        def wait(self):
            events.append("wait")
            return super().wait()

    def block_forward(*args, real=context_parallel.block_forward):
        events.append("compute")
        return real(*args)

    with patch.multiple(context_parallel, Passing=Passing, block_forward=block_forward):
        context_parallel.ring_attention(q, k, v, group, True)
    return events


def test_the_next_block_travels_while_one_is_computed():
    hops = ["leave", "compute", "wait", "leave", "compute", "wait", "compute"]
    assert run_ranks(3, _hops, None) == [hops] * 3


@pytest.mark.parametrize(
    ("ranks", "layout"),
    [
        (2, "--cp 2"),
        (2, "--cp 2 --cp-split contiguous --dtype bfloat16"),
        (2, "--cp 2 --cp-engine all-to-all --dtype bfloat16 --micro-batch-size 2"),
        (3, "--cp 3 --seq-len 12 --dtype float64"),
        (4, "--cp 2 --tp 2 --micro-batch-size 2"),
        (8, "--cp 2 --pp 2 --dp 2 --tie-word-embeddings True"),
    ],
)
def test_every_rank_sends_what_the_formula_says(small_run, ranks, layout):
    for found in run_ranks(ranks, _counts, [*small_run, *layout.split()], STEP):
        steps = found["steps"]
        counts = {key: (t.calls / steps, t.bytes / steps) for key, t in found["counts"].items()}
        assert steps == 3 and counts == {key: tuple(t) for key, t in found["expected"].items()}


def test_bytes_of_the_ring_by_hand(small_run):
    """2 micro-batches, 2 layers, 1 hop: k and v of (4, 2 heads, 8 tokens, 8) twice, and their gradients."""
    for found in run_ranks(2, _counts, [*small_run, "--cp", "2", "--steps", "1"], STEP):
        k = 4 * 2 * 8 * 8 * 4
        assert found["counts"]["cp", "send"] == found["counts"]["cp", "receive"] == (2 * 2 * 3, 2 * 2 * 3 * 2 * k)


EXTRA = [
    (3, "--cp 3 --seq-len 18"),
    (3, "--cp 3 --seq-len 15 --cp-split contiguous"),
    (4, "--cp 4 --cp-split contiguous --dp 1"),
    (4, "--cp 2 --tp 2 --num-key-value-heads 4 --cp-engine all-to-all"),
    (8, "--cp 2 --tp 4 --micro-batch-size 2"),
    (4, "--cp 2 --pp 2 --pp-schedule afab --micro-batch-size 2 --cp-engine all-to-all"),
    (2, "--cp 2 --dp-engine naive"),
]


@pytest.mark.parametrize(("ranks", "options"), EXTRA)
def test_parity_of_more_layouts(small_run, ranks, options):
    words = options.split()
    at = next((i for i, word in enumerate(words) if word in ("--seq-len", "--num-key-value-heads")), None)
    # These are the model's and the data's, so step01's too.
    common = words[at : at + 2] if at is not None else []
    sgd = "--dtype float64 --steps 3 --eval-every 3 --optimizer sgd --lr 0.5"
    args = (*small_run, *common, *sgd.split())
    parity.check(STEP, ranks, options, args)


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_kernels_of_gpus_are_called_with_what_they_take(dtype):
    """Shapes only: fake tensors that claim to be on a GPU. What the kernels compute needs one."""
    load_step(STEP)
    import context_parallel

    with FakeTensorMode(), patch.object(torch.Tensor, "is_cuda", True):
        q, k, v, grad = tensors(40, dtype=dtype)
        out, lse, extras = context_parallel.block_forward(q, k, v, True)
        grads = context_parallel.block_backward(grad, q, k, v, out, lse, True, extras)
    assert out.shape == q.shape and lse.shape == q.shape[:3]
    assert [x.shape for x in grads] == [q.shape, k.shape, v.shape]


def _user_error(args):
    module = load_step(STEP)
    try:
        module.train(parse(module.Config, args))
    except UserError as error:
        return str(error)


@pytest.mark.parametrize(
    ("ranks", "args", "message"),
    [
        (2, "--cp 2 --seq-len 18", "--seq-len 18 is not a multiple of 4, the pieces into which --cp 2 cuts it"),
        (2, "--cp 2 --seq-len 17 --cp-split contiguous", "--seq-len 17 is not a multiple of 2"),
        (2, "--cp 2 --cp-engine all-to-all --num-key-value-heads 1", "--cp 2 must divide the 4 query and 1 key-value"),
        (4, "--cp 2 --tp 2 --cp-engine all-to-all", "--cp 2 must divide the 2 query and 1 key-value heads"),
        (2, "--cp 3", "cp 3 · tp 1 does not make 2 processes"),
    ],
)
def test_errors_name_the_sizes(small_run, ranks, args, message):
    assert all(message in error for error in run_ranks(ranks, _user_error, [*small_run, *args.split()]))


@pytest.mark.parametrize("options", ["", "--compile", "--cp-engine all-to-all"])
def test_torchrun(small_run, tmp_path, options):
    command = [*TORCHRUN, *small_run, "--cp", "2", "--ledger", "--export-dir", tmp_path / "out", *options.split()]
    result = subprocess.run(command, cwd=ROOT, check=True, capture_output=True, text=True, timeout=300)
    losses = [float(loss) for loss in re.findall(r"loss ([\d.]+)", result.stdout)]
    expected = [record.loss for record in parity.reference(tuple(small_run))]
    assert losses == pytest.approx(expected, abs=2e-4)
    assert "≠" not in result.stdout and (tmp_path / "out" / "model.safetensors").exists()
