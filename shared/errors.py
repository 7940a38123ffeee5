"""What a user can put right."""

import re
import tempfile
from pathlib import Path


class UserError(ValueError):
    """Something the user can put right. It is printed as one line; any other exception keeps its traceback."""


def check_local(options: object) -> None:
    """Raise UserError for a path among the options that is none, such as s3://bucket, or begins with ~."""
    for name, path in vars(options).items():
        option = f"--{name.replace('_', '-')} {path}"
        # Path has made one slash of two.
        if isinstance(path, Path) and re.match(r"[a-z][a-z0-9+]+:/", str(path)):
            raise UserError(f"{option} is no local path: mount it, or copy it")
        if isinstance(path, Path) and str(path).startswith("~"):
            raise UserError(f"{option} begins with ~, which is not expanded here: write the whole path")


def check_writable(directory: Path, option: str) -> None:
    """Raise UserError unless `directory`, or the closest ancestor that exists, can be written to."""
    existing = next(path for path in (directory.absolute(), *directory.absolute().parents) if path.exists())
    try:
        tempfile.TemporaryFile(dir=existing).close()
    except OSError as error:
        raise UserError(f"{option}: cannot write to {existing} ({error.strerror}): choose another place") from error
