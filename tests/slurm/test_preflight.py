"""A node that does not answer, does not work, or does not reach the others is named, and soon."""

import multiprocessing
import resource
import socket
import time

import pytest
import torch.distributed as dist
from scripts import load

NAMES = ["n1", "n2", "n3", "n4"]


@pytest.fixture(scope="module")
def preflight():
    return load("preflight")


@pytest.mark.quick
def test_rounds(preflight):
    assert preflight.rounds(1) == [[[0]]]
    assert preflight.rounds(2) == [[[0, 1]], [[0, 1]]]
    assert preflight.rounds(5) == [[[0, 1], [2, 3]], [[1, 2], [3, 4]], [[0, 1, 2, 3, 4]]]


@pytest.mark.parametrize(
    ("nodes", "silent", "complaints", "hangs", "message"),
    [
        (4, [], {}, [], ""),
        (1, [], {}, [], ""),
        (4, [1, 3], {}, [], "no sign of life from n2, n4 in 0 s"),
        (4, [], {2: "7 GPUs instead of 8"}, [(2, [0, 1, 2, 3])], "n3: 7 GPUs instead of 8"),
        (4, [], {}, [(0, [2, 3]), (1, [1, 2])], "no all-reduce between n3-n4, n2-n3: suspect n3"),
        (2, [], {}, [(0, [0, 1])], "no all-reduce between n1-n2: suspect n1 or n2"),
        (4, [], {}, [(2, [1])], "every pair of nodes can all-reduce, but not all 4 together in 0 s"),
    ],
)
def test_verdict(preflight, nodes, silent, complaints, hangs, message):
    """From what has been reported: `hangs` lists rounds, and nodes that did not get through them."""
    store = dist.HashStore()
    for node in set(range(nodes)) - set(silent):
        store.set(f"node {node}", complaints.get(node, ""))
        for number, groups in enumerate(preflight.rounds(nodes)):
            in_round = any(node in group for group in groups)
            if in_round and not any(number == n and node in stuck for n, stuck in hangs):
                store.set(f"round {number} node {node}", "")
    assert preflight.verdict(store, NAMES[:nodes], 0.2) == message


def _node(preflight, node, run, port, gives_up, results):
    if gives_up:
        # Connects and says that it is well, but no more.
        preflight.all_reduce = lambda *args: time.sleep(60)
    results.put((node, preflight.preflight(node, NAMES[:3], run, 0, "localhost", port, 10)))


@pytest.mark.parametrize(("hangs", "found"), [(None, ""), (1, "no all-reduce between n1-n2, n2-n3: suspect n2")])
def test_three_nodes(preflight, tmp_path, hangs, found):
    context = multiprocessing.get_context("fork")
    results = context.Queue()
    with socket.socket() as free:
        free.bind(("", 0))
        port = free.getsockname()[1]
    arguments = [(preflight, node, tmp_path, port, node == hangs, results) for node in range(3)]
    processes = [context.Process(target=_node, args=args, daemon=True) for args in arguments]
    for process in processes:
        process.start()
    try:
        assert dict(results.get(timeout=60) for _ in processes) == {0: found, 1: "", 2: ""}
    finally:
        for process in processes:
            process.kill()
            process.join()


def test_node_that_cannot_write_or_lacks_gpus(preflight, tmp_path):
    assert preflight.check_node(tmp_path, 0) == ""
    assert "No such file or directory" in preflight.check_node(tmp_path / "absent", 0)
    assert preflight.check_node(tmp_path, 99).endswith("GPUs instead of 99")
    limits = resource.getrlimit(resource.RLIMIT_FSIZE)
    resource.setrlimit(resource.RLIMIT_FSIZE, (1000, limits[1]))
    try:
        assert "File too large" in preflight.check_node(tmp_path, 0)
    finally:
        resource.setrlimit(resource.RLIMIT_FSIZE, limits)
