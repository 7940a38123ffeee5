"""Cut functions out of the project's files: what a student gets, and what is put in the project's place.

A student's file can be read alone: it has the imports, the class around a method as it is, and the functions to write
without their bodies.
"""

import ast
import sys
import textwrap
from functools import partial
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


def _excerpt(text: str, node: Function | ast.ClassDef, methods: set[str], solved: bool) -> str:
    """A class or function of a file, and unless solved without the bodies of these methods, or without its own."""
    lines = text.splitlines(keepends=True)
    behind = len(lines) - node.end_lineno
    functions = [item for item in node.body if getattr(item, "name", None) in methods] or [node]
    for function in [] if solved else functions[::-1]:
        # Up to the docstring or the signature: a comment above the first line is half of a solution.
        head = function.body[0] if ast.get_docstring(function) is not None else function.returns
        stub = f"{' ' * function.body[0].col_offset}raise NotImplementedError\n"
        lines[head.end_lineno : function.end_lineno] = [stub]
    first = min([node.lineno, *(decorator.lineno for decorator in node.decorator_list)])
    return "".join(lines[first - 1 : len(lines) - behind])


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
            if (top := getattr(node, "name", None)) in tops:
                parts.append(_excerpt(text, node, tops[top], solved))
                # What the solution needs is there, but for private helpers: their names would be half of it.
                names = _names(_excerpt(text, node, tops[top], solved=True))
                needed |= _names(parts[-1]) | {name for name in names if not name.startswith("_")}
        imports += [line for line in _imports(lab, module, needed - tops.keys()) if line not in imports]
    imports.sort(key=lambda line: (line.startswith("from"), line))
    return "\n\n\n".join([f"{_header(lab)}\n" + "\n".join(imports), *(part.rstrip() for part in parts)]) + "\n"


def _header(lab: Lab) -> str:
    lines = [
        f"Lab {lab.id}: {lab.title}",
        "",
        *textwrap.wrap(lab.task, 100),
        "",
        f"Write what raises NotImplementedError. In {lab.step} it is",
        *(
            f"    {module.replace('.', '/')}.py: {'.'.join(rest)}"
            for module, rest in map(partial(located, lab), lab.names)
        ),
        "The rest is there to be read: a change of it changes nothing.",
        f"Read first: {lab.read[0]}: {lab.read[1]}",
        "",
        f"python -m labs check {lab.id}    says what is wrong.    python -m labs hint {lab.id}    helps.",
    ]
    return "\n".join(f"# {line}".rstrip() for line in lines) + "\n"


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
