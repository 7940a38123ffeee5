"""Directories that are complete or not there, whenever the power fails: `step-000120`, with a manifest of its files.

They are written under another name, forced to disk and renamed, which is one operation. What happens to a file after
that shows in its size or its checksum.
"""

import contextlib
import hashlib
import json
import os
import shutil
from pathlib import Path

from survive import metadata
from survive.agreement import Damaged, Failed

from shared.config import UserError

MANIFEST, TOKENIZER, LATEST = "manifest.json", "tokenizer", "latest"
# A file in those that stay for good, whatever a later run keeps.
FOR_GOOD = "for-good"
# Of what this version writes and reads.
FORMAT = 1


def step_directory(directory: Path, step: int) -> Path:
    return directory / f"step-{step:06}"


def step_of(checkpoint: Path) -> int:
    return int(checkpoint.name.removeprefix("step-"))


def being_written(final: Path) -> Path:
    """What it is called until it is complete, and again from when it is to be deleted."""
    return final.with_name(f".tmp-{final.name}")


def complete(directory: Path) -> list[Path]:
    """The complete checkpoints of a directory, newest first."""
    found = [path for path in directory.glob("step-*") if path.name[5:].isdecimal()]
    return sorted(found, key=step_of, reverse=True)


def named(path: Path) -> Path:
    """The checkpoint that a user means: this one, or the newest of a directory of them."""
    path = path.resolve()
    return path if (path / MANIFEST).exists() else next(iter(complete(path)), path)


def sync(path: Path) -> None:
    """Force a file's contents to disk, or a directory's names."""
    descriptor = os.open(path, os.O_RDONLY)
    try:
        os.fsync(descriptor)
    finally:
        os.close(descriptor)


def _sha256(path: Path) -> str:
    with path.open("rb") as file:
        return hashlib.file_digest(file, "sha256").hexdigest()


def seal(directory: Path, *patterns: str) -> dict[str, dict]:
    """Force the files of these patterns to disk. Returns the manifest's entries for them."""
    entries = {}
    for path in sorted(path for pattern in patterns for path in directory.glob(pattern)):
        sync(path)
        name = path.relative_to(directory).as_posix()
        entries[name] = {"bytes": path.stat().st_size, "sha256": _sha256(path)}
    return entries


def verify(directory: Path, entries: dict[str, dict]) -> None:
    """Raise Damaged, naming the file, unless these files are as they were written, and Failed for one that torch must
    not read."""
    for name, entry in entries.items():
        path = directory / name
        try:
            size = path.stat().st_size
        except FileNotFoundError as error:
            raise Damaged(f"{path} is missing") from error
        if size != entry["bytes"]:
            raise Damaged(f"{path} has {size} bytes, but {entry['bytes']} were written")
        if _sha256(path) != entry["sha256"]:
            raise Damaged(f"{path} is not what was written: its checksum differs")
        if name == metadata.NAME:
            metadata.check(path)


def _checksum(manifest: dict) -> str:
    return hashlib.sha256(json.dumps(manifest, sort_keys=True).encode()).hexdigest()


def read_manifest(directory: Path) -> dict:
    """What was saved there. Raises Damaged if it is not what was written, and Failed if this version cannot read it."""
    path = directory / MANIFEST
    try:
        manifest = json.loads(path.read_bytes())
        checksum = manifest.pop("sha256")
    except FileNotFoundError as error:
        raise Damaged(f"{path} is missing") from error
    except (ValueError, KeyError, AttributeError) as error:
        raise Damaged(f"{path} is not what was written: {error}") from error
    if checksum != _checksum(manifest):
        raise Damaged(f"{path} is not what was written: its checksum differs")
    if manifest["format"] != FORMAT:
        raise Failed(f"{path} is of format {manifest['format']}, but this version reads {FORMAT}")
    return manifest


def opened(path: Path) -> tuple[Path, dict]:
    """The checkpoint that a user means, and its manifest. Raises UserError unless all of it is as it was written."""
    try:
        source = named(path)
        manifest = read_manifest(source)
        verify(source, manifest["files"])
    except (Failed, OSError) as error:
        raise UserError(f"{error}: choose another checkpoint") from error
    return source, manifest


def publish(temporary: Path, final: Path, manifest: dict, keep: int, keep_every: int) -> None:
    """Make what has been written a complete checkpoint, the latest; then delete all but the `keep` newest
    and those of every `keep_every`-th step.

    At every moment the newest complete one is whole: nothing is deleted before the next is on disk.
    """
    directory = final.parent
    if final.exists():
        raise Failed(f"{final} is there already: does another run save to this directory?")
    for name, entry in manifest["files"].items():
        if not (temporary / name).exists() or (temporary / name).stat().st_size != entry["bytes"]:
            raise Failed(f"{temporary / name} is not what its rank wrote: does every machine see the same directory?")
    manifest = {"format": FORMAT, **manifest}
    (temporary / MANIFEST).write_text(json.dumps(manifest | {"sha256": _checksum(manifest)}, indent=1))
    sync(temporary / MANIFEST)
    if keep_every and step_of(final) % keep_every == 0:
        (temporary / FOR_GOOD).touch()
    for path in (temporary, *(path for path in temporary.rglob("*") if path.is_dir())):
        sync(path)
    os.rename(temporary, final)
    sync(directory)
    # From here on it counts, whatever cannot be done now: where there are no links, or a file is still open on NFS.
    with contextlib.suppress(OSError):
        link = being_written(directory / LATEST)
        link.unlink(missing_ok=True)
        link.symlink_to(final.name)
        os.replace(link, directory / LATEST)
    for old in complete(directory)[keep:]:
        if (old / FOR_GOOD).exists() or (keep_every and step_of(old) % keep_every == 0):
            continue
        with contextlib.suppress(OSError):
            # Under this name a part of it is never taken for a checkpoint.
            os.rename(old, being_written(old))
            shutil.rmtree(being_written(old))


def discard_unfinished(directory: Path) -> None:
    """What a run that was killed has begun to write, or to delete."""
    being_written(directory / LATEST).unlink(missing_ok=True)
    for path in directory.glob(being_written(directory / "step-*").name):
        shutil.rmtree(path, ignore_errors=True)


def set_aside(path: Path) -> Path:
    """Rename a damaged checkpoint, so that it neither counts as the newest nor gets lost."""
    aside = path.with_name(f"damaged-{path.name}")
    shutil.rmtree(aside, ignore_errors=True)
    os.rename(path, aside)
    return aside
