"""Every layout trains the same model as step01: loss, gradient norm, every gradient, weights after 3 steps."""

from functools import lru_cache

import parity
import pytest
import torch
from parity import LAYOUTS, QUICK, models, options
from ranks import run_ranks


def arguments(small_run, *options):
    return (*small_run, "--dtype", "float64", "--steps", str(parity.STEPS), "--eval-every", "3", *options)


# A layout's ranks train one model after the other. What is quick is apart.
CELLS = [pytest.param(*layout, ["tied"], marks=pytest.mark.quick) for layout in LAYOUTS if layout[2] in QUICK]
CELLS += [
    (step, ranks, layout, [name for name in models(ranks, layout) if name != "tied" or layout not in QUICK])
    for step, ranks, layout in LAYOUTS
]


@pytest.mark.parametrize(("step", "ranks", "layout", "names"), CELLS)
def test_parity(small_run, step, ranks, layout, names):
    parity.check(step, ranks, layout, *(arguments(small_run, *options(name, ranks, layout)) for name in names))


COLLAPSES = [
    ("step01_single_gpu", "step02_data_parallel", "--dp 1"),
    ("step01_single_gpu", "step02_data_parallel", "--dp 1 --dp-engine naive"),
    ("step02_data_parallel", "step03_tensor_parallel", "--tp 1"),
    ("step02_data_parallel", "step03_tensor_parallel", "--tp 1 --tp-engine naive"),
    ("step02_data_parallel", "step03_tensor_parallel", "--tp 1 --no-tp-overlap"),
    ("step03_tensor_parallel", "step04_pipeline_parallel", "--pp 1"),
    ("step03_tensor_parallel", "step04_pipeline_parallel", "--pp 1 --pp-schedule afab"),
    ("step04_pipeline_parallel", "step05_context_parallel", "--cp 1"),
    ("step04_pipeline_parallel", "step05_context_parallel", "--cp 1 --cp-engine all-gather"),
    ("step04_pipeline_parallel", "step05_context_parallel", "--cp 1 --cp-engine all-to-all"),
    ("step05_context_parallel", "step06_4d", ""),
    # The corpus of these tests is one document.
    ("step05_context_parallel", "step06_4d", "--mask-documents"),
    ("step05_context_parallel", "step06_4d", "--tp 1 --sequence-parallel"),
    ("step05_context_parallel", "step06_4d", "--pp-schedule zero-bubble"),
    ("step05_context_parallel", "step06_4d", "--on-bad-step skip --spike-factor 1000 --gc-every 2 --profile 2"),
]


@pytest.mark.parametrize("value", [float("nan"), float("inf")])
@pytest.mark.parametrize("kind", ["gradients", "weights"])
def test_what_is_no_number_is_found(small_run, kind, value):
    good, bad = (parity.record("step01_single_gpu", arguments(small_run)) for _ in range(2))
    assert parity.difference(bad, good)[0] == 0
    step = 0 if kind == "gradients" else parity.STEPS - 1
    with torch.inference_mode():
        getattr(bad[step], kind)["model.norm.weight"][3] = value
    assert parity.difference(bad, good) == (float("inf"), f"{kind} of model.norm.weight after step {step}")


DTYPES = ("float32", "float64", "bfloat16")


@lru_cache
def one_rank(step, *args):
    """A run in each dtype, one after the other."""
    return run_ranks(1, parity.record_each, step, [(*args, "--dtype", dtype) for dtype in DTYPES])[0]


@pytest.mark.parametrize(("before", "step", "layout"), COLLAPSES)
def test_axis_of_size_one_is_bitwise_the_step_before(small_run, before, step, layout):
    of_dtypes = zip(DTYPES, one_rank(step, *small_run, *layout.split()), one_rank(before, *small_run), strict=True)
    for dtype, records, expected in of_dtypes:
        for ours, theirs in zip(records, expected, strict=True):
            assert (ours.loss, ours.grad_norm) == (theirs.loss, theirs.grad_norm), dtype
            for kind in ("gradients", "weights"):
                for name, tensor in getattr(theirs, kind).items():
                    assert torch.equal(getattr(ours, kind)[name], tensor), (dtype, name)
