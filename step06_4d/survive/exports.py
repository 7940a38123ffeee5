"""Models in Hugging Face's format, from checkpoints of any layout: who writes a file holds no more than that file."""

import json
import shutil
import tempfile
import warnings
from contextlib import ExitStack
from pathlib import Path

import torch
import torch.distributed as dist
import torch.distributed.checkpoint as dcp
from huggingface_hub import split_state_dict_into_shards_factory
from safetensors.torch import save_file
from survive.agreement import Failed, on_all, on_first
from survive.boxes import Boxes
from survive.checkpoint_files import reason, save
from torch import Tensor
from torch.distributed import ProcessGroup
from torch.distributed.checkpoint.api import CheckpointException
from transformers import PreTrainedConfig, PreTrainedTokenizerBase

from shared.config import UserError
from shared.weights import appearing, export_config, parameter_shapes

# Of a safetensors file: what others write, too.
MAX_FILE_BYTES = 5_000_000_000


def read_weights(source: Path, shapes: dict[str, torch.Size], dtype: torch.dtype) -> dict[str, Tensor]:
    """Weights of a checkpoint. They are read box after box, and each is rounded on the way. Raises UserError for a file
    that cannot be read."""
    tensors = {name: torch.empty(shape, dtype=dtype) for name, shape in shapes.items()}
    with warnings.catch_warnings():
        warnings.filterwarnings("ignore", message="torch.distributed is disabled")
        try:
            dcp.load({f"model.{name}": tensor for name, tensor in tensors.items()}, checkpoint_id=source, no_dist=True)
        except CheckpointException as error:  # which is no Exception
            raise UserError(f"{source}: {reason(error)}") from error
    return tensors


def write_weights(
    source: Path,
    directory: Path,
    model_config: PreTrainedConfig,
    dtype: torch.dtype,
    max_bytes: int,
    writer: int = 0,
    writers: int = 1,
) -> list[Path]:
    """Write one of `writers` shares of the files, one after the other. Returns what all of them write."""
    shapes = parameter_shapes(model_config)
    split = split_state_dict_into_shards_factory(
        shapes,
        get_storage_size=lambda shape: shape.numel() * dtype.itemsize,
        filename_pattern="model{suffix}.safetensors",
        max_shard_size=max_bytes,
    )
    for file, names in list(split.filename_to_tensors.items())[writer::writers]:
        tensors = read_weights(source, {name: shapes[name] for name in names}, dtype)
        save_file(tensors, directory / file, metadata={"format": "pt"})
        # Before the next is read.
        del tensors
    if split.is_sharded and writer == 0:
        index = {"metadata": split.metadata, "weight_map": split.tensor_to_filename}
        (directory / "model.safetensors.index.json").write_text(json.dumps(index, indent=2, sort_keys=True) + "\n")
    return [directory / file for file in split.filename_to_tensors]


def check_shared(group: ProcessGroup, directory: Path) -> None:
    """Raise UserError on all ranks, before training, unless each sees what the first writes there."""

    def probe() -> str:
        directory.mkdir(parents=True, exist_ok=True)
        return Path(tempfile.mkdtemp(prefix=".seen-by-all-", dir=directory)).name

    name = None
    try:
        name = on_first(group, probe)
        on_all(group, (directory / name).stat)
    except Failed as error:
        raise UserError(
            f"--export-dir is written by all ranks: choose a place that all machines see ({error})"
        ) from error
    finally:
        if name and dist.get_rank(group) == 0:
            (directory / name).rmdir()


def export(
    group: ProcessGroup,
    saved: Path | None,
    weights: dict[str, Boxes],
    model_config: PreTrainedConfig,
    tokenizer: PreTrainedTokenizerBase,
    dtype: torch.dtype,
    directory: Path,
) -> None:
    """Write `directory`, each rank a share of its files. It appears once it is complete.

    The boxes of `weights` find together on disk: in the checkpoint `saved`, or in one that is written for this and
    deleted. Raises UserError, on all ranks, if any of them could not.
    """
    rank, size = dist.get_rank(group), dist.get_world_size(group)
    try:
        # Leaves nothing behind if anything below fails.
        with ExitStack() as stack:
            temporary = on_first(group, lambda: stack.enter_context(appearing(directory)))
            source = saved or temporary / "weights"
            if not saved:
                save(group, source, weights)
            written = on_all(
                group, lambda: write_weights(source, temporary, model_config, dtype, MAX_FILE_BYTES, rank, size)
            )

            def complete() -> None:
                missing = [path.name for path in written[0] if not path.exists()]
                if missing:
                    raise Failed(f"{missing[0]} is not there: does every machine see the same directory?")
                if not saved:
                    shutil.rmtree(source)
                export_config(model_config, tokenizer, dtype, temporary)
                stack.close()

            on_first(group, complete)
    except Failed as error:
        remedy = f": export {saved} by step06_4d/export.py" if saved else ""
        raise UserError(f"the model could not be exported ({error}){remedy}") from error
