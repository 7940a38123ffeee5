"""What all ranks decide together, or one would leave, or go on, while the others wait for it in a collective.

Above all, work that can fail on one rank, as all work with files can, counts as failed on all.
"""

from collections.abc import Callable
from typing import TypeVar

import torch.distributed as dist
from torch.distributed import ProcessGroup

from shared.config import UserError
from shared.ledger import Traffic

T = TypeVar("T")


class Failed(Exception):
    """What has failed on some rank, raised on all of them."""


class Damaged(Failed):
    """A file is not what was written. Any other failure to read it may pass: a file server's, for one."""


def _attempt(function: Callable[[], T]) -> tuple[T | None, Failed | None]:
    """Its result, and what went wrong: whatever that is, the other ranks must hear of it."""
    try:
        return function(), None
    except Failed as error:
        return None, error
    except Exception as error:
        for_people = isinstance(error, OSError | UserError)
        return None, Failed(str(error) if for_people else f"{type(error).__name__}: {error}")


def on_all(group: ProcessGroup, function: Callable[[], T]) -> list[T]:
    """What each rank's `function()` has returned: all-gathers it. Raises Failed on all ranks if it raised on any."""
    outcomes: list = [None] * dist.get_world_size(group)
    dist.all_gather_object(outcomes, _attempt(function), group=group)
    errors = {rank: error for rank, (_, error) in enumerate(outcomes) if error}
    if errors:
        texts = [f"rank {rank}: {error}" for rank, error in errors.items()]
        kind = Damaged if any(isinstance(error, Damaged) for error in errors.values()) else Failed
        raise kind("; ".join(texts[:3]) + (f"; and {len(texts) - 3} more ranks" if texts[3:] else ""))
    return [value for value, _ in outcomes]


def on_first(group: ProcessGroup, function: Callable[[], T]) -> T:
    """What `function()` has returned on rank 0: broadcasts it. Raises Failed on all ranks if it raised there."""
    outcome = [_attempt(function) if dist.get_rank(group) == 0 else None]
    dist.broadcast_object_list(outcome, group=group, group_src=0)
    value, error = outcome[0]
    if error:
        raise error
    return value


def with_agreement(traffic: dict[tuple[str, str], Traffic], nbytes: int) -> dict[tuple[str, str], Traffic]:
    """`traffic` and an all-reduce of `nbytes` over all ranks, of which there may be others."""
    key = "world", "all-reduce"
    calls, others = traffic.get(key, (0, 0))
    return traffic | {key: Traffic(calls + 1, others + nbytes)}
