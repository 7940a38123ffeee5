"""Context parallelism: each rank holds a part of every sequence. Attention is all that couples the parts.

Ring attention (arXiv 2310.01889): keys and values travel around the ranks, and each attends with its queries to one
block after the other. All-to-all (DeepSpeed-Ulysses, arXiv 2309.14509): for the attention alone, ranks exchange a part
of all heads for all of some heads. Both are exact, and neither builds a matrix of scores.

Shapes: b sequences, s tokens of a rank, d head dimension, c ranks.
"""

from collections.abc import Callable
from dataclasses import dataclass
from functools import partial
from typing import Literal

import torch
import torch.distributed as dist
from context.fused_attention import block_backward, block_forward, merge
from torch import Tensor
from torch.autograd.function import FunctionCtx
from torch.distributed import P2POp, ProcessGroup, irecv, isend
from torch.distributed.device_mesh import DeviceMesh

from shared.config import UserError
from shared.data import Batch, GlobalBatches, Sequences
from shared.ledger import Traffic
from shared.model import LlamaForCausalLM, causal_attention

# Rows of the batch, their queries, the keys these see, and whether masked causally.
Block = tuple[slice, slice, slice, bool]
Attention = Callable[[Tensor, Tensor, Tensor], Tensor]


@dataclass
class ContextParallelConfig:
    """The options of this axis."""

    # Context-parallel ranks: each holds a part of every sequence.
    cp: int = 1
    # ring: keys and values travel. all-to-all: heads are exchanged for tokens, so cp must divide their number.
    cp_engine: Literal["ring", "all-to-all"] = "ring"
    # Of the ring. zigzag: an early and a late piece for each rank, so that all have the same work under a causal mask.
    cp_split: Literal["zigzag", "contiguous"] = "zigzag"

    @property
    def zigzag(self) -> bool:
        # After an all-to-all, each rank has whole sequences: it needs no balance, but their order.
        return self.cp > 1 and self.cp_split == "zigzag" and self.cp_engine == "ring"

    def validate(self) -> None:
        super().validate()
        pieces = 2 * self.cp if self.zigzag else self.cp
        if pieces > 1 and self.seq_len % pieces:
            raise UserError(
                f"--seq-len {self.seq_len} is not a multiple of {pieces}, the pieces into which --cp {self.cp} cuts "
                f"it: try {max(self.seq_len // pieces, 1) * pieces}"
            )


def local_positions(seq_len: int, rank: int, size: int, zigzag: bool) -> Tensor:
    """The positions of a sequence that a rank holds. Zigzag: pieces `rank` and `2·size − 1 − rank` of 2·size."""
    positions = torch.arange(seq_len)
    if not zigzag:
        return positions.chunk(size)[rank]
    pieces = positions.chunk(2 * size)
    return torch.cat((pieces[rank], pieces[-1 - rank]))


class SplitBatches(GlobalBatches):
    """Global batches of which this rank has its part of each sequence, and the positions of its tokens."""

    def __init__(
        self, sequences: Sequences, config: ContextParallelConfig, rank: int, size: int, group: ProcessGroup
    ) -> None:
        super().__init__(sequences, config, rank, size)
        self.positions = local_positions(sequences.seq_len, dist.get_rank(group), config.cp, config.zigzag)
        self.tokens //= config.cp

    def next(self) -> list[Batch]:
        """The micro-batches of this rank's share of the next global batch, on the CPU."""
        return [self.split(batch) for batch in super().next()]

    def split(self, batch: Batch) -> Batch:
        return Batch(*(tensor[:, self.positions] for tensor in batch))


def gradient_group(mesh: DeviceMesh) -> ProcessGroup:
    """The ranks that hold the same parameters and see other tokens: over dp and cp."""
    ranks = mesh["dp", "cp"].mesh.flatten().tolist()
    return dist.new_group(ranks, use_local_synchronization=True, group_desc="dp")


def visible(rank: int, source: int, length: int, zigzag: bool) -> tuple[slice, slice, bool] | None:
    """Which of a rank's `length` queries see which of `source`'s keys, and whether masked causally. None see none."""
    every, half = slice(None), length // 2
    if source == rank:
        return every, every, True
    if zigzag:
        # Of an earlier rank, the early piece precedes all queries, and the late one none; and the other way round.
        return (every, slice(half), False) if source < rank else (slice(half, None), every, False)
    return (every, every, False) if source < rank else None


def causal_blocks(rank: int, size: int, length: int, zigzag: bool) -> list[list[Block]]:
    """What a rank's `length` queries see in each hop of the ring: at most one block, of all rows."""
    seen = [visible(rank, (rank - hop) % size, length, zigzag) for hop in range(size)]
    return [[(slice(None), *block)] if block else [] for block in seen]


class Passing:
    """A tensor on its way to the next rank of the ring, and the previous rank's on its way here."""

    def __init__(self, tensor: Tensor, group: ProcessGroup) -> None:
        rank, size = dist.get_rank(group), dist.get_world_size(group)
        self.received = torch.empty_like(tensor)
        send = P2POp(isend, tensor, group=group, group_peer=(rank + 1) % size)
        receive = P2POp(irecv, self.received, group=group, group_peer=(rank - 1) % size)
        self.works = dist.batch_isend_irecv([send, receive])

    def wait(self) -> Tensor:
        for work in self.works:
            work.wait()
        return self.received


class _RingAttention(torch.autograd.Function):
    @staticmethod
    def forward(
        ctx: FunctionCtx, q: Tensor, k: Tensor, v: Tensor, group: ProcessGroup, hops: list[list[Block]]
    ) -> Tensor:
        # One message for both, and only the key-value heads: queries' heads share them.
        own = kv = torch.stack((k, v))
        out = torch.empty_like(q, dtype=torch.promote_types(q.dtype, torch.float32))
        lse, extras = out.new_empty(q.shape[:3]), []
        for hop, blocks in enumerate(hops):
            # The next block travels while this one is computed.
            passing = Passing(kv, group) if hop + 1 < len(hops) else None
            for rows, queries, keys, causal in blocks:
                k, v = kv[:, rows, :, keys]
                block_out, block_lse, extra = block_forward(q[rows, :, queries], k, v, causal)
                extras.append(extra)
                seeing = out[rows, :, queries], lse[rows, :, queries]
                if hop == 0:
                    # Every query sees itself: a rank's own blocks have each of its queries once.
                    seeing[0].copy_(block_out), seeing[1].copy_(block_lse)
                else:
                    merge(*seeing, block_out, block_lse)
            if passing:
                kv = passing.wait()
        out = out.to(q.dtype)
        ctx.save_for_backward(q, own, out, lse)
        ctx.group, ctx.hops, ctx.extras = group, hops, extras
        return out

    @staticmethod
    def backward(ctx: FunctionCtx, grad: Tensor) -> tuple[Tensor, Tensor, Tensor, None, None]:
        q, kv, out, lse = ctx.saved_tensors
        dq, own_dkv = (torch.empty_like(x, dtype=lse.dtype) for x in (q, kv))
        extras, gradient_passing = iter(ctx.extras), None
        for hop, blocks in enumerate(ctx.hops):
            passing = Passing(kv, ctx.group) if hop + 1 < len(ctx.hops) else None
            computed = []
            for rows, queries, keys, causal in blocks:
                seeing = (x[rows, :, queries] for x in (grad, q, out))
                block_lse = lse[rows, :, queries].contiguous()
                k, v = kv[:, rows, :, keys]
                computed.append(block_backward(*seeing, block_lse, k, v, causal, next(extras)))
            if hop == 0:
                dkv, put = own_dkv, Tensor.copy_
            else:
                # The gradient of a block follows it from rank to rank, and collects what each adds.
                dkv, put = gradient_passing.wait() if gradient_passing else torch.zeros_like(own_dkv), Tensor.add_
            for (rows, queries, keys, _), (block_dq, *block_dkv) in zip(blocks, computed, strict=True):
                put(dq[rows, :, queries], block_dq)
                for total, block in zip(dkv, block_dkv, strict=True):
                    put(total[rows, :, keys], block)
            if hop > 0:
                gradient_passing = Passing(dkv, ctx.group)
            if passing:
                kv = passing.wait()
        if gradient_passing:
            own_dkv += gradient_passing.wait()
        dk, dv = own_dkv.to(q.dtype)
        return dq.to(q.dtype), dk, dv, None, None


def ring_attention(q: Tensor, k: Tensor, v: Tensor, group: ProcessGroup, hops: list[list[Block]]) -> Tensor:
    """Causal attention of q (b, heads, s, d) over the k and v (b, kv_heads, s, d) of all ranks: (b, heads, s, d).

    `hops` are the blocks of each hop; those of the first have every query once. Sends k and v c − 1 times in forward;
    in backward again, and as often their gradients, in at least float32.
    """
    return _RingAttention.apply(q, k, v, group, hops)


def exchange(x: Tensor, group: ProcessGroup) -> Tensor:
    """Slice i of x (c, ...) goes to rank i. Returns the slices that come from all ranks."""
    out = torch.empty_like(x, memory_format=torch.contiguous_format)
    dist.all_to_all_single(out, x.contiguous(), group=group)
    return out


class _AllToAll(torch.autograd.Function):
    """`exchange`, whose backward sends the gradients back where the slices came from."""

    @staticmethod
    def forward(ctx: FunctionCtx, x: Tensor, group: ProcessGroup) -> Tensor:
        ctx.group = group
        return exchange(x, group)

    @staticmethod
    def backward(ctx: FunctionCtx, grad: Tensor) -> tuple[Tensor, None]:
        return exchange(grad, ctx.group), None


def all_to_all_attention(
    q: Tensor, k: Tensor, v: Tensor, group: ProcessGroup, attend: Attention = causal_attention
) -> Tensor:
    """Causal attention as above: two all-to-alls in forward and two in backward, of q, k, v and of the output."""
    size = dist.get_world_size(group)
    # (b, heads, s, d) to (c, b, heads/c, s, d): a part of the heads for each rank.
    by_rank = [x.unflatten(1, (size, -1)).movedim(1, 0) for x in (q, k, v)]
    heads = [x.shape[2] for x in by_rank]
    # What arrives is ordered by rank, so by position: (b, heads/c, c·s, d).
    whole = _AllToAll.apply(torch.cat(by_rank, 2), group).movedim(0, 2).flatten(2, 3)
    out = attend(*whole.split(heads, 1))
    # And back: (b, heads/c, c, s, d) to (b, heads, s, d).
    return _AllToAll.apply(out.unflatten(2, (size, -1)).movedim(2, 0), group).movedim(0, 1).flatten(1, 2)


def apply_context_parallel(
    model: LlamaForCausalLM, config: ContextParallelConfig, group: ProcessGroup, device: torch.device
) -> None:
    """Replace the attention of each layer. Raises UserError for heads that cannot be shared."""
    if config.cp == 1:
        return
    if config.cp_engine == "all-to-all":
        heads, kv_heads = local_heads(model)
        if heads % config.cp or kv_heads % config.cp:
            raise UserError(
                f"--cp-engine all-to-all shares heads: --cp {config.cp} must divide the {heads} query and {kv_heads} "
                "key-value heads of each tensor-parallel rank: lower --cp or --tp, or take the ring"
            )
        attention = partial(all_to_all_attention, group=group)
    else:
        hops = causal_blocks(dist.get_rank(group), config.cp, config.seq_len // config.cp, config.zigzag)
        attention = partial(ring_attention, group=group, hops=hops)
        # NCCL connects two ranks at their first message, and each blocks until the other comes: all come now.
        Passing(torch.zeros(1, device=device), group).wait()
    for layer in model.model.layers.values():
        layer.self_attn.attention = attention


def local_heads(model: LlamaForCausalLM) -> tuple[int, int]:
    """Query and key-value heads of this rank: tensor parallelism may have split them."""
    attention = next(iter(model.model.layers.values())).self_attn
    return tuple(len(linear.weight) // attention.head_dim for linear in (attention.q_proj, attention.k_proj))


def context_parallel_traffic(
    config: ContextParallelConfig, model: LlamaForCausalLM, batches: SplitBatches
) -> dict[tuple[str, str], Traffic]:
    """Payload per step of a rank, for each micro-batch and layer.

    Ring: c − 1 times k and v in forward, the same and their gradients, in float32, in backward. All-to-all: q, k, v and
    the output in forward, their gradients in backward. The messages of forward once more if backward recomputes it.
    """
    if config.cp == 1:
        return {}
    heads, kv_heads = local_heads(model)
    summed, computed = config.grad_dtype.itemsize, config.compute_dtype.itemsize
    times = batches.micro_batches * len(model.model.layers)
    head = batches.tokens * model.model.config.head_dim
    if config.cp_engine == "all-to-all":
        times *= 4 + 2 * config.again
        return {("cp", "all-to-all"): Traffic(times, times * (heads + kv_heads) * head * computed)}
    times, passes = times * (config.cp - 1), 2 + config.again
    traffic = Traffic(times * (passes + 1), times * 2 * kv_heads * head * (passes * computed + summed))
    return {("cp", "send"): traffic, ("cp", "receive"): traffic}
