"""Llama. Module tree and parameter names equal transformers' LlamaForCausalLM: a checkpoint needs no name mapping.

Nothing here knows about ranks. A parallelism is applied from outside, through four seams: heads are counted from the
projections' width, RoPE honours `position_ids`, `LlamaAttention.attention` is a replaceable callable, and layers are
keyed by their global index, while the embedding and the final norm can each be replaced by `nn.Identity`. What such a
callable takes besides q, k and v is passed on to it, from the model's `forward`, without being looked at.

Shapes: b sequences, s tokens, h hidden size, f feed-forward size, d head dimension.
"""

import math

import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torch.utils.checkpoint import checkpoint
from transformers import LlamaConfig

from shared.attention import causal_attention
from shared.ops import rms_norm, rotate


class RMSNorm(nn.Module):
    """x / sqrt(mean(x²) + eps) · weight over the last dimension (arXiv 1910.07467)."""

    def __init__(self, hidden_size: int, eps: float) -> None:
        super().__init__()
        self.weight = nn.Parameter(torch.ones(hidden_size))
        self.eps = eps

    def forward(self, x: Tensor) -> Tensor:
        y = rms_norm(x, self.weight, self.eps)
        # One cast for all the projections that read y: autocast would make and keep one for each.
        device = x.device.type
        return y.to(torch.get_autocast_dtype(device)) if torch.is_autocast_enabled(device) else y


def rope_frequencies(config: LlamaConfig, dtype: torch.dtype, device: torch.device) -> Tensor:
    """Radians per position of each pair of head dimensions, (d/2,) (arXiv 2104.09864)."""
    rope = config.rope_parameters
    exponents = torch.arange(0, config.head_dim, 2, dtype=dtype, device=device) / config.head_dim
    frequencies = 1.0 / rope["rope_theta"] ** exponents
    if rope["rope_type"] == "llama3":
        # Llama 3.1: pairs that turn often within the original context keep their frequency, those that hardly turn
        # are slowed down by `factor`, with a linear ramp between the two.
        turns = frequencies * rope["original_max_position_embeddings"] / (2 * math.pi)
        low, high = rope["low_freq_factor"], rope["high_freq_factor"]
        keep = ((turns - low) / (high - low)).clamp(0, 1)
        frequencies = frequencies * (keep + (1 - keep) / rope["factor"])
    return frequencies


def rope_cos_sin(config: LlamaConfig, position_ids: Tensor, dtype: torch.dtype) -> tuple[Tensor, Tensor]:
    """cos and sin of the rotation angles at position_ids (b, s), each (b, s, 1, d/2)."""
    angles = position_ids[:, :, None, None].to(dtype) * rope_frequencies(config, dtype, position_ids.device)
    return angles.cos(), angles.sin()


class LlamaAttention(nn.Module):
    """Grouped-query attention (arXiv 2305.13245)."""

    def __init__(self, config: LlamaConfig) -> None:
        super().__init__()
        self.head_dim = config.head_dim
        self.q_proj = nn.Linear(config.hidden_size, config.num_attention_heads * self.head_dim, bias=False)
        self.k_proj = nn.Linear(config.hidden_size, config.num_key_value_heads * self.head_dim, bias=False)
        self.v_proj = nn.Linear(config.hidden_size, config.num_key_value_heads * self.head_dim, bias=False)
        self.o_proj = nn.Linear(config.num_attention_heads * self.head_dim, config.hidden_size, bias=False)
        self.attention = causal_attention

    def forward(self, x: Tensor, cos: Tensor, sin: Tensor, *attention_args: object) -> Tensor:
        # Heads and tokens are counted in what the projections return: some of the heads, of more tokens than x has.
        q = rotate(self.q_proj(x).unflatten(-1, (-1, self.head_dim)), cos, sin)
        k = rotate(self.k_proj(x).unflatten(-1, (-1, self.head_dim)), cos, sin)
        v = self.v_proj(x).unflatten(-1, (-1, self.head_dim))
        out = self.attention(q.transpose(1, 2), k.transpose(1, 2), v.transpose(1, 2), *attention_args)
        return self.o_proj(out.transpose(1, 2).flatten(2))


class LlamaMLP(nn.Module):
    """SwiGLU: down(silu(gate(x)) · up(x)) (arXiv 2002.05202)."""

    def __init__(self, config: LlamaConfig) -> None:
        super().__init__()
        self.gate_proj = nn.Linear(config.hidden_size, config.intermediate_size, bias=False)
        self.up_proj = nn.Linear(config.hidden_size, config.intermediate_size, bias=False)
        self.down_proj = nn.Linear(config.intermediate_size, config.hidden_size, bias=False)

    def down(self, gate: Tensor, up: Tensor) -> Tensor:
        return self.down_proj(F.silu(gate) * up)

    def forward(self, x: Tensor) -> Tensor:
        # Backward recomputes the cheap silu(gate) · up (and stops before the matmul) rather than keep two more
        # tensors of (b, s, f).
        return checkpoint(self.down, self.gate_proj(x), self.up_proj(x), use_reentrant=False, preserve_rng_state=False)


class LlamaDecoderLayer(nn.Module):
    def __init__(self, config: LlamaConfig) -> None:
        super().__init__()
        self.self_attn = LlamaAttention(config)
        self.mlp = LlamaMLP(config)
        self.input_layernorm = RMSNorm(config.hidden_size, config.rms_norm_eps)
        self.post_attention_layernorm = RMSNorm(config.hidden_size, config.rms_norm_eps)

    def forward(self, x: Tensor, cos: Tensor, sin: Tensor, *attention_args: object) -> Tensor:
        x = x + self.self_attn(self.input_layernorm(x), cos, sin, *attention_args)
        return x + self.mlp(self.post_attention_layernorm(x))


class LlamaModel(nn.Module):
    def __init__(self, config: LlamaConfig) -> None:
        super().__init__()
        self.config = config
        self.embed_tokens = nn.Embedding(config.vocab_size, config.hidden_size)
        self.layers = nn.ModuleDict({str(i): LlamaDecoderLayer(config) for i in range(config.num_hidden_layers)})
        self.norm = RMSNorm(config.hidden_size, config.rms_norm_eps)

    def forward(self, input_ids: Tensor, position_ids: Tensor, *attention_args: object) -> Tensor:
        """Token and position ids (b, s) to final hidden states (b, s, h). Attention is handed `attention_args` too."""
        x = self.embed_tokens(input_ids)
        # Angles reach thousands of radians: below float32 they would be rounded to whole turns.
        cos, sin = rope_cos_sin(self.config, position_ids, torch.promote_types(x.dtype, torch.float32))
        for layer in self.layers.values():
            x = layer(x, cos, sin, *attention_args)
        return self.norm(x)


class LlamaForCausalLM(nn.Module):
    def __init__(self, config: LlamaConfig) -> None:
        super().__init__()
        self.model = LlamaModel(config)
        self.lm_head = nn.Linear(config.hidden_size, config.vocab_size, bias=False)
        if config.tie_word_embeddings:
            self.lm_head.weight = self.model.embed_tokens.weight

    def forward(self, input_ids: Tensor, position_ids: Tensor) -> Tensor:
        """Token and position ids (b, s) to logits (b, s, vocab). Training takes `model` and the head apart: loss.py."""
        return self.lm_head(self.model(input_ids, position_ids))
