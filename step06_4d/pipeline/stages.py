"""Which layers are whose."""

from transformers import PreTrainedConfig

from shared.config import UserError
from shared.flops import flops_per_token


def split_layers(config: PreTrainedConfig, seq_len: int, stages: int) -> list[range]:
    """The layers of each stage, so that the most expensive one costs least. Raises UserError if there are too few.

    Costs are FLOPs per token. The head, on the last stage, often costs as much as some layers; the embedding, on the
    first, looks up h numbers.
    """
    layers = config.num_hidden_layers
    if layers < stages:
        raise UserError(f"{stages} pipeline stages need a layer each, but the model has {layers}: lower --pp")
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
