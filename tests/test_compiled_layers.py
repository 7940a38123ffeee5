"""--compile: a layer is one graph, which all layers share, with the messages that it sends uncompiled."""

from collections import Counter
from functools import partial
from unittest.mock import patch

import parity
import pytest
import torch
import torch.distributed as dist
from conftest import load_step, make_trainer
from fake_ranks import fake_group
from ranks import run_ranks
from torch._dynamo.backends.common import aot_autograd
from torch._dynamo.utils import counters
from torch._functorch.partitioners import min_cut_rematerialization_partition

pytestmark = pytest.mark.usefixtures("compiler")
RING = {"attention": 1, "attention_backward": 1}
SHARED_TOKENS = {"all_gather_into_tensor": 6, "reduce_scatter_tensor": 4}
# Step, ranks, options, and what a layer and its backward send for a micro-batch.
ROWS = [
    ("step03_tensor_parallel", 2, "--tp 2 --tp-engine naive", {"all_reduce": 7}),
    # Two of them for the gradients of copied keys and values.
    ("step06_4d", 4, "--tp 4 --recompute full", {"all_reduce": 6}),
    # Two of the gathers are forward's, made again.
    ("step06_4d", 4, "--tp 2 --cp 2 --sequence-parallel", SHARED_TOKENS | RING),
    ("step06_4d", 2, "--cp 2 --cp-engine all-gather --recompute full", RING),
    ("step06_4d", 2, "--cp 2 --cp-engine all-to-all --mask-documents", {"all_to_all_single": 4} | RING),
    ("step06_4d", 1, "--mask-documents", RING),
]


def compiled(step, ranks, args, evaluate=False):
    """Graphs and breaks of the layers of a rank whose other ranks do not exist, and what the graphs send."""
    # Not the one that lets forked ranks meet.
    dist.init_process_group = dist.distributed_c10d.init_process_group
    counters.clear()
    sent = Counter()

    def count(graph, inputs):
        targets = [node.target for node in graph.graph.nodes if isinstance(node.target, torch._ops.OpOverload)]
        sent.update(op._opname for op in targets if op.namespace in ("_c10d_functional", "context"))
        return graph

    # Without the time of a code generator, but with torch's choice of what is kept for backward.
    backend = aot_autograd(fw_compiler=count, partition_fn=min_cut_rematerialization_partition)
    compile_as = partial(torch.compile, backend=lambda graph, inputs, options=None: backend(graph, inputs))
    with fake_group(0, ranks), patch.object(torch, "compile", compile_as):
        trainer = make_trainer(load_step(step), [*args, "--compile"])
        for _ in range(2):
            trainer.forward_backward(trainer.batches.next())
        if evaluate:
            trainer.evaluate()
    sent.pop("wait_tensor", None)
    return counters["stats"]["unique_graphs"], sum(counters["graph_break"].values()), dict(sent)


@pytest.mark.parametrize(("step", "ranks", "options", "sent"), ROWS)
def test_a_layer_is_one_graph(small_run, step, ranks, options, sent):
    assert run_ranks(1, compiled, step, ranks, [*small_run, *options.split()], timeout=300) == [(1, 0, sent)]


@pytest.mark.parametrize(("step", "ranks"), [("step03_tensor_parallel", 1), ("step06_4d", 1), ("step06_4d", 2)])
def test_an_evaluation_is_another_graph(small_run, step, ranks):
    """Which has no gradients."""
    args = [*small_run, "--tp", str(ranks)]
    ((graphs, breaks, _),) = run_ranks(1, compiled, step, ranks, args, True, timeout=300)
    assert (graphs, breaks) == (2, 0)


def test_the_ring_of_step05_is_cut(small_run):
    """It teaches without the operator that step06 makes of it."""
    args = "step05_context_parallel", 2, [*small_run, "--cp", "2"]
    ((graphs, breaks, _),) = run_ranks(1, compiled, *args, timeout=300)
    assert (graphs, breaks) == (8, 6)


LAYOUTS = [
    ("step03_tensor_parallel", "--tp 2"),
    ("step05_context_parallel", "--cp 2 --cp-engine all-gather"),
    ("step06_4d", "--tp 2 --sequence-parallel --recompute full"),
    ("step06_4d", "--cp 2 --zero 3"),
    # Which cuts a layer where it puts off gradients of weights.
    ("step06_4d", "--pp 2 --pp-schedule zero-bubble --micro-batch-size 2"),
]


@pytest.mark.parametrize(("step", "layout"), LAYOUTS)
def test_parity(small_run, step, layout):
    args = (*small_run, "--dtype", "float64", "--steps", str(parity.STEPS), "--eval-every", "0", "--optimizer", "sgd")
    # The graphs of forward and backward, operator by operator.
    with patch.object(torch, "compile", partial(torch.compile, backend="aot_eager")):
        parity.check(step, 2, f"{layout} --compile", args, timeout=300)
