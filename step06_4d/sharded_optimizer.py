"""Sharded data parallelism (ZeRO, arXiv 1910.02054): what data-parallel ranks would all hold, each holds a part of.

`--zero 1`: gradients are reduce-scattered, the optimizer changes its rank's shard of the weights, and these are
all-gathered. 2: each micro-batch's gradients are reduced and freed. 3: so are the weights, gathered again for the
forward and the backward of each layer.

With --dtype bfloat16 the weights are in bfloat16; the optimizer has its shard of them, the master weights, in float32,
and so has every sum of gradients.
"""

from dataclasses import dataclass
from functools import partial
from typing import Literal

import torch
from data_parallel import DataParallel, data_parallel_traffic, make_data_parallel
from torch import Tensor, nn
from torch.distributed import ProcessGroup
from unit import Unit

from shared.config import UserError
from shared.ledger import Traffic
from shared.model import LlamaForCausalLM
from shared.weights import Weights, materialize


@dataclass
class ShardedOptimizerConfig:
    """The options of sharded data parallelism."""

    # What data-parallel ranks share out: 1 the optimizer's states, 2 the gradients too, 3 the weights too. From 1 on,
    # --dtype bfloat16 keeps the weights in bfloat16 and their float32 masters in the optimizer's shard.
    zero: Literal[0, 1, 2, 3] = 0

    @property
    def param_dtype(self) -> torch.dtype:
        return torch.bfloat16 if self.zero and self.dtype == "bfloat16" else super().param_dtype

    @property
    def compute_dtype(self) -> torch.dtype:
        """Of matmuls, and so of the activations that tensor and context parallelism send."""
        return torch.bfloat16 if self.dtype == "bfloat16" else self.param_dtype

    @property
    def grad_dtype(self) -> torch.dtype:
        """Of summed gradients, losses and norms."""
        return torch.promote_types(self.param_dtype, torch.float32)

    def validate(self) -> None:
        super().validate()
        if self.zero > 1 and self.pp > 1:
            raise UserError(
                f"--zero {self.zero} reduces gradients after each micro-batch, of which --pp {self.pp} needs many: "
                "take --zero 1, which reduces them once per step"
            )
        if self.zero and self.dp_engine == "naive":
            raise UserError(f"--zero {self.zero} is an engine of its own: leave out --dp-engine naive")


class ShardedDataParallel(DataParallel):
    """Reduces the gradients of a unit while backward computes those of others, and gathers weights before their use.

    `trained` are this rank's parts of the parameters that it has a part of.
    """

    def __init__(
        self,
        config: ShardedOptimizerConfig,
        model: LlamaForCausalLM,
        weights: Weights,
        device: torch.device,
        group: ProcessGroup,
    ) -> None:
        self.zero, self.group = config.zero, group
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
                unit = Unit(model, named, weights, config.param_dtype, device, group, config.zero)
                # Backward begins with the head, the norm and the last layer: they stay. An embedding it needs not.
                unit.again = config.zero == 3 and module in layers[:-1]
                if config.zero == 3 and module in layers:
                    module.register_forward_hook(partial(self._after_layer, len(self.units)))
                elif config.zero == 3 and module is base.embed_tokens and not tied:
                    module.register_forward_hook(lambda *_, unit=unit: unit.free())
                self.units.append(unit)
                self.unit_of |= dict.fromkeys(unit.span, unit)
        # As many dimensions as the parameter: these tell the optimizer what to decay.
        self.parts = {
            p: nn.Parameter(unit.master[part].view([1] * (p.ndim - 1) + [-1]).data)
            for p, unit in self.unit_of.items()
            if (part := unit.part(p)).start < part.stop
        }
        for p in self.unit_of:
            p.register_post_accumulate_grad_hook(self._on_gradient)
        super().__init__(list(self.parts.values()), group)

    def start(self, micro_batches: int) -> None:
        self.contributions = micro_batches if self.zero == 1 else 1
        for unit in self.units:
            unit.shard_gradient = None
            if unit.flat_gradient is not None:
                unit.flat_gradient.zero_()
            if self.zero == 3:
                # What an evaluation has left whole: nothing frees the last layer and the head but their reduction.
                unit.free()

    def add(self, parameter: nn.Parameter, gradient: Tensor) -> None:
        unit = self.unit_of[parameter]
        unit.add(parameter, gradient)
        if unit.arrived == len(unit.span) * self.contributions:
            self._reduce(unit)

    def _on_gradient(self, parameter: nn.Parameter) -> None:
        self.add(parameter, parameter.grad)
        parameter.grad = None

    def _reduce(self, unit: Unit) -> None:
        if self.zero == 3:
            unit.free()
        if self.zero > 1:
            # One at a time is on its way, or the gradients of many could wait there.
            for other in self.units:
                other.finish_reducing()
        unit.reduce()

    def finish(self) -> None:
        for unit in self.units:
            if unit.arrived:
                # Held up by parameters without a gradient.
                self._reduce(unit)
            unit.finish_reducing()
        for p, part in self.parts.items():
            part.grad = self.gradient(p).view_as(part)

    def gradient(self, parameter: nn.Parameter) -> Tensor:
        unit = self.unit_of[parameter]
        return unit.shard_gradient[unit.part(parameter)]

    def elements(self, parameter: nn.Parameter) -> int:
        part = self.unit_of[parameter].part(parameter)
        return part.stop - part.start

    def part(self, parameter: nn.Parameter) -> tuple[nn.Parameter | None, int]:
        unit = self.unit_of[parameter]
        return self.parts.get(parameter), unit.own.start + unit.part(parameter).start - unit.span[parameter].start

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
        if self.units[i].again:
            self.units[i].free()
        if output.requires_grad:
            output.register_hook(partial(self._before_backward, i))

    def _before_backward(self, i: int, gradient: Tensor) -> None:
        self.units[i].wait()
        # The next to be computed, in backward the layer before, travels while this one computes.
        if self.units[i - 1].again:
            self.units[i - 1].gather()


def make_gradients(
    config: ShardedOptimizerConfig,
    model: LlamaForCausalLM,
    weights: Weights,
    device: torch.device,
    group: ProcessGroup,
) -> DataParallel:
    """The engine that the options name, for the ranks of `group`. It gives the model its weights."""
    if config.zero:
        return ShardedDataParallel(config, model, weights, device, group)
    materialize(model, weights, config.param_dtype, device)
    return make_data_parallel(config, list(model.parameters()), group)


def gradient_traffic(gradients: DataParallel, micro_batches: int) -> dict[tuple[str, str], Traffic]:
    """Payload per step of a rank, over dp and cp; N bytes of weights, 2N of gradients if the weights are in bfloat16.

    Reduce-scatters of the gradients: one per unit, and from --zero 2 on micro-batch. All-gathers of the weights: one
    per unit; with --zero 3 for each micro-batch, and again in backward for all layers but the last. A ring makes each
    of D ranks send (D − 1)/D of these, where an all-reduce makes it 2(D − 1)/D. All-reduces: the loss and the norm.
    """
    if not isinstance(gradients, ShardedDataParallel):
        return data_parallel_traffic(gradients)
    units, accumulated = gradients.units, gradients.units[0].accumulated.itemsize
    reductions = 1 if gradients.zero == 1 else micro_batches
    gathers = list(units)
    if gradients.zero == 3:
        gathers = micro_batches * (units + [unit for unit in units if unit.again])
    return {
        ("dp", "reduce-scatter"): Traffic(
            reductions * len(units), reductions * sum(unit.flat.numel() for unit in units) * accumulated
        ),
        ("dp", "all-gather"): Traffic(len(gathers), sum(unit.flat.nbytes for unit in gathers)),
        ("dp", "all-reduce"): Traffic(2, 2 * accumulated),
    }
