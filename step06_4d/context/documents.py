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
from context import operators
from context.all_to_all import all_to_all_attention
from context.fused_attention import Block
from torch import Tensor
from torch.distributed import ProcessGroup
from torch.distributed.device_mesh import DeviceMesh

from shared.attention import documents_attention, takes_documents
from shared.config import UserError
from shared.data import Batch, GlobalBatches, Mixture
from shared.loss import CrossEntropy
from shared.model import LlamaForCausalLM

# A label that is none, as torch's own loss has it.
IGNORED = -100


@dataclass
class Config:
    """The options of this feature."""

    # Keep attention within a document of the corpus, and start positions anew with each.
    mask_documents: bool = False
    # Ignore the label of a document's last token, which is the first token of the next document.
    ignore_last_labels: bool = False

    def validate(self) -> None:
        super().validate()
        if self.ignore_last_labels and not self.mask_documents:
            raise UserError("--ignore-last-labels needs --mask-documents: without, a token sees the document before")


def document_begins(firsts: list[np.ndarray], seq_len: int) -> Tensor:
    """Where in its sequence the document of each token begins, (b, seq_len + 1), if those of a sequence begin at
    `firsts`, and one before them. The last column is of the token after the sequence."""
    begins = torch.zeros(len(firsts), seq_len + 1, dtype=torch.int64)
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

    def __init__(self, by_rank: operators.Blocks, bounds: Tensor | None = None, longest: int = 0) -> None:
        self.by_rank, self.bounds, self.longest = by_rank, bounds, longest
        # What compiled layers ask: looking at bounds, they would be compiled anew for each number of documents.
        self.has_bounds = bounds is not None

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
    # Of all ranks' micro-batches at this place.
    labels_over_ranks: int

    def to(self, device: torch.device) -> "DocumentBatch":
        return DocumentBatch(*Batch(*self[:3]).to(device), self.blocks.to(device), self.labels_over_ranks)

    def pin_memory(self) -> "DocumentBatch":
        return DocumentBatch(*Batch(*self[:3]).pin_memory(), self.blocks.pin_memory(), self.labels_over_ranks)


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
        begins = document_begins([self.firsts(place) for place in places], self.config.seq_len)
        if self.config.ignore_last_labels:
            last = begins[:, self.positions + 1] > self.positions
            batch = batch._replace(labels=batch.labels.masked_fill(last, IGNORED))
        begins = begins[:, :-1]
        batch = batch._replace(position_ids=batch.position_ids - begins[:, self.positions])
        bounds, longest = document_bounds(begins) if self.config.cp == 1 else (None, 0)
        by_rank = operators.Blocks(document_blocks(self.config, self.cp_rank, begins))
        blocks = Blocks(by_rank, bounds, longest)
        return DocumentBatch(*batch, blocks, self.labels_over_ranks(places))

    def labels_over_ranks(self, places: range) -> int:
        """Labels of these sequences and of those that other ranks take at the same time: found in the index."""
        labels = len(places) * self.size * self.config.seq_len
        if self.config.ignore_last_labels:
            share = self.global_batch_size // self.size
            shifts = range(-self.rank * share, (self.size - self.rank) * share, share)
            labels -= sum(len(self.firsts(place + shift)) for shift in shifts for place in places)
        return labels

    def firsts(self, place: int) -> np.ndarray:
        """Where documents begin in the sequence at a place in the order of training."""
        sequences, i = self.sequences.locate(place, self.seed)
        return sequences.document_begins(i)


def make_batches(config: context_parallel.Config, mesh: DeviceMesh) -> Callable[..., context_parallel.SplitBatches]:
    """What makes the batches of a run: `SplitBatches`, with blocks if documents are masked."""
    if not config.mask_documents:
        return context_parallel.SplitBatches
    return partial(DocumentBatches, cp_rank=mesh.get_local_rank("cp"))


def count_labels(config: Config, batches: GlobalBatches, taken: list[Batch | DocumentBatch]) -> int:
    """Labels of the micro-batches `taken` from `batches`, and of those that other ranks took at the same time."""
    if config.ignore_last_labels:
        return sum(batch.labels_over_ranks for batch in taken)
    return len(taken) * batches.micro_batch_size * batches.size * config.seq_len


def labelled_cross_entropy(cross_entropy: CrossEntropy, logits: Tensor, label: Tensor) -> Tensor:
    """`cross_entropy`, and its gradient, of tokens that have a label: 0 of others."""
    ignored = label == IGNORED
    losses = cross_entropy(logits, label.masked_fill(ignored, 0))
    logits.masked_fill_(ignored, 0)
    return losses.masked_fill_(ignored, 0)


def attention_in_one_call(q: Tensor, k: Tensor, v: Tensor, blocks: Blocks) -> Tensor:
    return documents_attention(q, k, v, blocks.bounds, blocks.longest)


def document_attention(
    q: Tensor,
    k: Tensor,
    v: Tensor,
    blocks: Blocks,
    config: context_parallel.Config,
    group: ProcessGroup,
    in_one_call: Callable = attention_in_one_call,
) -> Tensor:
    """The engine's attention over the blocks of a micro-batch. Alone, a rank is a ring where nothing travels."""
    engine = config.cp_engine if config.cp > 1 else "ring"
    if engine == "all-gather":
        return context_parallel.all_gather_attention(q, k, v, group, blocks.by_rank)
    attend = partial(context_parallel.ring_attention, group=group, blocks=blocks.by_rank)
    if blocks.has_bounds and takes_documents(q):
        attend = partial(in_one_call, blocks=blocks)
    return attend(q, k, v) if engine == "ring" else all_to_all_attention(q, k, v, group, attend)


def apply(model: LlamaForCausalLM, config: context_parallel.Config, mesh: DeviceMesh) -> None:
    """Replace the attention of each layer by one that takes blocks, if documents are masked, and the loss of the head
    by one that knows tokens without a label, if there are."""
    if config.mask_documents:
        # Compiled, it would be compiled anew for each number of documents. Not above: this loads the compiler.
        in_one_call = torch.compiler.disable(attention_in_one_call)
        attention = partial(document_attention, config=config, group=mesh.get_group("cp"), in_one_call=in_one_call)
        for layer in model.model.layers.values():
            layer.self_attn.attention = attention
    if config.ignore_last_labels and model.lm_head:
        model.lm_head.cross_entropy = partial(labelled_cross_entropy, model.lm_head.cross_entropy)
