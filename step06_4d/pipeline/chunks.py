"""Virtual stages: P ranks with V chunks of layers each are P · V stages.

Rank r holds virtual stages r, P + r, 2P + r ...: hidden states go around all ranks V times.
"""

from copy import copy

from pipeline.stages import split_layers
from torch import nn
from transformers import PreTrainedConfig

from shared.config import UserError
from shared.model import LlamaForCausalLM


def layers_of(stage: int, stages: int, chunks: int, config: PreTrainedConfig, seq_len: int) -> list[range]:
    """The layers of each of a rank's chunks. Raises UserError if there are too few."""
    if config.num_hidden_layers < stages * chunks and chunks > 1:
        raise UserError(
            f"--pp {stages} times --virtual-stages {chunks} chunks need a layer each, but the model has "
            f"{config.num_hidden_layers}: lower one"
        )
    return split_layers(config, seq_len, stages * chunks)[stage::stages]


def _alike(module: nn.Module) -> nn.Module:
    """A module with the same submodules, which can be replaced without replacing those of the other."""
    alike = copy(module)
    alike._modules = module._modules.copy()
    return alike


def chunks_of(model: LlamaForCausalLM, layers: list[range]) -> list[LlamaForCausalLM]:
    """Views of a rank's model, one for each chunk. The first has its embedding, the last its norm and its head."""
    if len(layers) == 1:
        return [model]
    chunks = []
    for layers_of_chunk in layers:
        chunks.append(_alike(model))
        inner = chunks[-1].model = _alike(model.model)
        inner.layers = nn.ModuleDict({str(i): model.model.layers[str(i)] for i in layers_of_chunk})
        if len(chunks) > 1:
            inner.embed_tokens = nn.Identity()
        if len(chunks) < len(layers):
            inner.norm, chunks[-1].lm_head = nn.Identity(), None
    return chunks
