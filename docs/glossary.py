"""Words of the glossary, where a page first uses them: a link that says on hover what the word means."""

import html
import posixpath
import re
from pathlib import Path

ROOT = Path(__file__).parent.parent
# Everyday words too: only a reader can tell which is meant.
EVERYDAY = {"beat", "block", "box", "copies", "document", "own", "piece", "place", "put off", "range", "unit"}
# Fences, code, links, headings, HTML and addresses stay as they are.
OTHER = r"^```.*?^```$|`[^`]+`|!?\[[^\]]*\]\([^)]*\)|^#[^\n]*$|<[^>]+>|https?://\S+"


def terms() -> dict[str, tuple[str, str]]:
    """Each word with its meaning, without marks, and the heading that it stands under."""
    found, heading = {}, ""
    for line in (ROOT / "GLOSSARY.md").read_text().splitlines():
        if line.startswith("## "):
            heading = line[3:].lower().replace(" ", "-")
        elif heading and line.startswith("| ") and not line.startswith("| word "):
            word, meaning = (cell.strip() for cell in line.strip("|").split("|"))
            found[word] = (meaning.replace("`", ""), heading)
    return found


def explain(source: Path, name: str) -> None:
    """In a page below `source`, link the first use of each word to the glossary."""
    if name == "GLOSSARY.md":
        return
    found, seen = terms(), set()
    # The longest first: "norm of heads" before any word in it.
    words = sorted(found.keys() - EVERYDAY, key=len, reverse=True)
    pattern = re.compile(rf"{OTHER}|\b({'|'.join(words)})(?=(?:s|es)?\b)", re.MULTILINE | re.DOTALL | re.IGNORECASE)
    glossary = posixpath.relpath("GLOSSARY.html", posixpath.dirname(name) or ".")

    def link(match: re.Match) -> str:
        word = (match[1] or "").lower()
        if not word or word in seen:
            return match[0]
        seen.add(word)
        meaning, heading = found[word]
        return f'<a class="term" href="{glossary}#{heading}" title="{html.escape(meaning)}">{match[1]}</a>'

    page = source / name
    page.write_text(pattern.sub(link, page.read_text()))
