"""Bugs of context parallelism."""

from dataclasses import replace
from functools import partial
from types import ModuleType
from typing import Any

import torch
import torch.distributed as dist
from torch import Tensor

from labs.bugs import bug

bug = partial(bug, "step05_context_parallel")


def change_batches(module: ModuleType, change: Any) -> None:
    """`change(batches, batch)` is the new micro-batch."""
    batches = module.context_parallel.SplitBatches
    batches.micro_batch = lambda self, places, real=batches.micro_batch: change(self, real(self, places))


@bug("--cp 2", "context_parallel.py", "tokens")
def positions_from_zero(module: ModuleType) -> None:
    """Each rank counts the positions of its piece from 0, as if it were a whole sequence."""

    def wrong(batches: Any, batch: Any) -> Any:
        return batch._replace(position_ids=torch.arange(len(batches.positions)).expand_as(batch.input_ids))

    change_batches(module, wrong)


@bug("--cp 2", "context_parallel.py", "tokens")
def labels_within_the_piece(module: ModuleType) -> None:
    """Each rank shifts its own tokens to make labels: the last token of its piece is to be followed by the first one,
    and where an early piece ends, by the beginning of a late one."""
    change_batches(module, lambda batches, batch: batch._replace(labels=batch.input_ids.roll(-1, 1)))


@bug("--cp 2", "context_parallel.py train.py", "missing-sum")
def reduced_over_dp_alone(module: ModuleType) -> None:
    """Gradients are summed over dp and not over cp, whose ranks have seen other tokens of the same sequences."""
    module.context_parallel.replicas = lambda config, mesh: mesh.get_group("dp")


@bug("--cp 2", "context_parallel.py", "mask")
def mask_of_contiguous_pieces(module: ModuleType) -> None:
    """Tokens are dealt out in zigzag, but blocks are masked as if rank 0 had the first half of a sequence."""

    def visible(config: Any, *args: Any, real: Any = module.context_parallel.visible) -> list:
        return real(replace(config, cp_split="contiguous"), *args)

    module.context_parallel.visible = visible


@bug("--cp 2", "context_parallel.py", "mask")
def every_rank_is_seen(module: ModuleType) -> None:
    """The mask holds within a rank's own block; of other ranks every key is seen, those of later tokens included."""

    def visible(config: Any, rank: int, source: int, real: Any = module.context_parallel.visible) -> list:
        (own,) = real(config, rank, rank)
        return [own if source == rank else own._replace(causal=False)]

    module.context_parallel.visible = visible


@bug("--cp 2 --cp-engine all-gather", "context_parallel.py", "missing-sum lost")
def gradients_of_keys_stay(module: ModuleType) -> None:
    """A rank keeps the gradients that its own queries have for its keys and values, and drops those of other ranks."""

    def own_part(out: Tensor, parts: Tensor, group: Any) -> None:
        out.copy_(parts.unflatten(0, (dist.get_world_size(group), -1))[dist.get_rank(group)])

    dist.reduce_scatter_single = own_part


@bug("--cp 2", "fused_attention.py", "softmax")
def blocks_averaged(module: ModuleType) -> None:
    """The outputs over two blocks of keys are averaged, as if each block had the same share of the softmax."""

    def merge(out: Tensor, lse: Tensor, block_out: Tensor, block_lse: Tensor) -> None:
        first = lse.isinf().unsqueeze(-1)
        out.copy_(torch.where(first, block_out, (out + block_out) / 2))
        lse.copy_(torch.logaddexp(lse, block_lse))

    module.context_parallel.attend.__globals__["merge"] = merge
