"""Which pickles a checkpoint may hold. torch writes `.metadata` as one, and reading a pickle runs whatever it names.

A checkpoint for --resume-from may be of somebody else. So before torch reads the file, it is read by an unpickler that
knows what torch writes, and nothing else.
"""

import pickle
from pathlib import Path

import torch
from survive.agreement import Failed

NAME = ".metadata"
METADATA = "torch.distributed.checkpoint.metadata"
OTHERS = {
    ("torch.distributed.checkpoint.filesystem", "_StorageInfo"),
    ("torch", "Size"),
    ("torch.serialization", "_get_layout"),
    ("pathlib", "PosixPath"),
}


class _Unpickler(pickle.Unpickler):
    def find_class(self, module: str, name: str) -> object:
        own = module == METADATA and "." not in name
        dtype = module == "torch" and isinstance(getattr(torch, name, None), torch.dtype)
        found = super().find_class(module, name) if own or dtype or (module, name) in OTHERS else None
        # The module of the metadata's classes has imported other things.
        if found is None or (own and getattr(found, "__module__", None) != METADATA):
            raise pickle.UnpicklingError(f"it would run {module}.{name}")
        return found


def check(path: Path) -> None:
    """Raise Failed if reading this file would run anything that torch's checkpoints have no use for."""
    with path.open("rb") as file:
        try:
            _Unpickler(file).load()
        except pickle.UnpicklingError as error:
            raise Failed(f"{path} is not of this program: {error}") from error
