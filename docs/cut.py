"""Code in a page, cut out of a file by its qualified name: `<!-- cut shared/data.py GlobalBatches.next -->`."""

import ast
import re
import textwrap
from pathlib import Path

ROOT = Path(__file__).parent.parent
CUT = re.compile(r"<!-- cut (\S+) (\S+) -->")


def cut(path: str, name: str) -> str:
    """The source of a function or class: "make_step.step" is one within another. Raises ValueError if there is none."""
    source = (ROOT / path).read_text()
    node = ast.parse(source)
    for part in name.split("."):
        found = [child for child in node.body if getattr(child, "name", None) == part]
        if len(found) != 1:
            raise ValueError(f"{path} has {len(found)} definitions of {name}, not one")
        node = found[0]
    first = min(line.lineno for line in (node, *node.decorator_list))
    return textwrap.dedent("\n".join(source.splitlines()[first - 1 : node.end_lineno]))


def filled(text: str) -> str:
    """A page with its pieces of code, each under a link to where it is from."""
    return CUT.sub(lambda m: f"`{m[2]}` in [{m[1]}](/files/{m[1]}.md):\n\n```python\n{cut(m[1], m[2])}\n```", text)
