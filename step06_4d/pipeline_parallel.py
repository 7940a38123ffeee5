"""Pipeline parallelism: each rank, a stage, holds some consecutive layers, and micro-batches flow through the stages.

A stage receives hidden states (b, s, h) from the one before, computes its layers and sends on; gradients come back the
other way. Who computes what when is a schedule: a list of actions. One executor runs any of them.
"""

import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from itertools import chain
from pathlib import Path
from typing import Literal

import torch
import torch.distributed as dist
from channel import Channel
from data_parallel import DataParallel
from schedules import Action, make_schedule
from stages import chunks_of, layers_of
from torch import Tensor, nn
from torch.distributed import ProcessGroup
from torch.distributed.device_mesh import DeviceMesh
from weight_gradients import Matmuls, put_off, weight_gradients

from shared.config import UserError
from shared.data import Batch, GlobalBatches
from shared.ledger import Traffic
from shared.model import LlamaForCausalLM
from shared.timeline import Event, check_timeline, simulate, write_timeline


@dataclass
class PipelineParallelConfig:
    """The options of this axis."""

    # Pipeline-parallel ranks: each holds some of the layers.
    pp: int = 1
    # afab: all micro-batches forward, then all backward. 1f1b: in turn, which holds fewer at once. zero-bubble: 1f1b,
    # with gradients of weights where it would wait.
    pp_schedule: Literal["1f1b", "afab", "zero-bubble"] = "1f1b"
    # Chunks of layers per pipeline rank, interleaved: each divides 1f1b's bubble and multiplies its messages.
    virtual_stages: int = 1
    # Picture of the last step's schedule as it ran, .svg or .png, and next to it a trace for Perfetto, .json.
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


class TiedCopy(nn.Identity):
    """In the place of the embedding on the last stage: passes hidden states on, and holds the head's weight under the
    embedding's name, for it is the same weight."""

    def __init__(self, weight: nn.Parameter) -> None:
        super().__init__()
        self.weight = weight


def apply_pipeline_parallel(model: LlamaForCausalLM, config: PipelineParallelConfig, mesh: DeviceMesh) -> None:
    """Take away what is on other stages. Layers keep their global index, so parameters keep their names.

    Raises UserError if there are too few layers, or micro-batches that chunks cannot take in turn.
    """
    stage, stages = mesh.get_local_rank("pp"), config.pp
    micro_batches = config.global_batch_size // (mesh["dp"].size() * config.micro_batch_size)
    if config.virtual_stages > 1 and micro_batches % stages:
        raise UserError(
            f"--virtual-stages {config.virtual_stages} takes micro-batches in groups of --pp {stages}, but a step has "
            f"{micro_batches} on each data-parallel rank: change --global-batch-size or --micro-batch-size"
        )
    mine = list(
        chain.from_iterable(layers_of(stage, stages, config.virtual_stages, model.model.config, config.seq_len))
    )
    for name in list(model.model.layers):
        if int(name) not in mine:
            del model.model.layers[name]
    if stage > 0:
        tied = stage == stages - 1 and model.model.config.tie_word_embeddings
        model.model.embed_tokens = TiedCopy(model.lm_head.weight) if tied else nn.Identity()
    if stage < stages - 1:
        model.model.norm, model.lm_head = nn.Identity(), None


# `micro_batch_loss` of train.py: the loss on the last stage, hidden states (b, s, h) on the others.
Forward = Callable[[PipelineParallelConfig, LlamaForCausalLM, Batch, Tensor | None], Tensor]


def _now() -> float:
    """Seconds. On a GPU, when all work so far is done: the messages it waits for included, those on their way not."""
    if torch.cuda.is_initialized():
        torch.cuda.current_stream().synchronize()
    return time.time()


class Pipeline:
    """This rank's stage, and the executor of its schedule."""

    def __init__(self, config: PipelineParallelConfig, model: LlamaForCausalLM, mesh: DeviceMesh) -> None:
        self.config, self.model, self.group = config, model, mesh.get_group("pp")
        self.stage, self.stages = dist.get_rank(self.group), dist.get_world_size(self.group)
        layers = layers_of(self.stage, self.stages, config.virtual_stages, model.model.config, config.seq_len)
        self.chunks = chunks_of(model, layers)
        ranks, device = dist.get_process_group_ranks(self.group), next(model.parameters()).device
        self.activations, self.gradients = (Channel(ranks, step, len(self.chunks) > 1, device) for step in (1, -1))
        self.ends: ProcessGroup | None = None
        if model.model.config.tie_word_embeddings and self.stages > 1:
            at_end = self.stage in (0, self.stages - 1)
            members = [ranks[0], ranks[-1]] if at_end else ranks[1:-1]
            group = dist.new_group(members, use_local_synchronization=True, group_desc="pp")
            self.ends = group if at_end else None
        self.events: list[Event] = []

    def is_first(self, action: Action) -> bool:
        """Whether it has the embedding: no hidden states come in, and no gradient goes out."""
        return self.stage == 0 and action.chunk == 0

    def is_last(self, action: Action) -> bool:
        """Whether it has the loss: no hidden states go out, and no gradient comes in."""
        return self.stage == self.stages - 1 and action.chunk == len(self.chunks) - 1

    def schedule(self, stage: int, micro_batches: int) -> list[Action]:
        return make_schedule(self.config.pp_schedule, self.config.virtual_stages, stage, self.stages, micro_batches)

    def run(self, batches: list[Batch], forward: Forward, tokens: int, engine: DataParallel) -> Tensor:
        """Forward and backward of a step's micro-batches. Returns the loss summed over them, divided by `tokens`."""
        self.forward, self.tokens, self.engine = forward, tokens, engine
        return self._execute(self.schedule(self.stage, len(batches)), batches)

    def evaluate(self, batches: list[Batch], forward: Forward) -> Tensor:
        """Forward only. Returns the loss summed over the micro-batches."""
        self.forward, self.tokens = forward, 1
        forwards = [action for action in self.schedule(self.stage, len(batches)) if action.kind == "forward"]
        return self._execute(forwards, batches)

    def _execute(self, schedule: list[Action], batches: list[Batch]) -> Tensor:
        parameter = next(self.model.parameters())
        b, s = batches[0].input_ids.shape
        shape = (b, s // self.config.token_shards, self.model.model.config.hidden_size)
        forwards = [action for action in schedule if action.kind == "forward"]
        self.trains = len(schedule) > len(forwards)
        self.held: dict[tuple[int, int], tuple[Tensor | None, Tensor]] = {}
        self.late: dict[int, list[Matmuls]] = {}
        self.total = parameter.new_zeros((), dtype=self.config.grad_dtype)
        self.events = [] if self.trains else self.events
        self.activations.start(sum(not self.is_first(a) for a in forwards), lambda: parameter.new_empty(shape))
        if self.trains:
            # Each forward comes back.
            self.gradients.start(sum(not self.is_last(a) for a in forwards), lambda: parameter.new_empty(shape))
        for action in schedule:
            if action.kind == "forward":
                self._forward(action, batches[action.micro_batch])
            elif action.kind == "weight":
                self._weight(action)
            else:
                self._backward(action)
        self.activations.release()
        self.gradients.release()
        # Only the last stage has a loss: all others add zero.
        dist.all_reduce(self.total, group=self.group)
        return self.total

    def _forward(self, action: Action, batch: Batch) -> None:
        hidden = None
        if not self.is_first(action):
            hidden = self.activations.receive().requires_grad_(self.trains)
        if not self.is_last(action):
            self.activations.release()
        with self._recorded(action), put_off(self.trains and self.config.pp_schedule == "zero-bubble"):
            output = self.forward(self.config, self.chunks[action.chunk], batch, hidden)
            if self.is_last(action):
                output = output / self.tokens
                self.total += output.detach()
        if not self.is_last(action):
            self.activations.send(output)
        if not self.is_first(action):
            # In a new buffer for each micro-batch: backward will read what has arrived.
            self.activations.expect()
        if self.trains:
            self.held[action.micro_batch, action.chunk] = hidden, output

    def _backward(self, action: Action) -> None:
        """Of the input and the weights, or of the input alone."""
        gradient = None if self.is_last(action) else self.gradients.receive()
        if not self.is_first(action):
            self.gradients.release()
        hidden, output = self.held.pop((action.micro_batch, action.chunk))
        with self._recorded(action), put_off(action.kind == "input") as matmuls:
            torch.autograd.backward(output, gradient)
        if not self.is_first(action):
            self.gradients.send(hidden.grad)
        if action.kind == "input":
            self.late[action.micro_batch] = matmuls
            # Which read the buffer once more.
            gradient = None
        if not self.is_last(action):
            self.gradients.expect(gradient)

    @torch.no_grad()
    def _weight(self, action: Action) -> None:
        with self._recorded(action):
            for linears, grads, x in self.late.pop(action.micro_batch):
                for linear, gradient in zip(linears, weight_gradients(linears, grads, x), strict=True):
                    self.engine.add(linear.weight, gradient)

    @contextmanager
    def _recorded(self, action: Action) -> Iterator[None]:
        start = _now() if self.config.timeline else None
        yield
        if self.config.timeline and self.trains:
            self.events.append(Event(self.stage, *action[:2], start, _now(), action.chunk))

    def sum_tied_gradients(self, gradients: DataParallel) -> None:
        """Add up what both ends have of a tied embedding's gradient, each summed over data-parallel ranks by now."""
        if self.ends:
            dist.all_reduce(gradients.gradient(self.model.model.embed_tokens.weight), group=self.ends)

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

    def traffic(self, gradients: DataParallel, batches: GlobalBatches) -> dict[tuple[str, str], Traffic]:
        """Payload per step of a rank: for each micro-batch and chunk, a (b, s, h) on to the next, and a gradient back.

        All-reduces: the loss, the gradients' norm, and on the ends the gradient of a tied embedding.
        """
        size, summed = self.config.param_dtype.itemsize, self.config.grad_dtype.itemsize
        tied = [gradients.elements(self.model.model.embed_tokens.weight)] if self.ends else []
        traffic = {("pp", "all-reduce"): Traffic(2 + len(tied), (2 + sum(tied)) * summed)}
        ends = (self.stage == 0) + (self.stage == self.stages - 1)
        messages = (2 * len(self.chunks) - ends) * batches.micro_batches
        if messages:
            tokens = batches.tokens // self.config.token_shards
            nbytes = messages * tokens * self.model.model.config.hidden_size * size
            traffic |= {("pp", kind): Traffic(messages, nbytes) for kind in ("send", "receive")}
        return traffic


def counted_on_stages(model: LlamaForCausalLM, parameters: list[nn.Parameter]) -> list[nn.Parameter]:
    """Without the copy of a tied embedding: over the stages, each parameter once."""
    embedding = model.model.embed_tokens
    return [p for p in parameters if not (isinstance(embedding, TiedCopy) and p is embedding.weight)]
