"""Every layout trains the same model as step01: loss, gradient norm, every gradient, weights after 3 steps."""

import parity
import pytest
import torch
from ranks import run_ranks

# A row: step, ranks, options. A new layout is a new row.
LAYOUTS = [
    ("step02_data_parallel", 2, "--dp-engine naive"),
    ("step02_data_parallel", 2, ""),
    ("step02_data_parallel", 2, "--bucket-mib 0.01"),
    ("step02_data_parallel", 2, "--bucket-mib 0.0001 --micro-batch-size 2"),
    ("step02_data_parallel", 4, "--dp 4 --micro-batch-size 2 --bucket-mib 0.02"),
    ("step02_data_parallel", 4, "--micro-batch-size 1 --dp-engine naive"),
    ("step02_data_parallel", 8, "--micro-batch-size 1"),
]
MODELS = {
    "sgd": "--optimizer sgd --lr 0.5",
    "adamw": "--optimizer adamw",
    "tied": "--optimizer sgd --lr 0.5 --tie-word-embeddings True",
}


def arguments(small_run, *options):
    return (*small_run, "--dtype", "float64", "--steps", str(parity.STEPS), "--eval-every", "3", *options)


@pytest.mark.parametrize("model", MODELS)
@pytest.mark.parametrize(("step", "ranks", "layout"), LAYOUTS)
def test_parity(small_run, step, ranks, layout, model):
    parity.check(step, ranks, layout, arguments(small_run, *MODELS[model].split()))


COLLAPSES = [
    ("step01_single_gpu", "step02_data_parallel", "--dp 1"),
    ("step01_single_gpu", "step02_data_parallel", "--dp 1 --dp-engine naive"),
]


@pytest.mark.parametrize("dtype", ["float32", "float64", "bfloat16"])
@pytest.mark.parametrize(("before", "step", "layout"), COLLAPSES)
def test_axis_of_size_one_is_bitwise_the_step_before(small_run, before, step, layout, dtype):
    args = (*small_run, "--dtype", dtype)
    (records,) = run_ranks(1, parity.record, step, (*args, *layout.split()))
    for ours, theirs in zip(records, parity.record(before, args), strict=True):
        assert (ours.loss, ours.grad_norm) == (theirs.loss, theirs.grad_norm)
        for kind in ("gradients", "weights"):
            for name, tensor in getattr(theirs, kind).items():
                assert torch.equal(getattr(ours, kind)[name], tensor), name
