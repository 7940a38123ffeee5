"""Turn a checkpoint into a directory that AutoModelForCausalLM and AutoTokenizer load, in one process.

It never holds more of the model than one of the files that it writes.
"""

from dataclasses import dataclass
from pathlib import Path
from typing import Literal

import torch
import tyro
from survive import durable
from survive.exports import MAX_FILE_BYTES, write_weights
from transformers import AutoConfig, AutoTokenizer

from shared.command import ending_in_a_line
from shared.errors import UserError, check_local, check_writable
from shared.weights import appearing, export_config


@dataclass
class ExportConfig:
    # The checkpoint, or the newest in this directory of checkpoints.
    checkpoint: tyro.conf.Positional[Path]
    # Where to write. Must be empty or absent.
    directory: tyro.conf.Positional[Path]
    # Of the exported weights, which are rounded from the float32 (or float64) that the optimizer trained.
    dtype: Literal["float32", "bfloat16", "float16", "float64"] = "bfloat16"
    # Largest safetensors file, and so what is held at once, in GB.
    max_shard_gb: float = MAX_FILE_BYTES / 1e9


def export_checkpoint(config: ExportConfig) -> None:
    """Raises UserError if the checkpoint is not what was written, or the directory cannot be."""
    check_local(config)
    directory, dtype = config.directory.resolve(), getattr(torch, config.dtype)
    if directory.exists() and (not directory.is_dir() or any(directory.iterdir())):
        raise UserError(f"{directory} is not empty: choose another directory or empty it")
    check_writable(directory.parent, "export")
    source, manifest = durable.opened(config.checkpoint)
    model_config = AutoConfig.for_model(**manifest["model"])
    with appearing(directory) as temporary:
        files = write_weights(source, temporary, model_config, dtype, int(config.max_shard_gb * 1e9))
        export_config(model_config, AutoTokenizer.from_pretrained(source / durable.TOKENIZER), dtype, temporary)
    print(f"{source} is in {directory}: {len(files)} file(s) of {config.dtype}")


def main() -> None:
    with ending_in_a_line():
        export_checkpoint(tyro.cli(ExportConfig))


if __name__ == "__main__":
    main()
