"""Before training: does every node work, and does it reach the others? In seconds, with the names of those that don't.

Run by srun, one process per node. All report to the first node, which judges after a deadline whatever has arrived: a
node that hangs is one that has not reported. A node first checks itself, then all-reduces with the next one, with the
one before, and with all. Where all together would only hang, the node whose pairs both fail is the suspect.
"""

import os
import sys
import tempfile
import threading
import time
from datetime import timedelta
from pathlib import Path

import torch
import torch.distributed as dist

# Elements of the matmul and of the message.
SIZE = 1024


def check_node(run: Path, gpus: int) -> str:
    """What is wrong with this node by itself. Empty if nothing is."""
    try:
        with tempfile.TemporaryFile(dir=run) as file:
            file.write(bytes(2**20))
            file.flush()
            os.fsync(file.fileno())
        if torch.cuda.device_count() < gpus:
            return f"{torch.cuda.device_count()} GPUs instead of {gpus}"
        for device in devices(gpus):
            ones = torch.ones(SIZE, SIZE, device=device)
            if (ones @ ones).sum().item() != SIZE**3:
                return f"{device} computes wrong products"
    except (OSError, RuntimeError) as error:
        return str(error).splitlines()[0]
    return ""


def devices(gpus: int) -> list[torch.device]:
    return [torch.device("cuda", i) for i in range(gpus)] or [torch.device("cpu")]


def rounds(nodes: int) -> list[list[list[int]]]:
    """The groups that all-reduce at the same time: each node with the next, with the one before, with all."""
    pairs = [[[node, node + 1] for node in range(first, nodes - 1, 2)] for first in (0, 1)]
    return [*(groups for groups in pairs if groups), [list(range(nodes))]]


def all_reduce(store: dist.Store, group: list[int], node: int, gpus: int, seconds: float) -> None:
    """Over all nodes of the group, from each of a node's GPUs and its memory. Raises, or hangs, if it does not work."""
    dist.init_process_group(
        # Checkpoints are saved over gloo, which may take another network.
        "cpu:gloo,cuda:nccl" if gpus else "gloo",
        store=store,
        rank=group.index(node),
        world_size=len(group),
        timeout=timedelta(seconds=seconds),
    )
    for device in [*devices(gpus), torch.device("cpu")]:
        if device.type == "cuda":
            torch.cuda.set_device(device)
        message = torch.ones(SIZE, device=device)
        dist.all_reduce(message)
        if message.sum().item() != SIZE * len(group):
            raise RuntimeError(f"wrong sum on {device}")
    dist.destroy_process_group()


def report(node: int, nodes: int, run: Path, gpus: int, head: str, port: int, seconds: float) -> None:
    """Check, talk to the others, and tell the first node what works."""

    def connect() -> dist.TCPStore:
        return dist.TCPStore(head, port, is_master=False, timeout=timedelta(seconds=seconds), wait_for_workers=False)

    store, rendezvous = connect(), connect()
    store.set(f"node {node}", check_node(run, gpus))
    # A node that has waited for a bad one is late for the next round, and is to find the others still waiting.
    for number, (groups, share) in enumerate(zip(rounds(nodes), (0.1, 0.25, 0.5), strict=False)):
        for group in groups:
            if node in group:
                try:
                    all_reduce(dist.PrefixStore(f"{number} {group[0]}", rendezvous), group, node, gpus, seconds * share)
                    store.set(f"round {number} node {node}", "")
                except Exception as error:
                    print(f"all-reduce of {len(group)} nodes: {str(error).splitlines()[0]}", file=sys.stderr)
                    if dist.is_initialized():
                        dist.destroy_process_group()


def verdict(store: dist.Store, names: list[str], seconds: float) -> str:
    """What is wrong, as far as the reports say before the deadline. Empty if nothing is."""
    deadline, plan = time.monotonic() + seconds, rounds(len(names))
    checked = [f"node {node}" for node in range(len(names))]
    reduced = [[f"round {number} node {node}" for node in range(len(names))] for number in range(len(plan))]
    expected = [*checked, *(reduced[n][node] for n, groups in enumerate(plan) for group in groups for node in group)]
    while not (complete := store.check(expected)) and time.monotonic() < deadline:
        time.sleep(0.1)
    silent = [name for name, key in zip(names, checked, strict=True) if not store.check([key])]
    if silent:
        return f"no sign of life from {', '.join(silent)} in {seconds:.0f} s"
    complaints = [
        f"{name}: {text}" for name, key in zip(names, checked, strict=True) if (text := store.get(key).decode())
    ]
    if complaints or complete:
        return "; ".join(complaints)
    pairs = [(n, group) for n, groups in enumerate(plan[:-1]) for group in groups]
    failed = [group for n, group in pairs if not store.check([reduced[n][node] for node in group])]
    if not failed:
        return f"every pair of nodes can all-reduce, but not all {len(names)} together in {seconds:.0f} s"
    counts = [sum(node in group for group in failed) for node in range(len(names))]
    suspects = [name for name, count in zip(names, counts, strict=True) if count == max(counts)]
    broken = ", ".join("-".join(names[node] for node in group) for group in failed)
    return f"no all-reduce between {broken}: suspect {' or '.join(suspects)}"


def preflight(node: int, names: list[str], run: Path, gpus: int, head: str, port: int, seconds: float) -> str:
    """The verdict, on the first node; empty on the others, which end when that has been reached. Raises
    DistNetworkError if the first node cannot be reached."""
    limit = timedelta(seconds=seconds)
    store = dist.TCPStore(head, port, is_master=node == 0, timeout=limit, wait_for_workers=False)
    arguments = (node, len(names), run, gpus, head, port, seconds)
    # NCCL's part may hang for good.
    threading.Thread(target=report, args=arguments, daemon=True).start()
    if node == 0:
        found = verdict(store, names, seconds)
        store.set("verdict", found)
        # The others read it here.
        time.sleep(1)
        return found
    store.wait(["verdict"], 2 * limit)
    return ""


def main() -> None:
    environment, name = os.environ, os.environ["SLURMD_NODENAME"]
    # A collective that hangs is to hang, not to end the process: the first node says which.
    environment |= {"TORCH_NCCL_ASYNC_ERROR_HANDLING": "0", "TORCH_NCCL_ENABLE_MONITORING": "0"}
    node, names = int(environment["SLURM_NODEID"]), environment["NODES"].split()
    head, port, seconds = environment["HEAD"], int(environment["PORT"]) + 1, float(environment["PREFLIGHT"])
    code = 0
    try:
        found = preflight(node, names, Path(environment["RUN"]), int(environment["GPUS"]), head, port, seconds)
        if node == 0:
            print(f"preflight: {found or f'{len(names)} nodes work'}", flush=True)
            code = 1 if found else 0
    except dist.DistError as error:
        print(f"preflight: {name} does not reach {head}:{port}: {str(error).splitlines()[0]}", flush=True)
        code = 1
    # Whatever still hangs must not keep the process.
    os._exit(code)


if __name__ == "__main__":
    main()
