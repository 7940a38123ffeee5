"""What sets the families of models apart that shared/model.py implements, and what of a configuration it does not.

A family is a `model_type` of transformers. Its configuration says most of what is special, and has a key for it; the
table says the rest.
"""

from dataclasses import fields
from typing import NamedTuple

from transformers import PreTrainedConfig

from shared.rope import ROPE_KEYS

ATTENTION_LINEARS = ("q_proj", "k_proj", "v_proj", "o_proj")
MLP_LINEARS = ("gate_proj", "up_proj", "down_proj")


class Family(NamedTuple):
    # The class that transformers loads an export as.
    architecture: str
    # Linears that have a bias, whatever the configuration says.
    biased: tuple[str, ...] = ()
    # Whether each head of q and k is normalized before it is rotated.
    head_norms: bool = False


FAMILIES = {
    "llama": Family("LlamaForCausalLM"),
    "mistral": Family("MistralForCausalLM"),
    "qwen2": Family("Qwen2ForCausalLM", biased=("q_proj", "k_proj", "v_proj")),
    "qwen3": Family("Qwen3ForCausalLM", head_norms=True),
    "smollm3": Family("SmolLM3ForCausalLM"),
}

# Every key of their configurations is in one of these three. A key that is in none is refused unless it has its
# default: a later version of transformers may add one.
IMPLEMENTED = {
    "vocab_size",
    "hidden_size",
    "intermediate_size",
    "num_hidden_layers",
    "num_attention_heads",
    "num_key_value_heads",
    "head_dim",
    "max_position_embeddings",
    "initializer_range",
    "rms_norm_eps",
    "tie_word_embeddings",
    "attention_bias",
    "mlp_bias",
    "no_rope_layers",
    # As far as `not_implemented` lets them pass.
    "rope_parameters",
    "sliding_window",
    "layer_types",
}
# The only values that are implemented.
NEUTRAL = {"hidden_act": ("silu",), "attention_dropout": (0, None), "is_encoder_decoder": (False,)}
NO_EFFECT = {
    # They have made layer_types, sliding_window and no_rope_layers.
    "use_sliding_window",
    "max_window_layers",
    "no_rope_layer_interval",
    # transformers reads neither.
    "pretraining_tp",
    "chunk_size_feed_forward",
    # Of generation, and of tokens. There is no padding here, whose embedding would not be trained.
    "use_cache",
    "pad_token_id",
    "bos_token_id",
    "eos_token_id",
    # Of files, of what a call returns, and of classifiers.
    "transformers_version",
    "architectures",
    "dtype",
    "output_hidden_states",
    "return_dict",
    "id2label",
    "label2id",
    "problem_type",
}


def _said(config: PreTrainedConfig) -> dict[str, object]:
    """The keys of its class. It keeps what else a file says, and heeds none of it."""
    return {field.name: getattr(config, field.name) for field in fields(config)}


def biased_linears(config: PreTrainedConfig) -> list[str]:
    """Those of a layer, by name."""
    said = _said(config)
    attention = ATTENTION_LINEARS if said.get("attention_bias") else FAMILIES[config.model_type].biased
    return [*attention, *(MLP_LINEARS if said.get("mlp_bias") else ())]


def has_head_norms(config: PreTrainedConfig) -> bool:
    return FAMILIES[config.model_type].head_norms


def has_rope(config: PreTrainedConfig, layer: int) -> bool:
    rotated = _said(config).get("no_rope_layers")
    return rotated is None or bool(rotated[layer])


def not_implemented(config: PreTrainedConfig, seq_len: int) -> list[str]:
    """What of a configuration changes the result for sequences of this length, and is not implemented, by name."""
    said, defaults = _said(config), {field.name: field.default for field in fields(config)}
    rope, window = config.rope_parameters, said.get("sliding_window")
    layer_types = said.get("layer_types") or ["sliding_attention"]
    found = {
        f"rope_type {rope.get('rope_type')}": rope.get("rope_type") not in ROPE_KEYS,
        "rope factor None": rope.get("factor", 1.0) is None,
        "partial_rotary_factor": rope.get("partial_rotary_factor", 1.0) != 1.0,
        f"sliding_window {window}, shorter than --seq-len {seq_len}": (
            window is not None and window < seq_len and "sliding_attention" in layer_types
        ),
        f"layer_types {layer_types}": not {*layer_types} <= {"full_attention", "sliding_attention"},
        # No keys of a class, but transformers heeds them in a file.
        "quantization_config": getattr(config, "quantization_config", None),
        "per_layer_config": getattr(config, "is_heterogeneous", False),
    }
    for key, value in said.items():
        if key not in IMPLEMENTED | NO_EFFECT:
            found[f"{key} {value}"] = value not in NEUTRAL.get(key, (defaults[key],))
    return [feature for feature, present in found.items() if present]
