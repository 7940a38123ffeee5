"""Cut functions out of the project's files: what a student gets, and what is put in the project's place.

A file of a student has what he needs to read: imports, the class around a method with the other methods' signatures and
docstrings, and the function itself without its body.
"""

import ast
import sys
from pathlib import Path
from types import FunctionType, ModuleType

from labs import ROOT
from labs.table import Lab

Function = ast.FunctionDef


def located(lab: Lab, name: str) -> tuple[str, list[str]]:
    """The module of a qualified name, and what follows: "zero.unit.Unit.reduce" is Unit.reduce of zero.unit."""
    parts = name.split(".")
    end = next(n for n in range(len(parts), 0, -1) if file_of(lab, ".".join(parts[:n])).is_file())
    return ".".join(parts[:end]), parts[end:]


def file_of(lab: Lab, module: str) -> Path:
    return ROOT / lab.step / f"{module.replace('.', '/')}.py"


def _lines(text: str, first: int, last: int) -> str:
    return "".join(text.splitlines(keepends=True)[first - 1 : last])


def _first_line(node: ast.stmt) -> int:
    return min([node.lineno, *(d.lineno for d in getattr(node, "decorator_list", []))])


def _head(text: str, node: Function | ast.ClassDef) -> str:
    """Signature and docstring."""
    if ast.get_docstring(node) is not None:
        return _lines(text, _first_line(node), node.body[0].end_lineno)
    # Not up to the body: a comment above its first line is half of a solution.
    last = node.returns if isinstance(node, Function) else (node.bases or [node])[-1]
    return _lines(text, _first_line(node), last.end_lineno)


def _whole(text: str, node: ast.stmt) -> str:
    return _lines(text, _first_line(node), node.end_lineno)


def _function(text: str, node: Function, body: str) -> str:
    return f"{_head(text, node).rstrip()}\n{' ' * node.body[0].col_offset}{body}\n"


def _class(text: str, node: ast.ClassDef, wanted: set[str], solved: bool) -> str:
    """The class, with its constructor, the wanted methods, and of others what they promise."""
    parts = [_head(text, node)]
    for item in node.body[1:] if ast.get_docstring(node) is not None else node.body:
        if not isinstance(item, Function) or item.name == "__init__" or (item.name in wanted and solved):
            parts.append(_whole(text, item))
        else:
            parts.append(_function(text, item, "raise NotImplementedError" if item.name in wanted else "..."))
    return "\n".join(parts)


def _names(code: str) -> set[str]:
    return {node.id for node in ast.walk(ast.parse(code)) if isinstance(node, ast.Name)}


def _imports(lab: Lab, module: str, needed: set[str]) -> list[str]:
    """Import statements of the needed names, from where the module has them or from the module itself."""
    statements, own = [], []
    for node in ast.parse(file_of(lab, module).read_text()).body:
        if isinstance(node, ast.Import | ast.ImportFrom):
            kept = [alias for alias in node.names if (alias.asname or alias.name.partition(".")[0]) in needed]
            if kept and isinstance(node, ast.Import):
                statements.append(ast.unparse(ast.Import(kept)))
            elif kept:
                statements.append(ast.unparse(ast.ImportFrom(node.module, kept, node.level)))
        elif isinstance(node, ast.ClassDef | Function):
            own.append(node.name)
        elif isinstance(node, ast.Assign):
            own += [target.id for target in node.targets if isinstance(target, ast.Name)]
    if ours := sorted(needed.intersection(own)):
        statements.append(f"from {module} import {', '.join(ours)}")
    return statements


def cut(lab: Lab, solved: bool = False) -> str:
    """The student's file, or, solved, the same with the project's functions in it."""
    wanted: dict[str, dict[str, set[str]]] = {}
    for name in lab.names:
        module, (top, *method) = located(lab, name)
        wanted.setdefault(module, {}).setdefault(top, set()).update(method)
    imports, parts = [], []
    for module, tops in wanted.items():
        text, needed = file_of(lab, module).read_text(), set()
        for node in ast.parse(text).body:
            if getattr(node, "name", None) not in tops:
                continue
            if isinstance(node, ast.ClassDef):
                parts.append(_class(text, node, tops[node.name], solved))
                needed |= _names(_class(text, node, tops[node.name], solved=True))
            else:
                parts.append(_whole(text, node) if solved else _function(text, node, "raise NotImplementedError"))
                needed |= _names(_whole(text, node))
        # A private helper would be half of the solution.
        needed = {name for name in needed - tops.keys() if solved or not name.startswith("_")}
        imports += [line for line in _imports(lab, module, needed) if line not in imports]
    others = any("\n        ...\n" in part for part in parts)
    imports.sort(key=lambda line: (line.startswith("from"), line))
    return "\n\n\n".join([f"{_header(lab, others)}\n" + "\n".join(imports), *(part.rstrip() for part in parts)]) + "\n"


def _header(lab: Lab, others: bool) -> str:
    where = [
        f"    {module.replace('.', '/')}.py: {'.'.join(rest)}" for module, rest in (located(lab, n) for n in lab.names)
    ]
    words, line = [], "#"
    for word in lab.task.split():
        if len(line) + len(word) > 99:
            words, line = [*words, line], "#"
        line += f" {word}"
    return "\n".join(
        [
            f"# Lab {lab.id}: {lab.title}",
            "#",
            *words,
            line,
            "#",
            f"# Write what raises NotImplementedError. In {lab.step} it is",
            *(f"# {name}" for name in where),
            *(["# Methods whose body is `...` exist there: call them."] if others else []),
            f"# Read first: {lab.read[0]}: {lab.read[1]}",
            "#",
            f"# python -m labs check {lab.id}    says what is wrong.    python -m labs hint {lab.id}    helps.",
            "",
        ]
    )


def load(path: Path) -> ModuleType:
    """The student's file as a module: what it imports is the step that is loaded."""
    module = ModuleType("student")
    module.__file__ = str(path)
    exec(compile(path.read_text(), path, "exec"), vars(module))
    return module


class Missing(Exception):
    """The student's file has not what it is to have."""


def transplant(lab: Lab, path: Path) -> None:
    """Put the student's functions in the place of the project's, in the step that is loaded."""
    student = load(path)
    for name in lab.names:
        module, (*outer, last) = located(lab, name)
        owner, theirs = sys.modules[module], student
        for attribute in outer:
            owner, theirs = getattr(owner, attribute), getattr(theirs, attribute, None)
        if last not in vars(theirs or ModuleType("")):
            raise Missing(f"`{'.'.join([*outer, last])}` is missing: it must keep its name")
        original = vars(owner)[last]
        setattr(owner, last, vars(theirs)[last])
        if isinstance(original, FunctionType) and not outer:
            _replace_everywhere(lab, original, vars(theirs)[last])


def _replace_everywhere(lab: Lab, original: FunctionType, new: FunctionType) -> None:
    """Where other files of the step, or a table in one, refer to a function."""
    for module in list(sys.modules.values()):
        if not str(getattr(module, "__file__", "")).startswith(str(ROOT / lab.step)):
            continue
        for key, value in list(vars(module).items()):
            if value is original:
                setattr(module, key, new)
            elif isinstance(value, dict):
                value.update({k: new for k, v in value.items() if v is original})
