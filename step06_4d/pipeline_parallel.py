"""Pipeline parallelism: each rank, a stage, holds some consecutive layers, and micro-batches flow through the stages.

A stage receives hidden states (b, s, h) from the one before, computes its layers and sends on; gradients come back the
other way. Who computes what when is a schedule, a list of actions (schedules.py). One executor runs any of them.
"""

import time
from collections.abc import Callable, Iterable, Iterator
from contextlib import AbstractContextManager, contextmanager
from dataclasses import dataclass
from itertools import chain
from pathlib import Path
from typing import Any, Literal, Protocol

import torch
import torch.distributed as dist
from pipeline.channels import Channel
from pipeline.chunks import chunks_of, layers_of
from pipeline.schedules import Action, make_schedule
from torch import Tensor, nn
from torch.distributed import ProcessGroup
from torch.distributed.device_mesh import DeviceMesh

from shared.config import UserError
from shared.data import Batch
from shared.distributed import groups_along, make_group
from shared.ledger import Traffic
from shared.model import LlamaForCausalLM
from shared.timeline import Event, check_timeline, simulate, write_timeline


@dataclass
class Config:
    """The options of this axis."""

    # Pipeline-parallel ranks. Each holds some of the layers.
    pp: int = 1
    # Order of forwards and backwards. afab does all forwards, then all backwards. 1f1b does them in turn, and so holds
    # the activations of fewer micro-batches. zero-bubble is 1f1b with the gradients of weights where it would wait.
    pp_schedule: Literal["1f1b", "afab", "zero-bubble"] = "1f1b"
    # Chunks of layers per pipeline rank, interleaved. Their number divides 1f1b's bubble and multiplies its messages.
    virtual_stages: int = 1
    # Draw the last step's schedule as it ran into this .svg or .png, and write a trace for Perfetto, .json, next to it.
    timeline: Path | None = None

    def validate(self) -> None:
        super().validate()
        if self.virtual_stages < 1:
            raise UserError(f"--virtual-stages must be at least 1, not {self.virtual_stages}")
        if self.virtual_stages > 1 and (self.pp == 1 or self.pp_schedule != "1f1b"):
            raise UserError(
                f"--virtual-stages {self.virtual_stages} interleaves the 1f1b schedule of several ranks, but --pp is "
                f"{self.pp} and --pp-schedule {self.pp_schedule}: leave it out or change these"
            )
        if self.timeline:
            check_timeline(self.timeline, self.metrics_file)

    def traffic(self, trainer: Any) -> dict[tuple[str, str], Traffic]:
        """Payload per step of a rank: for each micro-batch and chunk (b, s, h) to the next, and its gradient back.

        All-reduces: the loss, the gradients' norm, and on the ends the gradient of a tied embedding.
        """
        pipeline, batches, base = trainer.pipeline, trainer.batches, trainer.model.model
        size, summed = self.param_dtype.itemsize, self.grad_dtype.itemsize
        tied = [trainer.reducer.elements(base.embed_tokens.weight)] if pipeline.ends else []
        traffic = {("pp", "all-reduce"): Traffic(2 + len(tied), (2 + sum(tied)) * summed)}
        ends = (pipeline.stage == 0) + (pipeline.stage == pipeline.stages - 1)
        messages = (2 * len(pipeline.chunks) - ends) * batches.micro_batches
        if messages:
            nbytes = messages * batches.tokens // self.token_shards * base.config.hidden_size * size
            traffic |= {("pp", kind): Traffic(messages, nbytes) for kind in ("send", "receive")}
        return super().traffic(trainer) | traffic


def apply(model: LlamaForCausalLM, config: Config, mesh: DeviceMesh) -> None:
    """Take away what is on other stages. Layers keep their global index, so parameters keep their names.

    Raises UserError if there are too few layers, or micro-batches that chunks cannot take in turn.
    """
    stage, stages = mesh.get_local_rank("pp"), mesh["pp"].size()
    micro_batches = config.global_batch_size // (mesh["dp"].size() * config.micro_batch_size)
    if config.virtual_stages > 1 and micro_batches % stages:
        raise UserError(
            f"--virtual-stages {config.virtual_stages} takes micro-batches in groups of --pp {stages}, but a step has "
            f"{micro_batches} on each data-parallel rank: change --global-batch-size or --micro-batch-size"
        )
    chunks = layers_of(stage, stages, config.virtual_stages, model.model.config, config.seq_len)
    mine = list(chain.from_iterable(chunks))
    for name in list(model.model.layers):
        if int(name) not in mine:
            del model.model.layers[name]
    if stage > 0:
        tied = stage == stages - 1 and model.model.config.tie_word_embeddings
        model.model.embed_tokens = TiedCopy(model.lm_head.weight) if tied else nn.Identity()
    if stage < stages - 1:
        model.model.norm, model.lm_head = nn.Identity(), None


class TiedCopy(nn.Identity):
    """In the place of the embedding on the last stage: passes hidden states on, and holds the head's weight under the
    embedding's name, for it is the same weight."""

    def __init__(self, weight: nn.Parameter) -> None:
        super().__init__()
        self.weight = weight


def counted(model: LlamaForCausalLM, parameters: list[nn.Parameter]) -> list[nn.Parameter]:
    """Without the copy of a tied embedding: over the stages, each parameter once."""
    embedding = model.model.embed_tokens
    return [p for p in parameters if not (isinstance(embedding, TiedCopy) and p is embedding.weight)]


# That of train.py: the loss on the last stage, hidden states (b, s, h) for the next stage on the others.
MicroBatchLoss = Callable[[Config, LlamaForCausalLM, Batch], Tensor]


class WeightGradients(Protocol):
    """What puts off the gradients of weights (weight_gradients.py)."""

    def put_off(self, enabled: bool) -> AbstractContextManager[list]:
        """Forwards within prepare for it, and backwards within list what the gradients need."""

    def compute(self, late: list) -> Iterable[tuple[nn.Parameter, Tensor]]:
        """The gradients that such a list is about."""


class Pipeline:
    """This rank's stage, and the executor of its schedule."""

    def __init__(
        self, config: Config, model: LlamaForCausalLM, mesh: DeviceMesh, weight_gradients: WeightGradients
    ) -> None:
        self.config, self.model, self.group = config, model, mesh.get_group("pp")
        self.stage, self.stages = dist.get_rank(self.group), dist.get_world_size(self.group)
        layers = layers_of(self.stage, self.stages, config.virtual_stages, model.model.config, config.seq_len)
        self.chunks, self.weight_gradients = chunks_of(model, layers), weight_gradients
        device, ring = next(model.parameters()).device, len(self.chunks) > 1
        self.to_next = Channel(mesh, 1, device, config.timeout, ring)
        self.to_previous = Channel(mesh, -1, device, config.timeout, ring)
        self.ends: ProcessGroup | None = None
        if model.model.config.tie_word_embeddings and self.stages > 1:
            ends = [[ranks[0], ranks[-1]] for ranks in groups_along(mesh, "pp")]
            self.ends = make_group(ends, "pp", config.timeout)
        self.events: list[Event] = []

    def is_first(self, action: Action) -> bool:
        """Whether it has the embedding: no hidden states come in, and no gradient goes out."""
        return self.stage == 0 and action.chunk == 0

    def is_last(self, action: Action) -> bool:
        """Whether it has the loss: no hidden states go out, and no gradient comes in."""
        return self.stage == self.stages - 1 and action.chunk == len(self.chunks) - 1

    def schedule(self, stage: int, micro_batches: int) -> list[Action]:
        return make_schedule(self.config.pp_schedule, stage, self.stages, micro_batches, len(self.chunks))

    def run(
        self,
        batches: list[Batch],
        micro_batch_loss: MicroBatchLoss,
        tokens: int,
        add_gradient: Callable[[nn.Parameter, Tensor], None],
    ) -> Tensor:
        """Forward and backward of a step's micro-batches. Returns the loss summed over them, divided by `tokens`.

        `add_gradient` takes the gradients of weights that were put off.
        """
        self.micro_batch_loss, self.tokens = micro_batch_loss, tokens
        self.add_gradient = add_gradient
        return self._execute(self.schedule(self.stage, len(batches)), batches)

    def evaluate(self, batches: list[Batch], micro_batch_loss: MicroBatchLoss) -> Tensor:
        """Forward only. Returns the loss summed over the micro-batches."""
        self.micro_batch_loss, self.tokens = micro_batch_loss, 1
        forwards = [action for action in self.schedule(self.stage, len(batches)) if action.kind == "forward"]
        return self._execute(forwards, batches)

    def _execute(self, schedule: list[Action], batches: list[Batch]) -> Tensor:
        parameter = next(self.model.parameters())
        b, s = batches[0].input_ids.shape
        shape = (b, s // self.config.token_shards, self.model.model.config.hidden_size)
        forwards = [action for action in schedule if action.kind == "forward"]
        self.trains = len(schedule) > len(forwards)
        self.held: dict[tuple[int, int], tuple[Tensor | None, Tensor]] = {}
        self.late: dict[int, list] = {}
        self.total = parameter.new_zeros((), dtype=self.config.grad_dtype)
        self.events = [] if self.trains else self.events
        self.to_next.start(sum(not self.is_first(a) for a in forwards), lambda: parameter.new_empty(shape))
        if self.trains:
            # Each forward comes back.
            self.to_previous.start(sum(not self.is_last(a) for a in forwards), lambda: parameter.new_empty(shape))
        # Each forward turns autocast on for itself. Within this, they share its copies of the weights.
        with torch.autocast(parameter.device.type, enabled=False):
            for action in schedule:
                if action.kind == "forward":
                    self._forward(action, batches[action.micro_batch])
                elif action.kind == "weight":
                    self._weight(action)
                else:
                    self._backward(action)
        self.to_next.release()
        self.to_previous.release()
        # Only the last stage has a loss: all others add zero.
        dist.all_reduce(self.total, group=self.group)
        return self.total

    def _forward(self, action: Action, batch: Batch) -> None:
        hidden = None
        if not self.is_first(action):
            hidden = self.to_next.receive().requires_grad_(self.trains)
            batch = batch._replace(input_ids=hidden)
        if not self.is_last(action):
            self.to_next.release()
        zero_bubble = self.trains and self.config.pp_schedule == "zero-bubble"
        with self._recorded(action), self.weight_gradients.put_off(zero_bubble):
            output = self.micro_batch_loss(self.config, self.chunks[action.chunk], batch)
            if self.is_last(action):
                output = output / self.tokens
                self.total += output.detach()
        if not self.is_last(action):
            self.to_next.send(output)
        if not self.is_first(action):
            # In a new buffer for each micro-batch: backward will read what has arrived.
            self.to_next.expect()
        if self.trains:
            self.held[action.micro_batch, action.chunk] = hidden, output

    def _backward(self, action: Action) -> None:
        """Of the input and the weights, or of the input alone."""
        gradient = None if self.is_last(action) else self.to_previous.receive()
        if not self.is_first(action):
            self.to_previous.release()
        hidden, output = self.held.pop((action.micro_batch, action.chunk))
        with self._recorded(action), self.weight_gradients.put_off(action.kind == "input") as late:
            torch.autograd.backward(output, gradient)
        if not self.is_first(action):
            self.to_previous.send(hidden.grad)
        if not self.is_last(action):
            # Backward has read the buffer, so it can take the next gradient. A `weight` will read it once more.
            self.to_previous.expect(gradient if action.kind == "backward" else None)
        if action.kind == "input":
            self.late[action.micro_batch] = late

    @torch.no_grad()
    def _weight(self, action: Action) -> None:
        with self._recorded(action):
            for weight, gradient in self.weight_gradients.compute(self.late.pop(action.micro_batch)):
                self.add_gradient(weight, gradient)

    @contextmanager
    def _recorded(self, action: Action) -> Iterator[None]:
        start = _now() if self.config.timeline else None
        yield
        if self.config.timeline and self.trains:
            self.events.append(Event(self.stage, *action[:2], start, _now(), action.chunk))

    def sum_tied_gradients(self, gradient_of: Callable[[nn.Parameter], Tensor]) -> None:
        """Add up what both ends have of a tied embedding's gradient, each summed over data-parallel ranks by now."""
        if self.ends:
            dist.all_reduce(gradient_of(self.model.model.embed_tokens.weight), group=self.ends)

    def write_timeline(self) -> None:
        """Of the last step, from rank 0."""
        if not self.events:
            return
        events: list = [None] * self.stages
        dist.all_gather_object(events, self.events, group=self.group)
        if dist.get_rank() == 0:
            micro_batches = 1 + max(event.micro_batch for event in self.events)
            ideal = simulate([self.schedule(stage, micro_batches) for stage in range(self.stages)])
            write_timeline(self.config.timeline, list(chain.from_iterable(events)), ideal)

    def gather(self, tensors: dict[str, Tensor]) -> dict[str, Tensor]:
        """The tensors of all stages, on the CPU. Broadcasts each from the first stage that has it."""
        everyones: list = [None] * self.stages
        dist.all_gather_object(everyones, {name: (t.shape, t.dtype) for name, t in tensors.items()}, group=self.group)
        device, gathered = next(self.model.parameters()).device, {}
        for stage, kinds in enumerate(everyones):
            for name, (shape, dtype) in kinds.items():
                if name not in gathered:
                    tensor = (tensors[name] if name in tensors else torch.empty(shape, dtype=dtype)).to(device)
                    dist.broadcast(tensor, group=self.group, group_src=stage)
                    gathered[name] = tensor.cpu()
        return gathered


def _now() -> float:
    """Seconds. On a GPU, when all work so far is done: the messages it waits for included, those on their way not."""
    if torch.cuda.is_initialized():
        torch.cuda.current_stream().synchronize()
    return time.time()
