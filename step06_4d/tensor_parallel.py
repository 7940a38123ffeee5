"""Tensor parallelism: ranks split every matrix of a layer and work on the same tokens (arXiv 1909.08053).

A column-parallel linear computes a part of the outputs, for which it needs the whole input. A row-parallel one reads a
part of the inputs, and its outputs are summed over the ranks. A pair of them, with whole heads or columns of the MLP in
between, needs one all-reduce in forward, behind the second, and one in backward, before the first.

Shapes: b sequences, s tokens, h hidden size, n outputs, t ranks.
"""

import math
from dataclasses import dataclass

import torch
import torch.distributed as dist
import torch.nn.functional as F
from token_layout import Replicated, TokenLayout, enter_split, leave_split
from torch import Tensor, nn
from torch.autograd.function import FunctionCtx
from torch.distributed import ProcessGroup
from transformers import LlamaConfig
from weight_gradients import deferrable_linear, weight_gradients_or_none, weight_in_graph

from shared.config import BaseConfig, UserError
from shared.data import GlobalBatches
from shared.ledger import Traffic
from shared.loss import chunk_size, linear_cross_entropy
from shared.model import LlamaForCausalLM
from shared.ops import embedding
from shared.weights import Weights


@dataclass
class TensorParallelConfig:
    """The options of this axis."""

    # Tensor-parallel ranks: each holds a part of every matrix.
    tp: int = 1
    # In backward, communicate a block's input and its gradient while other gradients are computed.
    tp_overlap: bool = True


class _ColumnParallel(torch.autograd.Function):
    """x (b, s, h) times each of several weights (n, h): outputs (b, s, n). Backward sums the gradient of x, once."""

    @staticmethod
    def forward(
        ctx: FunctionCtx, x: Tensor, block: "list[ColumnParallelLinear]", *weights: Tensor
    ) -> tuple[Tensor, ...]:
        ctx.block = block
        # The weights themselves, not their copies in autocast's dtype: a pipeline has several micro-batches under way.
        ctx.save_for_backward(x, *weights)
        x, _ = block[0].layout.gather(x, block[0].group)
        return tuple(F.linear(x, weight.to(x.dtype)) for weight in weights)

    @staticmethod
    def backward(ctx: FunctionCtx, *grads: Tensor) -> tuple[Tensor | None, ...]:
        x, *weights = ctx.saved_tensors
        first = ctx.block[0]
        x, gathering = first.layout.gather(x, first.group, async_op=first.overlap)
        # From the last to the first, as autograd sums: with one rank, the result is bitwise the same.
        grad_x = grads[-1] @ weights[-1].to(x.dtype)
        for grad, weight in zip(grads[-2::-1], weights[-2::-1], strict=True):
            grad_x += grad @ weight.to(x.dtype)
        grad_x, summing = first.layout.sum(grad_x, first.group, async_op=first.overlap)
        if gathering:
            gathering.wait()
        grad_weights = weight_gradients_or_none(ctx.block, list(grads), x)
        if summing:
            summing.wait()
        return grad_x, None, *grad_weights


class ShardedModule(nn.Module):
    """Holds part `index` of `count` along `dim` of a full weight; `copies` consecutive ranks hold the same."""

    # Of the tokens, before and behind the split matrix.
    layout: TokenLayout = Replicated

    def __init__(self, full: Tensor, dim: int, group: ProcessGroup, copies: int = 1) -> None:
        super().__init__()
        self.full_shape, self.dim, self.group, self.copies = full.shape, dim, group, copies
        self.index, self.count = dist.get_rank(group) // copies, dist.get_world_size(group) // copies
        self.is_first_copy = dist.get_rank(group) % copies == 0
        self.weight = nn.Parameter(self.part_of(full.detach()).clone())

    def part_of(self, full: Tensor) -> Tensor:
        """A view. If `count` does not divide the size, the first parts are larger by one."""
        return full.tensor_split(self.count, self.dim)[self.index]


class ColumnParallelLinear(ShardedModule):
    """Rows of a weight (n, h), so a part of the outputs. Linears that read the same input form a `block`."""

    def __init__(self, full: Tensor, group: ProcessGroup, copies_group: ProcessGroup | None, overlap: bool) -> None:
        super().__init__(full, 0, group, dist.get_world_size(copies_group) if copies_group else 1)
        self.copies_group, self.overlap = copies_group, overlap
        self.block: list[ColumnParallelLinear] = []
        self.output: Tensor | None = None

    def forward(self, x: Tensor) -> Tensor:
        if self is self.block[0]:
            # The first of the block is called first, and computes it all: one function, so one sum in backward.
            outputs = _ColumnParallel.apply(x, self.block, *map(weight_in_graph, self.block))
            for linear, output in zip(self.block, outputs, strict=True):
                linear.output = output
        output, self.output = self.output, None
        return output


class RowParallelLinear(ShardedModule):
    """Columns of a weight (n, h): reads a part of the inputs, (b, s, h/t), and returns the whole outputs (b, s, n)."""

    def __init__(self, full: Tensor, group: ProcessGroup) -> None:
        super().__init__(full, 1, group)

    def forward(self, x: Tensor) -> Tensor:
        return leave_split(deferrable_linear(self, x), self.layout, self.group)


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
        return leave_split(x, self.layout, self.group)


class VocabParallelHead(VocabParallel):
    """The head and its loss: each rank has the logits of its part of the vocabulary, and they stay there."""

    def loss(self, hidden: Tensor, labels: Tensor) -> Tensor:
        """Cross entropy of hidden (b, s, h) and labels (b, s), summed over the tokens, the same on all ranks."""
        hidden = enter_split(hidden, self.layout, self.group)
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
        return (total.log() - label_logits).sum()


def _check_sizes(config: LlamaConfig, tp: int) -> int:
    """The ranks that hold the same key-value heads. Raises UserError if the model cannot be split over tp ranks."""
    heads, kv_heads, ffn = config.num_attention_heads, config.num_key_value_heads, config.intermediate_size

    def fits(size: int) -> bool:
        return heads % size == 0 and ffn % size == 0 and (kv_heads % size == 0 or size % kv_heads == 0)

    if not fits(tp):
        allowed = ", ".join(str(size) for size in range(1, heads + 1) if fits(size))
        raise UserError(
            f"--tp {tp} does not fit {heads} heads, {kv_heads} key-value heads and intermediate size {ffn}: tp must "
            f"divide the first and the last, and divide or be a multiple of the second, so be one of {allowed}"
        )
    return max(1, tp // kv_heads)


def apply_tensor_parallel(model: LlamaForCausalLM, group: ProcessGroup, overlap: bool = True) -> None:
    """Replace linears, embedding and head by this rank's parts. Raises UserError if they cannot be split."""
    copies, ranks = _check_sizes(model.model.config, dist.get_world_size(group)), dist.get_process_group_ranks(group)
    copies_group = None
    if copies > 1:
        # More ranks than key-value heads: `copies` neighbours hold the same one, and queries that belong to it.
        first = dist.get_rank(group) // copies * copies
        copies_group = dist.new_group(ranks[first : first + copies], use_local_synchronization=True, group_desc="tp")

    def split_columns(parent: nn.Module, names: dict[str, ProcessGroup | None]) -> None:
        block = []
        for name, group_of_copies in names.items():
            linear = ColumnParallelLinear(parent.get_submodule(name).weight, group, group_of_copies, overlap)
            linear.block = block
            block.append(linear)
            parent.set_submodule(name, linear)

    for layer in model.model.layers.values():
        attention, mlp = layer.self_attn, layer.mlp
        split_columns(attention, {"q_proj": None, "k_proj": copies_group, "v_proj": copies_group})
        attention.o_proj = RowParallelLinear(attention.o_proj.weight, group)
        split_columns(mlp, {"gate_proj": None, "up_proj": None})
        mlp.down_proj = RowParallelLinear(mlp.down_proj.weight, group)
    tied = model.lm_head.weight is model.model.embed_tokens.weight
    model.model.embed_tokens = VocabParallelEmbedding(model.model.embed_tokens.weight, group)
    model.lm_head = VocabParallelHead(model.lm_head.weight, group)
    if tied:
        model.lm_head.weight = model.model.embed_tokens.weight


def sharded_modules(model: nn.Module) -> dict[str, ShardedModule]:
    """The modules of the split parameters, by the parameter's name. All other parameters are the same on every rank."""
    modules = {module.weight: module for module in model.modules() if isinstance(module, ShardedModule)}
    return {name: modules[p] for name, p in model.named_parameters() if p in modules}


def shard_weights(model: nn.Module, weights: Weights) -> Weights:
    """From a parameter's name to this rank's part of the full tensor that `weights` has."""
    modules = sharded_modules(model)
    # Cloned, or the part would keep the full tensor alive.
    return lambda name: modules[name].part_of(weights(name)).clone() if name in modules else weights(name)


def full_tensors(model: nn.Module, tensors: dict[str, Tensor]) -> dict[str, Tensor]:
    """Parameters by name, or their gradients, as full tensors on the CPU. All-reduces each that is split."""
    modules, full_tensors = sharded_modules(model), {}
    for name, tensor in tensors.items():
        full = tensor.detach()
        if name in modules:
            full = tensor.new_zeros(modules[name].full_shape)
            if modules[name].is_first_copy:
                modules[name].part_of(full).copy_(tensor)
            dist.all_reduce(full, group=modules[name].group)
        full_tensors[name] = full.cpu()
    return full_tensors


def counted_parameters(model: nn.Module, group: ProcessGroup) -> list[nn.Parameter]:
    """The parameters of this rank that no earlier one holds: over the ranks of the group, the model once."""
    modules, first = sharded_modules(model), dist.get_rank(group) == 0
    return [p for name, p in model.named_parameters() if (modules[name].is_first_copy if name in modules else first)]


def norm_over_ranks(norm: Tensor, group: ProcessGroup) -> Tensor:
    """√Σ norm² over the ranks. All-reduces one number."""
    squares = norm.square()
    dist.all_reduce(squares, group=group)
    return squares.sqrt()


def tensor_parallel_traffic(
    config: BaseConfig, model: LlamaForCausalLM, batches: GlobalBatches
) -> dict[tuple[str, str], Traffic]:
    """Payload per step of a rank, all in all-reduces.

    Per micro-batch: (b, s, h) twice forward and twice backward in each layer, and the first of these again where
    backward recomputes the layer (it needs no result of the second); once forward behind the embedding, once backward
    before the head; three numbers per token for the loss; the gradients of copied key-value heads. Per step: one
    number, for the gradients' norm. A single rank sums no (b, s, h).
    """
    tokens, h = batches.tokens, model.model.config.hidden_size
    summed, computed = config.grad_dtype.itemsize, config.compute_dtype.itemsize
    split, chunks = int(config.tp > 1), math.ceil(tokens / chunk_size(h))
    calls = split * (4 + config.recomputes) * len(model.model.layers)
    nbytes = calls * tokens * h * computed
    if isinstance(model.model.embed_tokens, VocabParallelEmbedding):
        calls, nbytes = calls + split, nbytes + split * tokens * h * config.param_dtype.itemsize
    if isinstance(model.lm_head, VocabParallelHead):
        calls, nbytes = calls + split + 2 * chunks, nbytes + (split * h * computed + 3 * summed) * tokens
    copied = [module.weight for module in sharded_modules(model).values() if module.copies > 1]
    calls, nbytes = calls + len(copied), nbytes + sum(weight.numel() for weight in copied) * summed
    return {("tp", "all-reduce"): Traffic(batches.micro_batches * calls + 1, batches.micro_batches * nbytes + summed)}
