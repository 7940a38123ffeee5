"""Small models of each family that shared/model.py implements: between them, they have all that sets families apart."""

from pathlib import Path

import torch
from transformers import (
    MODEL_FOR_CAUSAL_LM_MAPPING,
    LlamaConfig,
    MistralConfig,
    PreTrainedConfig,
    PreTrainedModel,
    Qwen2Config,
    Qwen3Config,
    SmolLM3Config,
)

LINEAR = {"rope_type": "linear", "rope_theta": 1000.0, "factor": 2.5}
# Pairs of heads of 8 turn fast, slowly and in between within the original context.
LLAMA3 = {
    "rope_type": "llama3",
    "rope_theta": 1000.0,
    "factor": 8.0,
    "low_freq_factor": 1.0,
    "high_freq_factor": 4.0,
    "original_max_position_embeddings": 64,
}
YARN = {
    "rope_type": "yarn",
    "rope_theta": 100.0,
    "factor": 4.0,
    "original_max_position_embeddings": 32,
    "beta_fast": 4.0,
    "beta_slow": 0.5,
}
ROPES = {
    "default": {"rope_type": "default", "rope_theta": 500.0},
    "linear": LINEAR,
    "llama3": LLAMA3,
    "yarn": YARN,
    "yarn to the digit": YARN | {"truncate": False, "attention_factor": 1.3},
    "yarn with two scales": YARN | {"mscale": 0.7, "mscale_all_dim": 1.1},
}
# Class, and what is special.
RELATIVES = {
    "llama": (LlamaConfig, {"attention_bias": True, "mlp_bias": True, "rope_parameters": LINEAR}),
    "mistral": (MistralConfig, {"sliding_window": 256}),
    "qwen2": (Qwen2Config, {"rope_parameters": YARN, "tie_word_embeddings": True}),
    # Heads wider than what they are made of.
    "qwen3": (Qwen3Config, {"head_dim": 12, "rope_parameters": LLAMA3}),
    # The first of two stages has no rope at all. (There a bias of k would change nothing: all scores by the same.)
    "smollm3": (SmolLM3Config, {"no_rope_layers": [0, 1], "mlp_bias": True}),
}


def relative(name: str, **changes: object) -> PreTrainedConfig:
    """The configuration of a small model of this family, with these keys changed."""
    family, special = RELATIVES[name]
    sizes = {
        "vocab_size": 300,
        "hidden_size": 32,
        "intermediate_size": 48,
        "num_hidden_layers": 2,
        "num_attention_heads": 4,
        "num_key_value_heads": 2,
        "head_dim": 8,
        "max_position_embeddings": 256,
        "tie_word_embeddings": False,
        "pad_token_id": None,
    }
    return family(**sizes | special | changes)


def random_model(config: PreTrainedConfig, seed: int = 0) -> PreTrainedModel:
    """transformers' own, of which no number is one that a mistake could hide behind: no bias is 0 and no norm 1."""
    torch.manual_seed(seed)
    model = MODEL_FOR_CAUSAL_LM_MAPPING[type(config)](config)
    for p in model.parameters():
        if p.ndim == 1:
            p.data.copy_(p.data + torch.randn_like(p) / 4)
    return model


def saved(directory: Path, name: str, dtype: torch.dtype = torch.float32, **changes: object) -> Path:
    """A checkpoint as transformers writes it."""
    random_model(relative(name, **changes)).to(dtype).save_pretrained(directory / name)
    return directory / name
