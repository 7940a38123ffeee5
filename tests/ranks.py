"""Run a function on many ranks, forked from this process: a case of 4 ranks takes a tenth of a second.

A fork is safe here because the parent never holds a process group, and each child runs torch on one thread.
"""

import faulthandler
import gc
import itertools
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
from conftest import STEPS, hand_down, handed_down


class RankFailed(AssertionError):
    """A rank raised, died or did not finish in time. The message has its traceback."""


def _child(rank: int, world_size: int, store: str, function: Callable, args: tuple, results: Connection) -> None:
    try:
        # Where it waits, for a rank that does not finish. To file 2: a test may hold a stderr that is no file.
        faulthandler.dump_traceback_later(100, file=2)
        torch.set_num_threads(1)
        # What the parent has loaded is never garbage here.
        gc.freeze()
        os.environ |= {"RANK": str(rank), "LOCAL_RANK": str(rank), "WORLD_SIZE": str(world_size)}
        # The function calls init_process_group itself, as a trainer does. Here the ranks meet in a file, a new one each
        # time.
        init, times = dist.init_process_group, itertools.count()
        dist.init_process_group = lambda backend, **kwargs: init(
            backend, **kwargs, init_method=f"file://{store}-{next(times)}", rank=rank, world_size=world_size
        )
        value, failed_at = function(*args), None
        if dist.is_initialized():
            # Fails, or hangs, if some rank has called a collective that another has not.
            dist.barrier()
    except BaseException:
        value, failed_at = traceback.format_exc(), time.monotonic()
    # Plain pickle: multiprocessing's own would pass tensors by shared memory, which dies with the child.
    results.send_bytes(pickle.dumps((failed_at, value)))
    # Skips the interpreter's teardown, in which gloo's threads may abort.
    os._exit(0)


def run_ranks(world_size: int, function: Callable, *args: object, timeout: float = 120, method: str = "fork") -> list:
    """What `function(*args)` returns on each rank. Raises RankFailed as soon as one rank fails, or after `timeout`
    seconds; no process is left behind either way. Ranks that use a GPU are to be new processes: by method "spawn"."""
    context = multiprocessing.get_context(method)
    # Each rank would take 0.1 s to load its step.
    for step in (*args, getattr(function, "__globals__", {}).get("STEP")):
        if isinstance(step, str) and step in STEPS:
            hand_down(step)
    with tempfile.TemporaryDirectory() as directory:
        pending: dict[Connection, int] = {}
        processes, returned = [], [None] * world_size
        for rank in range(world_size):
            ours, theirs = context.Pipe(duplex=False)
            child_args = (rank, world_size, f"{directory}/store", function, args, theirs)
            # No daemon, which may not start processes, as preparing a corpus does.
            processes.append(context.Process(target=_child, args=child_args))
            processes[-1].start()
            theirs.close()
            pending[ours] = rank
        handed_down.clear()
        deadline, failures = time.monotonic() + timeout, []
        try:
            while pending:
                # After a first failure, a moment for others: the one that caused them may be read later.
                ready = wait(list(pending), 0.2 if failures else max(0, deadline - time.monotonic()))
                if failures and not ready:
                    break
                if not ready:
                    raise RankFailed(f"ranks {sorted(pending.values())} did not finish in {timeout} s: a deadlock?")
                for connection in ready:
                    rank = pending.pop(connection)
                    try:
                        failed_at, returned[rank] = pickle.loads(connection.recv_bytes())
                    except EOFError:
                        failed_at, returned[rank] = 0.0, "the process died"
                    if failed_at is not None:
                        failures.append((failed_at, rank))
            if failures:
                _, first = min(failures)
                raise RankFailed(f"rank {first}: {returned[first]}")
        finally:
            if pending:
                for process in processes:
                    process.kill()
            for process in processes:
                process.join()
    return returned
