"""Which layers are whose: P ranks with V chunks of layers each are P · V virtual stages.

Rank r holds virtual stages r, P + r, 2P + r ...: hidden states go around all ranks V times.
"""

from copy import copy

from torch import nn
from transformers import LlamaConfig

from shared.config import UserError
from shared.flops import flops_per_token
from shared.model import LlamaForCausalLM


def split_layers(config: LlamaConfig, seq_len: int, stages: int) -> list[range]:
    """The layers of each virtual stage, so that the most expensive one costs least. Raises UserError for too few.

    Costs are FLOPs per token. The head, on the last stage, often costs as much as some layers; the embedding, on the
    first, looks up h numbers.
    """
    layers = config.num_hidden_layers
    if layers < stages:
        raise UserError(
            f"{stages} stages need a layer each, but the model has {layers}: lower --pp or --virtual-stages"
        )
    head = 6 * config.hidden_size * config.vocab_size
    layer = (flops_per_token(config, seq_len, causal=True) - head) / layers
    costs, counts = [layer] * stages, [1] * stages
    costs[0] += config.hidden_size
    costs[-1] += head
    for _ in range(layers - stages):
        # Of equal stages the last, which holds the activations of fewer micro-batches.
        cheapest = min(reversed(range(stages)), key=costs.__getitem__)
        counts[cheapest] += 1
        costs[cheapest] += layer
    return [range(sum(counts[:stage]), sum(counts[: stage + 1])) for stage in range(stages)]


def layers_of(stage: int, stages: int, chunks: int, config: LlamaConfig, seq_len: int) -> list[range]:
    """The layers of each of a rank's chunks."""
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
    for own in layers:
        chunks.append(_alike(model))
        inner = chunks[-1].model = _alike(model.model)
        inner.layers = nn.ModuleDict({str(i): model.model.layers[str(i)] for i in own})
        if len(chunks) > 1:
            inner.embed_tokens = nn.Identity()
        if len(chunks) < len(layers):
            inner.norm, chunks[-1].lm_head = nn.Identity(), None
    return chunks
