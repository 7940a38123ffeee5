"""Write it yourself: `open` cuts a function out of the project, `check` judges what is put in its place."""

import argparse
import hashlib
import json
import textwrap
from pathlib import Path

from labs import ROOT
from labs.cut import cut
from labs.table import LABS, Lab

# Git ignores it.
MINE = ROOT / "my"


def file_of(lab: Lab) -> Path:
    return MINE / f"{lab.id}.py"


def _progress() -> dict[str, dict]:
    """By lab: `passed`, a checksum of the file that did, and how many `hints` have been shown."""
    path = MINE / "progress.json"
    return json.loads(path.read_text()) if path.exists() else {}


def _note(lab: Lab, **what: object) -> None:
    progress = _progress()
    progress.setdefault(lab.id, {}).update(what)
    MINE.mkdir(exist_ok=True)
    (MINE / "progress.json").write_text(json.dumps(progress, indent=1))


def _checksum(path: Path) -> str:
    return hashlib.sha256(path.read_bytes()).hexdigest()


def list_labs(args: argparse.Namespace) -> int:
    progress = _progress()
    for lab in LABS.values():
        path, passed = file_of(lab), progress.get(lab.id, {}).get("passed")
        state = f"open: {path.relative_to(ROOT)}" if path.exists() else ""
        if passed:
            state = "passed" if path.exists() and passed == _checksum(path) else "passed, changed since"
        print(f"{lab.id}  {lab.title:<40}{state}".rstrip())
    passed = sum("passed" in lab for lab in progress.values())
    print(f"\n{passed} of {len(LABS)} passed. `python -m labs open ID` begins one.")
    return 0


def open_lab(args: argparse.Namespace) -> int:
    lab = LABS[args.id]
    path = file_of(lab)
    if path.exists():
        print(f"{path.relative_to(ROOT)} exists: it is yours, and stays as it is. Move it away to begin anew.")
        return 1
    MINE.mkdir(exist_ok=True)
    path.write_text(cut(lab))
    print(f"{path.relative_to(ROOT)}: {lab.title}. Read {lab.read[0]}, {lab.read[1]!r}, then fill in what is missing.")
    return 0


def check_lab(args: argparse.Namespace) -> int:
    lab = LABS[args.id]
    path = file_of(lab)
    if not path.exists():
        print(f"There is no {path.relative_to(ROOT)} yet: python -m labs open {lab.id}")
        return 1
    # Takes seconds to import, which no other command needs.
    from labs.judge import judge

    if wrong := judge(lab, path):
        print(f"{lab.id}: {wrong}")
        return 1
    _note(lab, passed=_checksum(path))
    print(f"{lab.id}: right. The project's own is in {', '.join(lab.names)} of {lab.step}: compare.")
    return 0


def hint(args: argparse.Namespace) -> int:
    lab = LABS[args.id]
    shown = min(_progress().get(lab.id, {}).get("hints", 0) + 1, len(lab.hints))
    _note(lab, hints=shown)
    for i, text in enumerate(lab.hints[:shown], 1):
        print(textwrap.fill(f"{i}/{len(lab.hints)}  {text}", 100, subsequent_indent="     "))
    return 0


def add_commands(commands: argparse._SubParsersAction) -> None:
    commands.add_parser("list", help="the labs, and how far you are").set_defaults(run=list_labs)
    for name, run, text in (
        ("open", open_lab, "write my/ID.py: a function of the project, without its body"),
        ("check", check_lab, "put my/ID.py in the project's place, and say what is wrong"),
        ("hint", hint, "one hint more"),
    ):
        parser = commands.add_parser(name, help=text)
        parser.add_argument("id", choices=LABS, metavar="ID", help="as `list` shows it, such as 03a")
        parser.set_defaults(run=run)
