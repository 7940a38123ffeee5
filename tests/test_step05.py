"""step05: what it computes, sends and holds, how it fails. That layouts train the same model is in test_parity.py."""

from functools import partial
from types import SimpleNamespace
from unittest.mock import patch

import parity
import pytest
import torch
import torch.distributed as dist
import torch.nn.functional as F
from conftest import load_step
from fake_ranks import check_ledgers
from ranks import run_ranks
from running import ledger_of, user_error

from shared.live_bytes import LiveBytes

STEP = "step05_context_parallel"
ENGINES = ["all-gather zigzag", "all-gather contiguous", "ring zigzag", "ring contiguous", "all-to-all contiguous"]


def layout(cp, seq_len, split):
    """What local_positions and visible read of a configuration."""
    zigzag = split == "zigzag" and cp > 1
    return SimpleNamespace(cp=cp, seq_len=seq_len, zigzag=zigzag, device="cpu", timeout=60)


def start(engine, config):
    """The attention of an engine on this rank, of q, k and v."""
    load_step(STEP)
    import context_parallel

    from shared.distributed import start_mesh

    mesh, _ = start_mesh(config)
    group, rank = mesh.get_group("cp"), dist.get_rank()
    if engine == "all-to-all":
        return partial(
            context_parallel.all_to_all_attention, group=group, whole_attention=context_parallel.causal_attention
        )
    attention = context_parallel.ring_attention if engine == "ring" else context_parallel.all_gather_attention
    blocks = [context_parallel.visible(config, rank, source) for source in range(config.cp)]
    return partial(attention, group=group, blocks=blocks)


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


def _attention(cp, engine, s, dtype, prepare=lambda: None):
    """The same, of this rank's part, and the positions of that. Calls `prepare` once the step is loaded."""
    kind, split = engine.split()
    config = layout(cp, s, split)
    attention = start(kind, config)
    import context_parallel

    prepare()
    positions = context_parallel.local_positions(config, dist.get_rank())
    *qkv, grad = (x[:, :, positions] for x in tensors(s, dtype=dtype))
    q, k, v = (x.clone().requires_grad_() for x in qkv)
    out = attention(q, k, v)
    out.backward(grad)
    return positions, [out.detach(), q.grad, k.grad, v.grad]


def put_together(parts, s):
    order = torch.cat([positions for positions, _ in parts]).argsort()
    return [torch.cat(column, 2)[:, :, order] for column in zip(*(part for _, part in parts), strict=True)]


@pytest.mark.parametrize("engine", ENGINES)
@pytest.mark.parametrize("cp", [2, 3, 4])
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
    for split in ("zigzag", "contiguous"):
        config = layout(cp, s, split)
        seen, work = torch.zeros(s, s, dtype=torch.int), []
        for rank in range(cp):
            mine = local_positions(config, rank)
            work.append(0)
            for source in range(cp):
                for queries, keys, causal in visible(config, rank, source):
                    rows, columns = mine[queries[2]], local_positions(config, source)[keys[2]]
                    block = torch.ones(len(rows), len(columns), dtype=torch.int)
                    block = block.tril() if causal else block
                    seen[rows.unsqueeze(1), columns] += block
                    work[-1] += int(block.sum())
        assert torch.equal(seen, torch.ones(s, s, dtype=torch.int).tril())
        if split == "zigzag":
            assert len(set(work)) == 1
        else:
            assert work[-1] > 2 * work[0]


def _peak(engine, s):
    """The most bytes that live at once, and those that live between forward and backward."""
    attention = start(engine, layout(2, 2 * s, "zigzag"))
    q, k, v, grad = (x.requires_grad_() for x in tensors(s, dtype=torch.float32))
    with LiveBytes() as memory:
        out = attention(q, k, v)
        kept = memory.now
        out.backward(grad)
    return memory.peak, kept


@pytest.mark.parametrize("engine", ["all-gather", "ring", "all-to-all"])
def test_memory_grows_linearly_with_the_sequence(engine):
    small, large = ([peak for peak, _ in run_ranks(2, _peak, engine, s)] for s in (512, 2048))
    # A matrix of scores would make it 16 times as much.
    for a, b in zip(small, large, strict=True):
        assert b == pytest.approx(4 * a, rel=0.05)
        # And less than one such matrix would take: 2 sequences, 8 heads.
        assert b < 2 * 8 * 2048**2 * 4 / 8


def test_keys_and_values_of_other_ranks_are_not_kept_for_backward():
    """Kept are this rank's queries, keys and values, the output, and a number per head and query."""
    kept = 2 * 256 * 4 * (2 * 8 * 16 + 2 * 4 * 16 + 8)
    assert [run_ranks(2, _peak, engine, 256)[0][1] for engine in ("all-gather", "ring")] == [kept, kept]


def _hops():
    """The order in which blocks leave, are computed, and are waited for."""
    attention = start("ring", layout(3, 36, "zigzag"))
    import context_parallel
    import fused_attention

    q, k, v, _ = tensors(12)
    events = []

    class Passing(context_parallel.Passing):
        def __init__(self, *args):
            events.append("leave")
            super().__init__(*args)

        def wait(self):
            events.append("wait")
            return super().wait()

    def block_forward(*args, real=fused_attention.block_forward):
        events.append("compute")
        return real(*args)

    def block_backward(*args, real=fused_attention.block_backward):
        events.append("compute")
        return real(*args)

    blocks = patch.multiple(fused_attention, block_forward=block_forward, block_backward=block_backward)
    with patch.object(context_parallel, "Passing", Passing), blocks:
        out = attention(q.requires_grad_(), k.requires_grad_(), v.requires_grad_())
        events.append("backward")
        out.sum().backward()
    return events


def test_the_next_block_travels_while_one_is_computed():
    forward = "leave compute wait leave compute wait compute"
    # In the last two hops, gradients leave after they are computed, and come home last.
    backward = "leave compute wait leave compute leave wait compute wait leave wait"
    assert run_ranks(3, _hops) == [f"{forward} backward {backward}".split()] * 3


@pytest.mark.parametrize(
    ("ranks", "layout"),
    [
        (2, "--cp 2"),
        (2, "--cp 2 --cp-split contiguous --dtype bfloat16"),
        (2, "--cp 2 --cp-engine all-to-all --dtype bfloat16 --micro-batch-size 2"),
        (2, "--cp 2 --cp-engine all-gather --dtype bfloat16 --micro-batch-size 2"),
        (4, "--cp 2 --tp 2 --cp-engine all-gather --dtype float64"),
        (3, "--cp 3 --seq-len 12 --dtype float64"),
        (4, "--cp 2 --tp 2 --micro-batch-size 2"),
        (8, "--cp 2 --pp 2 --dp 2 --tie-word-embeddings True"),
    ],
)
def test_every_rank_sends_what_the_formula_says(small_run, ranks, layout):
    check_ledgers(ranks, [*small_run, *layout.split()], STEP)


def test_bytes_of_the_ring_by_hand(small_run):
    """2 micro-batches, 2 layers, 1 hop: k and v of (4, 2 heads, 8 tokens, 8) twice, and their gradients."""
    for found in run_ranks(2, ledger_of, [*small_run, "--cp", "2", "--steps", "1"], STEP):
        k = 4 * 2 * 8 * 8 * 4
        assert found["counts"]["cp", "send"] == found["counts"]["cp", "receive"] == (2 * 2 * 3, 2 * 2 * 3 * 2 * k)


def test_bytes_of_all_gather_by_hand(small_run):
    """2 micro-batches, 2 layers: k and v of (4, 2 heads, 8 tokens, 8) of both ranks arrive twice; gradients leave."""
    for found in run_ranks(2, ledger_of, [*small_run, "--cp", "2", "--cp-engine", "all-gather", "--steps", "1"], STEP):
        k_and_v = 2 * 4 * 2 * 8 * 8 * 4
        assert found["counts"]["cp", "all-gather"] == (2 * 2 * 2, 2 * 2 * 2 * 2 * k_and_v)
        assert found["counts"]["cp", "reduce-scatter"] == (2 * 2, 2 * 2 * 2 * k_and_v)


EXTRA = [
    (3, "--cp 3 --seq-len 18"),
    (3, "--cp 3 --seq-len 18 --cp-engine all-gather"),
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


@pytest.mark.parametrize(
    ("ranks", "args", "message"),
    [
        (2, "--cp 2 --seq-len 18", "--seq-len 18 is not a multiple of 4, the pieces into which --cp 2 cuts it"),
        (2, "--cp 2 --seq-len 17 --cp-split contiguous", "--seq-len 17 is not a multiple of 2"),
        (8, "--cp 8 --seq-len 20 --cp-split contiguous", "the pieces into which --cp 8 cuts it: try 16"),
        (4, "--cp 4 --seq-len 2", "--seq-len 2 is not a multiple of 8, the pieces into which --cp 4 cuts it: try 8"),
        (2, "--cp 2 --cp-engine all-to-all --num-key-value-heads 1", "--cp 2 must divide the 4 query and 1 key-value"),
        (4, "--cp 2 --tp 2 --cp-engine all-to-all", "--cp 2 must divide the 2 query and 1 key-value heads"),
        (2, "--cp 3 --seq-len 12", "cp 3 · tp 1 does not make 2 processes"),
    ],
)
def test_errors_name_the_sizes(small_run, ranks, args, message):
    assert all(message in error for error in run_ranks(ranks, user_error, [*small_run, *args.split()], STEP))
