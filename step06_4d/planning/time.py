"""Seconds of a step, from its parts: what is computed, what is sent, and what of that hides behind what."""

from collections.abc import Sequence
from functools import cache, cached_property
from typing import NamedTuple

from pipeline.schedules import make_schedule
from planning.layout import Layout, Model, Sizes, layer_parameters, linears
from planning.machines import Machine
from planning.traffic import Calls, keys_and_values, message, sums_of_layer

from shared.timeline import simulate


class Parts(NamedTuple):
    """Seconds of a step. Their sum is the step."""

    compute: float
    tp: float
    cp: float
    pp: float
    dp: float
    bubble: float
    optimizer: float

    @property
    def total(self) -> float:
        return sum(self)


class Work(NamedTuple):
    """Seconds of a layer or of the head, for one micro-batch: computing, and what is waited for."""

    forward: float
    # Gradients of inputs, and of weights.
    backward: float
    weights: float
    tp_forward: float = 0.0
    tp_backward: float = 0.0
    cp_forward: float = 0.0
    cp_backward: float = 0.0


class Times:
    """Of a layout on a machine."""

    def __init__(
        self,
        model: Model,
        layout: Layout,
        machine: Machine,
        works: dict | None = None,
        recomputed: float | None = None,
        fused: bool = False,
    ) -> None:
        """`works` keeps what layouts share. Of other software: `recomputed` is the share of forward that backward runs
        again, and `fused` says that operators which only move bytes are one where they follow each other."""
        self.sizes, self.layout, self.machine, self.model = Sizes(model, layout), layout, machine, model
        self.works, self.fused = {} if works is None else works, fused
        self.recomputed = float(layout.recompute == "full") if recomputed is None else recomputed
        key = (
            layout.tp,
            layout.cp,
            layout.micro_batch_size,
            layout.zero > 0,
            layout.recompute,
            layout.sequence_parallel,
        )
        if key not in self.works:
            self.works[key] = self._layer(), self._head()
        self.layer, self.head = self.works[key]

    def _layer(self) -> Work:
        sizes, layout, machine = self.sizes, self.layout, self.machine
        t, h, e = sizes.tokens, self.model.hidden_size, sizes.compute_bytes
        shapes = linears(sizes).values()
        matmuls = sum(machine.matmul(t, n, k, e) for k, n in shapes)
        weights = sum(machine.matmul(n, k, t, e) for k, n in shapes)
        moved, moved_back = self._moved()
        # Half of the scores: a causal mask hides the rest.
        flops = 2 * layout.seq_len * t * sizes.queries
        attention = machine.launch + flops / (machine.rate(e) * machine.attention)
        backward = matmuls + moved_back + 2.5 * attention
        forward = matmuls + moved + attention
        tp_forward, tp_backward, tp_again = self._tensor(t * h * e, weights)
        cp_forward, cp_backward = self._context(attention)
        # Each micro-batch adds its gradients to those before.
        weights += 0 if self.fused else machine.moved(3 * self.layer_numbers * sizes.sum_bytes, 9)
        again = self.recomputed
        return Work(
            forward,
            backward + again * forward,
            weights,
            tp_forward,
            tp_backward + again * tp_again,
            cp_forward,
            cp_backward + again * cp_forward,
        )

    def _moved(self) -> tuple[float, float]:
        """Seconds of a layer's operators that only move bytes, in forward and in backward."""
        sizes, machine, e, total = self.sizes, self.machine, self.sizes.compute_bytes, self.sizes.sum_bytes
        t, q, kv, wide = sizes.tokens, sizes.queries, sizes.keys, sizes.param_bytes
        own, product = sizes.own_tokens * self.model.hidden_size, t * sizes.ffn * e
        # Two norms, and two residual sums.
        norms, sums = machine.moved(2 * own * (wide + e), 2), machine.moved(2 * own * (2 * wide + e), 2)
        if self.fused:
            forward = norms + sums + machine.moved(t * (4 * q + 6 * kv) * e + 3 * product, 8)
            return forward, 2 * forward + machine.moved(3 * product)
        # Rotations in at least float32. silu and the product run again before backward takes their gradients.
        rotations = machine.moved(t * (q + kv) * (3 * e + 6 * total if e < total else 7 * e), 8)
        forward = norms + sums + rotations + machine.moved(5 * product, 2)
        again = norms if self.layout.recompute == "selective" else 0.0
        return forward, forward + norms + sums + again + machine.moved(9 * product, 3)

    def waited(self, sent: float, computed: float) -> float:
        """Seconds by which sending makes computing longer that goes on meanwhile."""
        hidden = min(sent, computed)
        return sent - hidden + self.machine.interference * hidden

    def _tensor(self, nbytes: float, weights: float) -> tuple[float, float, float]:
        """What forward, backward and a recomputed forward wait for."""

        def seconds(calls: Calls) -> float:
            tp = self.layout.tp
            return sum(n * self.machine.collective(kind, nbytes, tp, 1) for kind, n in calls.items())

        forward, backward, again = sums_of_layer(self.layout)
        if self.layout.tp_engine == "naive":
            return seconds(forward), seconds(backward), seconds(again)
        # A fan-out sums its input's gradient while it computes those of its weights, of five linears in seven.
        sums = {kind: n for kind, n in backward.items() if kind != "all-gather"}
        hidden = self.waited(seconds(sums), 0.7 * weights)
        return seconds(forward), seconds(backward) - seconds(sums) + hidden, seconds(again)

    def _context(self, attention: float) -> tuple[float, float]:
        layout, sizes, machine = self.layout, self.sizes, self.machine
        if layout.cp == 1:
            return 0.0, 0.0
        e, g, c, stride = sizes.compute_bytes, sizes.sum_bytes, layout.cp, layout.tp
        kv, q = keys_and_values(sizes), sizes.tokens * sizes.queries
        if layout.cp_engine == "all-gather":
            gathered = machine.collective("all-gather", c * kv * e, c, stride)
            return gathered, gathered + machine.collective("reduce-scatter", c * kv * g, c, stride)
        if layout.cp_engine == "all-to-all":
            once = machine.collective("all-to-all", (2 * q + kv) * e, c, stride)
            return once, once
        # Each block is added to the sum of those before, in float32.
        merged = c * machine.moved(3 * q * g, 4)
        # Each hop hides behind the block that is computed meanwhile.
        distance = stride * (c - 1)
        hop, back = machine.message(kv * e, distance), machine.message(kv * (e + g), distance)
        block = attention / c
        return merged + (c - 1) * self.waited(hop, block), merged + (c - 1) * self.waited(back, 2.5 * block)

    def _head(self) -> Work:
        """Its gradients are taken in forward; for the schedule they count as backward."""
        sizes, machine = self.sizes, self.machine
        t, h, v, e = sizes.tokens, self.model.hidden_size, sizes.vocabulary, sizes.compute_bytes
        once = machine.matmul(t, v, h, e)
        scores = machine.moved(8 * t * v * sizes.sum_bytes, 8)
        layout = self.layout
        sums = machine.collective("all-reduce", t * (h * e + 3 * sizes.sum_bytes), layout.tp, 1)
        # Of the weight's gradient: zeros, a factor, and the sum with those of the micro-batches before.
        weights = once + (0 if self.fused else machine.moved(6 * v * h * sizes.sum_bytes, 3))
        return Work(once + scores, once, weights, sums, sums)

    def chunk(self, layers: int, has_head: bool) -> tuple[float, float, float]:
        """Seconds of a forward, a backward without the gradients of weights, and these."""
        work, head = self.layer, self.head
        forward = layers * (work.forward + work.tp_forward + work.cp_forward)
        backward = layers * (work.backward + work.tp_backward + work.cp_backward)
        weights = layers * work.weights
        if has_head:
            forward, backward = forward + head.forward + head.tp_forward, backward + head.backward + head.tp_backward
            weights += head.weights
        return forward, backward, weights

    @cached_property
    def layer_numbers(self) -> int:
        return sum(layer_parameters(self.sizes).values())

    def numbers(self, layers: int, stage: int) -> int:
        """Parameters of a stage."""
        ends = (stage == 0) + (stage == self.layout.pp - 1)
        ends -= self.layout.pp == 1 and self.model.tie_word_embeddings
        return layers * self.layer_numbers + ends * self.sizes.vocabulary * self.model.hidden_size

    def data(self, layers: int, stage: int) -> float:
        """Seconds that a step waits for gradients and weights, and those of each micro-batch with --zero 2 and 3."""
        sizes, layout, machine = self.sizes, self.layout, self.machine
        size, stride = sizes.replicas, layout.tp
        if size == 1:
            return 0.0
        layer, embedding = self.layer_numbers, sizes.vocabulary * self.model.hidden_size
        forward, backward, weights = self.chunk(layers, False)
        backward += weights
        gradients, param, shards = sizes.sum_bytes, sizes.param_bytes, sizes.shards

        def seconds(kind: str, numbers: float, itemsize: int, ranks: int = shards, apart: int = stride) -> float:
            return machine.collective(kind, numbers * itemsize, ranks, apart)

        numbers = self.numbers(layers, stage)
        # Backward ends with the embedding, and forward begins with it: nothing is left that would hide it.
        end, others = (embedding if stage == 0 else layer), layers
        if not layout.zero:
            if layout.dp_engine == "naive":
                tensors = 9 * layers
                return tensors * seconds("all-reduce", numbers / tensors, gradients, size)
            last = seconds("all-reduce", end, gradients, size)
            return last + self.waited(
                others * seconds("all-reduce", (numbers - end) / others, gradients, size), backward
            )
        replicas = seconds("all-reduce", numbers / shards, gradients, size // shards, stride * shards)
        reduce, gather = seconds("reduce-scatter", end, gradients), seconds("all-gather", end, param)
        if layout.zero < 3:
            reductions = sizes.micro_batches if layout.zero == 2 else 1
            rest = (numbers - end) / others
            reduce += self.waited(others * seconds("reduce-scatter", rest, gradients), backward)
            gather += self.waited(others * seconds("all-gather", rest, param), forward)
            return reductions * reduce + gather + replicas
        gather_layer, reduce_layer = seconds("all-gather", layer, param), seconds("reduce-scatter", layer, gradients)
        each = self.waited(gather_layer, forward / layers) + self.waited(gather_layer + reduce_layer, backward / layers)
        return sizes.micro_batches * (layers * each + gather + reduce) + replicas

    def optimizer(self, layers: int, stage: int) -> float:
        numbers = self.numbers(layers, stage) / self.sizes.shards
        # Master, two moments and gradient are read, all but the last written, and the norm reads the gradient.
        return self.machine.moved(numbers * (8 * self.sizes.sum_bytes + self.sizes.param_bytes), 20)


def step_time(times: Times, chunks: Sequence[Sequence[int]], simulated: bool = False) -> Parts:
    """`chunks`: the layers of each chunk of each stage. `simulated`: the bubble by the schedule, not by a formula."""
    layout, machine, m = times.layout, times.machine, times.sizes.micro_batches
    stages, virtual = layout.pp, len(chunks[0])
    chunk = cache(times.chunk)
    costs = [[chunk(n, False) for n in of_stage] for of_stage in chunks]
    costs[-1][-1] = chunk(chunks[-1][-1], True)
    sums = [[sum(kind) for kind in zip(*of_stage, strict=True)] for of_stage in costs]
    slowest = max(range(stages), key=lambda stage: sum(sums[stage]))
    forward, backward, weights = sums[slowest]
    busy = m * (forward + backward + weights)
    mean = sum(map(sum, sums)) / stages
    sizes = times.sizes
    # A stage receives a message when its next action needs it, so that each is waited for. All wait for the slowest
    # link, even if only some neighbours are on different nodes.
    distance = (stages - 1) * layout.dp * layout.cp * layout.tp
    wait = machine.message(message(sizes), distance) if stages > 1 else 0.0
    if stages == 1:
        bubble = pp = 0.0
    elif simulated:
        alone = _simulated(layout, m, costs, 0)
        bubble, pp = alone - busy, _simulated(layout, m, costs, wait) - alone
    else:
        idle = max(forward + backward - weights, 0) if layout.pp_schedule == "zero-bubble" else mean / virtual
        bubble, pp = (stages - 1) * idle, 2 * (m * virtual + stages - 1) * wait
    layers = sum(chunks[slowest])
    # Those with most layers, and those with an embedding or a head.
    ends = {0, slowest, stages - 1}
    work, head = times.layer, times.head if slowest == stages - 1 else Work(0, 0, 0)
    tp = m * (layers * (work.tp_forward + work.tp_backward) + head.tp_forward + head.tp_backward)
    cp = m * layers * (work.cp_forward + work.cp_backward)
    return Parts(
        compute=busy - tp - cp,
        tp=tp,
        cp=cp,
        pp=pp,
        dp=max(times.data(sum(chunks[stage]), stage) for stage in ends),
        bubble=max(bubble, 0.0),
        optimizer=max(times.optimizer(sum(chunks[stage]), stage) for stage in ends),
    )


def _simulated(
    layout: Layout, micro_batches: int, costs: Sequence[Sequence[tuple[float, float, float]]], wait: float
) -> float:
    """Seconds of a step by the schedule of every stage. From some micro-batches on, each adds as much as the last."""
    stages, virtual = len(costs), len(costs[0])
    few = min(micro_batches, 3 * stages)
    schedules = [make_schedule(layout.pp_schedule, stage, stages, few, virtual) for stage in range(stages)]

    def cost(stage: int, kind: str, chunk: int) -> float:
        forward, inputs, weights = costs[stage][chunk]
        seconds = {"forward": forward, "backward": inputs + weights, "input": inputs, "weight": weights}[kind]
        first, last = (stage, chunk) == (0, 0), (stage, chunk) == (stages - 1, virtual - 1)
        return seconds + wait * (kind != "weight" and not (first if kind == "forward" else last))

    messages = [2 * virtual - (stage == 0) - (stage == stages - 1) for stage in range(stages)]
    busiest = max(sum(map(sum, of_stage)) + n * wait for of_stage, n in zip(costs, messages, strict=True))
    return max(event.end for event in simulate(schedules, cost)) + (micro_batches - few) * busiest
