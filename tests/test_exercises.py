"""The answers to the exercises in the steps' READMEs."""

from dataclasses import dataclass
from types import SimpleNamespace

import parity
import pytest
import torch
import torch.distributed as dist
from conftest import ROOT, load_step
from ranks import run_ranks
from running import ledger_of
from test_step02 import make_reducer
from torch import nn

from labs.bugs.step03 import copies_not_summed, norms_counted_by_all, rows_of_rank_0
from labs.bugs.step04 import micro_batch_loss_not_divided, tied_gradients_not_summed
from labs.bugs.step05 import positions_from_zero, reduced_over_dp_alone
from shared.config import BaseConfig
from shared.llama_configs import PRESETS
from shared.model import LlamaForCausalLM
from shared.timeline import bubble, simulate


def readme(step):
    return (ROOT / step / "README.md").read_text()


def _calls(bucket_mib):
    _, reducer = make_reducer(LlamaForCausalLM(PRESETS["tiny"]), "bucketed", bucket_mib)
    return reducer.all_reduces + 1


def test_step02_exercise_1():
    (calls,) = run_ranks(1, _calls, 1.0)
    assert f"<details><summary>Answer</summary>{calls}: a bucket" in readme("step02_data_parallel")


def _opposite_orders(as_they_fill):
    torch.manual_seed(0)
    a, b = layers = nn.ModuleList(nn.Linear(3, 3, bias=False) for _ in range(2))
    _, reducer = make_reducer(layers, "bucketed", 1e-6)
    if as_they_fill:

        def on_gradient(parameter):
            flat = reducer.bucket_of[parameter].flat
            reducer.works.append(dist.all_reduce(flat, group=reducer.group, async_op=True))
            reducer.launched += 1

        for parameter in reducer.parameters:
            parameter._post_accumulate_grad_hooks.clear()
            parameter.register_post_accumulate_grad_hook(on_gradient)
    reducer.start(1)
    first, second = (a, b) if dist.get_rank() == 0 else (b, a)
    second(first(torch.arange(3.0))).sum().backward()
    reducer.finish()
    return a.weight.grad, b.weight.grad


def test_step02_exercise_2():
    torch.manual_seed(0)
    a, b = nn.Linear(3, 3, bias=False), nn.Linear(3, 3, bias=False)
    for first, second in ((a, b), (b, a)):
        second(first(torch.arange(3.0))).sum().backward()
    for as_they_fill in (False, True):
        right = [
            torch.allclose(grad_a, a.weight.grad) and torch.allclose(grad_b, b.weight.grad)
            for grad_a, grad_b in run_ranks(2, _opposite_orders, as_they_fill)
        ]
        assert right == [not as_they_fill] * 2


def test_step03_exercise_1(text_file, tmp_path):
    # The default run, on less text, of layers that are small.
    text = tmp_path / "text.txt"
    text.write_text(40 * text_file.read_text())
    args = ["--dataset", str(text), "--tp", "2", "--num-hidden-layers", "8", "--steps", "1", "--device", "cpu"]
    args += ["--hidden-size", "32", "--intermediate-size", "48"]
    calls, _ = run_ranks(2, _tp_calls, args)
    assert f"<details><summary>Answer</summary>{calls}: " in readme("step03_tensor_parallel")


def _tp_calls(args):
    return ledger_of([*args, "--eval-every", "0"], "step03_tensor_parallel")["counts"]["tp", "all-reduce"].calls


@pytest.mark.parametrize("bug", [rows_of_rank_0, norms_counted_by_all, copies_not_summed])
def test_step03_exercises_2_to_4(small_run, bug):
    heads = ("--num-key-value-heads", "1") if bug is copies_not_summed else ()
    records = parity.check_bug("step03_tensor_parallel", "--tp 2", (*small_run, *heads), bug)
    if bug is rows_of_rank_0:
        # Twins for ever.
        assert torch.equal(*records[-1].weights["model.layers.1.mlp.up_proj.weight"].chunk(2))


def test_step04_exercise_1():
    load_step("step04_pipeline_parallel")
    from schedules import one_forward_one_backward

    def idle(micro_batches):
        schedules = [one_forward_one_backward(stage, 4, micro_batches) for stage in range(4)]
        return bubble(simulate(schedules))

    enough = next(m for m in range(1, 100) if idle(m) <= 0.05 + 1e-12)
    assert f"at most 5 %? <details><summary>Answer</summary>{enough}:" in readme("step04_pipeline_parallel")


def test_step04_exercise_2():
    load_step("step04_pipeline_parallel")
    from schedules import one_forward_one_backward

    normal = [one_forward_one_backward(stage, 4, 8) for stage in range(4)]
    # The same lists, as if there were one stage more behind.
    eager = [one_forward_one_backward(stage, 5, 8) for stage in range(4)]
    assert bubble(simulate(eager)) == pytest.approx(bubble(simulate(normal)))
    for before, after in zip(normal, eager, strict=True):
        assert [a.kind for a in after].index("backward") == [a.kind for a in before].index("backward") + 1


@pytest.mark.parametrize("bug", [micro_batch_loss_not_divided, tied_gradients_not_summed])
def test_step04_exercises_3_and_4(small_run, bug):
    args = (*small_run, "--micro-batch-size", "2", "--tie-word-embeddings", "True")
    parity.check_bug("step04_pipeline_parallel", "--pp 2", args, bug)


def test_step05_exercise_1():
    config = load_step("step05_context_parallel").Config(cp=4, cp_split="contiguous")
    from context_parallel import visible

    work = []
    for rank in range(4):
        blocks = [block for source in range(4) for block in visible(config, rank, source)]
        work.append(sum(1 if block.causal else 2 for block in blocks))
    assert f"<details><summary>Answer</summary>{work[-1] / (sum(work) / 4)} times" in readme("step05_context_parallel")


@pytest.mark.parametrize("bug", [positions_from_zero, reduced_over_dp_alone])
def test_step05_exercises_2_and_3(small_run, bug):
    args = (*small_run, "--dtype", "float64", "--steps", "30")
    for records in run_ranks(2, parity.record, "step05_context_parallel", (*args, "--cp", "2"), bug):
        assert parity.difference(records, parity.reference(args))[0] > 1e-3
        assert records[-1].loss < 0.8 * records[0].loss


def test_step05_exercise_4():
    module = load_step("step05_context_parallel")
    model = SimpleNamespace(
        model=SimpleNamespace(
            config=SimpleNamespace(head_dim=1),
            layers={"0": SimpleNamespace(self_attn=SimpleNamespace(head_dim=1, q_proj=None, k_proj=None))},
        )
    )
    for name, heads in (("q_proj", 32), ("k_proj", 8)):
        setattr(model.model.layers["0"].self_attn, name, torch.nn.Linear(1, heads))

    @dataclass
    class Config(module.context_parallel.Config, BaseConfig):
        """Of this axis alone."""

    def sent(engine, cp):
        batches = SimpleNamespace(micro_batches=1, tokens=1)
        config = Config(cp=cp, cp_engine=engine, dtype="bfloat16")
        traffic = config.traffic(SimpleNamespace(model=model, batches=batches))
        if engine == "ring":
            return traffic["cp", "send"].bytes
        # What a rank keeps for itself is not sent.
        return traffic["cp", "all-to-all"].bytes * (cp - 1) / cp

    fewest = next(cp for cp in range(2, 20) if sent("all-to-all", cp) < sent("ring", cp))
    assert f"<details><summary>Answer</summary>From {fewest} on" in readme("step05_context_parallel")
