"""Attention alone, forward and backward, over 2 and 4 ranks: step05's all-gather and ring against a textbook ring and
torch's own.

    python tests/benchmarks/step05_ring_attention.py [--rounds 3] [--seq-lens 2048 8192]

The textbook ring builds the score matrices, sends expanded heads, and waits for each message; it is written here.
torch's is the core of its experimental context_parallel. All in alternating rounds of one run, one sequence, 8 heads of
64, 4 of them for keys and values, one thread per rank, the time of the slowest rank.
"""

import argparse
import sys
import time
from pathlib import Path
from statistics import median
from types import SimpleNamespace
from unittest.mock import patch

ROOT = Path(__file__).parents[2]
sys.path += [str(ROOT / "step05_context_parallel"), str(ROOT / "tests")]
import fused_attention
import torch
import torch.distributed as dist
from context_parallel import Passing, all_gather_attention, local_positions, ring_attention, visible
from fused_attention import merge
from ranks import run_ranks
from torch.distributed.tensor.experimental._context_parallel import _attention as torch_attention

from shared.distributed import start_mesh
from shared.live_bytes import LiveBytes

aten = torch.ops.aten
HEADS, KV_HEADS, HEAD_DIM = 8, 4, 64
VARIANTS = ("all-gather", "zigzag", "contiguous", "textbook", "torch")


def scores(q, k, own):
    scores = q @ k.mT * HEAD_DIM**-0.5
    if own:
        scores.masked_fill_(torch.ones(scores.shape[-2:], dtype=torch.bool).triu(1), float("-inf"))
    return scores


class Textbook(torch.autograd.Function):
    @staticmethod
    def forward(ctx, q, k, v, group):
        rank, size = dist.get_rank(group), dist.get_world_size(group)
        kv = torch.stack([x.repeat_interleave(HEADS // KV_HEADS, 1) for x in (k, v)])
        ctx.group, ctx.kv = group, kv
        for hop in range(size):
            if hop <= rank:
                weights = scores(q, kv[0], hop == 0)
                block_lse = weights.logsumexp(-1)
                block_out = (weights - block_lse.unsqueeze(-1)).exp() @ kv[1]
                if hop == 0:
                    out, lse = block_out, block_lse
                else:
                    merge(out, lse, block_out, block_lse)
            if hop + 1 < size:
                kv = Passing(kv, group).wait()
        ctx.save_for_backward(q, out, lse)
        return out

    @staticmethod
    def backward(ctx, grad):
        q, out, lse = ctx.saved_tensors
        group, kv, rank, size = ctx.group, ctx.kv, dist.get_rank(ctx.group), dist.get_world_size(ctx.group)
        delta = (grad * out).sum(-1, keepdim=True)
        dq, dkv = torch.zeros_like(q), torch.zeros_like(kv)
        for hop in range(size):
            if hop <= rank:
                weights = (scores(q, kv[0], hop == 0) - lse.unsqueeze(-1)).exp()
                dkv[1] += weights.mT @ grad
                d_scores = weights * (grad @ kv[1].mT - delta) * HEAD_DIM**-0.5
                dq += d_scores @ kv[0]
                dkv[0] += d_scores.mT @ q
            kv, dkv = Passing(kv, group).wait(), Passing(dkv, group).wait()
        dk, dv = dkv.unflatten(2, (KV_HEADS, -1)).sum(3)
        return dq, dk, dv, None


class TorchRing(torch.autograd.Function):
    @staticmethod
    def forward(ctx, q, k, v, group):
        op = aten._scaled_dot_product_flash_attention_for_cpu
        out, lse = torch_attention._templated_ring_attention(group, 2, op, q, k, v, is_causal=True, dropout_p=0.0)[:2]
        ctx.save_for_backward(q, k, v, out, lse)
        ctx.group = group
        return out

    @staticmethod
    def backward(ctx, grad):
        q, k, v, out, lse = ctx.saved_tensors
        op = aten._scaled_dot_product_flash_attention_for_cpu_backward.default
        grads = torch_attention._templated_ring_attention_backward(
            ctx.group, 2, op, grad, "grad_out", q, k, v, out, lse.contiguous(), True, dropout_p=0.0
        )
        return *grads[:3], None


def attention(variant, q, k, v, group, blocks):
    if variant in ("textbook", "torch"):
        return (Textbook if variant == "textbook" else TorchRing).apply(q, k, v, group)
    return (all_gather_attention if variant == "all-gather" else ring_attention)(q, k, v, group, blocks)


def worker(seq_len, rounds):
    mesh, _ = start_mesh(SimpleNamespace(device="cpu", timeout=600, cp=None))
    group, rank, size = mesh.get_group("cp"), dist.get_rank(), dist.get_world_size()
    torch_attention._cp_options.enable_load_balance = True
    torch_attention._cp_options.convert_to_f32 = True
    torch_attention.set_rotate_method("alltoall")
    generator = torch.Generator().manual_seed(0)
    q, k, v, grad = (
        torch.randn(1, heads, seq_len, HEAD_DIM, generator=generator) for heads in (HEADS, KV_HEADS, KV_HEADS, HEADS)
    )
    flops = dict.fromkeys(VARIANTS, 0)

    def step(variant):
        zigzag = variant in ("all-gather", "zigzag", "torch")
        config = SimpleNamespace(seq_len=seq_len, cp=size, zigzag=zigzag)
        positions, blocks = local_positions(config, rank), [visible(config, rank, source) for source in range(size)]
        local = [x[:, :, positions].requires_grad_() for x in (q, k, v)]
        out_grad = grad[:, :, positions]

        def run():
            out = attention(variant, *local, group, blocks)
            for x in local:
                x.grad = None
            out.backward(out_grad)
            return out.detach(), [x.grad for x in local]

        return run, positions

    def counted(q, k, v, causal, block=fused_attention.block_forward):
        # Two matmuls of 2 FLOPs per score; a causal block has half of them.
        flops[variant] += 4 * HEAD_DIM * q.shape[1] * q.shape[2] * k.shape[2] // (2 if causal else 1)
        return block(q, k, v, causal)

    expected = aten._scaled_dot_product_flash_attention_for_cpu(q, k, v, 0.0, True)[0]
    steps, peaks = {}, {}
    for variant in VARIANTS:
        steps[variant], positions = step(variant)
        with LiveBytes() as memory, patch.object(fused_attention, "block_forward", counted):
            out, _ = steps[variant]()
        torch.testing.assert_close(out, expected[:, :, positions], rtol=1e-4, atol=1e-5, msg=variant)
        peaks[variant] = memory.peak
    seconds = {variant: [] for variant in VARIANTS}
    for _ in range(rounds):
        for variant in VARIANTS:
            dist.barrier()
            start = time.perf_counter()
            steps[variant]()
            seconds[variant].append(time.perf_counter() - start)
    return seconds, peaks, flops


def main():
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--rounds", type=int, default=3)
    parser.add_argument("--seq-lens", type=int, nargs="+", default=[2048, 8192])
    args = parser.parse_args()
    for seq_len in args.seq_lens:
        for ranks in (2, 4):
            results = run_ranks(ranks, worker, seq_len, args.rounds, timeout=3000)
            print(f"{seq_len} tokens on {ranks} ranks")
            print(
                f"{'':12}{'tokens/s':>10}{'× textbook':>12}{'× torch':>9}{'peak MiB':>10}  forward GFLOPs of each rank"
            )
            slowest = {
                variant: [max(times) for times in zip(*(seconds[variant] for seconds, _, _ in results), strict=True)]
                for variant in VARIANTS
            }
            for variant in VARIANTS:
                rates = [
                    median(a / b for a, b in zip(slowest[other], slowest[variant], strict=True))
                    for other in ("textbook", "torch")
                ]
                peak = max(peaks[variant] for _, peaks, _ in results) / 2**20
                work = ", ".join(f"{flops[variant] / 1e9:.2f}" for _, _, flops in results if flops[variant])
                rate = seq_len / median(slowest[variant])
                print(f"{variant:12}{rate:10.0f}{rates[0]:12.2f}{rates[1]:9.2f}{peak:10.1f}  {work}", flush=True)


if __name__ == "__main__":
    main()
