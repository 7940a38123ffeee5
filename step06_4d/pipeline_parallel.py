"""Pipeline parallelism: each rank, a stage, holds some consecutive layers, and micro-batches flow through the stages.

A stage receives hidden states (b, s, h) from the one before, computes its layers and sends on; gradients come back the
other way. Who computes what when is a schedule: a list of actions. One executor runs any of them.
"""

import time
from collections import Counter
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from itertools import chain
from pathlib import Path
from typing import Literal, NamedTuple

import torch
import torch.distributed as dist
from data_parallel import DataParallel
from torch import Tensor, nn
from torch.distributed import P2POp, ProcessGroup
from torch.distributed.device_mesh import DeviceMesh
from transformers import LlamaConfig

from shared.config import UserError
from shared.data import Batch, GlobalBatches
from shared.flops import flops_per_token
from shared.ledger import Traffic
from shared.model import LlamaForCausalLM
from shared.timeline import Event, check_timeline, simulate, write_timeline


@dataclass
class PipelineParallelConfig:
    """The options of this axis."""

    # Pipeline-parallel ranks: each holds some of the layers.
    pp: int = 1
    # afab: all micro-batches forward, then all backward. 1f1b: in turn, which holds fewer at once.
    pp_schedule: Literal["1f1b", "afab"] = "1f1b"
    # Picture of the last step's schedule as it ran, .svg or .png, and next to it a trace for Perfetto, .json.
    timeline: Path | None = None

    def validate(self) -> None:
        super().validate()
        if self.timeline:
            check_timeline(self.timeline, self.metrics_file)


class Action(NamedTuple):
    kind: Literal["forward", "backward"]
    micro_batch: int


def afab(stage: int, stages: int, micro_batches: int) -> list[Action]:
    """All forward, all backward (GPipe, arXiv 1811.06965). Holds the activations of all micro-batches at once."""
    forwards, backwards = ([Action(kind, m) for m in range(micro_batches)] for kind in ("forward", "backward"))
    return forwards + backwards


def one_forward_one_backward(stage: int, stages: int, micro_batches: int) -> list[Action]:
    """1F1B (arXiv 2006.09503). Holds the activations of at most `stages - stage` micro-batches at once."""
    forwards, backwards = ([Action(kind, m) for m in range(micro_batches)] for kind in ("forward", "backward"))
    # The first gradient comes back when its micro-batch has been through all later stages.
    warmup = min(stages - stage - 1, micro_batches)
    steady = [action for pair in zip(forwards[warmup:], backwards) for action in pair]  # noqa: B905 (warmup is left)
    return forwards[:warmup] + steady + backwards[micro_batches - warmup :]


SCHEDULES = {"afab": afab, "1f1b": one_forward_one_backward}


def split_layers(config: LlamaConfig, seq_len: int, stages: int) -> list[range]:
    """The layers of each stage, so that the most expensive one costs least. Raises UserError if there are too few.

    Costs are FLOPs per token. The head, on the last stage, often costs as much as some layers; the embedding, on the
    first, looks up h numbers.
    """
    layers = config.num_hidden_layers
    if layers < stages:
        raise UserError(f"--pp {stages} stages need a layer each, but the model has {layers}: lower --pp")
    head = 6 * config.hidden_size * config.vocab_size
    layer = (flops_per_token(config, seq_len, causal=True) - head) / layers
    costs, counts = [layer] * stages, [1] * stages
    costs[0] += config.hidden_size
    costs[-1] += head
    for _ in range(layers - stages):
        # Of equal stages the last, which holds the activations of fewer micro-batches.
        cheapest = min(reversed(range(stages)), key=costs.__getitem__)
        counts[cheapest] += 1
        costs[cheapest] += layer
    return [range(sum(counts[:stage]), sum(counts[: stage + 1])) for stage in range(stages)]


class TiedCopy(nn.Identity):
    """In the place of the embedding on the last stage: passes hidden states on, and holds the head's weight under the
    embedding's name, for it is the same weight."""

    def __init__(self, weight: nn.Parameter) -> None:
        super().__init__()
        self.weight = weight


def apply_pipeline_parallel(model: LlamaForCausalLM, seq_len: int, group: ProcessGroup) -> None:
    """Take away what is on other stages. Layers keep their global index, so parameters keep their names."""
    stage, stages = dist.get_rank(group), dist.get_world_size(group)
    mine = split_layers(model.model.config, seq_len, stages)[stage]
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


class Channel:
    """One direction of travel: activations to the next stage, or gradients to the one before.

    Each direction has a process group of its own, so that what one waits for never holds up the other.
    """

    def __init__(self, group: ProcessGroup, step: int, device: torch.device) -> None:
        self.group = group
        rank, size = dist.get_rank(group), dist.get_world_size(group)
        self.source = rank - step if 0 <= rank - step < size else None
        self.destination = rank + step if 0 <= rank + step < size else None
        self.works, self.sent, self.received = [], None, None
        # NCCL connects two ranks at their first message, and each blocks until the other comes: all come now.
        self.exchange(torch.zeros(1, device=device), torch.zeros(1, device=device))
        self.wait()

    def exchange(self, outgoing: Tensor | None, incoming: Tensor | None) -> None:
        """Start to send one tensor and to receive another, in one batch: neither waits for the other."""
        assert not self.works
        self.sent = outgoing if self.destination is not None else None
        self.received = incoming if self.source is not None else None
        operations = []
        if self.sent is not None:
            operations.append(P2POp(dist.isend, self.sent.detach(), group=self.group, group_peer=self.destination))
        if self.received is not None:
            operations.append(P2POp(dist.irecv, self.received, group=self.group, group_peer=self.source))
        self.works = dist.batch_isend_irecv(operations) if operations else []

    def wait(self) -> Tensor | None:
        """Wait for the exchange. Returns what has arrived, and frees what has left."""
        for work in self.works:
            work.wait()
        if self.sent is not None:
            # Backward needs its graph and its shape, but not its data.
            self.sent.data = self.sent.new_empty(()).expand_as(self.sent)
        received, self.works, self.sent, self.received = self.received, [], None, None
        return received


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
        self.is_last = self.stage == self.stages - 1
        ranks, device = dist.get_process_group_ranks(self.group), next(model.parameters()).device
        # Every rank makes the same number of groups: that is how torch tells them apart.
        way_back = dist.new_group(ranks, use_local_synchronization=True, group_desc="pp")
        self.activations, self.gradients = Channel(self.group, 1, device), Channel(way_back, -1, device)
        self.ends: ProcessGroup | None = None
        if model.model.config.tie_word_embeddings and self.stages > 1:
            at_end = self.stage in (0, self.stages - 1)
            members = [ranks[0], ranks[-1]] if at_end else ranks[1:-1]
            group = dist.new_group(members, use_local_synchronization=True, group_desc="pp")
            self.ends = group if at_end else None
        self.events: list[Event] = []

    def run(self, batches: list[Batch], forward: Forward, tokens: int) -> Tensor:
        """Forward and backward of a step's micro-batches. Returns the loss summed over them, divided by `tokens`."""
        schedule = SCHEDULES[self.config.pp_schedule](self.stage, self.stages, len(batches))
        self.forward, self.tokens = forward, tokens
        return self._execute(schedule, batches)

    def evaluate(self, batches: list[Batch], forward: Forward) -> Tensor:
        """Forward only. Returns the loss summed over the micro-batches."""
        self.forward, self.tokens = forward, 1
        return self._execute([Action("forward", m) for m in range(len(batches))], batches)

    def _execute(self, schedule: list[Action], batches: list[Batch]) -> Tensor:
        parameter = next(self.model.parameters())
        b, s = batches[0].input_ids.shape
        shape = (b, s // self.config.token_shards, self.model.model.config.hidden_size)
        self.left = Counter(action.kind for action in schedule)
        self.trains = self.left["backward"] > 0
        self.held: dict[int, tuple[Tensor | None, Tensor]] = {}
        # At least float32, as losses are: weights may be in bfloat16.
        self.total = torch.zeros((), dtype=self.config.grad_dtype, device=parameter.device)
        self.events = [] if self.trains else self.events
        self.activations.exchange(None, parameter.new_empty(shape) if self.stage > 0 else None)
        if self.trains:
            self.gradients.exchange(None, None if self.is_last else parameter.new_empty(shape))
        for action in schedule:
            self.left[action.kind] -= 1
            if action.kind == "forward":
                self._forward(action, batches[action.micro_batch])
            else:
                self._backward(action)
        self.activations.wait()
        self.gradients.wait()
        # Only the last stage has a loss: all others add zero.
        dist.all_reduce(self.total, group=self.group)
        return self.total

    def _forward(self, action: Action, batch: Batch) -> None:
        hidden = self.activations.wait()
        if hidden is not None:
            hidden.requires_grad_(self.trains)
        with self._recorded(action):
            output = self.forward(self.config, self.model, batch, hidden)
            if self.is_last:
                output = output / self.tokens
                self.total += output.detach()
        # A new buffer for each micro-batch: backward will read what has arrived.
        receives = hidden is not None and self.left["forward"] > 0
        self.activations.exchange(output, torch.empty_like(hidden) if receives else None)
        if self.trains:
            self.held[action.micro_batch] = hidden, output

    def _backward(self, action: Action) -> None:
        gradient = self.gradients.wait()
        hidden, output = self.held.pop(action.micro_batch)
        with self._recorded(action):
            torch.autograd.backward(output, gradient)
        # Backward has read the buffer, so it can take the next gradient.
        self.gradients.exchange(None if hidden is None else hidden.grad, gradient if self.left["backward"] else None)

    @contextmanager
    def _recorded(self, action: Action) -> Iterator[None]:
        start = _now() if self.config.timeline else None
        yield
        if self.config.timeline and self.trains:
            self.events.append(Event(self.stage, action.kind, action.micro_batch, start, _now()))

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
            micro_batches = len(self.events) // 2
            make_schedule = SCHEDULES[self.config.pp_schedule]
            ideal = simulate([make_schedule(stage, self.stages, micro_batches) for stage in range(self.stages)])
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

    def traffic(self, batches: GlobalBatches) -> dict[tuple[str, str], Traffic]:
        """Payload per step of a rank: for each micro-batch its (b, s, h) to the next stage, and the gradient back.

        All-reduces: the loss, the gradients' norm, and on the ends the gradient of a tied embedding.
        """
        size = self.config.param_dtype.itemsize
        tied = [self.model.model.embed_tokens.weight.nbytes] if self.ends else []
        traffic = {("pp", "all-reduce"): Traffic(2 + len(tied), 2 * size + sum(tied))}
        messages = ((self.stage > 0) + (not self.is_last)) * batches.micro_batches
        if messages:
            tokens = batches.tokens // self.config.token_shards
            nbytes = messages * tokens * self.model.model.config.hidden_size * size
            traffic |= {("pp", kind): Traffic(messages, nbytes) for kind in ("send", "receive")}
        return traffic


def counted_on_stages(model: LlamaForCausalLM, parameters: list[nn.Parameter]) -> list[nn.Parameter]:
    """Without the copy of a tied embedding: over the stages, each parameter once."""
    embedding = model.model.embed_tokens
    return [p for p in parameters if not (isinstance(embedding, TiedCopy) and p is embedding.weight)]
