"""The options that all steps share, and how they are read: defaults < `--config file.yaml` < command line."""

import dataclasses
import os
import sys
from collections import Counter
from collections.abc import Sequence
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from typing import Any, Literal, TypeVar

import torch
import tyro
import yaml

from shared.errors import UserError, check_local, check_writable
from shared.ledger import Traffic


@dataclass
class BaseConfig:
    # YAML file of options (`global-batch-size: 64`). The command line overrides it.
    config: Path | None = None

    # Preset of shared/llama_configs.py, Hugging Face id or local directory. The default is --init-from's model, or else
    # "tiny".
    model: str | None = None
    # Start from the safetensors of this Hugging Face id or local directory, not from random weights.
    init_from: str | None = None
    # Layers. This option and the next eight override the model's own values.
    num_hidden_layers: int | None = None
    # Width of the residual stream.
    hidden_size: int | None = None
    # Width of the MLP.
    intermediate_size: int | None = None
    # Query heads.
    num_attention_heads: int | None = None
    # Key-value heads. Fewer than query heads is grouped-query attention.
    num_key_value_heads: int | None = None
    # Width of a head. The default is hidden_size / num_attention_heads.
    head_dim: int | None = None
    # Rows of the embedding, at least as many as the tokenizer has tokens.
    vocab_size: int | None = None
    # Longest sequence the model is meant for.
    max_position_embeddings: int | None = None
    # Use one matrix for embedding and head.
    tie_word_embeddings: bool | None = None

    # "stdlib" (the source of Python's standard library), a file or directory of texts (see shared/corpus), a Hugging
    # Face id, or what prepare.py has made. Several form a mixture, each with its share: a:0.7 b:0.3.
    dataset: tuple[str, ...] = ("stdlib",)
    # Evaluate on these instead of on what is held out of --dataset.
    validation_dataset: tuple[str, ...] = ()
    # Configuration of a Hugging Face dataset.
    dataset_config: str | None = None
    # Split of the dataset.
    split: str = "train"
    # Column that holds the text. "meta.text" is a nested one.
    text_column: str = "text"
    # Text that is no valid Unicode: refuse it, naming its place, or replace its wrong characters by question marks.
    invalid_text: Literal["refuse", "replace"] = "refuse"
    # Begin each document that is tokenized with the tokenizer's BOS token. The default is what it does by itself.
    add_bos: bool | None = None
    # Read only as much of the dataset as this run needs. A longer run reads on.
    streaming: bool = False
    # "bpe" (byte-level, trained once on the dataset), Hugging Face id or local directory. The default is --init-from's
    # tokenizer, or else "bpe".
    tokenizer: str | None = None

    # Tokens per sequence.
    seq_len: int = 256
    # Sequences per optimizer step, over all devices.
    global_batch_size: int = 16
    # Sequences per forward pass of a device. Fewer need less memory and change nothing else.
    micro_batch_size: int = 8
    # Optimizer steps.
    steps: int = 200

    # AdamW (arXiv 1711.05101), or plain SGD, which hides no error in a gradient's scale.
    optimizer: Literal["adamw", "sgd"] = "adamw"
    # Peak learning rate.
    lr: float = 2e-3
    # Learning rate at the last step, unless --schedule is constant. The default is a tenth of the peak.
    min_lr: float | None = None
    # Steps over which the learning rate rises linearly to its peak.
    warmup_steps: int = 20
    # Course of the learning rate after warm-up. wsd stays at the peak and falls linearly over the last fifth of
    # these steps (arXiv 2404.06395).
    schedule: Literal["cosine", "linear", "constant", "wsd"] = "cosine"
    # Decoupled weight decay. Norms are not decayed.
    weight_decay: float = 0.1
    # AdamW's decay rates of the first and second moment.
    betas: tuple[float, float] = (0.9, 0.95)
    # Largest global gradient norm. 0 clips nothing.
    grad_clip: float = 1.0

    # Precision. bfloat16 keeps parameters, gradients and moments in float32 and runs the matmuls in bfloat16. auto is
    # bfloat16 on a GPU that multiplies in it, or else float32.
    dtype: Literal["auto", "float32", "bfloat16", "float64"] = "auto"
    # auto takes the GPU if there is one, or else the CPU.
    device: Literal["auto", "cpu", "cuda"] = "auto"
    # Seconds that a rank waits for others in a collective before the run fails.
    timeout: int = 600
    # Seed of the weights, each of which depends on its name too, and of the order of the data.
    seed: int = 0
    # Compute the same bits each time, on a GPU too, for which it takes slower kernels where faster ones add up in any
    # order: above all in the backward of attention.
    deterministic: bool = False
    # Compile each layer by torch.compile.
    compile: bool = False
    # Print what a rank sends per step, next to the formula.
    ledger: bool = False

    # Steps between two that are reported. Only for these does the CPU wait for a GPU, so larger is faster there. A loss
    # that is no number is noticed with the next of them.
    log_every: int = 1
    # Steps between two evaluations on the held-out sequences. 0 never evaluates.
    eval_every: int = 100
    # Global batches per evaluation, at most all that are held out.
    eval_steps: int = 2

    # File for a line of JSON per reported step. It must not exist yet.
    metrics_file: Path | None = None
    # Directory for the trained model and tokenizer, in Hugging Face's format. It must be empty or absent.
    export_dir: Path | None = None
    # Log to TensorBoard, in this directory.
    tensorboard: Path | None = None
    # Log to Weights & Biases.
    wandb: bool = False
    # Project in Weights & Biases.
    wandb_project: str = "parallel-steps"
    # Name of the run in Weights & Biases.
    run_name: str | None = None

    @property
    def final_lr(self) -> float:
        return self.lr / 10 if self.min_lr is None else self.min_lr

    @property
    def param_dtype(self) -> torch.dtype:
        return torch.float64 if self.dtype == "float64" else torch.float32

    @property
    def compute_dtype(self) -> torch.dtype:
        """Of matmuls and of the activations between them."""
        return torch.bfloat16 if self.dtype == "bfloat16" else self.param_dtype

    @property
    def grad_dtype(self) -> torch.dtype:
        """Of summed gradients, losses and norms."""
        return torch.promote_types(self.param_dtype, torch.float32)

    @property
    def resumes(self) -> bool:
        """Whether outputs of the same run, interrupted, may exist: they are continued."""
        return False

    @property
    def sequences(self) -> int:
        """How many are trained on."""
        return self.steps * self.global_batch_size

    def left_unfinished(self) -> str:
        """What a run leaves that is interrupted, and how to go on."""
        lost = f", and --export-dir {self.export_dir} is not written" if self.export_dir else ""
        other = ", with another --metrics-file" if self.metrics_file else ""
        return f"no weights are saved{lost}: the same command begins anew{other} (step06 saves in --checkpoint-dir)"

    def logs(self, step: int) -> bool:
        """Whether a step is reported. Its loss and gradient norm, and those before it, are then known to be numbers."""
        evaluates = self.eval_every and step % self.eval_every == 0
        return self.ledger or step in (1, self.steps) or step % self.log_every == 0 or bool(evaluates)

    def traffic(self, trainer: Any) -> dict[tuple[str, str], Traffic]:
        """Payload that a rank sends per step, by axis and kind: the formulas of all parallelisms, each adding its own.

        `trainer` is the `Trainer` of train.py.
        """
        return {}

    def validate(self) -> None:
        """Raise UserError for values that no layout can train with, and for outputs that would fail after training.

        Settles what the machine decides.
        """
        if self.dtype == "auto":
            on_gpu = self.device != "cpu" and has_bfloat16(planned=self.device == "cuda")
            self.dtype = "bfloat16" if on_gpu else "float32"
        for name in ("seq_len", "global_batch_size", "micro_batch_size", "eval_steps", "timeout", "log_every"):
            if getattr(self, name) < 1:
                raise UserError(f"--{name.replace('_', '-')} must be at least 1, not {getattr(self, name)}")
        for name in ("steps", "warmup_steps", "eval_every", "lr", "final_lr", "weight_decay", "grad_clip"):
            if not 0 <= getattr(self, name) < float("inf"):
                option = "min-lr" if name == "final_lr" else name.replace("_", "-")
                raise UserError(f"--{option} must be a number that is not negative, but is {getattr(self, name)}")
        if self.final_lr > self.lr:
            raise UserError(f"--min-lr {self.min_lr} is above --lr {self.lr}")
        if not all(0 <= beta < 1 for beta in self.betas):
            raise UserError(f"--betas must be in [0, 1), but are {self.betas}")
        if not 0 <= self.seed < 2**32:
            raise UserError(f"--seed must be in [0, 2^32), but is {self.seed}")
        if self.global_batch_size % self.micro_batch_size:
            raise UserError(
                f"--global-batch-size {self.global_batch_size} is not a multiple of "
                f"--micro-batch-size {self.micro_batch_size}: change one of the two"
            )
        if self.compile and self.ledger:
            raise UserError("--ledger listens to each operator, and torch then compiles nothing: leave --compile out")
        shares(self.dataset, "dataset")
        shares(self.validation_dataset, "validation_dataset")
        check_local(self)
        for option, path in (("--metrics-file", self.metrics_file), ("--tensorboard", self.tensorboard)):
            if path and path.exists() and not self.resumes:
                raise UserError(f"{option} {path} exists already: choose another name or delete it")
            if path:
                check_writable(path if path.is_dir() else path.parent, option)
        if self.export_dir:
            # Symbolic links and "." would defeat the renaming that makes it appear at once.
            self.export_dir = self.export_dir.resolve()
            if self.export_dir.exists() and (not self.export_dir.is_dir() or any(self.export_dir.iterdir())):
                raise UserError(f"--export-dir {self.export_dir} is not empty: choose another directory or empty it")
            for name, path in vars(self).items():
                inside = isinstance(path, Path) and path.resolve().is_relative_to(self.export_dir)
                if inside and name != "export_dir" and path != getattr(type(self), name):
                    option = name.replace("_", "-")
                    raise UserError(f"--{option} {path} must not lie in --export-dir {self.export_dir}")
            check_writable(self.export_dir.parent, "--export-dir")


def shares(datasets: tuple[str, ...], option: str) -> list[tuple[str, float]]:
    """Names of data sets and their shares: `a:0.7 b:0.3`. One alone needs none, nor those that are evaluated apart.

    Raises UserError if one is named twice, or if there are several, and one has no share above 0.
    """
    found, alone = [], 1.0 if len(datasets) == 1 or option == "validation_dataset" else None
    for dataset in datasets:
        name, _, share = dataset.rpartition(":")
        try:
            found.append((name, float(share)) if name else (dataset, alone))
        except ValueError:
            found.append((dataset, alone))
    if len(dict(found)) < len(found) or not all(share and 0 < share < float("inf") for _, share in found):
        raise UserError(
            f"--{option.replace('_', '-')} {' '.join(datasets)}: name each once, with a share above 0, as in a:0.7 "
            "b:0.3"
        )
    return found


def has_bfloat16(planned: bool = False) -> bool:
    """Whether this machine's GPU multiplies in bfloat16, or without one, that for which a run is only `planned`."""
    return torch.cuda.is_bf16_supported(including_emulation=False) if torch.cuda.is_available() else planned


ConfigT = TypeVar("ConfigT", bound=BaseConfig)


def parse(config_class: type[ConfigT], args: Sequence[str] | None = None, known_only: bool = False) -> ConfigT:
    """Read and validate options. A YAML file is turned into arguments, so that both obey one parser.

    `known_only`: of a YAML file, leave out what the class does not know.
    """
    args = sys.argv[1:] if args is None else list(args)
    # Of many ranks one says what is wrong with the options.
    read = partial(tyro.cli, config_class, console_outputs=os.environ.get("RANK", "0") == "0")
    config = read(args=args)
    if config.config:
        config = read(args=yaml_arguments(config.config, config_class, known_only) + args)
    config.validate()
    return config


def yaml_arguments(path: Path, config_class: type, known_only: bool = False) -> list[str]:
    """`{lr: 3e-4, betas: [0.9, 0.95], compile: true}` to `--lr 3e-4 --betas 0.9 0.95 --compile`."""
    try:
        text = path.read_text()
        options, tree = yaml.safe_load(text) or {}, yaml.compose(text, yaml.SafeLoader)
    except (OSError, UnicodeDecodeError, yaml.YAMLError) as error:
        raise UserError(f"--config {path}: {' '.join(str(error).split())}") from error
    if not isinstance(options, dict):
        raise UserError(f"--config {path}: expected lines of `option: value`, found {type(options).__name__}")
    names = Counter(str(key.value).replace("_", "-") for key, _ in tree.value) if options else Counter()
    if max(names.values(), default=1) > 1:
        raise UserError(f"--config {path}: {names.most_common(1)[0][0]} is given twice")
    if "config" in options:
        raise UserError(f"--config {path}: a file cannot name another with `config`")
    if known_only:
        known = {field.name for field in dataclasses.fields(config_class)}
        options = {key: value for key, value in options.items() if str(key).replace("-", "_") in known}
    flags = {field.name.replace("_", "-") for field in dataclasses.fields(config_class) if field.type is bool}
    arguments = []
    for key, value in options.items():
        name = str(key).replace("_", "-")
        if isinstance(value, bool) and name in flags:
            arguments.append(f"--{name}" if value else f"--no-{name}")
        elif value is not None:
            arguments += [f"--{name}", *(str(item) for item in (value if isinstance(value, list) else [value]))]
    return arguments
