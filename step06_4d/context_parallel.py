"""Context parallelism: each rank holds a piece of every sequence. Attention is all that couples the pieces.

All-gather, the naive form: a rank gathers the keys and values of all, and attends to what its own queries see of them
(arXiv 2407.21783). Ring attention, the same blocks travelling: a rank attends to one after the other while the next is
on its way (arXiv 2310.01889). All-to-all: for the attention alone, ranks exchange their tokens of all heads for all
tokens of some heads (DeepSpeed-Ulysses, arXiv 2309.14509). All are exact, and none builds a matrix of scores.

Shapes: b sequences, s tokens of a rank, d head dimension, c ranks.
"""

from dataclasses import dataclass
from functools import partial
from typing import Any, Literal

import torch
import torch.distributed as dist
from context.all_to_all import all_to_all_attention
from context.fused_attention import Block, add_gradients, attend, attend_backward, nothing_seen
from context.operators import Blocks, attend_over_ranks, operator
from torch import Tensor
from torch.autograd.function import FunctionCtx
from torch.distributed import P2POp, ProcessGroup, irecv, isend
from torch.distributed.device_mesh import DeviceMesh

from shared.attention import causal_attention
from shared.config import UserError
from shared.data import GlobalBatches, Mixture
from shared.distributed import groups_along, make_group
from shared.ledger import Traffic
from shared.model import LlamaForCausalLM


@dataclass
class Config:
    """The options of this axis."""

    # Context-parallel ranks. Each holds a piece of every sequence.
    cp: int = 1
    # How attention finds the keys and values of other ranks. With all-gather, each rank gathers all of them. With ring,
    # they travel from rank to rank while others are computed. With all-to-all, ranks exchange heads for tokens, so cp
    # must divide the number of heads.
    cp_engine: Literal["all-gather", "ring", "all-to-all"] = "ring"
    # Which tokens a rank has under all-gather and ring. zigzag gives each rank an early and a late piece, so that all
    # have the same work under a causal mask.
    cp_split: Literal["zigzag", "contiguous"] = "zigzag"

    @property
    def zigzag(self) -> bool:
        # After an all-to-all, each rank has whole sequences: it needs no balance, but their order.
        return self.cp > 1 and self.cp_split == "zigzag" and self.cp_engine != "all-to-all"

    def validate(self) -> None:
        super().validate()
        pieces = 2 * self.cp if self.zigzag else self.cp
        if pieces > 1 and self.seq_len % pieces:
            raise UserError(
                f"--seq-len {self.seq_len} is not a multiple of {pieces}, the pieces into which --cp {self.cp} cuts "
                f"it: try {max(self.seq_len // pieces, 1) * pieces}"
            )

    def traffic(self, trainer: Any) -> dict[tuple[str, str], Traffic]:
        """What attention sends, for each micro-batch and layer.

        All-gather: k and v of all ranks in forward and again in backward, and their gradients, in at least float32.
        Ring: c − 1 times k and v in forward, the same and their gradients in backward. All-to-all: q, k, v and the
        output in forward, their gradients in backward.
        """
        if self.cp == 1:
            return super().traffic(trainer)
        heads, kv_heads = local_heads(trainer.model)
        head = trainer.batches.tokens * trainer.model.model.config.head_dim
        keys_and_values, computed, summed = 2 * kv_heads * head, self.compute_dtype.itemsize, self.grad_dtype.itemsize
        # One pass is forward, one backward, and one more the forward that backward recomputes.
        times, passes = trainer.batches.micro_batches * len(trainer.model.model.layers), 2 + self.recomputes
        if self.cp_engine == "all-gather":
            gathered = times * self.cp * keys_and_values
            sent = {
                ("cp", "all-gather"): Traffic(times * passes, gathered * passes * computed),
                ("cp", "reduce-scatter"): Traffic(times, gathered * summed),
            }
        elif self.cp_engine == "ring":
            hops = times * (self.cp - 1)
            traffic = Traffic(hops * (passes + 1), hops * keys_and_values * (passes * computed + summed))
            sent = {("cp", "send"): traffic, ("cp", "receive"): traffic}
        else:
            calls = times * 2 * passes
            sent = {("cp", "all-to-all"): Traffic(calls, calls * (heads + kv_heads) * head * computed)}
        return super().traffic(trainer) | sent


def local_positions(config: Config, rank: int) -> Tensor:
    """The positions of a sequence that a rank of cp holds, (s,). Zigzag: pieces `rank` and `2c − 1 − rank` of 2c."""
    positions = torch.arange(config.seq_len)
    if not config.zigzag:
        return positions.chunk(config.cp)[rank]
    pieces = positions.chunk(2 * config.cp)
    return torch.cat((pieces[rank], pieces[-1 - rank]))


def visible(config: Config, rank: int, source: int) -> list[Block]:
    """What the queries of a rank see of the keys of `source`: a block, or nothing."""
    half = config.seq_len // config.cp // 2
    every, early, late = (
        (slice(None), slice(None), tokens) for tokens in (slice(None), slice(half), slice(half, None))
    )
    if source == rank:
        return [Block(every, every, causal=True)]
    if config.zigzag:
        # Of an earlier rank, the early piece precedes all queries, and the late one none; and the other way round.
        return [Block(every, early, causal=False) if source < rank else Block(late, every, causal=False)]
    return [Block(every, every, causal=False)] if source < rank else []


def gather(kv: Tensor, group: ProcessGroup) -> Tensor:
    """Keys and values (2, b, kv_heads, s, d) of all ranks, (c, 2, b, kv_heads, s, d)."""
    gathered = kv.new_empty(dist.get_world_size(group), *kv.shape)
    dist.all_gather_single(gathered.flatten(0, 1), kv, group=group)
    return gathered


@operator("all-gather")
class _AllGatherAttention(torch.autograd.Function):
    @staticmethod
    def forward(
        ctx: FunctionCtx, q: Tensor, k: Tensor, v: Tensor, group: ProcessGroup, blocks: list[list[Block]]
    ) -> Tensor:
        # Only the key-value heads: queries' heads share them.
        own = torch.stack((k, v))
        out, lse = nothing_seen(q)
        ctx.extras = [attend(q, kv, seen, out, lse) for kv, seen in zip(gather(own, group), blocks, strict=True)]
        out = out.to(q.dtype)
        ctx.save_for_backward(q, own, out, lse)
        ctx.group, ctx.blocks = group, blocks
        return out

    @staticmethod
    def backward(ctx: FunctionCtx, grad: Tensor) -> tuple[Tensor, Tensor, Tensor, None, None]:
        q, own, out, lse = ctx.saved_tensors
        # Gathered again: to keep them, each layer would hold the keys and values of whole sequences until backward.
        gathered = gather(own, ctx.group)
        dq, dkv, own_dkv = (torch.zeros_like(x, dtype=lse.dtype) for x in (q, gathered, own))
        for kv, seen, extras, source_dkv in zip(gathered, ctx.blocks, ctx.extras, dkv, strict=True):
            add_gradients(seen, attend_backward(grad, q, kv, seen, out, lse, extras), dq, source_dkv)
        # Each rank has a share of the gradients of all keys and values, and gets the sum of those of its own.
        dist.reduce_scatter_single(own_dkv, dkv.flatten(0, 1), group=ctx.group)
        dk, dv = own_dkv.to(q.dtype)
        return dq.to(q.dtype), dk, dv, None, None


def all_gather_attention(q: Tensor, k: Tensor, v: Tensor, group: ProcessGroup, blocks: list[list[Block]]) -> Tensor:
    """Causal attention of q (b, heads, s, d) over the k and v (b, kv_heads, s, d) of all ranks: (b, heads, s, d).

    `blocks` has for each rank what the queries see of its keys. Gathers k and v in forward and again in backward, and
    reduce-scatters their gradients, in at least float32. Nothing is computed meanwhile.
    """
    return attend_over_ranks("all-gather", q, k, v, group, blocks)


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


@operator("ring")
class _RingAttention(torch.autograd.Function):
    @staticmethod
    def forward(
        ctx: FunctionCtx, q: Tensor, k: Tensor, v: Tensor, group: ProcessGroup, blocks: list[list[Block]]
    ) -> Tensor:
        rank, size, extras = dist.get_rank(group), len(blocks), []
        # One message for both.
        own = kv = torch.stack((k, v))
        out, lse = nothing_seen(q)
        for hop in range(size):
            # The next keys and values travel while these, of `source`, are computed.
            passing = Passing(kv, group) if hop + 1 < size else None
            source = (rank - hop) % size
            extras.append(attend(q, kv, blocks[source], out, lse))
            if passing:
                kv = passing.wait()
        out = out.to(q.dtype)
        ctx.save_for_backward(q, own, out, lse)
        ctx.group, ctx.blocks, ctx.extras = group, blocks, extras
        return out

    @staticmethod
    def backward(ctx: FunctionCtx, grad: Tensor) -> tuple[Tensor, Tensor, Tensor, None, None]:
        q, kv, out, lse = ctx.saved_tensors
        rank, size = dist.get_rank(ctx.group), len(ctx.blocks)
        dq, own_dkv = (torch.zeros_like(x, dtype=lse.dtype) for x in (q, kv))
        gradient_passing = None
        for hop, extras in enumerate(ctx.extras):
            passing = Passing(kv, ctx.group) if hop + 1 < size else None
            seen = ctx.blocks[(rank - hop) % size]
            gradients = attend_backward(grad, q, kv, seen, out, lse, extras)
            if hop == 0:
                add_gradients(seen, gradients, dq, own_dkv)
            else:
                # The gradients of keys and values follow them from rank to rank, and collect what each adds.
                dkv = gradient_passing.wait() if gradient_passing else torch.zeros_like(own_dkv)
                add_gradients(seen, gradients, dq, dkv)
                gradient_passing = Passing(dkv, ctx.group)
            if passing:
                kv = passing.wait()
        if gradient_passing:
            own_dkv += gradient_passing.wait()
        dk, dv = own_dkv.to(q.dtype)
        return dq.to(q.dtype), dk, dv, None, None


def ring_attention(q: Tensor, k: Tensor, v: Tensor, group: ProcessGroup, blocks: list[list[Block]]) -> Tensor:
    """The same, where the keys and values of each rank are here for one hop only.

    Sends k and v c − 1 times in forward; in backward again, and as often their gradients, in at least float32.
    """
    return attend_over_ranks("ring", q, k, v, group, blocks)


class SplitBatches(GlobalBatches):
    """Global batches of which this rank has the tokens at `positions` (s,) of each sequence, and reads no others."""

    def __init__(self, sequences: Mixture, config: Config, rank: int, size: int, positions: Tensor) -> None:
        super().__init__(sequences, config, rank, size)
        self.positions = positions


def replicas(config: Config, mesh: DeviceMesh) -> ProcessGroup:
    """The ranks that hold the same parameters and see other tokens: over dp and cp."""
    if config.cp == 1:
        return mesh.get_group("dp")
    return make_group(groups_along(mesh, "dp", "cp"), "dp", config.timeout)


def apply(model: LlamaForCausalLM, config: Config, mesh: DeviceMesh) -> None:
    """Replace the attention of each layer. Raises UserError for heads that cannot be shared."""
    if config.cp == 1:
        return
    rank, group = mesh.get_local_rank("cp"), mesh.get_group("cp")
    blocks = Blocks(visible(config, rank, source) for source in range(config.cp))
    if config.cp_engine == "all-gather":
        attention = partial(all_gather_attention, group=group, blocks=blocks)
    elif config.cp_engine == "ring":
        attention = partial(ring_attention, group=group, blocks=blocks)
        # NCCL connects two ranks at their first message, and each blocks until the other comes: all come now.
        Passing(torch.zeros(1, device=mesh.device_type), group).wait()
    else:
        heads, kv_heads = local_heads(model)
        if heads % config.cp or kv_heads % config.cp:
            raise UserError(
                f"--cp-engine all-to-all shares heads: --cp {config.cp} must divide the {heads} query and {kv_heads} "
                "key-value heads of each tensor-parallel rank: lower --cp or --tp, or take the ring"
            )
        attention = partial(all_to_all_attention, group=group, whole_attention=causal_attention)
    for layer in model.model.layers.values():
        layer.self_attn.attention = attention


def local_heads(model: LlamaForCausalLM) -> tuple[int, int]:
    """Query and key-value heads of this rank: tensor parallelism may have split them."""
    attention = next(iter(model.model.layers.values())).self_attn
    return tuple(len(linear.weight) // attention.head_dim for linear in (attention.q_proj, attention.k_proj))
