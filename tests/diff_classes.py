"""What the added lines of a difference between two steps are: the idea of the step, or what it takes to plug it in.

`python tests/diff_classes.py` lists the added lines of each step's train.py with their class.
"""

import ast
import difflib
from itertools import pairwise
from pathlib import Path

ROOT = Path(__file__).parent.parent
STEPS = sorted(path.parent.name for path in ROOT.glob("step*/train.py"))
# Names in a line that only counts or draws what happens.
BOOKKEEPING = ("ledger", "traffic", "timeline")
NOISE = ("import", "option", "handed down", "bookkeeping")


def added(old: list[str], new: list[str]) -> tuple[set[int], set[int]]:
    """Numbers, from 1, of the lines that the old text loses and of those that the new one gains."""
    opcodes = difflib.SequenceMatcher(None, old, new, False).get_opcodes()
    changes = [code for code in opcodes if code[0] != "equal"]
    return (
        {line + 1 for _, i1, i2, _, _ in changes for line in range(i1, i2)},
        {line + 1 for _, _, _, j1, j2 in changes for line in range(j1, j2)},
    )


def classify(before: str, after: str) -> dict[int, str]:
    """The class of each line that the source `after` has more than `before`, by its number.

    "import"; "option" (a base of `Config`); "handed down" (a call or signature that only gains an argument);
    "bookkeeping"; "text" (comments, docstrings, empty lines); all else is "idea".
    """
    lost, gained = added(before.splitlines(), after.splitlines())
    removed = [header for line, header in _headers(before).items() if line in lost]
    headers, lines = _headers(after), after.splitlines()
    return {line: _class(headers.get(line), lines[line - 1], removed) for line in sorted(gained)}


def _headers(source: str) -> dict[int, ast.stmt]:
    """The innermost statement on each line, without its body if it has one."""
    headers = {}
    # Outer ones come before inner ones.
    for node in ast.walk(ast.parse(source)):
        if isinstance(node, ast.stmt):
            first = min(part.lineno for part in (node, *getattr(node, "decorator_list", [])))
            last = node.end_lineno
            if body := getattr(node, "body", None):
                last = max(body[0].lineno - 1, node.lineno)
                # `ast.walk` has noted already that it is to go on there.
                node.body = []
            headers |= dict.fromkeys(range(first, last + 1), node)
    return headers


def _class(statement: ast.stmt | None, line: str, removed: list[ast.stmt]) -> str:
    text = line.strip()
    is_docstring = isinstance(statement, ast.Expr) and isinstance(statement.value, ast.Constant)
    if statement is None or not text or text.startswith("#") or is_docstring:
        return "text"
    if isinstance(statement, ast.Import | ast.ImportFrom):
        return "import"
    if isinstance(statement, ast.ClassDef) and statement.name == "Config":
        return "option"
    if any(word in text.lower() for word in BOOKKEEPING):
        return "bookkeeping"
    return "handed down" if any(_only_gains(old, statement) for old in removed) else "idea"


def _only_gains(old: object, new: object) -> bool:
    """Whether `new` is `old`, but for arguments that its calls or signatures have more."""
    if isinstance(old, list) and isinstance(new, list):
        return len(old) == len(new) and all(map(_only_gains, old, new))
    if not isinstance(old, ast.AST) or type(old) is not type(new):
        return old == new
    return all(
        _is_subsequence(value, getattr(new, field))
        if isinstance(old, ast.Call | ast.arguments) and isinstance(value, list)
        else _only_gains(value, getattr(new, field))
        for field, value in ast.iter_fields(old)
    )


def _is_subsequence(old: list, new: list) -> bool:
    rest = iter(new)
    return all(any(_only_gains(item, other) for other in rest) for item in old)


def shares(before: str, after: str) -> tuple[int, int]:
    """Added lines of train.py that are the idea, and those that are the idea or noise."""
    sources = ((ROOT / step / "train.py").read_text() for step in (before, after))
    classes = list(classify(*sources).values())
    return classes.count("idea"), sum(kind == "idea" or kind in NOISE for kind in classes)


if __name__ == "__main__":
    for before, after in pairwise(STEPS[:-1]):
        old, new = ((ROOT / step / "train.py").read_text() for step in (before, after))
        idea, counted = shares(before, after)
        print(f"{after}: {idea} of {counted} added lines are the idea")
        for line, kind in classify(old, new).items():
            print(f"  {kind:12} {new.splitlines()[line - 1]}")
