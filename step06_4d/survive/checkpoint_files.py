"""What all ranks do together to write a checkpoint's files, and to read them."""

import shutil
import sys
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path
from uuid import uuid4

import torch
import torch.distributed as dist
import torch.distributed.checkpoint as dcp
from survive import durable
from survive.agreement import Failed, on_all, on_first
from survive.boxes import Boxes
from torch.distributed import ProcessGroup
from torch.distributed.checkpoint.api import CheckpointException
from torch.distributed.checkpoint.default_planner import DefaultSavePlanner


@contextmanager
def beside_training() -> Iterator[None]:
    """For a thread that writes while another one trains.

    Training gets the interpreter back 0.1 ms after it has asked for it, instead of 5. torch's checksums are left out:
    the manifest has others, of whole files, which are computed without the interpreter.
    """
    interval, checksums = sys.getswitchinterval(), torch.serialization.get_crc32_options()
    sys.setswitchinterval(1e-4)
    torch.serialization.set_crc32_options(False)
    try:
        yield
    finally:
        sys.setswitchinterval(interval)
        torch.serialization.set_crc32_options(checksums)


@beside_training()
def write(
    group: ProcessGroup,
    final: Path,
    state: dict[str, Boxes],
    manifest: dict,
    keep: int,
    keep_every: int,
    write_tokenizer: Callable[[Path], None],
) -> int:
    """Write the checkpoint `final`, each rank its boxes and the first also the tokenizer. Returns its size in bytes.

    Raises Failed, on all ranks, if any could not, and leaves nothing behind.
    """
    rank = dist.get_rank(group)
    # Another run that was given the same directory by mistake writes other files.
    temporary = on_first(group, lambda: durable.being_written(final).with_suffix(f".{uuid4().hex[:8]}"))

    def prepare() -> None:
        temporary.mkdir()
        write_tokenizer(temporary / durable.TOKENIZER)

    try:
        on_first(group, prepare)
        save(group, temporary, state, again=True)
        own = (f"__{rank}_*", *((".metadata", f"{durable.TOKENIZER}/*") if rank == 0 else ()))
        entries = on_all(group, lambda: durable.seal(temporary, *own))
        files = {name: entry for part in entries for name, entry in part.items()}
        on_first(group, lambda: durable.publish(temporary, final, {**manifest, "files": files}, keep, keep_every))
    except Failed:
        if rank == 0:
            shutil.rmtree(temporary, ignore_errors=True)
        raise
    return sum(entry["bytes"] for entry in files.values())


def save(group: ProcessGroup, path: Path, state: dict[str, Boxes], again: bool = False) -> None:
    """Write the boxes, each rank its own. Raises Failed on all ranks.

    If the same boxes are to be written `again`, who writes what is found once.
    """
    try:
        dcp.save(state, checkpoint_id=path, process_group=group, planner=DefaultSavePlanner(enable_plan_caching=again))
    except CheckpointException as error:
        raise Failed(reason(error)) from error


def verified(group: ProcessGroup, path: Path) -> dict:
    """The manifest of a checkpoint of which every file is as it was written: each rank reads a part of them.

    Raises Damaged, on all ranks, naming a file that is not, and Failed if one cannot be read.
    """
    manifest = on_first(group, lambda: durable.read_manifest(path))
    files = sorted(manifest["files"].items())
    own = dict(files[dist.get_rank(group) :: dist.get_world_size(group)])
    on_all(group, lambda: durable.verify(path, own))
    return manifest


def read(group: ProcessGroup, path: Path, state: dict[str, Boxes]) -> None:
    """Fill the boxes, of whatever dtype, from a checkpoint of any layout. Raises Failed on all ranks."""
    try:
        dcp.load(state, checkpoint_id=path, process_group=group)
    except CheckpointException as error:
        raise Failed(f"{path}: {reason(error)}") from error


def reason(error: CheckpointException) -> str:
    """In one line, what DCP reports with the traceback of every rank."""
    causes = {rank: str(cause) for rank, (cause, _) in list(error.failures.items())[:3]}
    # What torch says of a file that is shorter than what it has written, whatever the system said.
    short = "a file takes no more, as on a full disk"
    return "; ".join(f"rank {rank}: {short if 'unexpected pos' in cause else cause}" for rank, cause in causes.items())
