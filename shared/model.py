"""Llama, and relatives that add biases or norms of heads, or leave out rotations: the configuration says which.

Module tree and parameter names equal those of transformers' class of each: a checkpoint needs no name mapping.

Nothing here knows about ranks. A parallelism is applied from outside, through four seams: heads are counted from the
projections' width, RoPE honours `position_ids`, `LlamaAttention.attention` is a replaceable callable, and layers are
keyed by their global index, while the embedding and the final norm can each be replaced by `nn.Identity`. What such a
callable takes besides q, k and v is passed on to it, from the model's `forward`, without being looked at.

Shapes: b sequences, s tokens, h hidden size, f feed-forward size, d head dimension.
"""

import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torch.utils.checkpoint import checkpoint
from transformers import PreTrainedConfig

from shared.attention import causal_attention
from shared.families import biased_linears, has_head_norms, has_rope
from shared.ops import rms_norm, rotate
from shared.rope import rope_cos_sin


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


class LlamaAttention(nn.Module):
    """Grouped-query attention (arXiv 2305.13245)."""

    def __init__(self, config: PreTrainedConfig, index: int) -> None:
        super().__init__()
        self.head_dim, biased = config.head_dim, biased_linears(config)
        h, q, kv = config.hidden_size, config.num_attention_heads, config.num_key_value_heads
        self.q_proj = nn.Linear(h, q * self.head_dim, bias="q_proj" in biased)
        self.k_proj = nn.Linear(h, kv * self.head_dim, bias="k_proj" in biased)
        self.v_proj = nn.Linear(h, kv * self.head_dim, bias="v_proj" in biased)
        self.o_proj = nn.Linear(q * self.head_dim, h, bias="o_proj" in biased)
        self.q_norm, self.k_norm = nn.Identity(), nn.Identity()
        if has_head_norms(config):
            # Keep scores from growing without bound (arXiv 2302.05442).
            self.q_norm = RMSNorm(self.head_dim, config.rms_norm_eps)
            self.k_norm = RMSNorm(self.head_dim, config.rms_norm_eps)
        self.has_rope = has_rope(config, index)
        self.attention = causal_attention

    def forward(self, x: Tensor, cos: Tensor, sin: Tensor, *attention_args: object) -> Tensor:
        # Heads and tokens are counted in what the projections return: some of the heads, of more tokens than x has.
        q = self.q_norm(self.q_proj(x).unflatten(-1, (-1, self.head_dim)))
        k = self.k_norm(self.k_proj(x).unflatten(-1, (-1, self.head_dim)))
        if self.has_rope:
            q, k = rotate(q, cos, sin), rotate(k, cos, sin)
        v = self.v_proj(x).unflatten(-1, (-1, self.head_dim))
        out = self.attention(q.transpose(1, 2), k.transpose(1, 2), v.transpose(1, 2), *attention_args)
        return self.o_proj(out.transpose(1, 2).flatten(2))


class LlamaMLP(nn.Module):
    """SwiGLU: down(silu(gate(x)) · up(x)) (arXiv 2002.05202)."""

    def __init__(self, config: PreTrainedConfig) -> None:
        super().__init__()
        h, f, biased = config.hidden_size, config.intermediate_size, biased_linears(config)
        self.gate_proj = nn.Linear(h, f, bias="gate_proj" in biased)
        self.up_proj = nn.Linear(h, f, bias="up_proj" in biased)
        self.down_proj = nn.Linear(f, h, bias="down_proj" in biased)

    def down(self, gate: Tensor, up: Tensor) -> Tensor:
        return self.down_proj(F.silu(gate) * up)

    def forward(self, x: Tensor) -> Tensor:
        # Backward recomputes the cheap silu(gate) · up (and stops before the matmul) rather than keep two more
        # tensors of (b, s, f).
        return checkpoint(self.down, self.gate_proj(x), self.up_proj(x), use_reentrant=False, preserve_rng_state=False)


class LlamaDecoderLayer(nn.Module):
    def __init__(self, config: PreTrainedConfig, index: int) -> None:
        super().__init__()
        self.self_attn = LlamaAttention(config, index)
        self.mlp = LlamaMLP(config)
        self.input_layernorm = RMSNorm(config.hidden_size, config.rms_norm_eps)
        self.post_attention_layernorm = RMSNorm(config.hidden_size, config.rms_norm_eps)

    def forward(self, x: Tensor, cos: Tensor, sin: Tensor, *attention_args: object) -> Tensor:
        x = x + self.self_attn(self.input_layernorm(x), cos, sin, *attention_args)
        return x + self.mlp(self.post_attention_layernorm(x))


class LlamaModel(nn.Module):
    def __init__(self, config: PreTrainedConfig) -> None:
        super().__init__()
        self.config = config
        self.embed_tokens = nn.Embedding(config.vocab_size, config.hidden_size)
        self.layers = nn.ModuleDict({str(i): LlamaDecoderLayer(config, i) for i in range(config.num_hidden_layers)})
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
    def __init__(self, config: PreTrainedConfig) -> None:
        super().__init__()
        self.model = LlamaModel(config)
        self.lm_head = nn.Linear(config.hidden_size, config.vocab_size, bias=False)
        if config.tie_word_embeddings:
            self.lm_head.weight = self.model.embed_tokens.weight

    def forward(self, input_ids: Tensor, position_ids: Tensor) -> Tensor:
        """Token and position ids (b, s) to logits (b, s, vocab). Training takes `model` and the head apart: loss.py."""
        return self.lm_head(self.model(input_ids, position_ids))
