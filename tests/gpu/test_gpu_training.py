"""Training on one GPU, without other ranks."""

import json

import pytest
import torch
from conftest import load_step, make_trainer

from shared.config import parse

pytestmark = pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a GPU")


def train(args, path, *more):
    step01 = load_step("step01_single_gpu")
    step01.train(parse(step01.Config, [*args, "--metrics-file", str(path), *more]))
    return [json.loads(line) for line in path.read_text().splitlines()]


@pytest.fixture
def run(small_run):
    """Options of a run on the GPU that learns something."""
    return [*small_run, "--device", "cuda", "--steps", "40", "--eval-every", "0", "--seq-len", "64"]


def test_losses_are_those_of_a_cpu(run, tmp_path):
    exact = train(run, tmp_path / "cpu", "--device", "cpu", "--dtype", "float64")
    for dtype, tolerance in (("float64", 1e-9), ("float32", 1e-2), ("bfloat16", 5e-2)):
        ours = train(run, tmp_path / dtype, "--dtype", dtype)
        for a, b in zip(ours, exact, strict=True):
            assert a["loss"] == pytest.approx(b["loss"], abs=tolerance), (dtype, a["step"])
    assert exact[0]["loss"] - exact[-1]["loss"] > 1


def test_between_two_reports_nothing_is_read(run):
    """torch raises for what makes the CPU wait for the GPU."""
    trainer = make_trainer(load_step("step01_single_gpu"), run)

    def step():
        trainer.forward_backward(trainer.batches.next())
        trainer.clip_grad_norm()
        trainer.optimizer.step()
        trainer.optimizer.zero_grad()

    step()
    torch.cuda.set_sync_debug_mode("error")
    try:
        step()
        step()
    finally:
        torch.cuda.set_sync_debug_mode("default")


def test_deterministic(run, tmp_path):
    """And no op of a step lacks such a kernel, for which torch would raise."""
    try:
        for dtype in ("bfloat16", "float32"):
            first, second = (
                train(run, tmp_path / f"{dtype} {i}", "--deterministic", "--dtype", dtype, "--steps", "5")
                for i in range(2)
            )
            assert [r["grad_norm"] for r in first] == [r["grad_norm"] for r in second]
    finally:
        torch.use_deterministic_algorithms(False)


def test_memory_is_that_of_training(run, tmp_path):
    """And not of the matrices, twice 64 MiB, that measure the GPU's speed in float32. cuBLAS has up to 32 MiB."""
    (*_, last) = train(run, tmp_path / "metrics", "--dtype", "float32", "--steps", "3")
    assert last["peak_memory"] < 100 * 2**20 and last["reserved_memory"] >= last["peak_memory"]


def test_compile_trains_the_same_model(run, tmp_path):
    plain, compiled = (train(run, tmp_path / f"m{len(more)}", "--steps", "5", *more) for more in ([], ["--compile"]))
    for a, b in zip(compiled, plain, strict=True):
        assert a["loss"] == pytest.approx(b["loss"], abs=2e-2)
