"""Encoding documents by all cores: a process for each, since threads of one would share a cache and the interpreter."""

import multiprocessing
import os
import signal
import threading
from collections import deque
from collections.abc import Iterator
from concurrent.futures import Future, ProcessPoolExecutor
from concurrent.futures.process import BrokenProcessPool
from typing import Any

import numpy as np

from shared.config import UserError
from shared.corpus.tokenizers import Encoder

# One process has to read and write for all.
MAX_PROCESSES = 32
_encoder: Encoder | None = None


def encode_batches(encoder: Encoder, batches: Iterator[tuple[list[str], Any]]) -> Iterator[tuple[list, Any]]:
    """For each batch of texts, and what comes with it: the ids (n,) of each text, and the same, in the same order.

    Processes encode some batches ahead. If reading one fails, those before it come first. Raises UserError if a
    process is killed.
    """
    # Cores that this process may use, where the system tells.
    cores = len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count()
    processes = min(cores, MAX_PROCESSES)
    pending: deque[tuple[Future, Any]] = deque()
    ended, failed = False, None
    with ProcessPoolExecutor(processes, multiprocessing.get_context("fork"), _start, (encoder,)) as pool:
        while pending or not ended:
            try:
                while not ended and len(pending) <= 2 * processes:
                    texts, more = next(batches)
                    pending.append((pool.submit(_encode, texts), more))
            except StopIteration:
                ended = True
            except Exception as error:
                ended, failed = True, error
            if pending:
                future, more = pending.popleft()
                yield _result(future), more
    if failed:
        raise failed


def _result(future: Future) -> list[np.ndarray]:
    try:
        return future.result()
    except BrokenProcessPool as error:
        raise UserError(
            "a process that encodes documents was killed, perhaps for want of memory: the same command goes on after "
            "the last shard, and on fewer cores (taskset -c 0-3 python ...) it takes less memory"
        ) from error


def _start(encoder: Encoder) -> None:
    global _encoder
    _encoder = encoder
    # No threads besides the processes.
    os.environ["TOKENIZERS_PARALLELISM"] = "false"
    # Ctrl-C is for the process that started this one, without which there is nothing to do.
    signal.signal(signal.SIGINT, signal.SIG_IGN)
    threading.Thread(target=_end_with_parent, daemon=True).start()


def _end_with_parent() -> None:
    multiprocessing.parent_process().join()
    os._exit(1)


def _encode(texts: list[str]) -> list[np.ndarray]:
    return _encoder.encode(texts)
