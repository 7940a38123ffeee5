"""What a layout is, and what one of its ranks has: numbers only, so that thousands can be compared in seconds.

Names are those of the options of train.py, and of transformers' LlamaConfig.

Shapes: b sequences of a micro-batch, s tokens of a sequence, h hidden size, f feed-forward size, d head dimension.
"""

from dataclasses import dataclass, fields
from functools import cached_property
from typing import NamedTuple

BYTES = {"float32": 4, "bfloat16": 2, "float64": 8}


@dataclass(frozen=True)
class Model:
    """What is read of a configuration of transformers, whose own attributes are slow to read."""

    hidden_size: int
    intermediate_size: int
    num_hidden_layers: int
    num_attention_heads: int
    num_key_value_heads: int
    head_dim: int
    vocab_size: int
    tie_word_embeddings: bool
    # Linears of a layer that have one, and whether heads of q and k are normalized.
    biased: tuple[str, ...] = ()
    head_norms: bool = False

    @classmethod
    def of(cls, config: object) -> "Model":
        # Here, for it needs torch.
        from shared.families import biased_linears, has_head_norms

        same = {field.name: getattr(config, field.name) for field in fields(cls)[:8]}
        return cls(**same, biased=tuple(biased_linears(config)), head_norms=has_head_norms(config))


@dataclass(frozen=True)
class Layout:
    """The options of train.py that decide what a rank holds, computes and sends."""

    dp: int = 1
    tp: int = 1
    pp: int = 1
    cp: int = 1
    zero: int = 0
    shard: int | None = None
    sequence_parallel: bool = False
    virtual_stages: int = 1
    pp_schedule: str = "1f1b"
    recompute: str = "none"
    micro_batch_size: int = 1
    global_batch_size: int = 1
    seq_len: int = 256
    dtype: str = "bfloat16"
    optimizer: str = "adamw"
    dp_engine: str = "bucketed"
    tp_engine: str = "fan-out"
    cp_engine: str = "ring"
    cp_split: str = "zigzag"

    @classmethod
    def of(cls, config: object) -> "Layout":
        """That of a `Config` of train.py."""
        return cls(**{field.name: getattr(config, field.name) for field in fields(cls)})


class Place(NamedTuple):
    """A rank, by its place on each axis."""

    pp: int = 0
    dp: int = 0
    cp: int = 0
    tp: int = 0


def share(size: int, parts: int, index: int) -> int:
    """The size of a part, as `torch.tensor_split` cuts: the first ones are larger by one."""
    return size // parts + (index < size % parts)


@dataclass(frozen=True)
class Sizes:
    """What a rank's tensors are made of. Those in bytes have a name that says so."""

    model: Model
    layout: Layout
    tp_rank: int = 0

    @cached_property
    def micro_batches(self) -> int:
        return self.layout.global_batch_size // (self.layout.dp * self.layout.micro_batch_size)

    @cached_property
    def tokens(self) -> int:
        """Of a micro-batch, in a split matrix."""
        return self.layout.micro_batch_size * self.layout.seq_len // self.layout.cp

    @cached_property
    def own_tokens(self) -> int:
        """Of a micro-batch, between split matrices."""
        return self.tokens // (self.layout.tp if self.layout.sequence_parallel else 1)

    @cached_property
    def heads(self) -> int:
        return self.model.num_attention_heads // self.layout.tp

    @cached_property
    def queries(self) -> int:
        """Numbers per token: heads times their width."""
        return self.heads * self.model.head_dim

    @cached_property
    def keys(self) -> int:
        """Numbers per token. More ranks than key-value heads share one."""
        return max(1, self.model.num_key_value_heads // self.layout.tp) * self.model.head_dim

    @cached_property
    def ffn(self) -> int:
        return self.model.intermediate_size // self.layout.tp

    @cached_property
    def vocabulary(self) -> int:
        return share(self.model.vocab_size, self.layout.tp, self.tp_rank)

    @cached_property
    def compute_bytes(self) -> int:
        """A number in a matmul and between them."""
        return BYTES[self.layout.dtype]

    @cached_property
    def param_bytes(self) -> int:
        """A weight, and the residual sum, which begins as rows of one."""
        return max(self.compute_bytes, 2 if self.layout.zero else 4)

    @cached_property
    def sum_bytes(self) -> int:
        """A number in a sum: gradients, norms, the loss."""
        return max(self.compute_bytes, 4)

    @cached_property
    def replicas(self) -> int:
        """Ranks that see other tokens and train the same weights."""
        return self.layout.dp * self.layout.cp

    @cached_property
    def shards(self) -> int:
        """Parts into which --zero cuts."""
        return (self.layout.shard or self.replicas) if self.layout.zero else 1


def linears(sizes: Sizes) -> dict[str, tuple[int, int]]:
    """Inputs and outputs of each linear of a layer, as a rank has it."""
    h = sizes.model.hidden_size
    return {
        "q_proj": (h, sizes.queries),
        "k_proj": (h, sizes.keys),
        "v_proj": (h, sizes.keys),
        "o_proj": (sizes.queries, h),
        "gate_proj": (h, sizes.ffn),
        "up_proj": (h, sizes.ffn),
        "down_proj": (sizes.ffn, h),
    }


def layer_parameters(sizes: Sizes) -> dict[str, int]:
    """Numbers in each parameter of a layer, as a rank has it, in the order of the model's."""
    h, model, numbers = sizes.model.hidden_size, sizes.model, {}
    for name, (inputs, outputs) in linears(sizes).items():
        numbers[name] = inputs * outputs
        if name in model.biased:
            numbers[f"{name}.bias"] = outputs
        if name == "o_proj" and model.head_norms:
            numbers |= dict.fromkeys(("q_norm", "k_norm"), model.head_dim)
    return {**numbers, "input_layernorm": h, "post_attention_layernorm": h}


def units(sizes: Sizes, stage: int, layers: int) -> list[list[int]]:
    """Numbers in each parameter of a rank, as --zero groups them: embedding, layers, head.

    A tied head is the embedding.
    """
    model, last = sizes.model, sizes.layout.pp - 1
    vocabulary = sizes.vocabulary * model.hidden_size
    tied = model.tie_word_embeddings
    layer = list(layer_parameters(sizes).values())
    groups = [layer[:] for _ in range(layers)]
    if stage == last:
        groups[-1].append(model.hidden_size)
    if stage == 0 or (stage == last and tied):
        groups.insert(0, [vocabulary])
    if stage == last and not tied:
        groups.append([vocabulary])
    return groups
