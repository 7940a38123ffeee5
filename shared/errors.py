"""What a user can put right."""

import tempfile
from pathlib import Path


class UserError(ValueError):
    """Something the user can put right. It is printed as one line; any other exception keeps its traceback."""


def check_writable(directory: Path, option: str) -> None:
    """Raise UserError unless `directory`, or the closest ancestor that exists, can be written to."""
    existing = next(path for path in (directory.absolute(), *directory.absolute().parents) if path.exists())
    try:
        tempfile.TemporaryFile(dir=existing).close()
    except OSError as error:
        raise UserError(f"{option}: cannot write to {existing} ({error.strerror}): choose another place") from error
