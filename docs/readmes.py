"""READMEs as pages. Their links to files of the project become links to pages of the site."""

import posixpath
import re
from pathlib import Path

# `[text](target)`, and not the target of a picture or of a link to elsewhere.
LINK = re.compile(r"(!?\[[^\]]*\]\()([^)\s]+)(\))")
FENCE = re.compile(r"^(```.*?^```$)", re.MULTILINE | re.DOTALL)
# What is generated in a README, and stands side by side with the old lines on a page of its own.
CHANGES = re.compile(r"<!-- (?:diff \S+ (\S+)/train\.py|lesson [^\n]+) -->")
LANGUAGES = {".py": "python", ".yaml": "yaml", ".sh": "bash", ".toml": "toml", ".csv": "text"}


def write_page(root: Path, name: str, source: Path) -> None:
    """Copy a text, with the links that `page_of` finds for it."""
    # Not what is between fences.
    parts = FENCE.split((root / name).read_text())
    parts[::2] = [LINK.sub(lambda link: _resolved(root, name, link), part) for part in parts[::2]]
    parts[::2] = [CHANGES.sub(lambda change: _side_by_side(change[1] or "step06_4d"), part) for part in parts[::2]]
    path = source / name
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_text("".join(parts))


def _side_by_side(step: str) -> str:
    return f"[Side by side, with notes, and the whole file](/diffs/{step}.md).\n"


def _resolved(root: Path, name: str, link: re.Match) -> str:
    before, target, after = link.groups()
    if "://" in target or target.startswith("#"):
        return link[0]
    path, _, anchor = target.partition("#")
    path = posixpath.normpath(posixpath.join(posixpath.dirname(name), path))
    if not (root / path).exists():
        raise ValueError(f"{name} links to {target}, which does not exist")
    if before.startswith("!"):
        return f"{before}/{path}{after}"
    return f"{before}/{page_of(root, path)}{f'#{anchor}' if anchor else ''}{after}"


def page_of(root: Path, path: str) -> str:
    """The page that shows a file or a directory of the project."""
    if (root / path).is_dir():
        return f"{path}/README.md" if (root / path / "README.md").exists() else f"files/{path}.md"
    return path if path.endswith(".md") else f"files/{path}.md"


def write_linked_files(root: Path, source: Path) -> list[str]:
    """A page for each file that a page links to and that is no text. Returns their names."""
    texts = [path.read_text() for path in sorted(source.rglob("*.md"))]
    linked = sorted({match[1] for text in texts for match in re.finditer(r"\]\(/files/([^)#]+)\.md", text)})
    for name in linked:
        page = source / "files" / f"{name}.md"
        page.parent.mkdir(parents=True, exist_ok=True)
        page.write_text(f"# {name}\n\n{_contents(root, name)}")
    return [f"files/{name}" for name in linked]


def _contents(root: Path, name: str) -> str:
    if (root / name).is_dir():
        files = sorted(path.name for path in (root / name).iterdir() if path.is_file())
        return "\n".join(f"- `{file}`" for file in files) + "\n"
    fence = f"`````{LANGUAGES.get(Path(name).suffix, 'text')}"
    return f"{fence}\n{(root / name).read_text()}\n`````\n"
