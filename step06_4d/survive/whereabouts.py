"""Where in this project's code each rank is, whose place keeps the others waiting, and how to say so.

A rank's beat (see heartbeat.py) has its `step`, the line that it is `at`, and whether it `waits` there for others.
"""

import linecache
import re
from collections import Counter, defaultdict
from collections.abc import Iterable
from pathlib import Path
from types import FrameType

STEP = Path(__file__).parents[1]
SOURCES = (STEP, STEP.parent / "shared")
# They stand between a line of training and what it calls.
BETWEEN = ("heartbeat.py", "phases.py")
# The text of a line at which a rank waits for others, and does not keep them waiting.
WAITS = re.compile(r"\bdist\.|\bdcp\.|\.wait\(|thread\.join\(")
# A message lists so many places, those with most ranks.
MOST_PLACES = 4


def place(stack: Iterable[tuple[FrameType, int]]) -> tuple[str, bool]:
    """The innermost line of this project in a stack, innermost frame first, as `data.py:88`; and whether it waits."""
    for frame, line in stack:
        path = Path(frame.f_code.co_filename)
        if path.name not in BETWEEN and any(path.is_relative_to(source) for source in SOURCES):
            return f"{path.name}:{line}", bool(WAITS.search(linecache.getline(str(path), line)))
    return "no line of its own", False


def not_with_the_others(beats: dict[int, dict]) -> list[int]:
    """The ranks that do not wait where others wait. Stages of a pipeline wait at different lines, all rightly.

    If none waits, as with a GPU, or all do: those that are not where most ranks are, or nobody.
    """
    working = [rank for rank, beat in beats.items() if not beat["waits"]]
    if 0 < len(working) < len(beats):
        return working
    where = {rank: (beat["step"], beat["at"]) for rank, beat in beats.items()}
    for most, count in Counter(where.values()).most_common(1):
        if 2 * count > len(where):
            return [rank for rank in where if where[rank] != most]
    return []


def lost_ranks(lost: list[int], beats: dict[int, dict], state: str) -> str:
    """Who is missing, in which state, and where the others are."""
    others = {rank: beat for rank, beat in beats.items() if rank not in lost}
    heard = dict.fromkeys(f"in step {beats[rank]['step']}, at {beats[rank]['at']}" for rank in lost)
    text = f"lost {names(lost)} ({state}; last heard of {' and '.join(list(heard)[:MOST_PLACES])})"
    return f"{text}; {places(others)}" if others else text


def places(beats: dict[int, dict]) -> str:
    """Which ranks are where: `ranks 0-2 in step 12, at token_layout.py:52; rank 3 in step 12, at data.py:88`."""
    there = defaultdict(list)
    for rank, beat in beats.items():
        there[beat["step"], beat["at"]].append(rank)
    groups = sorted(there.items(), key=lambda group: -len(group[1]))
    texts = [f"{names(ranks)} in step {step}, at {at}" for (step, at), ranks in groups[:MOST_PLACES]]
    rest = sum(len(ranks) for _, ranks in groups[MOST_PLACES:])
    return "; ".join(texts) + (f"; and {rest} elsewhere" if rest else "")


def names(ranks: list[int]) -> str:
    """`rank 3`, or `ranks 0-2, 5`."""
    runs: list[list[int]] = []
    for rank in sorted(ranks):
        if runs and rank == runs[-1][-1] + 1:
            runs[-1].append(rank)
        else:
            runs.append([rank])
    text = ", ".join(str(run[0]) if len(run) == 1 else f"{run[0]}-{run[-1]}" for run in runs)
    return f"rank {text}" if len(ranks) == 1 else f"ranks {text}"
