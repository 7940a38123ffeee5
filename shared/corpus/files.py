"""Files that several processes write at once."""

import json
import os
from collections.abc import Iterator
from contextlib import ExitStack, contextmanager, suppress
from pathlib import Path

from filelock import FileLock


def appear(path: Path, content: dict, replace: bool = False) -> None:
    """Write a file of JSON that is there as a whole, or not at all. One that is there stays, unless it is replaced."""
    temporary = path.with_name(f".{path.name}.{here()}")
    temporary.write_text(json.dumps(content, indent=1) + "\n")
    if replace or not path.exists():
        os.replace(temporary, path)
    else:
        temporary.unlink()


def here() -> str:
    """No other process writes under this name."""
    return f"{os.uname().nodename}.{os.getpid()}"


@contextmanager
def one_after_the_other(lock: Path) -> Iterator[None]:
    """For processes of which the first does the work. Where the file system knows no locks, all do the same, which
    costs time and nothing else."""
    with ExitStack() as stack:
        with suppress(OSError, NotImplementedError):
            stack.enter_context(FileLock(lock))
        yield
