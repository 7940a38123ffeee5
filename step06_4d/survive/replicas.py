"""Do ranks that hold the same numbers of a weight still hold the same? If not, a device or the code is at fault.

Over data-parallel ranks, over tensor-parallel ones for norms and copied key-value heads, and over both ends of a
pipeline for a tied embedding: whatever ranks have under the same name, at the same offset.
"""

from collections import defaultdict

import torch.distributed as dist
from survive.agreement import on_first
from survive.whereabouts import names
from torch.distributed import ProcessGroup

from shared.config import UserError

# A message lists so many weights.
MOST_NAMES = 3


def check(group: ProcessGroup, sums: dict[tuple, int]) -> None:
    """Raise UserError on all ranks, naming weights and ranks, if two of them have other checksums of the same box.

    Gathers `sums`, which are by name and offset, on the first rank.
    """
    everyones: list | None = [None] * dist.get_world_size(group) if dist.get_rank(group) == 0 else None
    dist.gather_object(sums, everyones, group=group, group_dst=0)
    differing = on_first(group, lambda: _compare(everyones))
    if differing:
        more = f"; and {len(differing) - MOST_NAMES} more weights" if len(differing) > MOST_NAMES else ""
        raise UserError(
            f"ranks that should hold the same do not: {'; '.join(differing[:MOST_NAMES])}{more}. It is not saved: the "
            "same command goes on from the checkpoint before. If it happens again, that rank's device may be faulty"
        )


def _compare(everyones: list[dict[tuple, int]]) -> list[str]:
    holders: dict = defaultdict(lambda: defaultdict(list))
    for rank, sums in enumerate(everyones):
        for box, total in sums.items():
            holders[box][total].append(rank)
    differing = {}
    for (name, _), ranks_of in holders.items():
        # Most are probably right. Of two, nobody knows.
        *others, most = sorted(ranks_of.values(), key=len)
        if others:
            odd = [rank for ranks in others for rank in ranks]
            differing.setdefault(name, f"{name} on {names(odd)} is not that on {names(most)}")
    return list(differing.values())
