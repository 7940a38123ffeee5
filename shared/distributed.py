"""Processes and the mesh that names their groups."""

import math
import os
import sys
from datetime import timedelta
from importlib.util import find_spec

import numpy as np
import torch
import torch.distributed as dist
from torch.distributed import ProcessGroup
from torch.distributed.device_mesh import DeviceMesh, init_device_mesh
from torch.nn.attention import activate_flash_attention_impl

from shared.config import BaseConfig, UserError, has_bfloat16
from shared.corpus import Corpus

# From the axis whose ranks say least to each other, and may be far apart, to the one whose ranks talk most. The last
# one varies fastest over ranks, so its ranks are neighbours.
AXES = ("pp", "dp", "cp", "tp")

# cuBLAS: a workspace of its own for each stream. NCCL: no sums in NVLink's switches, which take what comes first.
DETERMINISTIC = {"CUBLAS_WORKSPACE_CONFIG": ":4096:8", "NCCL_ALGO": "^NVLS,NVLSTree"}


def pick_device(config: BaseConfig) -> torch.device:
    """The GPU of this process, or the CPU. Raises UserError for a GPU that is missing, or cannot do what is asked.

    Makes float32 matmuls on a GPU run in TF32, whose inputs have 10 bits behind the point, and whose sums are float32.
    With --deterministic it settles the order of sums, before anything is computed. A CPU's is settled anyway.
    """
    if config.device == "cuda" and not torch.cuda.is_available():
        raise UserError("--device cuda, but torch finds no GPU: leave the option out to train on the CPU")
    if torch.cuda.is_available() and config.device != "cpu":
        local_rank, gpus = int(os.environ.get("LOCAL_RANK", "0")), torch.cuda.device_count()
        if gpus == 1 and not dist.is_torchelastic_launched():
            # The launcher, as Slurm's, has given each process a GPU, and shows it no other.
            local_rank = 0
        if local_rank >= gpus:
            raise UserError(f"process {local_rank + 1} of this machine finds only {gpus} GPUs: lower --nproc-per-node")
        torch.cuda.set_device(local_rank)
        if config.dtype == "bfloat16" and not has_bfloat16():
            raise UserError(f"{torch.cuda.get_device_name()} has no bfloat16: leave --dtype bfloat16 out")
        torch.set_float32_matmul_precision("high")
        # Many tokens add up to a weight's gradient: not in bfloat16, where a matmul is shared by several processors.
        torch.backends.cuda.matmul.allow_bf16_reduced_precision_reduction = False
        if torch.cuda.get_device_capability()[0] == 9 and find_spec("flash_attn_interface"):
            # FlashAttention-3, whose kernels are for Hopper, in the place of torch's own, if its package is installed.
            activate_flash_attention_impl("FA3")
        if config.deterministic:
            for name, value in DETERMINISTIC.items():
                os.environ.setdefault(name, value)
            torch.use_deterministic_algorithms(True)
            # Nobody reads memory that nothing was written to.
            torch.utils.deterministic.fill_uninitialized_memory = False
        return torch.device("cuda", torch.cuda.current_device())
    return torch.device("cpu")


def check_launch(config: BaseConfig) -> dict[str, int]:
    """The axes of the mesh and their sizes: those that `config` has options for, in the order of AXES.

    One size may be None, which takes the ranks that the others leave. Raises UserError if the sizes do not fit the
    processes that torchrun has started.
    """
    axes = {axis: getattr(config, axis) for axis in AXES if hasattr(config, axis)}
    if axes and "RANK" not in os.environ:
        raise UserError("launch this step with torchrun: torchrun --nproc-per-node 2 " + sys.argv[0])
    world_size = int(os.environ.get("WORLD_SIZE", "1"))
    if not axes and world_size > 1:
        raise UserError("this step trains on one device: launch it with --nproc-per-node 1")
    given = math.prod(size for size in axes.values() if size is not None)
    sizes = {axis: world_size // max(given, 1) if size is None else size for axis, size in axes.items()}
    if any(size < 1 for size in sizes.values()) or math.prod(sizes.values()) != world_size:
        product = " · ".join(f"{axis} {'any' if size is None else size}" for axis, size in axes.items())
        raise UserError(f"{product} does not make {world_size} processes: change the sizes or --nproc-per-node")
    return sizes


def start_mesh(config: BaseConfig) -> tuple[DeviceMesh, torch.device]:
    """Join the other processes of torchrun. Returns their mesh, as `check_launch` has it, and this process's device."""
    sizes, device = check_launch(config), pick_device(config)
    timeout = timedelta(seconds=config.timeout)
    dist.init_process_group(
        "nccl" if device.type == "cuda" else "gloo",
        timeout=timeout,
        device_id=device if device.type == "cuda" else None,
    )
    return make_mesh(device.type, sizes, {axis: _group_options(axis, device, timeout) for axis in sizes}), device


def _group_options(axis: str, device: torch.device, timeout: timedelta) -> object:
    if device.type == "cuda":
        # What they send is to travel while a matmul runs that is launched right after it: it must be given processors
        # first.
        hidden = axis in ("cp", "tp")
        options = dist.ProcessGroupNCCL.Options(is_high_priority_stream=hidden)
    else:
        options = dist.ProcessGroupGloo._Options()
    options._timeout = timeout
    return options


def check_same(corpus: Corpus, device: torch.device) -> None:
    """Raise UserError on every rank if some rank has other tokens than the first, say from a cache of its own."""
    everything = corpus._replace(sources=corpus.sources + corpus.validation)
    mine, ranks = torch.tensor([int(everything.fingerprint, 16) >> 1], device=device), dist.get_world_size()
    everyones = torch.empty(ranks, dtype=mine.dtype, device=device)
    # All-gathers 8 bytes over all ranks, once.
    dist.all_gather_single(everyones, mine)
    first, *others = everyones.tolist()
    others = [rank for rank, one in enumerate(others, 1) if one != first]
    if others:
        raise UserError(
            f"ranks {others} have other tokens than rank 0, to train on or for validation: copy what is prepared to "
            "all machines, and name it by --dataset and --validation-dataset"
        )


def make_mesh(device_type: str, sizes: dict[str, int], backends: dict[str, object]) -> DeviceMesh:
    """A mesh with these axes, whose groups are made with `backends`: options, or a name, for each axis."""
    # With options of its own, an axis as large as the world has a group of its own too, whose name is the axis's.
    names = tuple(sizes)
    return init_device_mesh(device_type, tuple(sizes.values()), mesh_dim_names=names, backend_override=backends)


def groups_along(mesh: DeviceMesh, *axes: str) -> list[list[int]]:
    """The ranks that differ in their place along these axes only, for each place along the others: a partition."""
    dims = [mesh.mesh_dim_names.index(axis) for axis in axes]
    # Not of `mesh.mesh`, a tensor, which a dry run's fake tensors could not read.
    ranks = np.moveaxis(np.arange(mesh.size()).reshape(mesh.shape), dims, range(-len(dims), 0))
    return ranks.reshape(-1, math.prod(mesh.shape[dim] for dim in dims)).tolist()


def make_group(partition: list[list[int]], axis: str, timeout: int, backend: str | None = None) -> ProcessGroup | None:
    """The group of this rank in a partition of all ranks, or None where it is alone.

    Every rank calls this with the same partition, one after the other in the same order: on NCCL a group is split off
    the communicator of all ranks, by all of them. Ranks that are left out of the partition are alone. `axis` is the
    name under which the ledger counts what the group sends; a collective waits for `timeout` seconds. With a `backend`
    other than that of all ranks, one rank has a group as well: that of all ranks cannot stand in for it.
    """
    partition = [ranks for ranks in partition if len(ranks) > 1 or backend]
    options = {"timeout": timedelta(seconds=timeout), "group_desc": axis}
    if not partition:
        return None
    if backend is None and dist.group.WORLD.bound_device_id is not None:
        # Nobody is left out here. torch 2.13 names a group by how many its rank has, and closes groups in the order of
        # these names. With other numbers of them, ranks would close in other orders, and wait for each other forever.
        alone = sorted(set(range(dist.get_world_size())).difference(*partition))
        group = dist.split_group(split_ranks=partition + [[rank] for rank in alone], **options)
        return group if group.size() > 1 else None
    if backend == "gloo":
        # Next to NCCL, it says little, and not to all: connections are made when they are used.
        os.environ.setdefault("TORCH_GLOO_LAZY_INIT", "1")
    groups = [dist.new_group(ranks, backend=backend, **options) for ranks in partition]
    return next((group for ranks, group in zip(partition, groups, strict=True) if dist.get_rank() in ranks), None)
