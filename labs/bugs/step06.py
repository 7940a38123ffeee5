"""Bugs of what step06 adds: shards, sequence parallelism, zero bubble."""

from functools import partial
from types import ModuleType
from typing import Any

from torch import Tensor

from labs.bugs import bug

bug = partial(bug, "step06_4d")


@bug("--zero 1", "train.py", "missing-sum")
def norm_of_own_shard(module: ModuleType) -> None:
    """The norm is not summed over the ranks that hold the shards: each clips by the norm of its own shard."""

    def norm_over_ranks(norm: Tensor, group: Any, real: Any = module.tensor_parallel.norm_over_ranks) -> Tensor:
        return norm if group.size() > 1 else real(norm, group)

    module.tensor_parallel.norm_over_ranks = norm_over_ranks


@bug("--zero 2 --shard 2", "zero/unit.py zero/sharded_optimizer.py", "missing-sum", ranks=4)
def shards_not_summed_over_replicas(module: ModuleType) -> None:
    """Gradients are summed within a node, whose ranks hold the shards, and never over the nodes that hold replicas."""

    class Unit(module.sharded_optimizer.Unit):
        def __init__(self, *args: Any) -> None:
            super().__init__(*args)
            self.replicas = None

    module.sharded_optimizer.Unit = Unit


@bug("--tp 2 --sequence-parallel", "tensor/sequence_parallel.py train.py", "missing-sum")
def norm_weights_of_own_tokens(module: ModuleType) -> None:
    """With sequence parallelism a rank computes norms for its tokens only, and nobody adds up the gradients of their
    weights."""
    module.sequence_parallel.sum_partial_gradients = lambda *args: None


@bug("--tp 2", "tensor/sequence_parallel.py train.py", "counted-twice")
def norm_weights_summed_without_shares(module: ModuleType) -> None:
    """The gradients of the norms' weights are summed over tp without sequence parallelism, where each rank has the
    whole of them."""

    def wrong(config: Any, *args: Any, real: Any = module.sequence_parallel.sum_partial_gradients) -> None:
        real(SequenceParallel, *args)

    module.sequence_parallel.sum_partial_gradients = wrong


class SequenceParallel:
    """What is read of a config that shards tokens."""

    tp, sequence_parallel = 2, True


@bug("--pp 2 --pp-schedule zero-bubble", "pipeline/schedules.py pipeline_parallel.py", "lost")
def last_weight_gradients_dropped(module: ModuleType) -> None:
    """The step ends when the last input gradient has left: weight gradients that were put off until then are lost."""

    def schedule(*args: Any, real: Any = module.pipeline_parallel.make_schedule) -> list:
        actions = real(*args)
        return actions[:-1] if actions[-1].kind == "weight" else actions

    module.pipeline_parallel.make_schedule = schedule


@bug("--zero 1", "train.py zero/sharded_optimizer.py", "order")
def gathered_before_the_step(module: ModuleType) -> None:
    """The weights are gathered before the optimizer has changed its shard: each rank computes with a new shard of its
    own and the others' of the step before."""

    def init(trainer: Any, *args: Any, real: Any = module.Trainer.__init__) -> None:
        real(trainer, *args)
        reducer, step = trainer.reducer, trainer.optimizer.step
        gather = reducer.weights_changed

        def too_late() -> None:
            gather()
            reducer.wait_for_weights()
            step()

        trainer.optimizer.step, reducer.weights_changed = too_late, lambda: None

    module.Trainer.__init__ = init
