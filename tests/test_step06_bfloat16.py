"""step06 --zero with --dtype bfloat16: weights in bfloat16, and everything that adds up, in float32."""

import pytest
import torch
import torch.nn.functional as F
from parity import record, reference
from ranks import run_ranks
from test_step06_sharding import LEVELS, STEP, observed

from shared.ops import embedding, rms_norm


def nothing(**_):
    pass


def _norm_weight(args, masters):
    """The final norm's weight after training. Without masters, it is rounded to bfloat16 after each step."""

    def forget(model, reducer, optimizer):
        step = optimizer.step

        def forgetful():
            step()
            for unit in reducer.units:
                unit.master.copy_(unit.master.bfloat16())

        optimizer.step = forgetful

    return observed(args, nothing if masters else forget)["model"].model.norm.weight.detach().clone()


@pytest.mark.quick
def test_small_steps_add_up(small_run):
    """From 1, bfloat16 can go to 1 ± 0.004 at the least: rounded after each step of 3e-4, a weight never moves."""
    small_steps = "--dtype bfloat16 --zero 1 --lr 3e-4 --schedule constant --warmup-steps 0 --steps 20 --eval-every 0"
    args = [*small_run, *small_steps.split()]
    with_masters, without = (run_ranks(2, _norm_weight, args, masters)[0] for masters in (True, False))
    assert with_masters.dtype == without.dtype == torch.bfloat16
    assert (without == 1).all()
    assert (with_masters != 1).float().mean() > 0.5


def _start(args):
    """The masters of this rank, and the weights."""
    found = {}

    def instrument(model, reducer, optimizer):
        found["masters"] = {
            name: reducer.shards[p].flatten() for name, p in model.named_parameters() if p in reducer.shards
        }
        found["masters"] = {name: shard.detach().clone() for name, shard in found["masters"].items()}

    observed([*args, "--steps", "0"], instrument)
    return found["masters"]


@pytest.mark.parametrize("zero", LEVELS)
def test_masters_start_from_the_weights_before_rounding(small_run, zero):
    args = [*small_run, "--zero", str(zero)]
    exact, rounded = (run_ranks(2, _start, [*args, "--dtype", dtype]) for dtype in ("float32", "bfloat16"))
    for ours, theirs in zip(rounded, exact, strict=True):
        assert ours.keys() == theirs.keys()
        for name, part in theirs.items():
            assert torch.equal(ours[name], part), name
            assert "norm" in name or not torch.equal(part, part.bfloat16().float())


@pytest.mark.parametrize("zero", LEVELS)
def test_losses_stay_close_to_those_of_float32(small_run, zero):
    args = (*small_run, "--steps", "50", "--eval-every", "50", "--global-batch-size", "16")
    rounded = run_ranks(2, record, STEP, (*args, "--dtype", "bfloat16", "--zero", str(zero)))
    losses, expected = ([step.loss for step in run] for run in (rounded[0], reference((*args, "--dtype", "float32"))))
    assert expected[0] - expected[-1] > 1
    # And they are not rounded themselves, in steps of 1/32 near 5: neither these nor the validation loss.
    for loss in (*losses[:3], rounded[0][-1].weights["validation loss"]):
        assert torch.tensor(float(loss)).bfloat16().item() != loss
    assert losses == pytest.approx(expected, abs=0.03)
    # Ranks agree bit for bit, in what all have: after training too.
    first, second = (run[-1].weights for run in rounded)
    for name, weight in first.items():
        assert torch.equal(weight, second[name]), name
        assert weight.dtype == torch.bfloat16 or name == "validation loss"


def test_gradient_of_a_frequent_token():
    """Its row is used 5000 times. In bfloat16, 256 + 1 is 256."""
    ids, weight = torch.zeros(2, 2500, dtype=torch.long), torch.ones(3, 4, dtype=torch.bfloat16, requires_grad=True)
    embedding(ids, weight).sum().backward()
    assert weight.grad.dtype == torch.bfloat16
    # 5000 rounds to 4992.
    assert torch.equal(weight.grad, torch.tensor([[5000.0], [0], [0]]).expand(3, 4).bfloat16())
    exact = weight.detach().float().requires_grad_()
    assert torch.equal(embedding(ids, exact), F.embedding(ids, exact))


def test_embedding_is_torchs_in_float32():
    generator = torch.Generator().manual_seed(0)
    ids = torch.randint(7, (2, 50), generator=generator)
    gradients = []
    for function in (embedding, F.embedding):
        weight = torch.ones(7, 4, requires_grad=True)
        function(ids, weight).backward(torch.randn(2, 50, 4, generator=generator.manual_seed(1)))
        gradients.append(weight.grad)
    assert torch.equal(*gradients)


def test_rms_norm_is_as_accurate_as_float32_rounded_once():
    generator = torch.Generator().manual_seed(0)
    x, gradient = (torch.randn(3, 700, 96, generator=generator).bfloat16() for _ in range(2))
    # A residual stream's outliers.
    x[..., 5] *= 300
    weight = torch.randn(96, generator=generator).bfloat16()

    def computed(dtype):
        inputs = [t.to(dtype, copy=True).requires_grad_() for t in (x, weight)]
        out = rms_norm(*inputs, 1e-5)
        out.backward(gradient.to(dtype))
        return [out.detach(), *(t.grad for t in inputs)]

    for ours, theirs in zip(computed(torch.bfloat16), computed(torch.float32), strict=True):
        assert ours.dtype == torch.bfloat16 and torch.equal(ours, theirs.bfloat16())
