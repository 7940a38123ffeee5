"""What a rank of any layout would hold, compute and send, found on any machine in seconds.

Its training step runs as it is, on fake tensors, which have shapes but no numbers, and a fake process group.
"""

import math
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from typing import Any

import numpy as np
import torch
import torch.distributed as dist
from torch.distributed.device_mesh import DeviceMesh, init_device_mesh
from torch.testing._internal.distributed.fake_pg import FakeStore
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils.flop_counter import flop_registry
from transformers import LlamaConfig

from shared.config import BaseConfig, UserError
from shared.data import Sequences
from shared.live_bytes import LiveBytes
from shared.model import LlamaForCausalLM
from shared.weights import Weights

aten = torch.ops.aten
# torch's list lacks the matmul that adds in place, and the attention of CPUs.
FORMULAS = flop_registry | {
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


class Flops(TorchDispatchMode):
    """Of matmuls and attention, `total`, as executed: what is recomputed counts, and what a causal mask hides too."""

    def __init__(self) -> None:
        super().__init__()
        self.total = 0

    def __torch_dispatch__(self, func, types, args=(), kwargs=None) -> Any:  # noqa: ANN001 (torch's own signature)
        out = func(*args, **(kwargs or {}))
        if formula := FORMULAS.get(func._overloadpacket):
            self.total += formula(*args, **(kwargs or {}), out_val=out)
        return out


class Audit:
    """What a rank does while it trains. `measure` after two steps: the first one allocates what the second finds."""

    def __init__(self, mesh: DeviceMesh) -> None:
        self.mesh, self.memory = mesh, LiveBytes()
        self.static = 0

    def begin_step(self) -> None:
        pass


@contextmanager
def fake_rank(rank: int, **axes: int) -> Iterator[DeviceMesh]:
    """Be that rank of a mesh, whose other ranks do not exist: messages take no time and bring nothing."""
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


def audit(step, mesh, state) -> None:
    pass
