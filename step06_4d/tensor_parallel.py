"""Tensor parallelism: ranks split every matrix of a layer and work on the same tokens (arXiv 1909.08053).

A column-parallel linear computes a part of the outputs, for which it needs the whole input. A row-parallel one reads a
part of the inputs, and its outputs are summed over the ranks. Between the two are whole heads or columns of the MLP,
on which each rank works alone: ranks talk in forward after the second, and in backward before the first.

Shapes: b sequences, s tokens, h hidden size, n outputs, t ranks.
"""

import math
from dataclasses import dataclass
from typing import Any, Literal

import torch
import torch.distributed as dist
import torch.nn.functional as F
from tensor.conjugates import CopyToRanks, ShardedModule, SumOverRanks
from tensor.token_layout import Replicated, Sharded, later
from tensor.vocab_parallel import VocabParallelEmbedding, VocabParallelHead
from tensor.weight_gradients import deferrable_linear, weight_gradients_or_none, weight_in_graph
from torch import Tensor, nn
from torch.autograd.function import FunctionCtx
from torch.distributed import ProcessGroup
from torch.distributed.device_mesh import DeviceMesh
from transformers import PreTrainedConfig

from shared.config import UserError
from shared.distributed import groups_along, make_group
from shared.ledger import Traffic
from shared.loss import chunk_size
from shared.model import LlamaForCausalLM
from shared.ops import at_least_float32
from shared.weights import ALL, Weights


@dataclass
class Config:
    """The options of this axis."""

    # Tensor-parallel ranks. Each holds a shard of every matrix.
    tp: int = 1
    # Who sums the gradient of an input over the ranks. With naive, each linear that reads it does. With fan-out, all
    # linears that read the same input do so together, once.
    tp_engine: Literal["fan-out", "naive"] = "fan-out"
    # Communicate in backward while other gradients are computed, as only --tp-engine fan-out can.
    tp_overlap: bool = True

    def validate(self) -> None:
        super().validate()
        if self.tp_engine == "naive" and self.pp_schedule == "zero-bubble":
            raise UserError(
                "--tp-engine naive cannot put off the gradients of weights, as --pp-schedule zero-bubble does: "
                "take --tp-engine fan-out, or --pp-schedule 1f1b"
            )

    @property
    def sums_per_layer(self) -> int:
        """All-reduces of (b, s, h): 2 in forward; in backward one for each of 5 linears, or for each of 2 fan-outs,
        and the first of forward again where the layer is recomputed, for which nobody needs the second."""
        return (7 if self.tp_engine == "naive" else 4) + self.recomputes

    def traffic(self, trainer: Any) -> dict[tuple[str, str], Traffic]:
        """All-reduces. Per micro-batch: (b, s, h) `sums_per_layer` times in each layer, once for the embedding and once
        for the head, but never of a single rank; three numbers per token for the loss; the gradients of copied
        key-value heads. Per step: one number, for the gradients' norm.
        """
        model, batches = trainer.model, trainer.batches
        tokens, h = batches.tokens, model.model.config.hidden_size
        summed, computed = self.grad_dtype.itemsize, self.compute_dtype.itemsize
        split, chunks = int(self.tp > 1), math.ceil(tokens / chunk_size(h))
        calls = split * self.sums_per_layer * len(model.model.layers)
        nbytes = calls * tokens * h * computed
        if isinstance(model.model.embed_tokens, VocabParallelEmbedding):
            calls, nbytes = calls + split, nbytes + split * tokens * h * self.param_dtype.itemsize
        if isinstance(model.lm_head, VocabParallelHead):
            calls, nbytes = calls + split + 2 * chunks, nbytes + (split * h * computed + 3 * summed) * tokens
        sharded = sharded_modules(model)
        copied = [p for name, p in model.named_parameters() if name in sharded and sharded[name].copies > 1]
        calls, nbytes = calls + len(copied), nbytes + sum(p.numel() for p in copied) * summed
        total = Traffic(batches.micro_batches * calls + 1, batches.micro_batches * nbytes + summed)
        return super().traffic(trainer) | {("tp", "all-reduce"): total}


class ColumnParallelLinear(ShardedModule):
    """Rows of a weight (n, h): reads the whole inputs, (b, s, h), and returns a part of the outputs, (b, s, n/t)."""

    def __init__(self, full: nn.Linear, group: ProcessGroup, copies_group: ProcessGroup | None) -> None:
        super().__init__(full.weight, 0, group, dist.get_world_size(copies_group) if copies_group else 1)
        self.copies_group = copies_group
        # An output and what is added to it are on the same rank.
        self.bias = None if full.bias is None else nn.Parameter(self.shard_of(full.bias.detach()).clone())

    def of_copies(self, parameter: Tensor | None) -> Tensor | None:
        """The weight or bias, with a gradient that is the sum over its copies, at least in float32: each copy sees the
        queries of its own rank only."""
        if self.copies == 1 or parameter is None:
            return parameter
        return CopyToRanks.apply(at_least_float32(parameter), Replicated, self.copies_group)

    def forward(self, x: Tensor) -> Tensor:
        return F.linear(
            CopyToRanks.apply(x, self.layout, self.group), self.of_copies(self.weight), self.of_copies(self.bias)
        )


class RowParallelLinear(ShardedModule):
    """Columns of a weight (n, h): reads a part of the inputs, (b, s, h/t), and returns the whole outputs, (b, s, n)."""

    def __init__(self, full: nn.Linear, group: ProcessGroup) -> None:
        super().__init__(full.weight, 1, group)
        # Each rank has the whole.
        self.bias = full.bias

    def forward(self, x: Tensor) -> Tensor:
        y = SumOverRanks.apply(deferrable_linear(self, x), self.layout, self.group)
        # Behind the sum: before it, each rank would add it once.
        return y if self.bias is None else y + self.bias.to(y.dtype)


class _FanOut(torch.autograd.Function):
    """x (b, s, h) times each of several weights (n, h), plus biases (n,) that are none or follow the weights: outputs
    (b, s, n). Backward sums the gradient of x once."""

    @staticmethod
    def forward(
        ctx: FunctionCtx, x: Tensor, fan_out: "list[FanOutLinear]", *parameters: Tensor | None
    ) -> tuple[Tensor, ...]:
        ctx.fan_out = fan_out
        weights, biases = parameters[: len(fan_out)], parameters[len(fan_out) :]
        # The weights themselves, not their copies in autocast's dtype: a pipeline has several micro-batches under way.
        ctx.save_for_backward(x, *weights)
        x, _ = fan_out[0].layout.gather(x, fan_out[0].group)
        pairs = zip(weights, biases, strict=True)
        return tuple(F.linear(x, weight.to(x.dtype), None if b is None else b.to(x.dtype)) for weight, b in pairs)

    @staticmethod
    def backward(ctx: FunctionCtx, *grads: Tensor) -> tuple[Tensor | None, ...]:
        x, *weights = ctx.saved_tensors
        first = ctx.fan_out[0]
        if first.layout is Sharded and torch.compiler.is_compiling():
            x = later(x, grads[0])
        x, gathering = first.layout.gather(x, first.group, async_op=first.overlap)
        # From the last to the first, as autograd sums: with one rank, the result is bitwise the same.
        grad_x = grads[-1] @ weights[-1].to(x.dtype)
        for grad, weight in zip(grads[-2::-1], weights[-2::-1], strict=True):
            grad_x += grad @ weight.to(x.dtype)
        grad_x, summing = first.layout.sum(grad_x, first.group, async_op=first.overlap)
        if gathering:
            gathering.wait()
        grad_weights = weight_gradients_or_none(ctx.fan_out, list(grads), x)
        if summing:
            summing.wait()
        grad_biases = [
            None if linear.bias is None else g.sum((0, 1)) for linear, g in zip(ctx.fan_out, grads, strict=True)
        ]
        return grad_x, None, *grad_weights, *grad_biases


class FanOutLinear(ColumnParallelLinear):
    """One of the linears that read the same input: a fan-out, whose first computes them all."""

    def __init__(
        self,
        full: nn.Linear,
        group: ProcessGroup,
        copies_group: ProcessGroup | None,
        fan_out: "list[FanOutLinear]",
        overlap: bool,
    ) -> None:
        super().__init__(full, group, copies_group)
        self.fan_out, self.overlap = fan_out, overlap
        self.output: Tensor | None = None
        fan_out.append(self)

    def forward(self, x: Tensor) -> Tensor:
        if self is self.fan_out[0]:
            # It is called first. One autograd function for all, so one sum in backward.
            biases = (linear.of_copies(linear.bias) for linear in self.fan_out)
            outputs = _FanOut.apply(x, self.fan_out, *map(weight_in_graph, self.fan_out), *biases)
            for linear, output in zip(self.fan_out, outputs, strict=True):
                linear.output = output
        output, self.output = self.output, None
        return output


def _check_sizes(config: PreTrainedConfig, tp: int) -> int:
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


def apply(model: LlamaForCausalLM, config: Config, mesh: DeviceMesh) -> None:
    """Replace linears, embedding and head by this rank's shards. Raises UserError if they cannot be split."""
    group, copies = mesh.get_group("tp"), _check_sizes(model.model.config, mesh["tp"].size())
    copies_group = None
    if copies > 1:
        # More ranks than key-value heads: `copies` neighbours hold the same one, and queries that belong to it.
        rows = groups_along(mesh, "tp")
        neighbours = [row[first : first + copies] for row in rows for first in range(0, len(row), copies)]
        copies_group = make_group(neighbours, "tp", config.timeout)

    def split_columns(parent: nn.Module, names: dict[str, ProcessGroup | None]) -> None:
        fan_out: list[FanOutLinear] = []
        for name, group_of_copies in names.items():
            args = parent.get_submodule(name), group, group_of_copies
            naive = config.tp_engine == "naive"
            linear = ColumnParallelLinear(*args) if naive else FanOutLinear(*args, fan_out, config.tp_overlap)
            parent.set_submodule(name, linear)

    for layer in model.model.layers.values():
        attention, mlp = layer.self_attn, layer.mlp
        split_columns(attention, {"q_proj": None, "k_proj": copies_group, "v_proj": copies_group})
        attention.o_proj = RowParallelLinear(attention.o_proj, group)
        split_columns(mlp, {"gate_proj": None, "up_proj": None})
        mlp.down_proj = RowParallelLinear(mlp.down_proj, group)
    tied = model.lm_head.weight is model.model.embed_tokens.weight
    model.model.embed_tokens = VocabParallelEmbedding(model.model.embed_tokens.weight, group)
    model.lm_head = VocabParallelHead(model.lm_head.weight, group)
    if tied:
        model.lm_head.weight = model.model.embed_tokens.weight


def sharded_modules(model: nn.Module) -> dict[str, ShardedModule]:
    """The modules of the split parameters, by the parameter's name. All other parameters are the same on every rank."""
    modules = {
        p: module
        for module in model.modules()
        if isinstance(module, ShardedModule)
        for p in module.parameters()
        # The bias of a row-parallel linear has nothing of the dimension that is split.
        if p.ndim > module.dim
    }
    return {name: modules[p] for name, p in model.named_parameters() if p in modules}


def shard_weights(model: nn.Module, weights: Weights) -> Weights:
    """From a parameter's name, and rows of this rank's part, to these of the full tensor that `weights` has."""
    modules = sharded_modules(model)

    def part(name: str, rows: slice = ALL) -> Tensor:
        if name not in modules:
            return weights(name, rows)
        module = modules[name]
        if module.dim == 0:
            shard = module.shard_of(torch.empty(module.full_shape, device="meta"))
            first, own = shard.storage_offset() // shard.shape[1], range(len(shard))[rows]
            return weights(name, slice(first + own.start, first + own.stop))
        # Cloned, or the part would keep the full tensor alive.
        return module.shard_of(weights(name, rows)).clone()

    return part


def full_tensors(model: nn.Module, tensors: dict[str, Tensor]) -> dict[str, Tensor]:
    """Parameters by name, or their gradients, as full tensors on the CPU. All-reduces each that is split."""
    modules, full_tensors = sharded_modules(model), {}
    for name, tensor in tensors.items():
        full = tensor.detach()
        if name in modules:
            full = tensor.new_zeros(modules[name].full_shape[: tensor.ndim])
            if modules[name].is_first_copy:
                modules[name].shard_of(full).copy_(tensor)
            dist.all_reduce(full, group=modules[name].group)
        full_tensors[name] = full.cpu()
    return full_tensors


def counted(model: nn.Module) -> list[nn.Parameter]:
    """The parameters of this rank that no earlier tensor-parallel rank holds: over these ranks, the model once."""
    modules = sharded_modules(model)
    first = all(dist.get_rank(module.group) == 0 for module in modules.values())
    return [p for name, p in model.named_parameters() if (modules[name].is_first_copy if name in modules else first)]


def norm_over_ranks(norm: Tensor, group: ProcessGroup) -> Tensor:
    """√Σ norm² over the ranks. All-reduces one number."""
    squares = norm.square()
    dist.all_reduce(squares, group=group)
    return squares.sqrt()
