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


def ideas(before: str, after: str) -> dict[str, set[int]]:
    """Numbers, from 1, of the lines that a step adds to the source of train.py and that are its idea."""
    return {"the idea": {line for line, kind in diff_classes.classify(before, after).items() if kind == "idea"}}


def of_lessons(before: str, after: str) -> dict[str, set[int]]:
    """The same for each lesson of step06's train.py, by its name."""
    lines, added = after.splitlines(), diff_classes.classify(before, after)
    return {lesson: {line for line in added if lessons.claims(lesson, lines[line - 1])} for lesson in lessons.LESSONS}


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


def train(before: str, after: str, is_last: bool) -> str:
    """A step's train.py: its idea, or for the last step its lessons, with what surrounds them."""
    own = (of_lessons if is_last else ideas)(before, after)
    shown = {view: around(after, lines) for view, lines in own.items()}
    return table("train.py", after, shown, own, set(diff_classes.classify(before, after)))


def new(name: str, source: str) -> str:
    """A file that a step adds, with and without what plugs it in."""
    shown = set(range(1, len(source.splitlines()) + 1)) - bookkeeping(source)
    return table(name, source, {"the idea": shown}, {}, set())


def table(name: str, source: str, shown: dict[str, set[int]], own: dict[str, set[int]], added: set[int]) -> str:
    """The file as an HTML table, the first view chosen. What is added is marked: in a view its `own` lines only."""
    switch, rules = [], []
    for i, view in enumerate([*shown, "everything"]):
        switch.append(f'<label><input type="radio" name="{name}" value="v{i}"{" checked" * (i == 0)}> {view}</label>')
        chosen = f'.whole:has([name="{name}"][value="v{i}"]:checked)'
        if view in shown:
            hidden = f"{chosen} tr:not(.v{i})"
            # Where lines are left out, a line of dots.
            rules.append(f"{hidden} {{ display: none }}{hidden} + .v{i} td {{ border-top: 1px dotted }}")
        if view in own:
            rules.append(f"{chosen} .added:not(.o{i}) {{ background: none; box-shadow: none }}")
    rows = []
    for number, code in enumerate(highlighted(source)[: len(source.splitlines())], 1):
        views = " ".join(f"v{i}" for i, lines in enumerate(shown.values()) if number in lines)
        marks = "added " * (number in added) + " ".join(
            f"o{i}" for i, lines in enumerate(own.values()) if number in lines
        )
        rows.append(
            f'<tr class="{views}"><td class="number" data-line="{number}"></td><td class="{marks}">{code}</td></tr>'
        )
    return (
        f'<div class="whole"><style>{"".join(rules)}</style><fieldset><legend>Show of {name}</legend>{"".join(switch)}'
        f'</fieldset><table class="highlight"><tbody>{"".join(rows)}</tbody></table></div>'
    )
