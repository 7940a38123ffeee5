"""Pipeline schedules: for each stage, the list of its actions in order. Data, so that they can be checked on paper.

A stage is a rank. With V chunks of layers on each of P ranks there are P · V virtual stages; chunk c of rank r is
virtual stage c · P + r, so hidden states go around all ranks V times.
"""

from typing import Literal, NamedTuple


class Action(NamedTuple):
    """A stage's work on a micro-batch, or on one of its chunks.

    A backward computes the gradients of its input and of its weights. `input` computes the former alone, which the
    stage before waits for, and `weight` the latter, which nobody does.
    """

    kind: Literal["forward", "backward", "input", "weight"]
    micro_batch: int
    chunk: int = 0


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


def interleaved(stage: int, stages: int, micro_batches: int, chunks: int) -> list[Action]:
    """Interleaved 1F1B (arXiv 2104.04473): the pipeline fills in the time of a chunk instead of a stage.

    Holds at most chunks · stages + stages − 2 · stage − 1 chunks of activations. `micro_batches` is a multiple of
    `stages`: they go through a chunk in groups of that many, the first comes back just when the last has left. A
    smaller group would make the stages wait for each other, some of them forever.
    """
    groups = [range(first, min(first + stages, micro_batches)) for first in range(0, micro_batches, stages)]
    forwards = [Action("forward", m, chunk) for group in groups for chunk in range(chunks) for m in group]
    backwards = [Action("backward", m, chunk) for group in groups for chunk in range(chunks)[::-1] for m in group]
    warmup = min(2 * (stages - stage - 1) + (chunks - 1) * stages, len(forwards))
    return _in_turn(forwards, backwards, warmup)


def zero_bubble(stage: int, stages: int, micro_batches: int) -> list[Action]:
    """ZB-H1 (arXiv 2401.10241): 1F1B whose gradients of weights come later, when the stage would wait.

    A stage is `stage` forwards less ahead than the first one, so it may hold what that many weight gradients need:
    together at most `stages` micro-batches.
    """
    actions = []
    for kind, m, _ in one_forward_one_backward(stage, stages, micro_batches):
        actions.append(Action("forward" if kind == "forward" else "input", m))
        if kind == "backward" and m >= stage:
            actions.append(Action("weight", m - stage))
    return actions + [Action("weight", m) for m in range(max(micro_batches - stage, 0), micro_batches)]


SCHEDULES = {
    "afab": afab,
    "1f1b": one_forward_one_backward,
    "zero-bubble": zero_bubble,
}


def make_schedule(name: str, stage: int, stages: int, micro_batches: int, chunks: int = 1) -> list[Action]:
    """The schedule that the options name, of one stage."""
    if chunks > 1:
        return interleaved(stage, stages, micro_batches, chunks)
    return SCHEDULES[name](stage, stages, micro_batches)
