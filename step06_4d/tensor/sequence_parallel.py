"""Sequence parallelism: between split matrices, tensor-parallel ranks share the tokens (arXiv 2205.05198).

Tensor parallelism alone has every rank compute the same norms and residual sums, and keep the same activations for
backward. Here each does so for its part of the tokens: an all-reduce becomes a reduce-scatter and an all-gather, which
together move the same bytes.
"""

import math
from dataclasses import dataclass
from typing import Any

import torch
import torch.distributed as dist
from tensor.token_layout import Sharded
from tensor_parallel import ShardedModule, VocabParallelEmbedding, VocabParallelHead, sharded_modules
from torch import nn

from shared.config import UserError
from shared.ledger import Traffic
from shared.model import LlamaForCausalLM


@dataclass
class Config:
    """The options of sequence parallelism, for the ranks of --tp."""

    # Share the tokens of norms and residual sums among tensor-parallel ranks, which divides activations by --tp.
    sequence_parallel: bool = False

    @property
    def token_shards(self) -> int:
        """Parts of the tokens between split matrices."""
        return self.tp if self.sequence_parallel else 1

    def validate(self) -> None:
        super().validate()
        pieces = self.cp * self.token_shards
        if pieces > self.cp and self.seq_len % pieces:
            multiple = math.lcm(pieces, 2 * self.cp if self.zigzag else 1)
            raise UserError(
                f"--sequence-parallel: --seq-len {self.seq_len} is not a multiple of {pieces}, --cp {self.cp} times "
                f"--tp {self.tp}: try {max(self.seq_len // multiple, 1) * multiple}"
            )

    def traffic(self, trainer: Any) -> dict[tuple[str, str], Traffic]:
        """In the place of tensor parallelism's all-reduces of (b, s, h): a reduce-scatter of each, and an all-gather on
        the way back.

        A fan-out keeps its input as this rank has it, and all-gathers it once more in backward. Naive linears keep
        what they have gathered. Where backward recomputes a layer, each gathers again. With or without, one all-reduce
        for what this rank has of the gradients that are a sum over these ranks.
        """
        traffic, model, batches = super().traffic(trainer), trainer.model, trainer.batches
        alone = traffic["tp", "all-reduce"]
        partial = sum(trainer.reducer.elements(p) for p in partial_parameters(self, model)) * self.grad_dtype.itemsize
        alone = Traffic(alone.calls + (partial > 0), alone.bytes + partial)
        if self.token_shards == 1:
            return traffic | {("tp", "all-reduce"): alone}
        full, computed = self.param_dtype.itemsize, self.compute_dtype.itemsize
        hidden = batches.micro_batches * batches.tokens * model.model.config.hidden_size
        layers = len(model.model.layers)
        first = isinstance(model.model.embed_tokens, VocabParallelEmbedding)
        last = isinstance(model.lm_head, VocabParallelHead)
        # All-reduces of tensor parallelism alone, reduce-scatters here.
        in_layers = self.sums_per_layer * layers
        calls = batches.micro_batches * (in_layers + first + last)
        nbytes = hidden * ((in_layers + last) * computed + first * full)
        gathers_more = (4 * self.recomputes if self.tp_engine == "naive" else 2 + self.recomputes) * layers
        return traffic | {
            ("tp", "reduce-scatter"): Traffic(calls, nbytes),
            ("tp", "all-gather"): Traffic(
                calls + batches.micro_batches * gathers_more, nbytes + hidden * gathers_more * computed
            ),
            ("tp", "all-reduce"): Traffic(alone.calls - calls, alone.bytes - nbytes),
        }


def apply(model: LlamaForCausalLM, config: Config) -> None:
    """After tensor parallelism: its modules take and return this rank's part of the tokens, (b, s/t, h)."""
    if config.token_shards > 1:
        for module in model.modules():
            if isinstance(module, ShardedModule):
                module.layout = Sharded


def partial_parameters(config: Config, model: LlamaForCausalLM) -> list[nn.Parameter]:
    """Those of this stage of which all tensor-parallel ranks have the whole, and each a part of the gradient: with
    sequence parallelism that of its tokens, and of norms of heads always that of its heads."""
    if config.tp == 1:
        return []
    split = sharded_modules(model)
    parameters = {name: p for name, p in model.named_parameters() if name not in split}
    of_heads = [p for name, p in parameters.items() if name.endswith(("q_norm.weight", "k_norm.weight"))]
    return list(parameters.values()) if config.sequence_parallel else of_heads


def sum_partial_gradients(config: Config, model: LlamaForCausalLM, reducer: Any) -> None:
    """All-reduce these gradients, all as one, once per step. (In step03, norms of heads do so in each backward.)

    `reducer.gradient(p)` is what this rank has of the gradient of p.
    """
    gradients = [reducer.gradient(p) for p in partial_parameters(config, model)]
    flat = torch.cat([gradient.flatten() for gradient in gradients]) if gradients else torch.empty(0)
    if flat.numel():
        group = next(module.group for module in model.modules() if isinstance(module, ShardedModule))
        dist.all_reduce(flat, group=group)
        for gradient, total in zip(gradients, flat.split([g.numel() for g in gradients]), strict=True):
            gradient.copy_(total.view_as(gradient))
