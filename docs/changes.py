"""The page of what a step changes: where its README has what, differences side by side, and whole files."""

import re
from pathlib import Path

import diffs
import whole

from labs.table import LABS

ROOT = Path(__file__).parent.parent
# Sections of a README that a reader of the code asks for.
SECTIONS = ("The ledger", "Memory", "The proof", "Speed", "Exercises")


def write_page(before: str, after: str, path: Path) -> None:
    """Files that both steps have, then those that are new."""
    old_files, new_files = (
        {file.name: file.read_text() for file in sorted((ROOT / step).glob("*.py"))} for step in (before, after)
    )
    text = [
        # The whole width is for the code.
        "---\nhide-toc: true\n---",
        f"# {before.split('_')[0]} → {after.split('_')[0]}, side by side",
        around(after),
        f"Left is [{before}](/{before}/README.md), right [{after}](/{after}/README.md), without what stays the same.\n",
    ]
    for name, new in new_files.items():
        if name in old_files and old_files[name] != new:
            changes = diffs.table(after if name == "train.py" else "", old_files[name], new)
            text += [f"## {name}", raw(changes)]
    train = whole.train(old_files["train.py"], new_files["train.py"], after == diffs.STEPS[-1])
    text += ["## train.py, whole", raw(train)]
    for name in sorted(new_files.keys() - old_files.keys()):
        text += [f"## {name} (new)", raw(whole.new(name, new_files[name]))]
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_text("\n".join(text))


def around(step: str) -> str:
    """How a step is run, what its README has, and its labs."""
    readme = (ROOT / step / "README.md").read_text()
    command = re.search(r"^```bash\n(.*?)```", readme, re.MULTILINE | re.DOTALL)[1]
    links = [f"[The idea](/{step}/README.md)"] + [
        f"[{section}](/{step}/README.md#{section.lower().replace(' ', '-')})"
        for section in SECTIONS
        if f"\n## {section}\n" in readme
    ]
    labs = [lab for lab in LABS.values() if lab.step == step]
    titles = ", ".join(f"{lab.title} (`{lab.id}`)" for lab in labs)
    write = f"Write it yourself, as a [lab](/labs/README.md): {titles}. Begin by `python -m labs open {labs[0].id}`."
    return f"{' · '.join(links)}\n\n```bash\n{command}```\n\n{write}\n"


def raw(html: str) -> str:
    return f"```{{raw}} html\n{html}\n```\n"
