"""Continue a text with a model that was trained: a checkpoint of any layout, or an export. transformers does it."""

from dataclasses import dataclass
from pathlib import Path

import torch
import tyro
from survive import durable
from survive.exports import read_weights
from transformers import (
    MODEL_FOR_CAUSAL_LM_MAPPING,
    AutoConfig,
    AutoModelForCausalLM,
    PreTrainedModel,
    PreTrainedTokenizerBase,
    set_seed,
)

from shared.command import ending_in_a_line
from shared.config import has_bfloat16
from shared.corpus.tokenizers import as_written
from shared.errors import UserError, check_local
from shared.weights import parameter_shapes


@dataclass
class GenerateConfig:
    # An export, a checkpoint, or the newest in this directory of checkpoints.
    model: tyro.conf.Positional[Path]
    # What is continued.
    prompt: str
    # Tokens to add. Fewer, if the model ends the text.
    max_new_tokens: int = 100
    # Below 1, likely tokens become more likely. 0 takes the likeliest, each time.
    temperature: float = 1.0
    # Of the tokens that are drawn.
    seed: int = 0


def load(path: Path, dtype: torch.dtype) -> tuple[PreTrainedModel, PreTrainedTokenizerBase]:
    """Raises UserError if there is neither an export nor a checkpoint that is as it was written."""
    if (path / "config.json").exists():
        return AutoModelForCausalLM.from_pretrained(path, dtype=dtype), as_written(path)
    source, manifest = durable.opened(path)
    model_config = AutoConfig.for_model(**manifest["model"])
    weights = read_weights(source, parameter_shapes(model_config), dtype)
    family = MODEL_FOR_CAUSAL_LM_MAPPING[type(model_config)]
    model = family.from_pretrained(None, config=model_config, state_dict=weights, dtype=dtype)
    return model, as_written(source / durable.TOKENIZER)


def generate(config: GenerateConfig) -> str:
    """The prompt and what follows. Raises UserError for options with which there is nothing to draw."""
    if not config.prompt or config.max_new_tokens < 1 or config.temperature < 0:
        raise UserError("--prompt must not be empty, --max-new-tokens at least 1, and --temperature not negative")
    check_local(config)
    on_gpu = torch.cuda.is_available() and has_bfloat16()
    model, tokenizer = load(config.model, torch.bfloat16 if on_gpu else torch.float32)
    model = model.to("cuda" if on_gpu else "cpu")
    set_seed(config.seed)
    sampling = {"do_sample": config.temperature > 0}
    if config.temperature:
        # transformers would draw from the 50 likeliest tokens only.
        sampling |= {"temperature": config.temperature, "top_k": 0}
    tokens = tokenizer(config.prompt, return_tensors="pt").to(model.device)
    ends = {"eos_token_id": tokenizer.eos_token_id, "pad_token_id": tokenizer.eos_token_id}
    with torch.inference_mode():
        (ids,) = model.generate(**tokens, max_new_tokens=config.max_new_tokens, **ends, **sampling)
    return tokenizer.decode(ids, skip_special_tokens=True)


def main() -> None:
    with ending_in_a_line():
        print(generate(tyro.cli(GenerateConfig)))


if __name__ == "__main__":
    main()
