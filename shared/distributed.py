"""Processes and the mesh that names their groups."""

import math
import os
import sys
from datetime import timedelta

import numpy as np
import torch
import torch.distributed as dist
from torch.distributed import ProcessGroup
from torch.distributed.device_mesh import DeviceMesh, init_device_mesh

from shared.config import BaseConfig, UserError


def pick_device(config: BaseConfig) -> torch.device:
    """The GPU of this process, or the CPU. Raises UserError for --device cuda without one."""
    if config.device == "cuda" and not torch.cuda.is_available():
        raise UserError("--device cuda, but torch finds no GPU: leave the option out to train on the CPU")
    if torch.cuda.is_available() and config.device != "cpu":
        local_rank, gpus = int(os.environ.get("LOCAL_RANK", "0")), torch.cuda.device_count()
        if local_rank >= gpus:
            raise UserError(f"process {local_rank + 1} of this machine finds only {gpus} GPUs: lower --nproc-per-node")
        torch.cuda.set_device(local_rank)
        return torch.device("cuda", torch.cuda.current_device())
    return torch.device("cpu")


def single_device(config: BaseConfig) -> torch.device:
    """The device of a process that trains alone. Raises UserError if torchrun has started several."""
    if int(os.environ.get("WORLD_SIZE", "1")) > 1:
        raise UserError("this step trains on one device: launch it with --nproc-per-node 1")
    return pick_device(config)


def start_mesh(config: BaseConfig, **axes: int | None) -> tuple[DeviceMesh, torch.device]:
    """Join the other processes of torchrun. Returns their mesh and the device of this one.

    The mesh has the named axes, the last one varying fastest over ranks.
    One axis may be None: it takes the ranks that the others leave. Raises UserError if the sizes do not fit.
    """
    if "RANK" not in os.environ:
        raise UserError("launch this step with torchrun: torchrun --nproc-per-node 2 " + sys.argv[0])
    device, world_size = pick_device(config), int(os.environ["WORLD_SIZE"])
    given = math.prod(size for size in axes.values() if size is not None)
    sizes = {name: world_size // max(given, 1) if size is None else size for name, size in axes.items()}
    if min(sizes.values()) < 1 or math.prod(sizes.values()) != world_size:
        product = " · ".join(f"{name} {'any' if size is None else size}" for name, size in axes.items())
        raise UserError(f"{product} does not make {world_size} processes: change the sizes or --nproc-per-node")
    timeout = timedelta(seconds=config.timeout)
    dist.init_process_group(
        "nccl" if device.type == "cuda" else "gloo",
        timeout=timeout,
        device_id=device if device.type == "cuda" else None,
    )
    options = dist.ProcessGroupNCCL.Options() if device.type == "cuda" else dist.ProcessGroupGloo._Options()
    options._timeout = timeout
    return make_mesh(device.type, sizes, options), device


def make_mesh(device_type: str, sizes: dict[str, int], backend: object) -> DeviceMesh:
    """A mesh with these axes, whose groups are made with `backend`: options, or a name."""
    # With options of its own, an axis as large as the world has a group of its own too, whose name is the axis's.
    override = dict.fromkeys(sizes, backend)
    return init_device_mesh(device_type, tuple(sizes.values()), mesh_dim_names=tuple(sizes), backend_override=override)


def groups_along(mesh: DeviceMesh, *axes: str) -> list[list[int]]:
    """The ranks that differ in their place along these axes only, for each place along the others: a partition."""
    dims = [mesh.mesh_dim_names.index(axis) for axis in axes]
    # Not the tensor `mesh.mesh`, which does not exist in a dry run: a mesh of all ranks has them in order.
    ranks = np.arange(math.prod(mesh.shape)).reshape(mesh.shape)
    size = math.prod(mesh.shape[dim] for dim in dims)
    return np.moveaxis(ranks, dims, range(-len(dims), 0)).reshape(-1, size).tolist()


def make_group(partition: list[list[int]], axis: str, timeout: int) -> ProcessGroup | None:
    """The group of this rank in a partition of all ranks, or None where it is alone.

    Every rank calls this with the same partition, one after the other in the same order: on NCCL a group is split off
    the communicator of all ranks, by all of them. Ranks that are left out of the partition are alone. `axis` is the
    name under which the ledger counts what the group sends; a collective waits for `timeout` seconds.
    """
    partition = [ranks for ranks in partition if len(ranks) > 1]
    options = {"timeout": timedelta(seconds=timeout), "group_desc": axis}
    if dist.group.WORLD.bound_device_id is not None:
        return dist.split_group(split_ranks=partition, **options) if partition else None
    groups = [dist.new_group(ranks, **options) for ranks in partition]
    return next((group for ranks, group in zip(partition, groups, strict=True) if dist.get_rank() in ranks), None)
