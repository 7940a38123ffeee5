"""Rotary position embedding (RoPE, arXiv 2104.09864), of the kinds that transformers knows by these names.

Shapes: b sequences, s tokens, d head dimension.
"""

import math

import torch
from torch import Tensor
from transformers import PreTrainedConfig

# What each kind reads besides rope_theta.
ROPE_KEYS = {
    "default": (),
    "linear": ("factor",),
    "llama3": ("factor", "low_freq_factor", "high_freq_factor", "original_max_position_embeddings"),
    "yarn": (
        "factor",
        "original_max_position_embeddings",
        "beta_fast",
        "beta_slow",
        "truncate",
        "attention_factor",
        "mscale",
        "mscale_all_dim",
    ),
}


def rope_frequencies(config: PreTrainedConfig, dtype: torch.dtype, device: torch.device) -> Tensor:
    """Radians per position of each pair of head dimensions, (d/2,)."""
    rope, d = config.rope_parameters, config.head_dim
    exponents = torch.arange(0, d, 2, dtype=dtype, device=device) / d
    frequencies = 1.0 / rope["rope_theta"] ** exponents
    if rope["rope_type"] == "default":
        return frequencies
    if rope["rope_type"] == "linear":
        return frequencies / rope["factor"]
    # Pairs that turn often within the original context keep their frequency, those that hardly turn are slowed down by
    # `factor`, with a linear ramp between the two.
    if rope["rope_type"] == "llama3":
        # In turns.
        turns = frequencies * rope["original_max_position_embeddings"] / (2 * math.pi)
        low, high = rope["low_freq_factor"], rope["high_freq_factor"]
        keep = ((turns - low) / (high - low)).clamp(0, 1)
    else:
        # In pairs, counted from the fastest.
        first, last = _yarn_ramp(rope, d)
        keep = 1 - ((torch.arange(d // 2, dtype=dtype, device=device) - first) / (last - first)).clamp(0, 1)
    return frequencies * (keep + (1 - keep) / rope["factor"])


def _yarn_ramp(rope: dict, d: int) -> tuple[float, float]:
    """The pairs between which YaRN ramps: those that turn `beta_fast` and `beta_slow` times (arXiv 2309.00071)."""

    def pair(turns: float) -> float:
        positions_per_radian = rope["original_max_position_embeddings"] / (turns * 2 * math.pi)
        return d * math.log(positions_per_radian) / (2 * math.log(rope["rope_theta"]))

    first, last = pair(rope.get("beta_fast") or 32), pair(rope.get("beta_slow") or 1)
    if rope.get("truncate", True):
        first, last = math.floor(first), math.ceil(last)
    first, last = max(first, 0), min(last, d - 1)
    return first, last + 0.001 * (first == last)


def attention_factor(rope: dict) -> float:
    """What rotated queries and keys are multiplied with. Above 1 with YaRN: scores are sharper in a longer context."""
    if rope["rope_type"] != "yarn":
        return 1.0
    given, mscale, mscale_all_dim = (rope.get(key) for key in ("attention_factor", "mscale", "mscale_all_dim"))

    def growth(scale: float) -> float:
        return 0.1 * scale * math.log(rope["factor"]) + 1 if rope["factor"] > 1 else 1.0

    if given is not None:
        return given
    return growth(mscale) / growth(mscale_all_dim) if mscale and mscale_all_dim else growth(1)


def rope_cos_sin(config: PreTrainedConfig, position_ids: Tensor, dtype: torch.dtype) -> tuple[Tensor, Tensor]:
    """cos and sin of the rotation angles at position_ids (b, s), each (b, s, 1, d/2), times the attention factor."""
    angles = position_ids[:, :, None, None].to(dtype) * rope_frequencies(config, dtype, position_ids.device)
    factor = attention_factor(config.rope_parameters)
    return (angles.cos(), angles.sin()) if factor == 1 else (angles.cos() * factor, angles.sin() * factor)
