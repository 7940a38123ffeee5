"""What a rank of any layout would hold, compute and send, found on any machine.

Its training step runs as it is. But its tensors are fake: they have shapes and no numbers. And so is its process group,
whose other ranks do not exist.
"""

import dataclasses
import math
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from typing import Any

import numpy as np
import torch
import torch.distributed as dist
from observe.phases import replaced
from torch._subclasses.fake_tensor import FakeTensorMode
from torch.testing._internal.distributed.fake_pg import FakeStore
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_iter
from torch.utils.flop_counter import flop_registry

from shared import distributed
from shared.config import UserError, parse
from shared.corpus import Corpus
from shared.data import Batch, GlobalBatches
from shared.ledger import Ledger, table
from shared.live_bytes import LiveBytes
from shared.llama_configs import load_model_config
from shared.weights import TILE, any_weights, parameter_shapes

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
class Config:
    """The option of a dry run."""

    # Print the memory, FLOPs and traffic of the first and the last rank of this layout, found without devices or data.
    dry_run: bool = False

    def validate(self) -> None:
        super().validate()
        if self.dry_run and self.dp is None:
            raise UserError("--dry-run needs --dp: there are no processes whose number would tell it")
        if self.dry_run and min(self.dp, self.pp, self.cp, self.tp) < 1:
            raise UserError(f"--dp {self.dp}, --pp {self.pp}, --cp {self.cp} and --tp {self.tp} must be at least 1")


def dry_run(config: Config, make_trainer: Callable) -> None:
    """Print what the first and the last rank of the layout would hold, compute and send.

    `make_trainer` is the `Trainer` of train.py.
    """
    axes = {"pp": config.pp, "dp": config.dp, "cp": config.cp, "tp": config.tp}
    for rank in sorted({0, math.prod(axes.values()) - 1}):
        with fake_rank(rank, **axes):
            print(audited_step(config, make_trainer), flush=True)
    if config.config and _as_in_file(config):
        command = f"python step06_4d/plan.py --config {config.config} --gpu h100"
        print(f"how long a step takes: {command}", flush=True)


def _as_in_file(config: Config) -> bool:
    """Whether the command line has changed nothing."""
    try:
        return parse(type(config), ["--config", str(config.config), "--dry-run"]) == config
    except UserError:
        return False


def audited_step(config: Config, make_trainer: Callable) -> str:
    """What a training step on fake tensors holds, computes and sends, as text."""
    audit, trainer = audited_steps(config, make_trainer)
    return audit.report(trainer)


def audited_steps(config: Config, make_trainer: Callable) -> tuple["Audit", Any]:
    """A trainer on fake tensors, and what its second step has held, computed and sent."""
    with FakeTensorMode(), LiveBytes() as memory, Audit(memory) as audit:
        trainer = fake_trainer(config, make_trainer)
        # The first step makes states that the second finds: of as few micro-batches as the schedule takes.
        fewest = config.pp if config.virtual_stages > 1 else 1
        for micro_batches in (fewest, trainer.batches.micro_batches):
            audit.begin_step()
            trainer.forward_backward(fake_batches(trainer.batches)[:micro_batches])
            trainer.clip_grad_norm()
            trainer.optimizer.step()
            trainer.optimizer.zero_grad()
            trainer.reducer.weights_changed()
    return audit, trainer


@contextmanager
def fake_rank(rank: int, **axes: int) -> Iterator[None]:
    """Be that rank of a mesh with the named axes: a trainer finds the mesh instead of starting one."""
    dist.init_process_group("fake", rank=rank, world_size=math.prod(axes.values()), store=FakeStore())
    # Before there are fake tensors: a mesh reads the numbers of one.
    mesh = distributed.make_mesh("cpu", axes, dict.fromkeys(axes, "fake"))
    try:
        with replaced(distributed, "start_mesh", lambda *_, **__: (mesh, torch.device("cpu"))):
            yield
    finally:
        dist.destroy_process_group()


def check_layout(config: Config, make_trainer: Callable) -> None:
    """Raise UserError if the layout's first rank would, for want of a factor. Its `Trainer` is built without memory."""
    with fake_rank(0, pp=config.pp, dp=config.dp, cp=config.cp, tp=config.tp), FakeTensorMode():
        fake_trainer(config, make_trainer)


def fake_trainer(config: Config, make_trainer: Callable) -> Any:
    """A trainer of weights and tokens that need no files. Its tensors are fake under FakeTensorMode."""
    model_config = load_model_config(config)
    # A global batch to train on, and one to hold out.
    tokens = np.broadcast_to(np.uint16(0), (2 * config.global_batch_size * config.seq_len + 1,))
    # A sequence that is one document is what costs most.
    config = dataclasses.replace(config, mask_documents=False, ignore_last_labels=False, compile=False)
    return make_trainer(config, model_config, Corpus.from_array(tokens), any_weights(model_config))


def fake_batches(batches: GlobalBatches) -> list[Batch]:
    """Of the same sizes. A thread makes the real ones, out of sight."""
    sizes = batches.micro_batch_size, len(batches.positions)
    return [Batch(*(torch.zeros(sizes, dtype=torch.int64) for _ in range(3))) for _ in range(batches.micro_batches)]


class Audit(TorchDispatchMode):
    """While active, counts FLOPs and what is sent, next to the bytes of live tensors, which `memory` counts by then.

    FLOPs are those that are executed: also of what is recomputed, and of what a causal mask hides.
    """

    def __init__(self, memory: LiveBytes) -> None:
        super().__init__()
        self.memory = memory
        self.begin_step()

    def begin_step(self) -> None:
        """Count anew, but for what is live."""
        self.memory.peak, self.static = self.memory.now, self.memory.now
        self.ledger, self.flops = Ledger(), 0

    def __torch_dispatch__(self, func, types, args=(), kwargs=None) -> Any:  # noqa: ANN001 (torch's own signature)
        self.ledger.count(func, args)
        out = func(*args, **(kwargs or {}))
        if formula := FLOPS.get(func._overloadpacket):
            self.flops += formula(*args, **(kwargs or {}), out_val=out)
        return out

    def held(self, trainer: Any) -> dict[str, int]:
        """Bytes that the trainer's step since `begin_step` has held, by kind, and the most at a time."""
        optimizer = trainer.optimizer
        # With --zero 3 the parameters are empty between steps, and their shards are the weights.
        weights = _storages(
            [list(trainer.model.parameters()), [u.shard for u in getattr(trainer.reducer, "units", ())]]
        )
        optimizer_only = _storages([optimizer.param_groups, optimizer.state]) - weights
        kinds = {"weights": weights, "optimizer": optimizer_only}
        held = {name: sum(self.memory.live.get(key, 0) for key in keys) for name, keys in kinds.items()}
        held |= {"gradients": self.static - sum(held.values())}
        return held | {"activations and buffers": self.memory.peak - self.static, "peak": self.memory.peak}

    def report(self, trainer: Any) -> str:
        """What the trainer's step since `begin_step` has held, computed and sent, as text."""
        parameters, mesh = list(trainer.model.parameters()), trainer.mesh
        gib = {name: nbytes / 2**30 for name, nbytes in self.held(trainer).items()}
        place = ", ".join(f"{axis} {mesh.get_local_rank(axis)}" for axis in mesh.mesh_dim_names)
        # What ranks agree on over all of them, outside the trainer, is no part of it.
        expected = {key: sent for key, sent in trainer.config.traffic(trainer).items() if key[0] != "world"}
        return "\n".join(
            [
                f"rank {dist.get_rank()} of {dist.get_world_size()}: {place}",
                f"{'parameters':<26}{sum(p.numel() for p in parameters):>15,}",
                *(f"{f'GiB {name}':<32}{value:>9.3f}" for name, value in gib.items()),
                *(f"{f'GiB of the host, {name}':<32}{value / 2**30:>9.3f}" for name, value in on_host(trainer).items()),
                f"{'TFLOP per step':<32}{self.flops / 1e12:>9.3f}",
                table(self.ledger.counts, expected, 1),
            ]
        )


def on_host(trainer: Any) -> dict[str, int]:
    """Bytes of its machine's memory that a rank takes next to its device: before the first step, and for a save."""
    shapes, largest = parameter_shapes(trainer.model.model.config), 0
    for name, p in trainer.model.named_parameters():
        # One after the other is drawn or read, in float32: of the rows that this rank has numbers of, first the whole,
        # by way of a tile, then the part that is its own.
        rows = trainer.reducer.unit_of[p].rows(p) if trainer.config.zero else slice(0, len(p))
        whole, own = ((rows.stop - rows.start) * shape[1:].numel() for shape in (shapes[name], p.shape))
        largest = max(largest, whole + (own if own < whole else 0) + min(TILE, shapes[name].numel()))
    return {"start": 4 * largest, "saves": trainer.config.copied_bytes(trainer)}


def _storages(values: object) -> set[int]:
    return {tensor.untyped_storage()._cdata for tensor in tree_iter(values) if isinstance(tensor, torch.Tensor)}
