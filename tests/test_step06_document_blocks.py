"""Document masks: which blocks of attention a rank has, and that they are what a mask would leave, in every engine."""

import os
from functools import lru_cache

import numpy as np
import pytest
import torch
import torch.distributed as dist
import torch.nn.attention.varlen
import torch.nn.functional as F
from conftest import load_step
from ranks import run_ranks
from test_kernels_of_gpus import on_gpu
from test_step05 import ENGINES, layout, put_together, tensors

STEP = "step06_4d"
SPLITS = [(1, "contiguous"), *((cp, split) for split in ("zigzag", "contiguous") for cp in (2, 3, 4))]
EOS = 9


def packed(s, rows=2):
    """Where the documents of random sequences begin, (rows, s), at several densities; one is a single document."""
    generator = torch.Generator().manual_seed(s)
    firsts = torch.rand(rows, s, generator=generator) < torch.linspace(0, 0.6, rows).unsqueeze(1)
    firsts[:, 0] = True
    return (firsts * torch.arange(s)).cummax(1).values


def mask(begins):
    """(rows, queries, keys): the definition."""
    positions = torch.arange(begins.shape[1])
    return (begins.unsqueeze(2) <= positions) & (positions <= positions.unsqueeze(1))


@pytest.mark.quick
def test_where_the_document_of_each_token_begins():
    load_step(STEP)
    from context.documents import document_begins

    begins = [[0, 0, 2, 2, 2, 5, 6, 6, 6], [0, 1, 1, 1, 1, 1, 1, 1, 8], [0] * 9]
    firsts = [np.array(row, np.int64) for row in ([2, 5, 6], [1, 8], [])]
    assert document_begins(firsts, 8).tolist() == begins


def _batches(cp, split):
    """This rank's positions, and the first micro-batch: every 7th token ends a document."""
    load_step(STEP)
    import context_parallel
    from context import documents

    from shared.corpus import Corpus
    from shared.data import split_corpus
    from shared.distributed import start_mesh

    config = layout(cp, 16, split)
    mesh, _ = start_mesh(config)
    config.cp_engine, config.mask_documents, config.ignore_last_labels, config.seed = "ring", True, False, 0
    config.global_batch_size = config.micro_batch_size = 3
    config.seq_len, config.device = 16, "cpu"
    corpus = Corpus.from_array(np.where(np.arange(1000) % 7 == 6, EOS, 1), [*range(0, 1000, 7)])
    positions = context_parallel.local_positions(config, dist.get_rank())
    sequences, _ = split_corpus(corpus, config)
    batches = documents.make_batches(config, mesh)(sequences, config, 0, 1, positions)
    batch = batches.next()[0].to(torch.device("cpu"))
    (blocks,) = documents.blocks(batch)
    return positions, (batch.input_ids, batch.position_ids), len(blocks.by_rank)


@pytest.mark.parametrize(("cp", "split"), [(1, "contiguous"), (2, "zigzag"), (2, "contiguous")])
def test_positions_start_anew_with_each_document(cp, split):
    parts = run_ranks(cp, _batches, cp, split)
    order = torch.cat([positions for positions, *_ in parts]).argsort()
    ids, positions = (torch.cat(x, 1)[:, order] for x in zip(*(part for _, part, _ in parts), strict=True))
    assert (ids == EOS).sum() > 3
    for row, found in zip(ids.tolist(), positions.tolist(), strict=True):
        expected, position = [], 0
        for token in row:
            expected.append(position)
            position = 0 if token == EOS else position + 1
        assert found == expected
    assert all(by_rank == cp for *_, by_rank in parts)


@pytest.mark.parametrize(("cp", "split"), SPLITS)
def test_blocks_have_each_visible_score_once_and_no_other(cp, split):
    load_step(STEP)
    from context.documents import document_blocks
    from context_parallel import local_positions

    config = layout(cp, s := 12 * cp, split)
    begins = packed(s, rows=8)
    seen = torch.zeros(8, s, s, dtype=torch.int)
    for rank in range(cp):
        mine = local_positions(config, rank)
        for source, blocks in enumerate(document_blocks(config, rank, begins)):
            theirs = local_positions(config, source)
            for (rows, _, queries), (rows_of_keys, _, keys), causal in blocks:
                assert rows == rows_of_keys
                block = torch.ones(len(mine[queries]), len(theirs[keys]), dtype=torch.int)
                seen[rows, mine[queries].unsqueeze(1), theirs[keys]] += block.tril() if causal else block
    assert torch.equal(seen, mask(begins).int())


@pytest.mark.parametrize(("cp", "split"), SPLITS)
def test_without_boundaries_blocks_are_those_without_a_mask(cp, split):
    load_step(STEP)
    from context.documents import document_blocks
    from context_parallel import visible

    def ranges(index):
        rows, heads, tokens = index
        return rows.indices(5)[:2], heads, tokens.indices(24 // cp)[:2]

    config = layout(cp, 24, split)
    for rank in range(cp):
        ours = document_blocks(config, rank, packed(24)[:1].expand(5, -1))
        theirs = [visible(config, rank, source) for source in range(cp)]
        ours, theirs = (
            [[(ranges(block.queries), ranges(block.keys), block.causal) for block in blocks] for blocks in by_rank]
            for by_rank in (ours, theirs)
        )
        assert ours == theirs


def test_blocks_are_few():
    """2 documents, cut at 20 of 48 tokens: on 2 zigzag ranks, a call for each document and rank at most."""
    load_step(STEP)
    from context.documents import document_blocks

    begins = torch.tensor([0] * 20 + [20] * 28).expand(3, -1)
    config = layout(2, 48, "zigzag")
    calls = [[len(blocks) for blocks in document_blocks(config, rank, begins)] for rank in range(2)]
    # Of rank 0's late piece, document 2 alone sees rank 1's. Rank 1's first document sees rank 0's early piece.
    assert calls == [[2, 1], [1, 2]]


def _attention(cp, engine, s, dtype):
    """Positions of this rank, output and gradients of its part."""
    load_step(STEP)
    import context_parallel
    from context import documents

    from shared.distributed import start_mesh

    kind, split = engine.split()
    config, rank = layout(cp, s, split), int(os.environ["RANK"])
    mesh, _ = start_mesh(config)
    config.cp_engine = kind
    whole = kind == "all-to-all"
    blocks = documents.document_blocks(layout(1, s, split) if whole else config, 0 if whole else rank, packed(s))
    positions = context_parallel.local_positions(config, rank)
    *qkv, grad = (x[:, :, positions] for x in tensors(s, dtype=dtype))
    q, k, v = (x.clone().requires_grad_() for x in qkv)
    out = documents.document_attention(q, k, v, documents.Blocks(blocks), config, mesh.get_group("cp"))
    out.backward(grad)
    return positions, [out.detach(), q.grad, k.grad, v.grad]


def varlen(q, k, v, bounds, same, longest, also, *, scale, window_size, enable_gqa):
    """torch's, computed on the CPU: q, k and v (tokens, heads, d)."""
    calls.append(bounds.tolist())
    assert bounds is same and bounds.dtype == torch.int32 and q.ndim == 3 and q.shape[-1] % 8 == 0
    assert longest == also == bounds.diff().max() and window_size == (-1, 0) and enable_gqa
    parts = zip(*(x.transpose(0, 1).split(bounds.diff().tolist(), 1) for x in (q, k, v)), strict=True)
    options = {"is_causal": True, "enable_gqa": True, "scale": scale}
    outs = [F.scaled_dot_product_attention(*(x.unsqueeze(0) for x in each), **options)[0] for each in parts]
    return torch.cat(outs, 1).transpose(0, 1)


calls = []


def _one_call(cp, s, d):
    """What the kernel of a GPU for many documents gives on this rank: output and gradients of its part."""
    load_step(STEP)
    import context_parallel
    from context import documents

    from shared.distributed import start_mesh

    config, rank = layout(cp, s, "contiguous"), int(os.environ["RANK"])
    mesh, _ = start_mesh(config)
    config.cp_engine = "all-to-all"
    torch.nn.attention.varlen.varlen_attn = varlen
    blocks = documents.Blocks([], *documents.document_bounds(packed(s)))
    positions = context_parallel.local_positions(config, rank)
    *qkv, grad = (x[:, :, positions, :d] for x in tensors(s, dtype=torch.bfloat16))
    q, k, v = (x.clone().requires_grad_() for x in qkv)
    out = on_gpu(documents.document_attention)(q, k, v, blocks, config, mesh.get_group("cp"))
    out.backward(grad)
    assert len(calls) == 1 and len(calls[0]) > 3
    return positions, [out.detach(), q.grad, k.grad, v.grad]


@pytest.mark.parametrize("d", [16, 12])
@pytest.mark.parametrize("cp", [1, 2])
def test_on_a_gpu_one_call_is_for_all_documents(cp, d):
    s, (*qkv, grad) = 48, (x[..., :d] for x in tensors(48, dtype=torch.bfloat16))
    q, k, v = (x.clone().requires_grad_() for x in qkv)
    out = F.scaled_dot_product_attention(q, k, v, mask(packed(s)).unsqueeze(1), enable_gqa=True)
    out.backward(grad)
    expected = [out.detach(), q.grad, k.grad, v.grad]
    for ours, theirs in zip(put_together(run_ranks(cp, _one_call, cp, s, d), s), expected, strict=True):
        torch.testing.assert_close(ours, theirs, rtol=0.05, atol=0.05)


@lru_cache
def dense(s, dtype):
    """The same with an explicit mask, over whole sequences."""
    *qkv, grad = tensors(s, dtype=dtype)
    q, k, v = (x.clone().requires_grad_() for x in qkv)
    out = F.scaled_dot_product_attention(q, k, v, mask(packed(s)).unsqueeze(1), enable_gqa=True)
    out.backward(grad)
    return [out.detach(), q.grad, k.grad, v.grad]


@pytest.mark.parametrize("engine", ENGINES)
@pytest.mark.parametrize("cp", [1, 2, 3, 4])
def test_attention_equals_that_with_a_dense_mask(cp, engine):
    if "all-to-all" in engine and cp == 3:
        pytest.skip("4 key-value heads cannot be shared by 3 ranks")
    parts = run_ranks(cp, _attention, cp, engine, 48, torch.float64)
    for ours, theirs in zip(put_together(parts, 48), dense(48, torch.float64), strict=True):
        torch.testing.assert_close(ours, theirs, rtol=0, atol=1e-13)


@pytest.mark.parametrize("engine", ["all-gather zigzag", "ring zigzag", "all-to-all contiguous"])
def test_bfloat16_is_as_accurate_as_a_dense_mask(engine):
    s, exact, theirs = 256, dense(256, torch.float64), dense(256, torch.bfloat16)
    ours = put_together(run_ranks(4, _attention, 4, engine, s, torch.bfloat16), s)
    for a, b, reference in zip(ours, theirs, exact, strict=True):
        error, allowed = ((x.double() - reference).square().mean().sqrt() for x in (a, b))
        assert error <= 1.2 * allowed
