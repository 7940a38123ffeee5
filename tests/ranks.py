"""Run a function on many ranks, forked from this process: a case of 4 ranks takes a tenth of a second.

A fork is safe here because the parent never holds a process group, and each child runs torch on one thread.
"""

import multiprocessing
import os
import pickle
import tempfile
import time
import traceback
from collections.abc import Callable
from multiprocessing.connection import Connection, wait

import torch
import torch._dynamo  # Or each child would import it when it makes its first optimizer, in 1.5 s.
import torch.distributed as dist


class RankFailed(AssertionError):
    """A rank raised, died or did not finish in time. The message has its traceback."""


def _child(rank: int, world_size: int, store: str, function: Callable, args: tuple, results: Connection) -> None:
    try:
        torch.set_num_threads(1)
        os.environ |= {"RANK": str(rank), "LOCAL_RANK": str(rank), "WORLD_SIZE": str(world_size)}
        # The function calls init_process_group itself, as a trainer does; here the ranks meet in a file.
        init = dist.init_process_group
        dist.init_process_group = lambda backend, **kwargs: init(
            backend, **kwargs, init_method=f"file://{store}", rank=rank, world_size=world_size
        )
        # Plain pickle: multiprocessing's own would pass tensors by shared memory, which dies with the child.
        results.send_bytes(pickle.dumps((True, function(*args))))
        if dist.is_initialized():
            dist.barrier()
        code = 0
    except BaseException:
        results.send_bytes(pickle.dumps((False, traceback.format_exc())))
        code = 1
    # Skips the interpreter's teardown, in which gloo's threads may abort.
    os._exit(code)


def run_ranks(world_size: int, function: Callable, *args: object, timeout: float = 60) -> list:
    """What `function(*args)` returns on each rank. Raises RankFailed as soon as one rank fails, or after `timeout`
    seconds; no process is left behind either way."""
    context = multiprocessing.get_context("fork")
    with tempfile.TemporaryDirectory() as directory:
        pending: dict[Connection, int] = {}
        processes, returned = [], [None] * world_size
        for rank in range(world_size):
            ours, theirs = context.Pipe(duplex=False)
            child_args = (rank, world_size, f"{directory}/store", function, args, theirs)
            processes.append(context.Process(target=_child, args=child_args, daemon=True))
            processes[-1].start()
            theirs.close()
            pending[ours] = rank
        deadline = time.monotonic() + timeout
        try:
            while pending:
                ready = wait(list(pending), max(0, deadline - time.monotonic()))
                if not ready:
                    raise RankFailed(f"ranks {sorted(pending.values())} did not finish in {timeout} s: a deadlock?")
                for connection in ready:
                    rank = pending.pop(connection)
                    try:
                        succeeded, value = pickle.loads(connection.recv_bytes())
                    except EOFError:
                        succeeded, value = False, "the process died"
                    if not succeeded:
                        raise RankFailed(f"rank {rank}: {value}")
                    returned[rank] = value
        finally:
            if pending:
                for process in processes:
                    process.kill()
            for process in processes:
                process.join()
    return returned
