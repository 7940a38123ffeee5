"""Pipeline schedules: for each stage, the list of its actions in order. Data, so that they can be checked on paper."""

from typing import Literal, NamedTuple


class Action(NamedTuple):
    """A stage's work on a micro-batch."""

    kind: Literal["forward", "backward"]
    micro_batch: int


def afab(stage: int, stages: int, micro_batches: int) -> list[Action]:
    """All forward, all backward (GPipe, arXiv 1811.06965). Holds the activations of all micro-batches at once."""
    forwards, backwards = ([Action(kind, m) for m in range(micro_batches)] for kind in ("forward", "backward"))
    return forwards + backwards


def _in_turn(forwards: list[Action], backwards: list[Action], warmup: int) -> list[Action]:
    """`warmup` forwards, then a forward and a backward in turn, then the backwards that remain."""
    steady = [action for pair in zip(forwards[warmup:], backwards) for action in pair]  # noqa: B905 (warmup remain)
    return forwards[:warmup] + steady + backwards[len(backwards) - warmup :]


def one_forward_one_backward(stage: int, stages: int, micro_batches: int) -> list[Action]:
    """1F1B (arXiv 2006.09503). Holds the activations of at most `stages - stage` micro-batches at once."""
    forwards, backwards = ([Action(kind, m) for m in range(micro_batches)] for kind in ("forward", "backward"))
    # The first gradient comes back when its micro-batch has been through all later stages.
    return _in_turn(forwards, backwards, min(stages - stage - 1, micro_batches))


SCHEDULES = {
    "afab": afab,
    "1f1b": one_forward_one_backward,
}


def make_schedule(name: str, stage: int, stages: int, micro_batches: int) -> list[Action]:
    """The schedule that the options name, of one stage."""
    return SCHEDULES[name](stage, stages, micro_batches)
