"""Work that can fail on one rank, as all work with files can, and then counts as failed on all.

Else that rank would leave, or go on, while the others wait for it in a collective.
"""

from collections.abc import Callable
from typing import TypeVar

import torch.distributed as dist
from torch.distributed import ProcessGroup
from torch.distributed.device_mesh import DeviceMesh

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
        return None, Failed(str(error) if isinstance(error, OSError) else f"{type(error).__name__}: {error}")


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


def agreement_traffic(
    mesh: DeviceMesh, others: dict[tuple[str, str], Traffic], nbytes: int
) -> dict[tuple[str, str], Traffic]:
    """Payload of one all-reduce over all ranks, on top of those of the same group among the `others`.

    The group of all ranks is also that of an axis as large.
    """
    world = dist.group.WORLD
    axes = [axis for axis in mesh.mesh_dim_names if mesh.get_group(axis).group_name == world.group_name]
    key = axes[-1] if axes else world.group_desc, "all-reduce"
    calls, before = others.get(key, (0, 0))
    return {key: Traffic(calls + 1, before + nbytes)}
