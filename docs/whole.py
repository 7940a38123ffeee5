"""A whole file with a switch: its idea, one of its lessons, or everything.

What is the idea of train.py say the classes of tests/diff_classes.py, and its lessons in step06 tests/lessons.py.
"""

import ast
import sys
from pathlib import Path

ROOT = Path(__file__).parent.parent
sys.path.append(str(ROOT / "tests"))

import diff_classes
import lessons
from diffs import highlighted

# Unchanged lines that are shown on either side of what the idea adds.
CONTEXT = 2


def views(before: str | None, after: str) -> dict[str, set[int]]:
    """Of the source of a file, by the name of a view: the numbers of its lines, from 1. `before`: of the last step."""
    if before is None:
        return {"the idea": set(range(1, len(after.splitlines()) + 1)) - bookkeeping(after)}
    classes = diff_classes.classify(before, after)
    return {"the idea": around(after, {line for line, kind in classes.items() if kind == "idea"})}


def views_of_lessons(before: str, after: str) -> dict[str, set[int]]:
    """The same for each lesson of step06's train.py."""
    lines, added = after.splitlines(), diff_classes.classify(before, after)
    return {
        lesson: around(after, {line for line in added if lessons.claims(lesson, lines[line - 1])})
        for lesson in lessons.LESSONS
    }


def bookkeeping(source: str) -> set[int]:
    """Lines of a new file that plug its idea in: imports, options, and what only counts or draws."""
    classes = diff_classes.classify("", source)
    found = {line for line, kind in classes.items() if kind in diff_classes.NOISE}
    for node in ast.walk(ast.parse(source)):
        # With its body.
        if isinstance(node, ast.ClassDef | ast.FunctionDef) and node.lineno in found:
            found |= set(range(min(part.lineno for part in (node, *node.decorator_list)), node.end_lineno + 1))
    return found


def around(source: str, lines: set[int]) -> set[int]:
    """Lines with their context, and the heads of the functions and classes that they are in."""
    written = {number for number, line in enumerate(source.splitlines(), 1) if line.strip()}
    found = {near for line in lines for near in range(line - CONTEXT, line + CONTEXT + 1)} & written
    for node in ast.walk(ast.parse(source)):
        if isinstance(node, ast.ClassDef | ast.FunctionDef) and lines & set(range(node.lineno, node.end_lineno + 1)):
            found |= set(range(node.lineno, node.body[0].lineno))
    return found


def table(name: str, source: str, shown: dict[str, set[int]], marked: set[int]) -> str:
    """The file as an HTML table, the first view chosen. `marked` lines are what the step adds."""
    switch = "".join(
        f'<label><input type="radio" name="{name}" value="v{i}"{" checked" * (i == 0)}> {view}</label>'
        for i, view in enumerate([*shown, "everything"])
    )
    chosen = [f'.whole:has([name="{name}"][value="v{i}"]:checked) tr:not(.v{i})' for i in range(len(shown))]
    # Where lines are left out, a line of dots.
    rules = "".join(
        f"{rows} {{ display: none }}{rows} + .v{i} td {{ border-top: 1px dotted }}" for i, rows in enumerate(chosen)
    )
    rows = []
    for number, code in enumerate(highlighted(source)[: len(source.splitlines())], 1):
        classes = " ".join(f"v{i}" for i, lines in enumerate(shown.values()) if number in lines)
        cells = f'<td class="number" data-line="{number}"></td><td class="{"added" * (number in marked)}">{code}</td>'
        rows.append(f'<tr class="{classes}">{cells}</tr>')
    return (
        f'<div class="whole"><style>{rules}</style><fieldset><legend>Show of {name}</legend>{switch}</fieldset>'
        f'<table class="highlight"><tbody>{"".join(rows)}</tbody></table></div>'
    )
