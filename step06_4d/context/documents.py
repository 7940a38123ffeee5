"""Document masks: packed documents do not see each other, and each begins at position 0.

A sequence is cut from the corpus, where an EOS token ends each document: it holds the end of one document, some whole
ones, and the beginning of the last. What a query sees is the part of its own document up to itself, so attention is a
list of blocks, one for each document. A rank of a ring has to know where its queries' documents begin, and nothing
about other ranks. A document trains as it would alone.

Shapes: b sequences, s tokens.
"""

from dataclasses import dataclass
from functools import partial
from itertools import product
from typing import NamedTuple

import torch
import torch.distributed as dist
import torch.nn.functional as F
from context_parallel import (
    Block,
    ContextParallelConfig,
    SplitBatches,
    all_to_all_attention,
    causal_blocks,
    local_positions,
    ring_attention,
)
from torch import Tensor
from torch.distributed import ProcessGroup

from shared.data import Batch, Sequences
from shared.model import LlamaForCausalLM


@dataclass
class DocumentsConfig:
    """The option of this feature."""

    # Attention stays within a document of the corpus, and positions start anew with each.
    mask_documents: bool = False


def document_begins(input_ids: Tensor, eos: int) -> Tensor:
    """Where in its sequence the document of each token begins, (b, s). The EOS token belongs to what it ends."""
    is_first = F.pad(input_ids[:, :-1] == eos, (1, 0))
    return (is_first * torch.arange(input_ids.shape[1])).cummax(1).values


def document_blocks(begins: Tensor, rank: int, size: int, zigzag: bool) -> list[list[Block]]:
    """The blocks of each hop of a ring: `causal_blocks`, cut by documents that begin at `begins` (b, whole sequence).

    As few as possible, for each is a call of a kernel: the pieces of a document that a zigzag rank holds count as one,
    and so do rows that are divided alike, as those are that no document begins in.
    """
    positions = [local_positions(begins.shape[1], r, size, zigzag) for r in range(size)]
    tokens = range(len(positions[rank]))
    divisions, repeats = begins[:, positions[rank]].unique_consecutive(dim=0, return_counts=True)
    # Rows and tokens of each document's part on this rank, and where the document begins.
    parts, parts_begin, row = [], [], 0
    for division, rows in zip(divisions, repeats.tolist(), strict=True):
        begin, counts = division.unique_consecutive(return_counts=True)
        ends = counts.cumsum(0)
        spans = zip((ends - counts).tolist(), ends.tolist(), strict=True)
        parts += [(slice(row, row + rows), start, end) for start, end in spans]
        parts_begin.append(begin)
        row += rows
    hops = []
    for hop, blocks in enumerate(causal_blocks(rank, size, len(tokens), zigzag)):
        # Of the keys of this hop, the first of each document.
        first_keys = torch.searchsorted(positions[(rank - hop) % size], torch.cat(parts_begin)).tolist()
        cut = []
        for (_, queries, keys, causal), (part, first_key) in product(blocks, zip(parts, first_keys, strict=True)):
            rows, start, end = part
            # A block's queries go on to the last one, so a part's own end is the end of what it has of them.
            queries = slice(max(start, tokens[queries].start), end)
            keys = slice(max(first_key, tokens[keys].start), end if causal else tokens[keys].stop)
            if queries.start < queries.stop and keys.start < keys.stop:
                cut.append((rows, queries, keys, causal))
        hops.append(cut)
    return hops


class DocumentBatch(NamedTuple):
    """A micro-batch, and the blocks of its attention on this rank."""

    input_ids: Tensor
    labels: Tensor
    position_ids: Tensor
    hops: list[list[Block]]

    def to(self, device: torch.device) -> "DocumentBatch":
        return DocumentBatch(*Batch(*self[:3]).to(device), self.hops)


class DocumentBatches(SplitBatches):
    """Batches whose positions start anew with each document. Blocks are computed here, where sequences are still whole
    and on the CPU: once per micro-batch, without a message, and without waiting for a GPU."""

    def __init__(
        self, sequences: Sequences, config: ContextParallelConfig, rank: int, size: int, group: ProcessGroup, eos: int
    ) -> None:
        super().__init__(sequences, config, rank, size, group)
        self.eos = eos
        # After an all-to-all, a rank has whole sequences: a ring of its own.
        self.ring = (dist.get_rank(group), config.cp) if config.cp_engine == "ring" else (0, 1)
        self.zigzag = config.zigzag

    def split(self, batch: Batch) -> DocumentBatch:
        begins = document_begins(batch.input_ids, self.eos)
        local = super().split(batch._replace(position_ids=batch.position_ids - begins))
        return DocumentBatch(*local, document_blocks(begins, *self.ring, self.zigzag))


class DocumentAttention:
    """In the place of the attention of all layers: that of the micro-batch whose blocks `hops` are."""

    def __init__(self, config: ContextParallelConfig, group: ProcessGroup) -> None:
        self.group, self.all_to_all = group, config.cp > 1 and config.cp_engine == "all-to-all"
        self.hops: list[list[Block]] = []

    # Compiled, it would be compiled anew for each list of blocks.
    @torch.compiler.disable
    def __call__(self, q: Tensor, k: Tensor, v: Tensor) -> Tensor:
        attend = partial(ring_attention, group=self.group, hops=self.hops)
        return all_to_all_attention(q, k, v, self.group, attend) if self.all_to_all else attend(q, k, v)


def apply_document_masks(model: LlamaForCausalLM, config: DocumentsConfig, group: ProcessGroup) -> None:
    """Replace the attention of each layer, if documents are masked."""
    if config.mask_documents:
        attention = DocumentAttention(config, group)
        for layer in model.model.layers.values():
            layer.self_attn.attention = attention


def forward_in_documents(model: LlamaForCausalLM, x: Tensor, batch: DocumentBatch) -> Tensor:
    """`model.model` of a micro-batch: token ids, or hidden states (b, s, h) of an earlier stage, to hidden states.

    The model's seam hands attention q, k and v, and no more. So the blocks are set before forward, and once more when
    backward reaches the output: a layer that is recomputed then finds those of its own micro-batch, whatever ran since.
    """
    attention = next(iter(model.model.layers.values())).self_attn.attention
    attention.hops = batch.hops
    hidden = model.model(x, batch.position_ids)
    if hidden.requires_grad:
        hidden.register_hook(lambda _: setattr(attention, "hops", batch.hops))
    return hidden
