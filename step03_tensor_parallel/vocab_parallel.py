"""The vocabulary over ranks: each has some rows of the embedding and of the head, and the logits of these alone.

Shapes: b sequences, s tokens, h hidden size.
"""

import torch
import torch.distributed as dist
from conjugates import CopyToRanks, ShardedModule, SumOverRanks
from torch import Tensor
from torch.distributed import ProcessGroup

from shared.loss import linear_cross_entropy
from shared.ops import embedding


class VocabParallel(ShardedModule):
    """Rows of a weight (vocab, h). If t does not divide the vocabulary, some ranks hold a row more: no padding."""

    def __init__(self, full: Tensor, group: ProcessGroup) -> None:
        super().__init__(full, 0, group)
        self.first_row = sum(len(part) for part in full.tensor_split(self.count)[: self.index])

    def local(self, ids: Tensor) -> tuple[Tensor, Tensor]:
        """Token ids as rows of this rank, 0 for those of other ranks, and which these are."""
        rows = ids - self.first_row
        elsewhere = (rows < 0) | (rows >= len(self.weight))
        return rows.masked_fill_(elsewhere, 0), elsewhere


class VocabParallelEmbedding(VocabParallel):
    """Token ids (b, s) to vectors (b, s, h)."""

    def forward(self, ids: Tensor) -> Tensor:
        rows, elsewhere = self.local(ids)
        x = embedding(rows, self.weight).masked_fill_(elsewhere.unsqueeze(-1), 0)
        return SumOverRanks.apply(x, self.group)


class VocabParallelHead(VocabParallel):
    """The head and its loss: each rank has the logits of its part of the vocabulary, and they stay there."""

    def loss(self, hidden: Tensor, labels: Tensor) -> Tensor:
        """Cross entropy of hidden (b, s, h) and labels (b, s), summed over the tokens, the same on all ranks."""
        hidden = CopyToRanks.apply(hidden, self.group)
        return linear_cross_entropy(hidden, self.weight, labels, self.cross_entropy)

    def cross_entropy(self, logits: Tensor, label: Tensor) -> Tensor:
        """As in shared/loss.py, for the columns of this rank. All-reduces one number per token, then two."""
        highest = logits.amax(-1, keepdim=True)
        dist.all_reduce(highest, dist.ReduceOp.MAX, self.group)
        logits -= highest
        row, elsewhere = self.local(label)
        label_logits = logits.gather(-1, row).masked_fill_(elsewhere, 0)
        sums = torch.cat((logits.exp_().sum(-1, keepdim=True), label_logits), -1)
        dist.all_reduce(sums, group=self.group)
        total, label_logits = sums.split(1, -1)
        logits /= total
        logits.scatter_add_(-1, row, elsewhere.to(logits.dtype) - 1)
        return total.log() - label_logits
