"""Processes and the mesh that names their groups."""

import math
import os
import sys
from datetime import timedelta

import torch
import torch.distributed as dist
import torch.distributed.distributed_c10d as c10d
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
    # Of the groups that are made later, the mesh's among them: torch's own are 30 minutes on gloo and 10 on NCCL.
    c10d.default_pg_timeout = c10d.default_pg_nccl_timeout = timeout
    dist.init_process_group(
        "nccl" if device.type == "cuda" else "gloo",
        timeout=timeout,
        device_id=device if device.type == "cuda" else None,
    )
    return init_device_mesh(device.type, tuple(sizes.values()), mesh_dim_names=tuple(sizes)), device
