"""Presets by name, and the model configuration of a run. Both are transformers' own, of the model's family."""

import difflib
from pathlib import Path

from transformers import (
    AutoConfig,
    LlamaConfig,
    MistralConfig,
    PreTrainedConfig,
    Qwen2Config,
    Qwen3Config,
    SmolLM3Config,
)

from shared.config import BaseConfig, UserError
from shared.families import FAMILIES, not_implemented

LLAMA3_ROPE = {
    "rope_type": "llama3",
    "rope_theta": 500000.0,
    "factor": 8.0,
    "low_freq_factor": 1.0,
    "high_freq_factor": 4.0,
    "original_max_position_embeddings": 8192,
}
LLAMA32_ROPE = LLAMA3_ROPE | {"factor": 32.0}


def _preset(
    vocab: int, h: int, f: int, layers: int, heads: int, kv_heads: int, context: int, *,
    theta: float = 10000.0, rope: dict | None = None, eps: float = 1e-5, tied: bool = False,
    head_dim: int | None = None, family: type[PreTrainedConfig] = LlamaConfig, **more: object,
) -> PreTrainedConfig:  # fmt: skip
    return family(
        vocab_size=vocab,
        hidden_size=h,
        intermediate_size=f,
        num_hidden_layers=layers,
        num_attention_heads=heads,
        num_key_value_heads=kv_heads,
        head_dim=head_dim or h // heads,
        max_position_embeddings=context,
        rope_parameters=rope or {"rope_type": "default", "rope_theta": theta},
        rms_norm_eps=eps,
        tie_word_embeddings=tied,
        **more,
    )


# fmt: off
PRESETS = {
    #                          vocab      h      f  layers heads kv  context
    "tiny":           _preset(  4096,   256,   704,   4,   8,   4,   2048, tied=True),
    "smollm-135m":    _preset( 49152,   576,  1536,  30,   9,   3,   2048, tied=True),
    "smollm-360m":    _preset( 49152,   960,  2560,  32,  15,   5,   2048, tied=True),
    "smollm-1.7b":    _preset( 49152,  2048,  8192,  24,  32,  32,   2048, tied=True),
    "tinyllama-1.1b": _preset( 32000,  2048,  5632,  22,  32,   4,   2048),
    "llama-2-7b":     _preset( 32000,  4096, 11008,  32,  32,  32,   4096),
    "llama-2-13b":    _preset( 32000,  5120, 13824,  40,  40,  40,   4096),
    "llama-2-70b":    _preset( 32000,  8192, 28672,  80,  64,   8,   4096),
    "llama-3.1-8b":   _preset(128256,  4096, 14336,  32,  32,   8, 131072, rope=LLAMA3_ROPE),
    "llama-3.1-70b":  _preset(128256,  8192, 28672,  80,  64,   8, 131072, rope=LLAMA3_ROPE),
    "llama-3.1-405b": _preset(128256, 16384, 53248, 126, 128,   8, 131072, rope=LLAMA3_ROPE),
    "llama-3.2-1b":   _preset(128256,  2048,  8192,  16,  32,   8, 131072, rope=LLAMA32_ROPE, tied=True),
    "llama-3.2-3b":   _preset(128256,  3072,  8192,  28,  24,   8, 131072, rope=LLAMA32_ROPE, tied=True),
    # The smallest of each other family.
    "mistral-7b":     _preset( 32768,  4096, 14336,  32,  32,   8,  32768, family=MistralConfig, theta=1e6,
                              sliding_window=None),
    "qwen2.5-0.5b":   _preset(151936,   896,  4864,  24,  14,   2,  32768, family=Qwen2Config, theta=1e6, eps=1e-6,
                              tied=True),
    "qwen3-0.6b":     _preset(151936,  1024,  3072,  28,  16,   8,  40960, family=Qwen3Config, theta=1e6, eps=1e-6,
                              tied=True, head_dim=128),
    "smollm3-3b":     _preset(128256,  2048, 11008,  36,  16,   4,  65536, family=SmolLM3Config, theta=5e6, eps=1e-6,
                              tied=True),
}
# fmt: on

OVERRIDES = (
    "num_hidden_layers",
    "hidden_size",
    "intermediate_size",
    "num_attention_heads",
    "num_key_value_heads",
    "head_dim",
    "vocab_size",
    "max_position_embeddings",
    "tie_word_embeddings",
)


def load_model_config(config: BaseConfig) -> PreTrainedConfig:
    """The configuration named by --model (or --init-from) with the overrides of the command line applied.

    Raises UserError if it cannot be found, is of no model that model.py implements, or its sizes do not fit together.
    """
    name = config.model or config.init_from or "tiny"
    # A checkpoint may lie in a directory of the same name as a preset.
    preset = None if config.model is None and Path(name).is_dir() else PRESETS.get(name)
    base = preset or _pretrained_config(name)
    values, overrides = base.to_dict(), {key: getattr(config, key) for key in OVERRIDES}
    overrides = {key: value for key, value in overrides.items() if value is not None}
    if overrides.get("num_hidden_layers", base.num_hidden_layers) != base.num_hidden_layers:
        # Lists with an item for each layer: transformers makes them anew.
        values = {key: value for key, value in values.items() if key not in ("layer_types", "no_rope_layers")}
    # Nothing is padded. A padding token beyond the vocabulary would be refused.
    values |= overrides | {"pad_token_id": None}
    try:
        if overrides.keys() & {"hidden_size", "num_attention_heads"} or not values.get("head_dim"):
            # Of some families only: in the others, transformers divides where it needs it, unless it finds this.
            values["head_dim"] = overrides.get("head_dim", values["hidden_size"] // values["num_attention_heads"])
        model_config = type(base)(**values)
    except Exception as error:  # transformers wraps its message in errors of several kinds
        raise UserError(f"--model {name}: {' '.join(str(error).split())}") from error
    _check(name, model_config, config.seq_len)
    return model_config


def _pretrained_config(name: str) -> PreTrainedConfig:
    try:
        model_config = AutoConfig.from_pretrained(name)
    except Exception as error:  # transformers' checks of values, the hub's errors and the network's share no base
        if (Path(name) / "config.json").exists():
            raise UserError(f"--model {name}: cannot read its config.json: {' '.join(str(error).split())}") from error
        close = difflib.get_close_matches(name.lower(), PRESETS, n=1)
        hint = f"did you mean {close[0]}? " if close else ""
        raise UserError(
            f"--model {name}: {hint}It is no preset ({', '.join(PRESETS)}), and neither a local directory with a "
            "config.json nor a Hugging Face id that can be reached"
        ) from error
    if model_config.model_type not in FAMILIES:
        known = ", ".join(FAMILIES)
        raise UserError(f"--model {name}: a {model_config.model_type} model, but these trainers know only {known}")
    return model_config


def _check(name: str, model_config: PreTrainedConfig, seq_len: int) -> None:
    heads, kv_heads = model_config.num_attention_heads, model_config.num_key_value_heads
    if min(getattr(model_config, key) for key in OVERRIDES if key != "tie_word_embeddings") < 1:
        raise UserError(f"--model {name}: all sizes must be at least 1")
    if heads % kv_heads:
        raise UserError(f"--model {name}: {heads} attention heads are not a multiple of {kv_heads} key-value heads")
    if seq_len > model_config.max_position_embeddings:
        raise UserError(
            f"--seq-len {seq_len} is beyond the model's {model_config.max_position_embeddings} positions: "
            f"shorten it or pass --max-position-embeddings {seq_len}"
        )
    if found := not_implemented(model_config, seq_len):
        raise UserError(f"--model {name} uses {', '.join(found)}, which shared/model.py does not implement")
