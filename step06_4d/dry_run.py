"""What a rank of any layout would hold, compute and send, found on any machine.

Its training step runs as it is, on fake tensors, which have shapes but no numbers, and with a fake process group, whose
other ranks do not exist.
"""

import math
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from typing import Any

import numpy as np
import torch
import torch.distributed as dist
from torch import nn
from torch.distributed.device_mesh import DeviceMesh, init_device_mesh
from torch.testing._internal.distributed.fake_pg import FakeStore
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_iter
from torch.utils.flop_counter import flop_registry
from transformers import LlamaConfig

from shared.config import BaseConfig, UserError
from shared.data import Sequences
from shared.ledger import Ledger, Traffic, table
from shared.live_bytes import LiveBytes
from shared.model import LlamaForCausalLM
from shared.weights import Weights

aten = torch.ops.aten
# torch's list lacks the matmul that adds in place, and the attention of CPUs.
FLOPS = flop_registry | {
    aten.addmm_: flop_registry[aten.addmm],
    aten._scaled_dot_product_flash_attention_for_cpu: flop_registry[aten._scaled_dot_product_flash_attention],
    aten._scaled_dot_product_flash_attention_for_cpu_backward: flop_registry[
        aten._scaled_dot_product_flash_attention_backward
    ],
}


@dataclass
class DryRunConfig:
    """The option of a dry run."""

    # Print the memory, FLOPs and traffic of the first and the last rank of this layout, found without devices or data.
    dry_run: bool = False

    def validate(self) -> None:
        super().validate()
        if self.dry_run and self.dp is None:
            raise UserError("--dry-run needs --dp: there are no processes whose number would tell it")
        if self.dry_run and min(self.dp, self.pp, self.cp, self.tp) < 1:
            raise UserError(f"--dp {self.dp}, --pp {self.pp}, --cp {self.cp} and --tp {self.tp} must be at least 1")


@contextmanager
def fake_rank(rank: int, **axes: int) -> Iterator[DeviceMesh]:
    """Be that rank of a mesh with the named axes."""
    dist.init_process_group("fake", rank=rank, world_size=math.prod(axes.values()), store=FakeStore())
    try:
        yield init_device_mesh("cpu", tuple(axes.values()), mesh_dim_names=tuple(axes))
    finally:
        dist.destroy_process_group()


def fake_weights(model_config: LlamaConfig) -> Weights:
    """From a parameter's name to a tensor of its shape."""
    with torch.device("meta"):
        shapes = {name: p.shape for name, p in LlamaForCausalLM(model_config).named_parameters()}
    return lambda name: torch.empty(shapes[name])


def fake_sequences(config: BaseConfig) -> Sequences:
    """Enough for a step."""
    return Sequences(np.broadcast_to(np.uint16(0), (config.global_batch_size * config.seq_len + 1,)), config.seq_len)


class Audit(TorchDispatchMode):
    """Counts, while active, the bytes of live tensors, FLOPs as executed (also what is recomputed, and what a causal
    mask hides), and what is sent. To be active from before the model has weights."""

    def __init__(self, mesh: DeviceMesh) -> None:
        super().__init__()
        self.mesh, self.memory = mesh, LiveBytes()
        self.begin_step()

    def begin_step(self) -> None:
        """Count anew, but for what is live."""
        self.memory.peak, self.static = self.memory.now, self.memory.now
        self.ledger, self.flops = Ledger(self.mesh), 0

    def __torch_dispatch__(self, func, types, args=(), kwargs=None) -> Any:  # noqa: ANN001 (torch's own signature)
        self.ledger.count(func, args)
        out = func(*args, **(kwargs or {}))
        self.memory.track(out)
        if formula := FLOPS.get(func._overloadpacket):
            self.flops += formula(*args, **(kwargs or {}), out_val=out)
        return out

    def report(
        self, model: nn.Module, optimizer: torch.optim.Optimizer, expected: dict[tuple[str, str], Traffic]
    ) -> str:
        """What the step since `begin_step` has held, computed and sent, as text."""
        weights = _storages(list(model.parameters()))
        optimizer_only = _storages([optimizer.param_groups, optimizer.state]) - weights
        kinds = {"weights": weights, "optimizer": optimizer_only}
        gib = {name: sum(self.memory.live.get(key, 0) for key in keys) / 2**30 for name, keys in kinds.items()}
        gib |= {"gradients": self.static / 2**30 - sum(gib.values())}
        gib |= {"activations and buffers": (self.memory.peak - self.static) / 2**30, "peak": self.memory.peak / 2**30}
        place = ", ".join(f"{axis} {self.mesh.get_local_rank(axis)}" for axis in self.mesh.mesh_dim_names)
        return "\n".join(
            [
                f"rank {dist.get_rank()} of {dist.get_world_size()}: {place}",
                f"{'parameters':<26}{sum(p.numel() for p in model.parameters()):>15,}",
                *(f"{f'GiB {name}':<32}{value:>9.3f}" for name, value in gib.items()),
                f"{'TFLOP per step':<32}{self.flops / 1e12:>9.3f}",
                table(self.ledger.counts, expected, 1),
            ]
        )


def _storages(values: object) -> set[int]:
    return {tensor.untyped_storage()._cdata for tensor in tree_iter(values) if isinstance(tensor, torch.Tensor)}
