"""Turn a checkpoint into a directory that AutoModelForCausalLM and AutoTokenizer load, in one process.

It never holds more of the model than one of the files that it writes.
"""

import json
import sys
import warnings
from dataclasses import dataclass
from pathlib import Path
from typing import Literal

import torch
import torch.distributed.checkpoint as dcp
import tyro
from huggingface_hub import split_state_dict_into_shards_factory
from safetensors.torch import save_file
from survive import durable
from survive.agreement import Failed
from transformers import AutoTokenizer, LlamaConfig

from shared.config import UserError, check_writable
from shared.model import LlamaForCausalLM
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
    max_shard_gb: float = 5.0


def export_checkpoint(config: ExportConfig) -> None:
    """Raises UserError if the checkpoint is not what was written, or the directory cannot be."""
    source, directory, dtype = (
        durable.named(config.checkpoint),
        config.directory.resolve(),
        getattr(torch, config.dtype),
    )
    if directory.exists() and (not directory.is_dir() or any(directory.iterdir())):
        raise UserError(f"{directory} is not empty: choose another directory or empty it")
    check_writable(directory.parent, "export")
    try:
        manifest = durable.read_manifest(source)
        durable.verify(source, manifest["files"])
    except Failed as error:
        raise UserError(f"{error}: choose another checkpoint") from error
    model_config = LlamaConfig(**manifest["model"])
    with torch.device("meta"):
        # A tied head is the embedding, which has one name.
        shapes = {name: p.shape for name, p in LlamaForCausalLM(model_config).named_parameters()}
    split = split_state_dict_into_shards_factory(
        shapes,
        get_storage_size=lambda shape: shape.numel() * dtype.itemsize,
        filename_pattern="model{suffix}.safetensors",
        max_shard_size=int(config.max_shard_gb * 1e9),
    )
    with appearing(directory) as temporary, warnings.catch_warnings():
        warnings.filterwarnings("ignore", message="torch.distributed is disabled")
        for file, names in split.filename_to_tensors.items():
            tensors = {name: torch.empty(shapes[name], dtype=dtype) for name in names}
            # Reads box after box, and rounds each on the way.
            dcp.load({f"model.{name}": tensor for name, tensor in tensors.items()}, checkpoint_id=source, no_dist=True)
            save_file(tensors, temporary / file, metadata={"format": "pt"})
        if split.is_sharded:
            index = {"metadata": split.metadata, "weight_map": split.tensor_to_filename}
            (temporary / "model.safetensors.index.json").write_text(json.dumps(index, indent=2, sort_keys=True))
        export_config(model_config, AutoTokenizer.from_pretrained(source / durable.TOKENIZER), dtype, temporary)
    print(f"{source} is in {directory}: {len(split.filename_to_tensors)} file(s) of {config.dtype}")


def main() -> None:
    try:
        export_checkpoint(tyro.cli(ExportConfig))
    except UserError as error:
        sys.exit(f"error: {error}")


if __name__ == "__main__":
    main()
