"""Does a layout of a step train the same model as step01? In float64, where a correct one agrees to rounding."""

import math
from collections.abc import Callable, Sequence
from contextlib import ExitStack
from functools import lru_cache
from itertools import pairwise
from types import ModuleType
from typing import Any, NamedTuple
from unittest.mock import patch

import torch
import torch.distributed as dist
from conftest import load_step
from ranks import run_ranks
from torch import Tensor

from shared.config import parse
from shared.metrics import Metrics

STEPS = 3
TOLERANCE = 1e-10
# Step, ranks, options. A new layout is a new row.
LAYOUTS = [
    ("step02_data_parallel", 2, "--dp-engine naive"),
    ("step02_data_parallel", 2, ""),
    ("step02_data_parallel", 2, "--bucket-mib 0.01"),
    ("step02_data_parallel", 2, "--bucket-mib 0.0001 --micro-batch-size 2"),
    ("step02_data_parallel", 4, "--dp 4 --micro-batch-size 2 --bucket-mib 0.02"),
    ("step02_data_parallel", 4, "--micro-batch-size 1 --dp-engine naive"),
    ("step02_data_parallel", 8, "--micro-batch-size 1"),
    ("step03_tensor_parallel", 2, "--tp 2"),
    ("step03_tensor_parallel", 2, "--tp 2 --tp-engine naive"),
    ("step03_tensor_parallel", 2, "--tp 2 --no-tp-overlap --micro-batch-size 2"),
    ("step03_tensor_parallel", 4, "--tp 4"),
    ("step03_tensor_parallel", 4, "--dp 2 --tp 2"),
    ("step03_tensor_parallel", 8, "--dp 2 --tp 4 --micro-batch-size 2 --bucket-mib 0.01"),
    ("step03_tensor_parallel", 8, "--dp 2 --tp 4 --tp-engine naive --micro-batch-size 2"),
    ("step04_pipeline_parallel", 2, "--pp 2"),
    ("step04_pipeline_parallel", 2, "--pp 2 --micro-batch-size 1 --pp-schedule afab"),
    ("step04_pipeline_parallel", 2, "--pp 2 --micro-batch-size 8"),
    ("step04_pipeline_parallel", 4, "--dp 2 --pp 2 --micro-batch-size 1 --bucket-mib 0.01"),
    ("step04_pipeline_parallel", 4, "--pp 2 --tp 2 --micro-batch-size 2 --pp-schedule afab"),
    ("step04_pipeline_parallel", 8, "--dp 2 --pp 2 --tp 2 --micro-batch-size 1"),
    ("step05_context_parallel", 2, "--cp 2 --cp-engine all-gather"),
    ("step05_context_parallel", 4, "--cp 4 --cp-engine all-gather --cp-split contiguous --micro-batch-size 2"),
    ("step05_context_parallel", 8, "--tp 2 --pp 2 --cp 2 --cp-engine all-gather --micro-batch-size 2"),
    ("step05_context_parallel", 2, "--cp 2"),
    ("step05_context_parallel", 2, "--cp 2 --cp-split contiguous --micro-batch-size 2"),
    ("step05_context_parallel", 2, "--cp 2 --cp-engine all-to-all"),
    ("step05_context_parallel", 4, "--cp 4 --micro-batch-size 8"),
    ("step05_context_parallel", 4, "--dp 2 --cp 2 --micro-batch-size 2"),
    ("step05_context_parallel", 4, "--tp 2 --cp 2"),
    ("step05_context_parallel", 4, "--pp 2 --cp 2 --micro-batch-size 1"),
    ("step05_context_parallel", 8, "--dp 2 --tp 2 --cp 2 --micro-batch-size 2"),
    ("step05_context_parallel", 8, "--dp 2 --pp 2 --cp 2 --micro-batch-size 1"),
    ("step05_context_parallel", 8, "--tp 2 --pp 2 --cp 2 --micro-batch-size 2"),
    ("step05_context_parallel", 16, "--dp 2 --tp 2 --pp 2 --cp 2 --micro-batch-size 1"),
    ("step06_4d", 16, "--dp 2 --tp 2 --pp 2 --cp 2 --micro-batch-size 1 --bucket-mib 0.01"),
    ("step06_4d", 2, "--zero 1 --micro-batch-size 2"),
    ("step06_4d", 4, "--zero 2 --dp 2 --tp 2 --micro-batch-size 2"),
    ("step06_4d", 4, "--zero 3 --micro-batch-size 2"),
    ("step06_4d", 4, "--zero 2 --shard 2 --micro-batch-size 1"),
    ("step06_4d", 8, "--zero 3 --shard 2 --dp 2 --tp 2 --cp 2 --micro-batch-size 2"),
    ("step06_4d", 8, "--zero 1 --shard 2 --dp 2 --pp 2 --cp 2 --micro-batch-size 1"),
    ("step06_4d", 4, "--recompute full --pp 2 --cp 2 --micro-batch-size 1"),
    ("step06_4d", 4, "--recompute full --dp 2 --cp 2 --cp-engine all-gather --micro-batch-size 2"),
    ("step06_4d", 4, "--recompute selective --zero 3 --tp 2 --micro-batch-size 2"),
    ("step06_4d", 8, "--recompute full --zero 3 --dp 2 --tp 2 --cp 2 --micro-batch-size 2"),
    ("step06_4d", 4, "--tp 2 --sequence-parallel --zero 3 --recompute selective --micro-batch-size 2"),
    (
        "step06_4d",
        16,
        "--dp 2 --tp 2 --pp 2 --cp 2 --sequence-parallel --zero 1 --recompute full --pp-schedule zero-bubble "
        "--micro-batch-size 1",
    ),
    ("step06_4d", 2, "--tp 2 --sequence-parallel"),
    ("step06_4d", 4, "--tp 4 --sequence-parallel --no-tp-overlap --micro-batch-size 2"),
    ("step06_4d", 4, "--tp 4 --tp-engine naive --sequence-parallel --recompute full --micro-batch-size 2"),
    ("step06_4d", 8, "--dp 2 --tp 2 --pp 2 --sequence-parallel --micro-batch-size 1"),
    ("step06_4d", 8, "--tp 2 --pp 2 --cp 2 --sequence-parallel --micro-batch-size 2"),
    ("step06_4d", 2, "--pp 2 --micro-batch-size 1 --pp-schedule zero-bubble"),
    ("step06_4d", 8, "--dp 2 --pp 2 --tp 2 --micro-batch-size 1 --bucket-mib 0.01 --pp-schedule zero-bubble"),
]
# Step, ranks, options, and the models of relatives.py: what these add to a layer goes through each axis and option.
LAYOUTS_OF_RELATIVES = [
    ("step03_tensor_parallel", 2, "--tp 2", "llama mistral qwen2 qwen3 smollm3"),
    # More ranks than key-value heads: biases are copied as well.
    ("step03_tensor_parallel", 4, "--tp 4", "qwen2 qwen3"),
    ("step03_tensor_parallel", 4, "--tp 4 --tp-engine naive", "llama qwen3"),
    ("step04_pipeline_parallel", 2, "--pp 2 --micro-batch-size 2", "llama mistral qwen2 qwen3 smollm3"),
    ("step05_context_parallel", 2, "--cp 2", "llama mistral qwen2 qwen3 smollm3"),
    ("step05_context_parallel", 8, "--tp 2 --pp 2 --cp 2 --micro-batch-size 2", "qwen3 smollm3"),
    ("step06_4d", 4, "--dp 2 --tp 2 --zero 2 --recompute selective --micro-batch-size 2", "qwen2 qwen3 smollm3"),
    ("step06_4d", 4, "--dp 2 --tp 2 --zero 3 --sequence-parallel --recompute full --micro-batch-size 2", "qwen2 qwen3"),
    ("step06_4d", 2, "--tp 2 --tp-engine naive --sequence-parallel --zero 1", "llama mistral qwen2"),
    (
        "step06_4d",
        8,
        "--dp 2 --tp 2 --pp 2 --zero 1 --sequence-parallel --pp-schedule zero-bubble --micro-batch-size 1",
        "llama qwen3 smollm3",
    ),
    ("step06_4d", 4, "--tp 2 --cp 2 --mask-documents", "qwen2 qwen3 smollm3"),
]
# Of LAYOUTS, what `pytest -m quick` checks with tied embeddings: each axis, each engine, each option.
QUICK = {
    "--dp-engine naive",
    "--bucket-mib 0.01",
    "--tp 2 --tp-engine naive",
    "--dp 2 --tp 2",
    "--pp 2 --micro-batch-size 1 --pp-schedule afab",
    "--dp 2 --pp 2 --micro-batch-size 1 --bucket-mib 0.01",
    "--cp 2 --cp-engine all-gather",
    "--cp 2",
    "--cp 2 --cp-engine all-to-all",
    "--zero 1 --micro-batch-size 2",
    "--zero 2 --dp 2 --tp 2 --micro-batch-size 2",
    "--zero 2 --shard 2 --micro-batch-size 1",
    "--tp 2 --sequence-parallel --zero 3 --recompute selective --micro-batch-size 2",
    "--recompute full --pp 2 --cp 2 --micro-batch-size 1",
    "--pp 2 --micro-batch-size 1 --pp-schedule zero-bubble",
}
SGD, ODD = "--optimizer sgd --lr 0.5", "--vocab-size 301 --num-hidden-layers 3"
# Even sizes and tied embeddings; sizes that nothing divides, untied; both, for many ranks; untied and even.
MODELS = {
    "tied": f"{SGD} --tie-word-embeddings True",
    "odd": f"{SGD} {ODD}",
    "odd, tied": f"{SGD} {ODD} --tie-word-embeddings True",
    "adamw": "--optimizer adamw",
}


def models(ranks: int, layout: str) -> list[str]:
    """Those of MODELS that a layout trains. AdamW is for few ranks, and for those that share its moments."""
    names = ["tied", "odd"] if ranks < 8 else ["odd, tied"]
    return [*names, "adamw"] if ranks == 2 or "--zero" in layout else names


def tied_or_not(ranks: int) -> list[str]:
    """The embeddings that are trained: as in MODELS, from 8 ranks on tied ones, which stages have to agree on."""
    return ["True", "False"] if ranks < 8 else ["True"]


def options(name: str, ranks: int, layout: str) -> list[str]:
    """Of one of MODELS. The odd ones' batches are three micro-batches of each replica."""
    words = layout.split()
    given = dict(pairwise(words))
    dp = int(given.get("--dp", ranks // math.prod(int(given.get(axis, 1)) for axis in ("--tp", "--pp", "--cp"))))
    size = int(given.get("--micro-batch-size", 4))
    odd = ["--micro-batch-size", str(size), "--global-batch-size", str(3 * dp * size)] if name.startswith("odd") else []
    return MODELS[name].split() + odd


class StepRecord(NamedTuple):
    """Of a step. Only the first one has its gradients, and only the last one the weights after it: to put those
    together takes many messages, and wrong ones of any other step lead to other weights."""

    loss: float
    grad_norm: float
    gradients: dict[str, Tensor]
    weights: dict[str, Tensor]


def whole(trainer: Any, tensors: dict[str, Tensor]) -> dict[str, Tensor]:
    """Copies of a rank's parameters or gradients, put together with the other ranks' parts."""
    return {name: tensor.detach().clone() for name, tensor in trainer.whole(tensors).items()}


def gradient(trainer: Any, parameter: torch.nn.Parameter) -> Tensor:
    """Of a parameter, put together from the shards of data-parallel ranks."""
    unit_of = getattr(getattr(trainer, "reducer", None), "unit_of", None)
    if unit_of is None:
        return parameter.grad
    unit = unit_of[parameter]
    flat = torch.empty_like(unit.flat, dtype=unit.shard_gradient.dtype)
    dist.all_gather_single(flat, unit.shard_gradient.contiguous(), group=unit.group)
    return flat[unit.range_of[parameter]].view(parameter.shape)


Bug = Callable[[ModuleType], None] | None


def loaded(step: str, bug: Bug) -> ModuleType:
    """A step's module, which `bug` may break."""
    module = load_step(step)
    if bug:
        bug(module)
        # Which would catch those that let the replicas drift apart, but only at the end of a run.
        module.data_parallel.Reducer.check_replicas = lambda self: None
    return module


def record(step: str, args: tuple[str, ...], bug: Bug = None) -> list[StepRecord]:
    """Run the train() of a step, and observe it from outside."""
    return observed(loaded(step, bug), args)


def observed(module: ModuleType, args: tuple[str, ...]) -> list[StepRecord]:
    """The records of a run, which leaves the module as it was."""
    config, records, seen = parse(module.Config, list(args)), [], {}

    def clip_grad_norm(trainer, clip=module.Trainer.clip_grad_norm):
        parameters = {} if records else dict(trainer.model.named_parameters())
        # In this mode a ledger counts nothing.
        with torch.inference_mode():
            gradients = {name: gradient(trainer, p) for name, p in parameters.items()}
            seen.update(trainer=trainer, gradients=whole(trainer, gradients) if gradients else {})
        return clip(trainer)

    def log(metrics, step, loss, grad_norm, lr):
        last = step == config.steps
        weights = whole(seen["trainer"], dict(seen["trainer"].model.named_parameters())) if last else {}
        records.append(StepRecord(loss.item(), grad_norm.item(), seen["gradients"], weights))

    def log_evaluation(metrics, step, losses):
        records[-1].weights["validation loss"] = torch.tensor(list(losses.values()), dtype=torch.float64)

    with ExitStack() as stack:
        for owner, name, function in (
            (module.Trainer, "clip_grad_norm", clip_grad_norm),
            (Metrics, "log", log),
            (Metrics, "log_evaluation", log_evaluation),
            (Metrics, "note", lambda *args, **record: None),
        ):
            stack.enter_context(patch.object(owner, name, function))
        module.train(config)
    return records


def record_each(step: str, runs: Sequence[tuple[str, ...]], bug: Bug = None) -> list[list[StepRecord]]:
    """Several runs, one after the other, on the same ranks."""
    module, records = loaded(step, bug), []
    for args in runs:
        records.append(observed(module, args))
        if dist.is_initialized():
            dist.barrier()
            dist.destroy_process_group()
    return records


@lru_cache
def reference(args: tuple[str, ...]) -> list[StepRecord]:
    return record("step01_single_gpu", args)


def difference(records: list[StepRecord], expected: list[StepRecord]) -> tuple[float, str]:
    """The largest error relative to the largest number of its tensor, and where it is."""

    def errors():
        for i, (a, b) in enumerate(zip(records, expected, strict=True)):
            yield abs(a.loss - b.loss) / b.loss, f"loss of step {i}"
            yield abs(a.grad_norm - b.grad_norm) / b.grad_norm, f"gradient norm of step {i}"
            for kind in ("gradients", "weights"):
                ours, theirs = getattr(a, kind), getattr(b, kind)
                assert ours.keys() == theirs.keys()
                for name, tensor in theirs.items():
                    assert ours[name].shape == tensor.shape, name
                    error = (ours[name] - tensor).abs().max() / tensor.abs().max()
                    yield error.item(), f"{kind} of {name} after step {i}"

    # NaN is neither larger nor smaller than anything, and would not be found.
    return max((error if math.isfinite(error) else math.inf, where) for error, where in errors())


def check(step: str, ranks: int, layout: str, *runs: tuple[str, ...], timeout: float = 120) -> None:
    """Raise AssertionError unless every rank of the layout agrees with step01, in each run of other options, which has
    `timeout` seconds."""
    check_each(step, ranks, [(args, layout) for args in runs], timeout)


def check_each(step: str, ranks: int, runs: Sequence[tuple[tuple[str, ...], str]], timeout: float = 120) -> None:
    """The same, where each run has a layout of its own."""
    expected = [reference(args) for args, _ in runs]
    everyone = [(*args, *layout.split()) for args, layout in runs]
    of_ranks = run_ranks(ranks, record_each, step, everyone, timeout=timeout * len(runs))
    for rank, of_runs in enumerate(of_ranks):
        for records, theirs, args in zip(of_runs, expected, everyone, strict=True):
            error, where = difference(records, theirs)
            assert error <= TOLERANCE, f"rank {rank}: {where} is off by {error:.1e} with {' '.join(args)}"


def check_bug(step: str, layout: str, args: tuple[str, ...], bug: Bug) -> list[StepRecord]:
    """On two ranks with a bug, raise AssertionError unless the loss barely notices and parity does. Without one, unless
    both are right. Returns what rank 0 records of the short run."""
    args = (*args, "--dtype", "float64", "--eval-every", "0")
    long, short = (*args, "--steps", "60", "--optimizer", "adamw"), (*args, "--steps", "3", *SGD.split())
    of_ranks = run_ranks(2, record_each, step, [(*run, *layout.split()) for run in (long, short)], bug)
    first, last = (reference(long)[i].loss for i in (0, -1))
    found = of_ranks[0][0][-1].loss
    # Over the run, the curve with the bug falls within 5 % of what the right one falls.
    assert abs(found - last) < 0.05 * (first - last), (found, last, first)
    error, where = max(difference(records, reference(short)) for _, records in of_ranks)
    name = bug.__name__ if bug else "correct"
    print(f"{name}: final loss {found:.3f} ({last:.3f}), largest error {error:.0e}, in {where}")
    assert error > 1e-3 if bug else error <= TOLERANCE, f"off by {error:.1e} in {where}"
    return of_ranks[0][1]
