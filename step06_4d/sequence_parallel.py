"""Sequence parallelism: between split matrices, tensor-parallel ranks share the tokens (arXiv 2205.05198).

Tensor parallelism alone has every rank compute the same norms and residual sums, and keep the same activations for
backward. Here each does so for its part of the tokens: an all-reduce becomes a reduce-scatter and an all-gather, which
together move the same bytes.
"""

import math
from dataclasses import dataclass

import torch
import torch.distributed as dist
from data_parallel import DataParallel
from tensor_parallel import (
    ShardedModule,
    VocabParallelEmbedding,
    VocabParallelHead,
    tensor_parallel_traffic,
)
from token_layout import Sharded
from torch import nn

from shared.config import UserError
from shared.data import GlobalBatches
from shared.ledger import Traffic
from shared.model import LlamaForCausalLM, RMSNorm


@dataclass
class SequenceParallelConfig:
    """The options of sequence parallelism, for the ranks of --tp."""

    # Tensor-parallel ranks share the tokens of norms and residual sums: activations are divided by --tp.
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


def apply_sequence_parallel(model: LlamaForCausalLM, config: SequenceParallelConfig) -> None:
    """After tensor parallelism: its modules take and return this rank's part of the tokens, (b, s/t, h)."""
    if config.token_shards > 1:
        for module in model.modules():
            if isinstance(module, ShardedModule):
                module.layout = Sharded


def norm_weights(model: LlamaForCausalLM) -> list[nn.Parameter]:
    """Those of this stage: the only parameters of which all tensor-parallel ranks hold the whole."""
    return [module.weight for module in model.modules() if isinstance(module, RMSNorm)]


def sum_norm_gradients(config: SequenceParallelConfig, model: LlamaForCausalLM, gradients: DataParallel) -> None:
    """Each rank has seen its tokens only: all-reduce the gradients of the norms' weights, all as one, once per step."""
    if config.token_shards == 1:
        return
    parts = [gradients.gradient(p) for p in norm_weights(model)]
    flat = torch.cat([part.flatten() for part in parts])
    if flat.numel():
        group = next(module.group for module in model.modules() if isinstance(module, ShardedModule))
        dist.all_reduce(flat, group=group)
        for part, total in zip(parts, flat.split([part.numel() for part in parts]), strict=True):
            part.copy_(total.view_as(part))


def sequence_parallel_traffic(
    config: SequenceParallelConfig, model: LlamaForCausalLM, gradients: DataParallel, batches: GlobalBatches
) -> dict[tuple[str, str], Traffic]:
    """Payload per step of a rank, in the place of that of tensor parallelism alone.

    Every all-reduce of (b, s, h) becomes a reduce-scatter of it, and an all-gather on the way back. A layer all-gathers
    its two inputs once more in backward, for it keeps this rank's part only, and again if backward recomputes it. One
    all-reduce for what this rank has of the norms' gradients.
    """
    if config.token_shards == 1:
        return {}
    full, computed = config.param_dtype.itemsize, config.compute_dtype.itemsize
    hidden = batches.micro_batches * batches.tokens * model.model.config.hidden_size
    layers = len(model.model.layers)
    first = isinstance(model.model.embed_tokens, VocabParallelEmbedding)
    last = isinstance(model.lm_head, VocabParallelHead)
    # All-reduces of tensor parallelism alone, reduce-scatters here.
    in_layers = (4 + config.recomputes) * layers
    calls = batches.micro_batches * (in_layers + first + last)
    nbytes = hidden * ((in_layers + last) * computed + first * full)
    gathers_more = (2 + config.recomputes) * layers
    alone = tensor_parallel_traffic(config, model, batches)["tp", "all-reduce"]
    norms = sum(gradients.elements(p) for p in norm_weights(model)) * config.grad_dtype.itemsize
    return {
        ("tp", "reduce-scatter"): Traffic(calls, nbytes),
        ("tp", "all-gather"): Traffic(
            calls + batches.micro_batches * gathers_more, nbytes + hidden * gathers_more * computed
        ),
        ("tp", "all-reduce"): Traffic(alone.calls - calls + (norms > 0), alone.bytes - nbytes + norms),
    }
