"""Which files a data set has: those of a local directory, or of the Hugging Face hub."""

import hashlib
import json
import os
import re
import sysconfig
from pathlib import Path
from typing import NamedTuple

from shared.config import BaseConfig, UserError
from shared.corpus.readers import READERS, File, is_text, kind

# Words by which file names tell of a split. Others are part of no split.
SPLITS = {
    "train": ("train", "training"),
    "validation": ("validation", "valid", "val", "dev"),
    "test": ("test", "testing", "eval", "evaluation"),
}


# Files of the datasets library beside its data.
ABOUT = ("dataset_infos.json", "dataset_info.json")


class Listing(NamedTuple):
    """The files of a data set in the order in which they are read, and its revision on the hub."""

    files: list[File]
    revision: str | None


def list_files(config: BaseConfig, dataset: str) -> Listing:
    """Raises UserError if there is no such data set, or if it has nothing that can be read for the split."""
    path = Path(dataset)
    if dataset == "stdlib":
        path = Path(sysconfig.get_path("stdlib"))
        skip = {"site-packages", "dist-packages", "test", "tests", "idle_test", "__pycache__"}
        found = [file for file in path.rglob("*.py") if not skip & set(file.relative_to(path).parts)]
    elif path.is_file():
        if kind(dataset) not in READERS:
            raise UserError(f"--dataset {dataset}: read are only {', '.join(READERS)}, also with .gz, .bz2, .xz, .zst")
        found = [path]
    elif path.is_dir():
        found = _local_split(config, path)
    else:
        return _hub_files(config, dataset)
    stats = {str(file.relative_to(path)): (file.absolute(), file.stat()) for file in found}
    files = {name: File(str(file), stat.st_size, stat.st_mtime_ns) for name, (file, stat) in stats.items()}
    return Listing(_ordered(files, config), None)


def _ordered(files: dict[str, File], config: BaseConfig) -> list[File]:
    """By the hash of their names, so that neither the held-out end of a corpus nor the part of it that a stream reaches
    is what happens to be sorted there. The seed draws the part that is streamed."""
    salt = f"{config.seed} " if config.streaming else ""
    return [files[name] for name in sorted(files, key=lambda name: hashlib.sha256((salt + name).encode()).digest())]


def _local_split(config: BaseConfig, directory: Path) -> list[Path]:
    """The files of --split in a directory."""
    if (directory / "state.json").exists() and (directory / "dataset_info.json").exists():
        # Of `Dataset.save_to_disk`, which names its files in state.json.
        state = json.loads((directory / "state.json").read_text())
        return [directory / data["filename"] for data in state["_data_files"]]
    if (directory / "dataset_dict.json").exists():
        return _local_split(config, directory / config.split)
    files = _walk(directory)
    others = [file for file in files if not (is_text(file) and file.stem.upper() in ("README", "LICENSE"))]
    # Beside something else than texts, or texts that all tell a split, those are about the data.
    if others and (not all(map(is_text, others)) or all(_split_of(str(f.relative_to(directory))) for f in others)):
        files = others
    kinds = {READERS[kind(file.name)] for file in files}
    if len(kinds) != 1:
        found = ", ".join(sorted({kind(file.name) for file in files})) or "no such file"
        raise UserError(f"--dataset {directory} must hold one kind of {', '.join(READERS)}, found {found}")
    by_split = {}
    for file in files:
        by_split.setdefault(_split_of(str(file.relative_to(directory))), []).append(file)
    # Texts may be named after what they are about: only a whole directory that is divided counts as divided.
    if set(by_split) == {None} or (None in by_split and all(map(is_text, files))):
        by_split = {"train": files}
    if config.split not in by_split:
        raise UserError(f"--dataset {directory} has no --split {config.split}, but {', '.join(filter(None, by_split))}")
    if None in by_split:
        raise UserError(
            f"--dataset {directory}: {len(by_split[None])} files tell no split by their names "
            f"({by_split[None][0].name}), but others do ({by_split[config.split][0].name}): move those to leave out"
        )
    # Each once: a directory may have been found by its own name, and by a link that tells a split.
    chosen = {(os.path.realpath(file.parent), file.name): file for file in by_split[config.split]}.values()
    if lost := next((file for file in chosen if not file.exists()), None):
        raise UserError(f"--dataset {directory}: {lost} is a link that leads nowhere")
    return list(chosen)


def _walk(directory: Path) -> list[Path]:
    """The files below it of kinds that can be read, none of them hidden, and links to such. Raises UserError for a
    directory that is out of reach: a data set of which a part is missing is another one."""

    def refuse(error: OSError) -> None:
        raise UserError(f"--dataset {directory}: cannot read {error.filename} ({error.strerror})") from error

    found, seen = [], set()
    for root, directories, names in os.walk(directory, onerror=refuse, followlinks=True):
        # Through whatever link one comes, which may tell a split. In an order that is the same on every machine.
        place = os.path.realpath(root), _split_of(str(Path(root).relative_to(directory)))
        if place in seen:
            directories.clear()
            continue
        seen.add(place)
        # Which a file system has at its root, and only root reads.
        directories[:] = sorted(name for name in directories if not name.startswith(".") and name != "lost+found")
        for file in (Path(root, name) for name in names if not name.startswith(".")):
            # Perhaps a directory: part, part.1
            if not file.suffix.strip(".0123456789") and file.is_symlink() and not file.exists():
                raise UserError(f"--dataset {directory}: {file} is a link that leads nowhere")
            if kind(file.name) in READERS and (file.is_file() or file.is_symlink()) and file.name not in ABOUT:
                found.append(file)
    return found


def _split_of(name: str) -> str | None:
    """The split that a file's name, or a directory's that it lies in, tells of: the last one counts."""
    words = re.split(r"[^a-zA-Z]+", name.lower())
    return next((split for word in reversed(words) for split, names in SPLITS.items() if word in names), None)


def _hub_files(config: BaseConfig, dataset: str) -> Listing:
    """The files that the hub's data set has for the split, at its newest revision or at `@REVISION`: by the datasets
    library, which knows how people name them."""
    from datasets import load_dataset_builder
    from huggingface_hub import HfFileSystem

    try:
        name, _, revision = dataset.partition("@")
        builder = load_dataset_builder(name, config.dataset_config, revision=revision or None)
        data_files = builder.config.data_files or {}
        urls, filesystem = [str(url) for url in data_files.get(config.split, [])], HfFileSystem()
        # Their names without the revision.
        files = {re.sub("@[^/]*", "", url): File(url, filesystem.info(url)["size"], 0) for url in urls}
    except Exception as error:  # the hub's errors, the network's and those of a malformed id share no base
        raise UserError(
            f"--dataset {dataset}: no such file or directory, and no Hugging Face dataset within reach "
            f"({' '.join(str(error).split())})"
        ) from error
    if not files:
        raise UserError(
            f"--dataset {dataset} has no --split {config.split}, but {', '.join(map(str, data_files)) or 'none'}"
        )
    if kinds := {kind(url) for url in urls} - set(READERS):
        raise UserError(f"--dataset {dataset} has {', '.join(sorted(kinds))} files: read are only {', '.join(READERS)}")
    revision = re.search(r"@([0-9a-f]{40})", urls[0])
    return Listing(_ordered(files, config), revision.group(1) if revision else None)
