"""The difference between two steps, side by side, with a note in the margin for every change.

A note of notes.toml is anchored by the text of a line that its change adds or removes, never by a number.
"""

import difflib
import html
import tomllib
from collections.abc import Iterator
from itertools import pairwise
from pathlib import Path
from typing import NamedTuple

from pygments import highlight
from pygments.formatters import HtmlFormatter
from pygments.lexers import PythonLexer

DOCS = Path(__file__).parent
ROOT = DOCS.parent
STEPS = sorted(path.parent.name for path in ROOT.glob("step*/train.py"))
PAIRS = list(pairwise(STEPS))
# Unchanged lines that are shown on either side of a change.
CONTEXT = 3


class Hunk(NamedTuple):
    """Lines `old` of the file before and `new` of the file after, of which those changed differ."""

    old: range
    new: range
    removed: frozenset[int]
    added: frozenset[int]


def hunks(old: list[str], new: list[str]) -> list[Hunk]:
    """The changes between two texts, those that are close to each other together."""
    found = []
    for group in difflib.SequenceMatcher(None, old, new, False).get_grouped_opcodes(CONTEXT):
        changed = [code for code in group if code[0] != "equal"]
        found.append(
            Hunk(
                range(group[0][1], group[-1][2]),
                range(group[0][3], group[-1][4]),
                frozenset(i for _, i1, i2, _, _ in changed for i in range(i1, i2)),
                frozenset(j for _, _, _, j1, j2 in changed for j in range(j1, j2)),
            )
        )
    return found


def notes() -> dict[str, list[dict[str, str]]]:
    """Of each step, by the name of its directory: `at` which changed line, and the `note`."""
    with (DOCS / "notes.toml").open("rb") as file:
        return tomllib.load(file)


def placed(step: str, old: list[str], new: list[str]) -> list[list[str]]:
    """For each change of a step's train.py, its notes. Raises ValueError for one without, or a note without a place."""
    found = hunks(old, new)
    lines = [[old[i] for i in hunk.removed] + [new[j] for j in hunk.added] for hunk in found]
    notes_of = [[] for _ in found]
    for entry in notes().get(step, []):
        places = [i for i, changed in enumerate(lines) if any(entry["at"] == line.strip() for line in changed)]
        if len(places) != 1:
            raise ValueError(f"notes.toml, {step}: {entry['at']!r} is a changed line of {len(places)} changes, not one")
        notes_of[places[0]].append(entry["note"])
    if step in notes() and [] in notes_of:
        raise ValueError(f"notes.toml, {step}: no note for the change {lines[notes_of.index([])]}")
    return notes_of


def highlighted(text: str) -> list[str]:
    """Each line of a Python file as HTML."""
    return highlight(text, PythonLexer(stripnl=False), HtmlFormatter(nowrap=True)).split("\n")


def rows(hunk: Hunk) -> Iterator[tuple[int | None, int | None]]:
    """Lines that stand next to each other, None where there is none."""
    i, j = hunk.old.start, hunk.new.start
    while i < hunk.old.stop or j < hunk.new.stop:
        if i in hunk.removed or j in hunk.added:
            yield (i if i in hunk.removed else None), (j if j in hunk.added else None)
            i, j = i + (i in hunk.removed), j + (j in hunk.added)
        else:
            yield i, j
            i, j = i + 1, j + 1


def table(step: str, before: str, after: str) -> str:
    """The changes of two texts as an HTML table: old, new, note."""
    old, new = before.splitlines(), after.splitlines()
    old_html, new_html = highlighted(before), highlighted(after)
    parts = []
    for hunk, notes_of in zip(hunks(old, new), placed(step, old, new), strict=True):
        body = []
        for i, j in rows(hunk):
            left = f'<td class="{"removed" if i in hunk.removed else ""}">{old_html[i] if i is not None else ""}</td>'
            right = f'<td class="{"added" if j in hunk.added else ""}">{new_html[j] if j is not None else ""}</td>'
            body.append(f"<tr>{left}{right}</tr>")
        margin = "".join(f"<p>{html.escape(note)}</p>" for note in notes_of)
        code = f'<table class="highlight"><tbody>{"".join(body)}</tbody></table>'
        parts.append(f'<div class="hunk">{code}<aside>{margin}</aside></div>')
    return f'<div class="diff">{"".join(parts)}</div>'
