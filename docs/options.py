"""The page of all options, from the dataclasses that each step reads them into."""

import ast
import dataclasses
import importlib
import inspect
import re
import sys
import textwrap
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from types import ModuleType
from typing import Literal, NamedTuple, get_args, get_origin, get_type_hints

ROOT = Path(__file__).parent.parent
# An option named in a help, and not within code already.
FLAG = re.compile(r"(?<!`)(--[a-z][a-z-]*[a-z])")
STEPS = sorted(path.parent.name for path in ROOT.glob("step*/train.py"))


class Option(NamedTuple):
    """As one types it, without dashes; what it can be, if that is a choice; its default; its help."""

    name: str
    choices: tuple[str, ...]
    default: str
    text: str


@contextmanager
def loaded(step: str) -> Iterator[ModuleType]:
    """The train.py of a step. Steps have files of the same names: those of another one come back in the end."""
    names = {path.stem for path in ROOT.glob("step*/*")}

    def take_out() -> dict[str, ModuleType]:
        return {name: sys.modules.pop(name) for name in [*sys.modules] if name.partition(".")[0] in names}

    others = take_out()
    sys.path.insert(0, str(ROOT / step))
    try:
        yield importlib.import_module("train")
    finally:
        sys.path.remove(str(ROOT / step))
        take_out()
        sys.modules.update(others)


def options(config: type) -> list[Option]:
    """The options of a step, those of all steps first."""
    texts, hints = {}, get_type_hints(config)
    for cls in config.__mro__[:-1]:
        texts = helps(cls) | texts
    return [
        Option(field.name, choices(hints[field.name]), default(field.default), texts[field.name])
        for field in dataclasses.fields(config)
    ]


def helps(cls: type) -> dict[str, str]:
    """The comment above each field of a class."""
    source = textwrap.dedent(inspect.getsource(cls))
    lines, found = source.splitlines(), {}
    for node in ast.parse(source).body[0].body:
        if isinstance(node, ast.AnnAssign):
            first = node.lineno - 1
            while lines[first - 1].lstrip().startswith("#"):
                first -= 1
            found[node.target.id] = " ".join(line.strip("# ") for line in lines[first : node.lineno - 1])
    return found


def choices(hint: type) -> tuple[str, ...]:
    if get_origin(hint) is Literal:
        return tuple(map(str, get_args(hint)))
    return ("yes", "no") if hint is bool else ()


def default(value: object) -> str:
    if isinstance(value, bool):
        return "yes" if value else "no"
    if isinstance(value, tuple):
        return " ".join(map(str, value))
    return "" if value is None else str(value)


def page() -> str:
    """Each option under the step in which it first is what it is."""
    by_step = {}
    for step in STEPS:
        with loaded(step) as train:
            by_step[step] = options(train.Config)
    text = [
        "# All options\n",
        "`--help` of a step shows its own, and [USING.md](/USING.md) how to use them. What is yes or no is written",
        "`--name` or `--no-name`, and no by default. Where no default stands, the text says what happens without it.\n",
    ]
    shown: set[Option] = set()
    for step, found in by_step.items():
        rows = [option for option in found if option not in shown]
        shown.update(rows)
        if rows:
            text += [
                f"## From [{step[:6]}](/{step}/README.md) on\n",
                "| option | what it does | steps |",
                "|---|---|---|",
            ]
            text += [row(option, [name[4:6] for name in STEPS if option in by_step[name]]) for option in rows]
            text.append("")
    return "\n".join(text)


def row(option: Option, steps: list[str]) -> str:
    flag = f"`--{option.name.replace('_', '-')}`"
    values = "" if option.choices in ((), ("yes", "no")) else "<br>" + ", ".join(f"`{c}`" for c in option.choices)
    # What would be read as HTML or as another cell.
    text = FLAG.sub(r"`\1`", option.text.replace("|", "\\|").replace("<", "&lt;"))
    if option.default not in ("", "no"):
        text += f" Default: `{option.default}`."
    return f"| {flag}{values} | {text} | {steps[0] if len(steps) == 1 else f'{steps[0]}–{steps[-1]}'} |"
