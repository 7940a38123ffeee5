"""Sharded data parallelism (ZeRO, arXiv 1910.02054): what data-parallel ranks would all hold, each holds a part of.

`--zero 1`: gradients are reduce-scattered, the optimizer changes its rank's shard of the weights, and these are
all-gathered. 2: each micro-batch's gradients are reduced and freed. 3: so are the weights, gathered again for the
forward and the backward of each layer.

`--shard N`: a shard is 1/N, spread over N neighbouring ranks (hybrid sharding, arXiv 2205.00119). Once per step, its
gradients are all-reduced over the replicas that hold the same one.

With --dtype bfloat16 the weights are in bfloat16; the optimizer has its shard of them, the master weights, in float32,
and so has every sum of gradients.
"""

from dataclasses import dataclass
from functools import partial
from typing import Any, Literal

import data_parallel
import torch
import torch.distributed as dist
from torch import Tensor, nn
from torch.distributed import ProcessGroup
from torch.distributed.device_mesh import DeviceMesh
from zero.unit import Unit

from shared.config import UserError
from shared.distributed import groups_along, make_group
from shared.ledger import Traffic
from shared.model import LlamaForCausalLM
from shared.weights import Weights, materialize


@dataclass
class Config:
    """The options of sharded data parallelism."""

    # What is sharded over data-parallel ranks. 1 shards the optimizer's states, 2 the gradients too, 3 the weights too.
    # From 1 on, --dtype bfloat16 keeps the weights in bfloat16 and their float32 masters in the optimizer's shard. A
    # bucket is then a layer, whatever --bucket-mib says.
    zero: Literal[0, 1, 2, 3] = 0
    # Spread the shards of --zero over this many neighbouring data-parallel ranks, such as those of a node, and not over
    # all. It must divide dp · cp, which is the default. With fewer, each holds more. But only their sums of gradients
    # leave them, once per step.
    shard: int | None = None

    @property
    def param_dtype(self) -> torch.dtype:
        return torch.bfloat16 if self.zero and self.dtype == "bfloat16" else super().param_dtype

    def traffic(self, trainer: Any) -> dict[tuple[str, str], Traffic]:
        """N bytes of weights, 2N of gradients if the weights are in bfloat16, over the ranks of dp and cp.

        Reduce-scatters of the gradients: one per unit, and from --zero 2 on micro-batch. All-gathers of the weights:
        one per unit; with --zero 3 for each micro-batch, and again in backward for all layers but the last. A ring
        makes each of D ranks send (D − 1)/D of these, where an all-reduce makes it 2(D − 1)/D. All-reduces: the loss
        and the norm. With --shard, all but the loss goes over its ranks, and the gradients of each unit's shard are
        all-reduced over the replicas.
        """
        if not self.zero:
            return super().traffic(trainer)
        units, replicas, size = trainer.reducer.units, trainer.reducer.replicas, self.grad_dtype.itemsize
        reductions = 1 if self.zero == 1 else trainer.batches.micro_batches
        gathers = list(units)
        if self.zero == 3:
            gathers = trainer.batches.micro_batches * (units + [unit for unit in units if unit.regathers])
        axis = "shard" if replicas else "dp"
        sent = {
            (axis, "reduce-scatter"): Traffic(
                reductions * len(units), reductions * sum(unit.flat.numel() for unit in units) * size
            ),
            (axis, "all-gather"): Traffic(len(gathers), sum(unit.flat.nbytes for unit in gathers)),
            ("dp", "all-reduce"): Traffic(2, 2 * size),
        }
        if replicas:
            sent |= {
                ("dp", "all-reduce"): Traffic(1, size),
                ("shard", "all-reduce"): Traffic(1, size),
                ("replicas", "all-reduce"): Traffic(len(units), sum(unit.shard_size for unit in units) * size),
            }
        return super().traffic(trainer) | sent

    def validate(self) -> None:
        super().validate()
        if self.zero > 1 and self.pp > 1:
            raise UserError(
                f"--zero {self.zero} reduces gradients after each micro-batch, of which --pp {self.pp} needs many: "
                "take --zero 1, which reduces them once per step"
            )
        if self.zero > 1 and self.pp_schedule != "1f1b":
            # The gradients of a unit would arrive while it is reduced for the micro-batch before, or for weights that
            # this one's backward has freed.
            raise UserError(
                f"--zero {self.zero} takes one micro-batch after the other: leave out --pp-schedule {self.pp_schedule}"
            )
        if self.zero and self.dp_engine == "naive":
            raise UserError(f"--zero {self.zero} is an engine of its own: leave out --dp-engine naive")
        if self.shard is not None and not self.zero:
            raise UserError(f"--shard {self.shard} spreads what --zero divides: add --zero 1, 2 or 3, or leave it out")
        if self.shard is not None and self.shard < 2:
            raise UserError(f"--shard {self.shard} divides nothing: take at least 2 ranks")


class ShardedReducer(data_parallel.Reducer):
    """Reduces the gradients of a unit while backward computes those of others, and gathers weights before their use.

    `trained` are this rank's shards of the parameters, of those that it has numbers of.
    """

    def __init__(
        self,
        config: Config,
        model: LlamaForCausalLM,
        weights: Weights,
        device: torch.device,
        group: ProcessGroup,
        shard_group: ProcessGroup,
        replicas: ProcessGroup | None,
    ) -> None:
        """`group` are all data-parallel ranks, `shard_group` those that hold one shard each, and `replicas` those that
        hold the same shard as this rank, if there are several."""
        self.zero, self.shard_group = config.zero, shard_group
        # In the order of forward.
        self.units: list[Unit] = []
        self.unit_of: dict[nn.Parameter, Unit] = {}
        names, base = {p: name for name, p in model.named_parameters()}, model.model
        layers, tied = list(base.layers.values()), base.config.tie_word_embeddings
        for module in (base.embed_tokens, *layers, model.lm_head):
            # With the last layer the final norm: units with norms are then of the same size on all ranks of tp.
            members = [module, base.norm] if module is layers[-1] else [module]
            parameters = [p for m in members if m for p in m.parameters() if p not in self.unit_of]
            if parameters:
                # The head is called without hooks; the norm in front of it waits for it.
                waits = base.norm if module is model.lm_head else module
                waits.register_forward_pre_hook(partial(self._before_forward, len(self.units)))
                named = {names[p]: p for p in parameters}
                unit = Unit(model, named, weights, config.param_dtype, device, shard_group, replicas, config.zero)
                # Backward begins with the head, the norm and the last layer: they stay. An embedding it needs not.
                unit.regathers = config.zero == 3 and module in layers[:-1]
                if config.zero == 3 and module in layers:
                    module.register_forward_hook(partial(self._after_layer, len(self.units)))
                elif config.zero == 3 and module is base.embed_tokens and not tied:
                    module.register_forward_hook(lambda *_, unit=unit: unit.free())
                self.units.append(unit)
                self.unit_of |= dict.fromkeys(unit.range_of, unit)
        super().__init__(model, group)
        self.replicas = replicas
        # As many dimensions as the parameter: these tell the optimizer what to decay.
        self.shards = {
            p: nn.Parameter(unit.master[where].view([1] * (p.ndim - 1) + [-1]).data)
            for p, unit in self.unit_of.items()
            if (where := unit.in_shard(p)).start < where.stop
        }
        self.trained = list(self.shards.values())
        for p in self.unit_of:
            p.register_post_accumulate_grad_hook(self._on_gradient)

    def start(self, micro_batches: int) -> None:
        self.contributions = micro_batches if self.zero == 1 else 1
        for unit in self.units:
            unit.shard_gradient, unit.to_reduce = None, micro_batches // self.contributions
            if unit.flat_gradient is not None:
                unit.flat_gradient.zero_()
            if self.zero == 3:
                # What an evaluation has left whole: nothing frees the last layer and the head but their reduction.
                unit.free()

    def add(self, parameter: nn.Parameter, gradient: Tensor) -> None:
        unit = self.unit_of[parameter]
        unit.add(parameter, gradient)
        if unit.arrived == len(unit.range_of) * self.contributions:
            self._reduce(unit)

    def _on_gradient(self, parameter: nn.Parameter) -> None:
        self.add(parameter, parameter.grad)
        parameter.grad = None

    def _reduce(self, unit: Unit) -> None:
        if self.zero == 3:
            unit.free()
        if self.zero > 1 or self.replicas:
            # One at a time is on its way, or the gradients of many could wait there. What it leaves goes on to the
            # replicas while this one is reduced.
            for other in self.units:
                other.finish_reducing()
        unit.reduce()

    def finish(self) -> None:
        for unit in self.units:
            if unit.arrived:
                # Held up by parameters without a gradient.
                self._reduce(unit)
            # There were fewer than micro-batches, if some were held up.
            unit.to_reduce = 0
            unit.finish_reducing()
        for unit in self.units:
            unit.finish_summing()
        for p, shard in self.shards.items():
            shard.grad = self.gradient(p).view_as(shard)

    def check_replicas(self) -> None:
        # Whole, sharded weights may not fit. Of shards there are replicas as well.
        if self.zero < 3:
            self.wait_for_weights()
            super().check_replicas()
        if self.replicas and self.trained:
            data_parallel.Reducer(nn.ParameterList(self.trained), self.replicas).check_replicas()

    def gradient(self, parameter: nn.Parameter) -> Tensor:
        unit = self.unit_of[parameter]
        return unit.shard_gradient[unit.in_shard(parameter)]

    def elements(self, parameter: nn.Parameter) -> int:
        where = self.unit_of[parameter].in_shard(parameter)
        return where.stop - where.start

    def trained_of(self, parameter: nn.Parameter) -> tuple[nn.Parameter | None, int]:
        return self.shards.get(parameter), self.unit_of[parameter].numbers(parameter).start

    def weights_changed(self) -> None:
        for unit in self.units:
            if unit.master is not unit.shard:
                unit.shard.copy_(unit.master)
            unit.is_whole = False
            if self.zero < 3:
                unit.gather()

    def wait_for_weights(self) -> None:
        for unit in self.units:
            unit.wait()

    def _before_forward(self, i: int, *_: object) -> None:
        self.units[i].wait()
        # The next travel while this one computes.
        if i + 1 < len(self.units):
            self.units[i + 1].gather()

    def _after_layer(self, i: int, module: nn.Module, args: tuple, output: Tensor) -> None:
        if self.units[i].regathers:
            self.units[i].free()
        if output.requires_grad:
            output.register_hook(partial(self._before_backward, i))

    def _before_backward(self, i: int, gradient: Tensor) -> None:
        self.units[i].wait()
        # The next to be computed, in backward the layer before, travels while this one computes.
        if self.units[i - 1].regathers:
            self.units[i - 1].gather()


def shard_groups(config: Config, mesh: DeviceMesh, group: ProcessGroup) -> tuple[ProcessGroup, ProcessGroup | None]:
    """The ranks of `group` that hold one shard each, and those that hold the same one as this rank, if several do.

    Raises UserError if --shard does not divide them.
    """
    size, shard = dist.get_world_size(group), config.shard
    if shard is None or shard == size:
        return group, None
    if size % shard:
        raise UserError(
            f"--shard {shard} does not divide dp · cp = {size // config.cp} · {config.cp}: take a divisor, or leave it "
            "out"
        )
    partition = groups_along(mesh, "dp", "cp")
    neighbours = [ranks[i : i + shard] for ranks in partition for i in range(0, size, shard)]
    replicas = [ranks[i::shard] for ranks in partition for i in range(shard)]
    return make_group(neighbours, "shard", config.timeout), make_group(replicas, "replicas", config.timeout)


def make_reducer(
    config: Config,
    model: LlamaForCausalLM,
    weights: Weights,
    device: torch.device,
    group: ProcessGroup,
    mesh: DeviceMesh,
) -> data_parallel.Reducer:
    """The engine that the options name, for the ranks of `group`. It gives the model its weights."""
    if config.zero:
        return ShardedReducer(config, model, weights, device, group, *shard_groups(config, mesh, group))
    materialize(model, weights, config.param_dtype, device)
    return data_parallel.make_reducer(config, model, group)
