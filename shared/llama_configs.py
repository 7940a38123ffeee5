"""Presets by name, and the model configuration of a run. Both are transformers' own LlamaConfig."""

import difflib
from pathlib import Path

from transformers import AutoConfig, LlamaConfig

from shared.config import BaseConfig, UserError

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
) -> LlamaConfig:  # fmt: skip
    return LlamaConfig(
        vocab_size=vocab,
        hidden_size=h,
        intermediate_size=f,
        num_hidden_layers=layers,
        num_attention_heads=heads,
        num_key_value_heads=kv_heads,
        max_position_embeddings=context,
        rope_parameters=rope or {"rope_type": "default", "rope_theta": theta},
        rms_norm_eps=eps,
        tie_word_embeddings=tied,
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


def load_model_config(config: BaseConfig) -> LlamaConfig:
    """The configuration named by --model (or --init-from) with the overrides of the command line applied.

    Raises UserError if it cannot be found, is not a Llama that model.py implements, or its sizes do not fit together.
    """
    name = config.model or config.init_from or "tiny"
    values = (PRESETS.get(name) or _pretrained_config(name)).to_dict()
    overrides = {key: getattr(config, key) for key in OVERRIDES if getattr(config, key) is not None}
    if overrides.keys() & {"hidden_size", "num_attention_heads"}:
        values["head_dim"] = None
    try:
        model_config = LlamaConfig(**values | overrides)
    except Exception as error:  # transformers wraps its message in errors of several kinds
        raise UserError(f"--model {name}: {' '.join(str(error).split())}") from error
    _check(name, model_config, config.seq_len)
    return model_config


def _pretrained_config(name: str) -> LlamaConfig:
    try:
        model_config = AutoConfig.from_pretrained(name)
    except (OSError, ValueError) as error:
        if (Path(name) / "config.json").exists():
            raise UserError(f"--model {name}: cannot read its config.json: {' '.join(str(error).split())}") from error
        close = difflib.get_close_matches(name.lower(), PRESETS, n=1)
        hint = f"did you mean {close[0]}? " if close else ""
        raise UserError(
            f"--model {name}: {hint}It is no preset ({', '.join(PRESETS)}), and neither a local directory with a "
            "config.json nor a Hugging Face id that can be reached"
        ) from error
    if not isinstance(model_config, LlamaConfig):
        raise UserError(f"--model {name}: a {model_config.model_type} model, but these trainers know only llama")
    return model_config


def _check(name: str, model_config: LlamaConfig, seq_len: int) -> None:
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
    rope = model_config.rope_parameters
    unsupported = {
        f"rope_type {rope['rope_type']}": rope["rope_type"] not in ("default", "llama3"),
        "partial_rotary_factor": rope.get("partial_rotary_factor", 1.0) != 1.0,
        "attention_bias": model_config.attention_bias,
        "mlp_bias": model_config.mlp_bias,
        f"hidden_act {model_config.hidden_act}": model_config.hidden_act != "silu",
        "attention_dropout": model_config.attention_dropout,
        "quantization_config": getattr(model_config, "quantization_config", None),
    }
    if any(unsupported.values()):
        found = ", ".join(feature for feature, present in unsupported.items() if present)
        raise UserError(f"--model {name} uses {found}, which shared/model.py does not implement")
