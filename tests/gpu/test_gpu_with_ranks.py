"""Ranks on one GPU: several by gloo, since NCCL refuses two ranks on a card, and one by NCCL, with every option."""

import parity
import pytest
import torch
from one_card import record, train
from ranks import run_ranks

pytestmark = pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a GPU")
# In float64, where a correct layout agrees to rounding.
EXACT = "--device cuda --dtype float64 --steps 3 --eval-every 0 --optimizer sgd --lr 0.5"
LAYOUTS = [
    ("step03_tensor_parallel", 2, "--tp 2"),
    ("step05_context_parallel", 2, "--cp 2"),
    ("step04_pipeline_parallel", 2, "--pp 2 --micro-batch-size 2"),
    ("step06_4d", 4, "--dp 2 --tp 2 --sequence-parallel --zero 1"),
    ("step06_4d", 4, "--dp 2 --cp 2 --zero 3 --recompute full"),
    ("step06_4d", 4, "--pp 2 --tp 2 --pp-schedule zero-bubble --micro-batch-size 2"),
    ("step05_context_parallel", 4, "--cp 2 --tp 2 --cp-engine all-to-all --num-key-value-heads 4"),
]
OPTIONS = [
    "",
    "--dtype float32",
    "--dtype float64",
    "--zero 1",
    "--zero 3 --recompute full",
    "--zero 1 --recompute selective --sequence-parallel",
    "--mask-documents",
    "--mask-documents --dtype float32",
    "--pp-schedule zero-bubble",
    "--tp-engine naive --dp-engine naive",
    "--on-bad-step skip --spike-factor 3",
    "--profile 1 --gc-every 1 --heartbeat-timeout 30",
    "--log-every 3",
    "--deterministic",
    "--compile",
]


@pytest.mark.parametrize("options", OPTIONS)
def test_nccl_with_every_option(small_run, options):
    """It is enough that nothing fails: what is computed is proved with several ranks."""
    args = [*small_run, "--device", "cuda", "--steps", "4", "--eval-every", "2", *options.split()]
    run_ranks(1, train, "step06_4d", args, timeout=120, method="spawn")


@pytest.mark.parametrize(("step", "ranks", "layout"), LAYOUTS)
def test_parity_on_one_card(small_run, step, ranks, layout):
    words = layout.split()
    heads = ["--num-key-value-heads", "4"] if "--num-key-value-heads" in words else []
    args = (*small_run, *EXACT.split(), *heads)
    expected = parity.record("step01_single_gpu", (*args, "--device", "cpu"))
    for rank, records in enumerate(run_ranks(ranks, record, step, (*args, *words), timeout=120, method="spawn")):
        error, where = parity.difference(records, expected)
        assert error <= parity.TOLERANCE, f"rank {rank}: {where} is off by {error:.1e}"


def test_a_checkpoint_goes_from_gpu_to_cpu_and_back(small_run, tmp_path):
    args = (*small_run, *EXACT.split(), "--schedule", "constant")
    records = []
    for steps, device in ((1, "cuda"), (2, "cpu"), (3, "cuda")):
        options = ("--device", device, "--checkpoint-dir", str(tmp_path), "--steps", str(steps), "--zero", "1")
        (part,) = run_ranks(1, record, "step06_4d", (*args, *options), timeout=120, method="spawn")
        records += part
    expected = parity.record("step01_single_gpu", (*args, "--device", "cpu"))
    # Each of three runs has the gradients of its first step, and the weights of its last.
    records = [
        ours._replace(
            **{kind: getattr(ours, kind) if getattr(theirs, kind) else {} for kind in ("gradients", "weights")}
        )
        for ours, theirs in zip(records, expected, strict=True)
    ]
    error, where = parity.difference(records, expected)
    assert error <= parity.TOLERANCE, f"{where} is off by {error:.1e}"
