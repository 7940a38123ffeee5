"""All layouts of a number of GPUs, those that fit, and how fast they are."""

from collections.abc import Callable, Iterable, Iterator
from dataclasses import dataclass, replace
from functools import cache, cached_property, partial
from itertools import product

from pipeline.stages import split_layers
from planning.layout import Layout, Model, Place, Sizes
from planning.machines import Machine
from planning.memory import Memory, memory
from planning.states import states
from planning.time import Parts, Times, step_time

from shared.flops import flops_per_token

# Share of a GPU's memory that tensors may take. Kernels, NCCL and fragmentation need the rest.
USABLE = 0.85
MICRO_BATCHES = (1, 2, 4, 8)
MOST_CHUNKS = 8


@dataclass(frozen=True)
class Plan:
    """A layout on a machine, and what is predicted of it."""

    model: Model
    layout: Layout
    machine: Machine
    # Layers of so many virtual stages.
    split: Callable[[int], list[int]]
    # Of a layer, once for all layouts that have the same.
    works: dict

    @cached_property
    def chunks(self) -> list[list[int]]:
        """Layers of each chunk of each stage."""
        stages = self.layout.pp
        split = self.split(stages * self.layout.virtual_stages)
        return [split[stage::stages] for stage in range(stages)]

    @cached_property
    def fullest(self) -> Memory:
        return max(map(self.memory_of, range(self.layout.pp)), key=lambda held: held.total)

    @cached_property
    def states_fit(self) -> bool:
        """What is held between steps does, which is quick to say: no option of the step itself matters."""
        alike = replace(self.layout, recompute="none", micro_batch_size=1, pp_schedule="1f1b", virtual_stages=1)
        held = (_between_steps(self.model, alike, i, sum(self.chunks[i])) for i in {0, alike.pp - 1})
        return max(held) <= USABLE * self.machine.memory

    @cached_property
    def fits(self) -> bool:
        """The first stage, which has the most micro-batches under way, is looked at first."""
        room, stages = USABLE * self.machine.memory, range(self.layout.pp)
        return self.states_fit and all(self.memory_of(stage).total <= room for stage in stages)

    def memory_of(self, stage: int) -> Memory:
        """Of a stage's first rank, which has most."""
        return memory(self.model, self.layout, Place(stage), self.chunks[stage])

    @cached_property
    def estimate(self) -> float:
        """Seconds per step, by formulas alone."""
        return step_time(Times(self.model, self.layout, self.machine, self.works), self.chunks).total

    @cached_property
    def parts(self) -> Parts:
        """Seconds per step, the bubble by running its schedule."""
        return step_time(Times(self.model, self.layout, self.machine, self.works), self.chunks, simulated=True)

    @property
    def gpus(self) -> int:
        return self.layout.dp * self.layout.tp * self.layout.pp * self.layout.cp

    @property
    def tokens_per_second(self) -> float:
        """Of a GPU."""
        return self.layout.global_batch_size * self.layout.seq_len / self.parts.total / self.gpus

    def mfu(self, causal: bool) -> float:
        flops = flops_per_token(self.model, self.layout.seq_len, causal)
        return self.tokens_per_second * flops / self.machine.flops


@cache
def _between_steps(model: Model, layout: Layout, stage: int, layers: int) -> int:
    """Bytes of a stage's first rank."""
    return sum(states(Sizes(model, layout), Place(stage), layers))


def layouts(model: Model, machine: Machine, gpus: int, base: Layout) -> Iterator[Layout]:
    """Those that train.py takes, of the sequences, the batch and the dtype of `base`."""
    for tp, cp, pp in product(_splits(model, min(gpus, machine.node)), _divisors(gpus), _divisors(gpus)):
        dp, rest = divmod(gpus, tp * cp * pp)
        pieces = (2 * cp if cp > 1 else 1) * tp
        if rest or pp > model.num_hidden_layers or base.seq_len % pieces or base.seq_len // cp < 512 <= base.seq_len:
            continue
        for micro_batch in MICRO_BATCHES:
            if base.global_batch_size % (dp * micro_batch):
                continue
            m = base.global_batch_size // (dp * micro_batch)
            sizes = {"dp": dp, "tp": tp, "pp": pp, "cp": cp, "micro_batch_size": micro_batch}
            options = product(
                _sharding(dp * cp, tp, pp, machine.node),
                (tp > 1,),
                _schedules(pp, m, model.num_hidden_layers),
                ("none", "selective", "full"),
            )
            for (zero, shard), sequence_parallel, (schedule, virtual), recompute in options:
                yield replace(
                    base,
                    **sizes,
                    zero=zero,
                    shard=shard,
                    sequence_parallel=sequence_parallel,
                    pp_schedule=schedule,
                    virtual_stages=virtual,
                    recompute=recompute,
                )


def _divisors(n: int) -> list[int]:
    return [i for i in range(1, n + 1) if n % i == 0]


def _splits(model: Model, most: int) -> list[int]:
    """Sizes of tp. Its messages need the links inside a node."""
    heads, kv_heads = model.num_attention_heads, model.num_key_value_heads
    return [
        tp
        for tp in range(1, most + 1)
        if heads % tp == 0 and model.intermediate_size % tp == 0 and (kv_heads % tp == 0 or tp % kv_heads == 0)
    ]


def _sharding(replicas: int, tp: int, pp: int, node: int) -> list[tuple[int, int | None]]:
    """--zero and --shard. From 2 on it takes one micro-batch after the other, so no pipeline."""
    if replicas == 1:
        return [(0, None), (1, None)]
    levels = (0, 1) if pp > 1 else (0, 1, 2, 3)
    inside = node // tp
    spread = [None, inside] if 1 < inside < replicas and replicas % inside == 0 else [None]
    return [(zero, shard) for zero in levels for shard in (spread if zero else [None])]


def _schedules(pp: int, micro_batches: int, layers: int) -> list[tuple[str, int]]:
    """--pp-schedule and --virtual-stages. afab is never faster than 1f1b, and holds more."""
    if pp == 1:
        return [("1f1b", 1)]
    most = min(MOST_CHUNKS, layers // pp) if micro_batches % pp == 0 else 1
    # Those that cut evenly, and a few between.
    chunks = [v for v in range(1, most + 1) if v.bit_count() == 1 or layers % (pp * v) == 0]
    return [("1f1b", v) for v in chunks] + [("zero-bubble", 1)]


def plans_of(model: Model, machine: Machine, layouts: Iterable[Layout]) -> Iterator[Plan]:
    works: dict = {}

    @cache
    def split(seq_len: int, stages: int) -> list[int]:
        return [len(layers) for layers in split_layers(model, seq_len, stages)]

    return (Plan(model, layout, machine, partial(split, layout.seq_len), works) for layout in layouts)


def all_plans(model: Model, machine: Machine, gpus: int, base: Layout) -> Iterator[Plan]:
    return plans_of(model, machine, layouts(model, machine, gpus, base))


def any_fits(model: Model, machine: Machine, gpus: int, base: Layout) -> bool:
    """Whether a layout fits, of those that hold least."""
    plans = all_plans(model, machine, gpus, base)
    return any(plan.fits for plan in plans if plan.layout.recompute == "full" and plan.layout.zero)


def search(model: Model, machine: Machine, gpus: int, base: Layout, few: int) -> tuple[list[Plan], list[Plan]]:
    """The fastest that fit, fastest first, and all."""
    plans, best = list(all_plans(model, machine, gpus, base)), []
    # The schedule itself may change the order of some that are close.
    for plan in sorted((plan for plan in plans if plan.states_fit), key=lambda plan: plan.estimate):
        if len(best) >= 3 * few or (best and plan.estimate > 2 * best[0].estimate and len(best) >= few):
            break
        if plan.fits:
            best.append(plan)
    return sorted(best, key=lambda plan: plan.parts.total)[:few], plans
