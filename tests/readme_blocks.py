"""What the READMEs show of the tree itself: differences between steps, and the layouts that are proved.

`python tests/readme_blocks.py` writes them anew, after <!-- diff A B -->, <!-- lesson L -->, <!-- parity matrix --> and
<!-- parity of relatives -->.
"""

import difflib
import re
from pathlib import Path

from lessons import lines_of
from parity import LAYOUTS, LAYOUTS_OF_RELATIVES, MODELS, models
from relatives import RELATIVES

ROOT = Path(__file__).parent.parent
STEPS = sorted(path.parent.name for path in ROOT.glob("step*/train.py"))
DIFF = re.compile(r"<!-- diff (\S+) (\S+) -->\n```diff\n.*?```", re.DOTALL)
LESSON = re.compile(r"<!-- lesson ([^\n]+) -->\n```diff\n.*?```", re.DOTALL)
MATRIX = re.compile(r"<!-- parity matrix -->\n(\|.*\n)*")
OF_RELATIVES = re.compile(r"<!-- parity of relatives -->\n(\|.*\n)*")


def unified(before: str, after: str) -> str:
    """The difference of two files as text, with the enclosing function named, without file headers."""
    old, new = ((ROOT / name).read_text().splitlines() for name in (before, after))
    lines = list(difflib.unified_diff(old, new, lineterm="", n=1))[2:]
    return "\n".join(_named(line, old) if line.startswith("@@") else line.rstrip() for line in lines)


def _named(header: str, old: list[str]) -> str:
    """`@@ -70 +80 @@` to `@@ def evaluate @@`: line numbers would change with every edit above."""
    first = int(re.match(r"@@ -(\d+)", header).group(1))
    names = [match[1] for line in old[:first] if (match := re.match(r"\s*((def|class) \w+)", line))]
    return f"@@ {names[-1] if names else 'imports'} @@"


def parity_matrix() -> str:
    """The cells that test_parity.py runs."""
    lines = ["| step | ranks | options | " + " | ".join(MODELS) + " |", "|---|---|---|" + "---|" * len(MODELS)]
    for step, ranks, options in LAYOUTS:
        cells = (" ✓ |" if name in models(ranks, options) else "  |" for name in MODELS)
        lines.append(f"| {step} | {ranks} | {f'`{options}`' if options else ''} |" + "".join(cells))
    return "\n".join(lines)


def parity_of_relatives() -> str:
    """The cells that test_relatives.py runs."""
    lines = ["| step | ranks | options | " + " | ".join(RELATIVES) + " |", "|---|---|---|" + "---|" * len(RELATIVES)]
    for step, ranks, options, names in LAYOUTS_OF_RELATIVES:
        cells = (" ✓ |" if name in names.split() else "  |" for name in RELATIVES)
        lines.append(f"| {step} | {ranks} | `{options}` |" + "".join(cells))
    return "\n".join(lines)


def refreshed(text: str) -> str:
    """A README's text with its blocks made anew."""
    text = MATRIX.sub(lambda _: f"<!-- parity matrix -->\n{parity_matrix()}\n", text)
    text = OF_RELATIVES.sub(lambda _: f"<!-- parity of relatives -->\n{parity_of_relatives()}\n", text)
    text = LESSON.sub(lambda m: f"<!-- lesson {m[1]} -->\n```diff\n{lines_of(m[1])}\n```", text)
    return DIFF.sub(lambda m: f"<!-- diff {m[1]} {m[2]} -->\n```diff\n{unified(m[1], m[2])}\n```", text)


if __name__ == "__main__":
    for readme in ROOT.glob("**/README.md"):
        if ".venv" not in readme.parts:
            readme.write_text(refreshed(readme.read_text()))
