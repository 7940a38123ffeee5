"""The answers to the exercises in the steps' READMEs."""

import torch
import torch.distributed as dist
from conftest import ROOT
from ranks import run_ranks
from test_step02 import engine
from torch import nn

from shared.llama_configs import PRESETS
from shared.model import LlamaForCausalLM


def _calls(bucket_mib):
    _, gradients = engine("bucketed", bucket_mib, list(LlamaForCausalLM(PRESETS["tiny"]).parameters()))
    return gradients.calls + 1


def test_step02_exercise_1():
    (calls,) = run_ranks(1, _calls, 1.0)
    assert (
        f"<details><summary>Answer</summary>{calls}: a bucket" in (ROOT / "step02_data_parallel/README.md").read_text()
    )


def _opposite_orders(as_they_fill):
    torch.manual_seed(0)
    a, b = nn.Linear(3, 3, bias=False), nn.Linear(3, 3, bias=False)
    _, gradients = engine("bucketed", 1e-6, [a.weight, b.weight])
    if as_they_fill:

        def on_gradient(parameter):
            flat = gradients.bucket_of[parameter].flat
            gradients.works.append(dist.all_reduce(flat, group=gradients.group, async_op=True))
            gradients.launched += 1

        for parameter in gradients.parameters:
            parameter._post_accumulate_grad_hooks.clear()
            parameter.register_post_accumulate_grad_hook(on_gradient)
    gradients.start()
    gradients.reduce_in_next_backward()
    first, second = (a, b) if dist.get_rank() == 0 else (b, a)
    second(first(torch.arange(3.0))).sum().backward()
    gradients.finish()
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
