"""Document masks: packed documents do not see each other, and each begins at position 0.

A sequence is cut from the corpus, whose index says where documents begin: it holds the end of one document, some whole
ones, and the beginning of the last. What a query sees is the part of its own document up to itself, so attention is a
list of blocks, one for each document. A rank has to know where its queries' documents begin, and nothing about other
ranks. A document trains as it would alone.

Shapes: b sequences, s tokens of a rank.
"""

from collections.abc import Callable
from dataclasses import dataclass, replace
from functools import partial
from itertools import product
from typing import NamedTuple

import context_parallel
import numpy as np
import torch
import torch.nn.functional as F
from context.all_to_all import all_to_all_attention
from context.fused_attention import Block
from torch import Tensor
from torch.distributed import ProcessGroup
from torch.distributed.device_mesh import DeviceMesh

from shared.attention import documents_attention, takes_documents
from shared.data import Batch, Mixture
from shared.model import LlamaForCausalLM


@dataclass
class Config:
    """The option of this feature."""

    # Keep attention within a document of the corpus, and start positions anew with each.
    mask_documents: bool = False


def document_begins(firsts: list[np.ndarray], seq_len: int) -> Tensor:
    """Where in its sequence the document of each token begins, (b, seq_len), if those of a sequence begin at `firsts`,
    and one before them."""
    begins = torch.zeros(len(firsts), seq_len, dtype=torch.int64)
    for row, first in zip(begins, firsts, strict=True):
        row[first] = torch.from_numpy(first)
    return begins.cummax(1).values


class Held(NamedTuple):
    """What a rank holds of a document: some rows of the batch have it as tokens `start` to `end`."""

    rows: slice
    start: int
    end: int
    # Position in the whole sequence at which the document begins.
    begin: int


def held_documents(begins: Tensor) -> list[Held]:
    """The documents of a rank whose tokens belong to documents that begin at `begins` (b, s).

    As few as possible, for each will be a call of a kernel: the pieces of a document that a zigzag rank holds count as
    one, and so do rows that are divided alike, as those are that no document begins in.
    """
    held, row = [], 0
    for division, rows in zip(*begins.unique_consecutive(dim=0, return_counts=True), strict=True):
        begin, counts = division.unique_consecutive(return_counts=True)
        ends = counts.cumsum(0)
        for start, end, at in zip((ends - counts).tolist(), ends.tolist(), begin.tolist(), strict=True):
            held.append(Held(slice(row, row + int(rows)), start, end, at))
        row += int(rows)
    return held


def document_blocks(config: context_parallel.Config, rank: int, begins: Tensor) -> list[list[Block]]:
    """What a rank sees of each rank's keys: `visible`, cut by documents that begin at `begins` (b, whole sequence)."""
    positions = [context_parallel.local_positions(config, source) for source in range(config.cp)]
    held, tokens = held_documents(begins[:, positions[rank]]), range(len(positions[rank]))
    blocks = []
    for source in range(config.cp):
        seen, cut = context_parallel.visible(config, rank, source), []
        # Of the source's keys, the first of each document.
        first_keys = torch.searchsorted(positions[source], torch.tensor([document.begin for document in held])).tolist()
        for block, (document, first_key) in product(seen, zip(held, first_keys, strict=True)):
            (*_, queries), (*_, keys), causal = block
            # A block's queries go on to the last one, so a document's end is the end of what the block has of it.
            queries = slice(max(document.start, tokens[queries].start), document.end)
            keys = slice(max(first_key, tokens[keys].start), document.end if causal else tokens[keys].stop)
            if queries.start < queries.stop and keys.start < keys.stop:
                cut.append(Block((document.rows, slice(None), queries), (document.rows, slice(None), keys), causal))
        blocks.append(cut)
    return blocks


def document_bounds(begins: Tensor) -> tuple[Tensor, int]:
    """Of documents that begin at `begins` (b, s): where in all sequences, one after the other, the first begins, the
    second, and so on, and the last ends, (n + 1,) int32; and the length of the longest."""
    firsts = (begins == torch.arange(begins.shape[1])).flatten().nonzero().flatten()
    bounds = F.pad(firsts, (0, 1), value=begins.numel()).int()
    return bounds, int(bounds.diff().max())


class Blocks:
    """The blocks of a micro-batch, as attention is handed them. An object and no list, or torch.compile would look into
    it, and compile each layer anew for every micro-batch.

    Where a rank attends to whole sequences, also where documents begin and end in all of them, one after the other.
    """

    def __init__(self, by_rank: list[list[Block]], bounds: Tensor | None = None, longest: int = 0) -> None:
        self.by_rank, self.bounds, self.longest = by_rank, bounds, longest

    def to(self, device: torch.device) -> "Blocks":
        bounds = None if self.bounds is None else self.bounds.to(device, non_blocking=True)
        return Blocks(self.by_rank, bounds, self.longest)

    def pin_memory(self) -> "Blocks":
        return Blocks(self.by_rank, None if self.bounds is None else self.bounds.pin_memory(), self.longest)


class DocumentBatch(NamedTuple):
    """A micro-batch, and the blocks of its attention on this rank."""

    input_ids: Tensor
    labels: Tensor
    position_ids: Tensor
    blocks: Blocks

    def to(self, device: torch.device) -> "DocumentBatch":
        return DocumentBatch(*Batch(*self[:3]).to(device), self.blocks.to(device))

    def pin_memory(self) -> "DocumentBatch":
        return DocumentBatch(*Batch(*self[:3]).pin_memory(), self.blocks.pin_memory())


def blocks(batch: Batch | DocumentBatch) -> tuple[Blocks, ...]:
    """What attention takes besides q, k and v: blocks if documents are masked, or nothing."""
    return (batch.blocks,) if isinstance(batch, DocumentBatch) else ()


class DocumentBatches(context_parallel.SplitBatches):
    """Batches whose positions start anew with each document. Blocks are computed here, where sequences are still whole
    and on the CPU: once per micro-batch, without a message, and without waiting for a GPU."""

    def __init__(
        self,
        sequences: Mixture,
        config: context_parallel.Config,
        rank: int,
        size: int,
        positions: Tensor,
        cp_rank: int,
    ) -> None:
        super().__init__(sequences, config, rank, size, positions)
        # After an all-to-all, a rank has whole sequences, as it would alone.
        alone = config.cp_engine == "all-to-all"
        self.config, self.cp_rank = (replace(config, cp=1), 0) if alone else (config, cp_rank)

    def micro_batch(self, places: range) -> DocumentBatch:
        batch = super().micro_batch(places)
        located = [self.sequences.locate(i, self.seed) for i in places]
        begins = document_begins([sequences.document_begins(i) for sequences, i in located], self.config.seq_len)
        batch = batch._replace(position_ids=batch.position_ids - begins[:, self.positions])
        bounds, longest = document_bounds(begins) if self.config.cp == 1 else (None, 0)
        return DocumentBatch(*batch, Blocks(document_blocks(self.config, self.cp_rank, begins), bounds, longest))


def make_batches(config: context_parallel.Config, mesh: DeviceMesh) -> Callable[..., context_parallel.SplitBatches]:
    """What makes the batches of a run: `SplitBatches`, with blocks if documents are masked."""
    if not config.mask_documents:
        return context_parallel.SplitBatches
    return partial(DocumentBatches, cp_rank=mesh.get_local_rank("cp"))


# Compiled, it would be compiled anew for each list of blocks.
@torch.compiler.disable
def document_attention(
    q: Tensor, k: Tensor, v: Tensor, blocks: Blocks, config: context_parallel.Config, group: ProcessGroup
) -> Tensor:
    """The engine's attention over the blocks of a micro-batch. Alone, a rank is a ring where nothing travels."""
    engine = config.cp_engine if config.cp > 1 else "ring"
    if engine == "all-gather":
        return context_parallel.all_gather_attention(q, k, v, group, blocks.by_rank)
    attend = partial(context_parallel.ring_attention, group=group, blocks=blocks.by_rank)
    if blocks.bounds is not None and takes_documents(q):
        attend = partial(documents_attention, bounds=blocks.bounds, longest=blocks.longest)
    return attend(q, k, v) if engine == "ring" else all_to_all_attention(q, k, v, group, attend)


def apply(model: LlamaForCausalLM, config: context_parallel.Config, mesh: DeviceMesh) -> None:
    """Replace the attention of each layer by one that takes blocks, if documents are masked."""
    if config.mask_documents:
        for layer in model.model.layers.values():
            layer.self_attn.attention = partial(document_attention, config=config, group=mesh.get_group("cp"))
