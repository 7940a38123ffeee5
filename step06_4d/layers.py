"""What wraps the forward of a layer: compile, and activation recompute.

Recompute: what backward needs of a layer is computed again rather than kept (arXiv 1604.06174).
"""

from dataclasses import dataclass
from functools import partial
from typing import Literal

import torch
from torch import Tensor, nn
from torch.autograd.graph import saved_tensors_hooks
from torch.utils.checkpoint import checkpoint

from shared.config import UserError
from shared.model import LlamaForCausalLM, RMSNorm

# A layer waits for a message where it needs it, and computes meanwhile what does not.
COMPILE_OPTIONS = {
    "reorder_for_compute_comm_overlap": True,
    "reorder_for_compute_comm_overlap_passes": ["sink_waits"],
}


@dataclass
class Config:
    """The option of activation recompute."""

    # What backward computes again. selective recomputes what the norms return. (Attention scores and the product in the
    # MLP are always recomputed.) full recomputes layers, and keeps only the input of each.
    recompute: Literal["none", "selective", "full"] = "none"

    @property
    def recomputes(self) -> int:
        """How often backward runs the forward of a layer again, messages included."""
        return int(self.recompute == "full")

    def validate(self) -> None:
        super().validate()
        if self.recompute == "selective" and self.compile:
            raise UserError("--compile chooses itself what to recompute: leave out --recompute selective, or take full")


class _Recomputed:
    """In the place of what a norm returned, kept for backward: its input, which the norm keeps anyway."""

    def __init__(self, norm: RMSNorm, x: Tensor, like: Tensor) -> None:
        self.norm, self.x, self.shape, self.dtype = norm, x.detach(), like.shape, like.dtype

    def __call__(self) -> Tensor:
        return self.norm.forward(self.x).to(self.dtype).view(self.shape)


class SelectiveRecompute:
    """The forward of a layer that does not keep what its norms return: 2·b·s·h numbers less."""

    def __init__(self, layer: nn.Module) -> None:
        self.forward = layer.forward
        # What norms have returned, by its memory, and from what. Held while forward runs: nothing else can lie there.
        self.outputs: dict[int, tuple[Tensor, RMSNorm, Tensor]] = {}
        # What norms of heads return is rotated, and not kept.
        for norm in (layer.input_layernorm, layer.post_attention_layernorm):
            norm.register_forward_hook(self._note)

    def _note(self, norm: RMSNorm, args: tuple[Tensor], output: Tensor) -> None:
        self.outputs[output.untyped_storage()._cdata] = output, norm, *args

    def _pack(self, tensor: Tensor) -> Tensor | _Recomputed:
        output, norm, x = self.outputs.get(tensor.untyped_storage()._cdata, (None, None, None))
        return tensor if output is None else _Recomputed(norm, x, tensor)

    def _unpack(self, packed: Tensor | _Recomputed) -> Tensor:
        return packed() if isinstance(packed, _Recomputed) else packed

    def __call__(self, *args: object) -> Tensor:
        with saved_tensors_hooks(self._pack, self._unpack):
            output = self.forward(*args)
        self.outputs.clear()
        return output


def apply(model: LlamaForCausalLM, config: Config) -> None:
    """Wrap the forward of each layer, and no more than that: hooks and the sharding of weights stay outside."""
    for layer in model.model.layers.values():
        if config.compile:
            layer.forward = torch.compile(layer.forward, dynamic=False, options=COMPILE_OPTIONS)
        if config.recompute == "full":
            layer.forward = partial(checkpoint, layer.forward, use_reentrant=False, preserve_rng_state=False)
        elif config.recompute == "selective":
            layer.forward = SelectiveRecompute(layer)
