"""Full weights by global name, from a seed or from safetensors, and export in Hugging Face's format.

A parallelism takes its part of `full_weights(...)(name)`: every layout starts from bitwise the same model. Who keeps a
few rows of it asks for these, and so neither draws nor reads the others.
"""

import hashlib
import json
import os
import shutil
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path
from uuid import uuid4

import torch
import torch.distributed as dist
from huggingface_hub import save_torch_state_dict, snapshot_download
from safetensors import SafetensorError, safe_open
from torch import Tensor, nn
from transformers import PreTrainedConfig, PreTrainedTokenizerBase

from shared.config import BaseConfig, UserError
from shared.families import FAMILIES
from shared.model import LlamaForCausalLM

# Of a parameter's global name, and of its rows if only these are wanted.
Weights = Callable[..., Tensor]
ALL = slice(None)
# Numbers that are drawn from one generator: whole rows.
TILE = 2**22
# Files of a model on the hub; and the same weights once more, in its author's own format.
WANTED, OTHERS = ["*.safetensors", "*.json"], ["consolidated*", "original/*"]
# These have a row for each token.
BY_VOCABULARY = ("model.embed_tokens.weight", "lm_head.weight")


def parameter_shapes(model_config: PreTrainedConfig) -> dict[str, torch.Size]:
    """Of the whole model, by global name. A tied head is the embedding, which has one name."""
    with torch.device("meta"):
        return {name: p.shape for name, p in LlamaForCausalLM(model_config).named_parameters()}


def full_weights(config: BaseConfig, model_config: PreTrainedConfig) -> Weights:
    """A function from a parameter's global name to its full tensor, or some of its rows, on the CPU.

    Raises UserError, before anything is read, if --init-from lacks a tensor or holds one of another shape.
    """
    shapes = parameter_shapes(model_config)
    if config.init_from:
        grown = BY_VOCABULARY if config.vocab_size else ()
        # A model that is only now to be tied has a head of its own, which must not be lost without a word.
        tied = model_config.tie_word_embeddings and config.tie_word_embeddings is None
        return _safetensors_weights(config.init_from, shapes, tied, grown)

    def weight(name: str, rows: slice = ALL) -> Tensor:
        wanted = range(*rows.indices(shapes[name][0]))
        return _random_weight(name, shapes[name], wanted, model_config.initializer_range, config.seed)

    return weight


def any_weights(model_config: PreTrainedConfig) -> Weights:
    """As `full_weights`, but of any value: for who overwrites them, or needs their shapes alone."""
    shapes = parameter_shapes(model_config)
    return lambda name, rows=ALL: torch.empty(len(range(shapes[name][0])[rows]), *shapes[name][1:])


def _random_weight(name: str, shape: torch.Size, rows: range, std: float, seed: int) -> Tensor:
    """Norm weights are ones, biases zeros; matrices are normal(0, std), tile by tile of rows, each from a generator
    seeded by (seed, name, its first row): whoever asks for a row gets the same."""
    out = torch.empty(len(rows), *shape[1:])
    if len(shape) == 1:
        return out.fill_(0 if name.endswith(".bias") else 1)
    digest = hashlib.sha256(f"{seed} {name}".encode()).digest()
    tile = max(1, TILE // shape[1])
    for first in range(rows.start // tile * tile, rows.stop, tile):
        generator = torch.Generator().manual_seed(int.from_bytes(digest[:8], "little", signed=True) + first)
        drawn = torch.empty(min(tile, shape[0] - first), shape[1]).normal_(0, std, generator=generator)
        begin, end = max(first, rows.start), min(first + tile, rows.stop)
        out[begin - rows.start : end - rows.start] = drawn[begin - first : end - first]
    return out


def _check_copy(source: str, files: dict[str, Path]) -> None:
    """Some checkpoints hold the embedding once more, as a head. Raises UserError if that is another matrix."""
    rows = []
    for name in BY_VOCABULARY:
        with safe_open(files[name], framework="pt") as file:
            # Training a head changes each row.
            rows.append(file.get_slice(name)[:1000])
    if not torch.equal(*rows):
        raise UserError(
            f"--init-from {source} says that its head is the embedding, but holds another one: give "
            "--tie-word-embeddings False to use it"
        )


def _safetensors_weights(source: str, shapes: dict[str, torch.Size], tied: bool, grown: tuple[str, ...]) -> Weights:
    """Those of `grown` may have fewer rows there than in the model: each new one is the mean of all."""
    directory = _local_directory(source)
    files, unexpected = {}, []
    for path in _safetensors_files(directory):
        try:
            with safe_open(path, framework="pt") as file:
                for name in file.keys():  # noqa: SIM118 (it is no dict)
                    files[name] = path
                    shape = torch.Size(file.get_slice(name).get_shape())
                    if name not in shapes and not name.endswith("rotary_emb.inv_freq"):
                        unexpected.append(name)
                    elif name in grown and shape[0] < shapes[name][0] and shape[1:] == shapes[name][1:]:
                        pass
                    elif shape != shapes.get(name, shape):
                        raise UserError(
                            f"--init-from {source}: {name} is {tuple(shape)} in {path.name}, but the model's is "
                            f"{tuple(shapes[name])}: leave out --model and its overrides to use the checkpoint's own"
                        )
        except (OSError, SafetensorError) as error:
            raise UserError(f"--init-from {source}: cannot read {path.name}, is it truncated? ({error})") from error
    has_copy = tied and "lm_head.weight" in unexpected
    if has_copy:
        unexpected.remove("lm_head.weight")
    if unexpected:
        raise UserError(
            f"--init-from {source} holds {len(unexpected)} tensors that the model lacks: {unexpected[0]}, ...: "
            "leave out --model and its overrides to use the checkpoint's own"
        )
    missing = [name for name in shapes if name not in files]
    if missing:
        raise UserError(f"--init-from {source} lacks {len(missing)} of {len(shapes)} tensors, such as {missing[0]}")
    if has_copy:
        _check_copy(source, files)

    def weight(name: str, rows: slice = ALL) -> Tensor:
        wanted = range(*rows.indices(shapes[name][0]))
        with safe_open(files[name], framework="pt") as file:
            # Mapped into memory: only what is touched is read.
            tensor = file.get_tensor(name)
        part = tensor[wanted.start : wanted.stop]
        if len(part) == len(wanted):
            # Cloned, or a part would keep the full tensor alive.
            return part.clone() if len(part) < len(tensor) else part
        # The mean is no surprise to the layers above, and makes no token more likely than the others.
        mean = tensor.mean(0, keepdim=True, dtype=torch.float64).to(tensor.dtype)
        return torch.cat([part, mean.expand(len(wanted) - len(part), -1)])

    return weight


def _local_directory(source: str) -> Path:
    if Path(source).is_dir():
        return Path(source)
    try:
        return Path(snapshot_download(source, allow_patterns=WANTED, ignore_patterns=OTHERS))
    except Exception as error:  # the hub's errors, the network's and those of a malformed id share no base
        raise UserError(f"--init-from {source}: no such directory, and no Hugging Face id within reach") from error


def _safetensors_files(directory: Path) -> list[Path]:
    index = directory / "model.safetensors.index.json"
    if index.exists():
        try:
            names = sorted(set(json.loads(index.read_text())["weight_map"].values()))
        except (OSError, ValueError, KeyError) as error:
            raise UserError(f"--init-from {directory}: cannot read {index.name}, is it truncated? ({error})") from error
    else:
        names = ["model.safetensors"]
    missing = [name for name in names if not (directory / name).exists()]
    if missing:
        raise UserError(f"--init-from {directory}: {', '.join(missing)} not found")
    return [directory / name for name in names]


def materialize(model: nn.Module, weights: Weights, dtype: torch.dtype, device: torch.device) -> None:
    """Give each parameter of a model built on the meta device its weight, one at a time."""
    replace_parameters(model, {p: weights(name).to(device, dtype) for name, p in model.named_parameters()})


def replace_parameters(model: nn.Module, tensors: dict[nn.Parameter, Tensor]) -> dict[nn.Parameter, nn.Parameter]:
    """Put parameters of these contents in the place of others, and return which for which. What was tied stays tied."""
    new = {p: nn.Parameter(tensor) for p, tensor in tensors.items()}
    for module in model.modules():
        for name, p in list(module.named_parameters(recurse=False)):
            if p in new:
                setattr(module, name, new[p])
    return new


def export(
    state_dict: dict[str, Tensor], model_config: PreTrainedConfig, tokenizer: PreTrainedTokenizerBase, directory: Path
) -> None:
    """Write what AutoModelForCausalLM and AutoTokenizer load, from rank 0. `directory` appears once it is complete."""
    if dist.is_initialized() and dist.get_rank() != 0:
        return
    # A part of a larger tensor, as sharded weights are, would be refused.
    state_dict = {
        name: tensor.clone() if tensor.untyped_storage().nbytes() > tensor.nbytes else tensor
        for name, tensor in state_dict.items()
    }
    with appearing(directory) as temporary:
        save_torch_state_dict(state_dict, temporary)
        export_config(model_config, tokenizer, next(iter(state_dict.values())).dtype, temporary)


def export_config(
    model_config: PreTrainedConfig, tokenizer: PreTrainedTokenizerBase, dtype: torch.dtype, directory: Path
) -> None:
    """All that is exported but the weights."""
    # Without the names of files of code that are not there.
    exported = type(model_config)(**{k: v for k, v in model_config.to_dict().items() if k != "auto_map"})
    exported.architectures = [FAMILIES[model_config.model_type].architecture]
    exported.dtype = dtype
    exported.bos_token_id, exported.eos_token_id = tokenizer.bos_token_id, tokenizer.eos_token_id
    exported.pad_token_id = tokenizer.pad_token_id
    exported.save_pretrained(directory)
    tokenizer.save_pretrained(directory)
    # transformers 4, and what was written for it, knows other names. Without them it takes defaults, and says nothing.
    rope = {key: value for key, value in exported.rope_parameters.items() if key != "rope_theta"}
    scaling = None if rope["rope_type"] == "default" else rope
    dtype_name = str(dtype).removeprefix("torch.")
    older = {"rope_theta": exported.rope_parameters["rope_theta"], "rope_scaling": scaling, "torch_dtype": dtype_name}
    _change_json(directory / "config.json", lambda config: config | older)
    _change_json(directory / "tokenizer_config.json", lambda config: _older_tokenizer(config, tokenizer))


def _older_tokenizer(config: dict, tokenizer: PreTrainedTokenizerBase) -> dict:
    if config.get("tokenizer_class") == "TokenizersBackend":
        config["tokenizer_class"] = "PreTrainedTokenizerFast"
    if isinstance(config.get("extra_special_tokens"), list):
        config["additional_special_tokens"] = config.pop("extra_special_tokens")
    return config | {"model_input_names": tokenizer.model_input_names}


def _change_json(path: Path, change: Callable[[dict], dict]) -> None:
    path.write_text(json.dumps(change(json.loads(path.read_text())), indent=2) + "\n")


@contextmanager
def appearing(directory: Path) -> Iterator[Path]:
    """Yields another directory to write to, which is renamed to this one once it is complete."""
    directory.parent.mkdir(parents=True, exist_ok=True)
    # Not by the process's number, which in a container is the same again after a restart.
    temporary = directory.with_name(f".{directory.name}.{uuid4().hex[:8]}")
    temporary.mkdir()
    try:
        yield temporary
    except BaseException:
        shutil.rmtree(temporary)
        raise
    # safetensors 0.8 makes files that nobody else may read.
    for file in temporary.glob("*.safetensors"):
        file.chmod(temporary.stat().st_mode & 0o666)
    try:
        # Replaces the directory if it exists, which only works while that is empty.
        os.rename(temporary, directory)
    except OSError as error:
        raise UserError(f"--export-dir {directory} is in use by now; the model is in {temporary}") from error
