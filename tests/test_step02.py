"""step02: what it sends, what it holds, how it fails. That it is right is in test_parity.py."""

import re
import sys
from types import SimpleNamespace

import numpy as np
import pytest
import torch
import torch.distributed as dist
from conftest import load_step
from ranks import RankFailed, run_ranks
from running import printed, user_error
from torch import nn

from shared.config import parse
from shared.corpus import Corpus, Source, Tokens
from shared.distributed import start_mesh
from shared.ledger import Ledger, Traffic
from shared.live_bytes import LiveBytes

STEP = "step02_data_parallel"


def make_reducer(model, name="bucketed", bucket_mib=1.0):
    """Options, and an engine over all ranks for the parameters of a module."""
    module = load_step(STEP)
    options = parse(module.Config, ["--device", "cpu", "--dp-engine", name, "--bucket-mib", str(bucket_mib)])
    mesh, _ = start_mesh(options)
    return options, module.data_parallel.make_reducer(options, model, mesh.get_group("dp"))


def _ledger(name, micro_batches):
    torch.manual_seed(0)
    layers = nn.Sequential(nn.Linear(10, 20), nn.Linear(20, 30), nn.Linear(30, 5))
    options, reducer = make_reducer(layers, name, 0.001)
    with Ledger() as ledger:
        reducer.start(micro_batches)
        for _ in range(micro_batches):
            layers(torch.randn(4, 10)).sum().backward()
        reducer.finish()
    expected = options.traffic(SimpleNamespace(reducer=reducer))
    return ledger.counts, expected, sum(p.numel() for p in layers.parameters())


@pytest.mark.parametrize("micro_batches", [1, 3])
@pytest.mark.parametrize("name", ["naive", "bucketed"])
def test_bytes_are_four_per_parameter(name, micro_batches):
    for counts, expected, parameters in run_ranks(2, _ledger, name, micro_batches):
        # 6 tensors; buckets of at least 1 KiB, filled from the last layer on: 5 + 5·30 + 30 + 30·20, 20 + 20·10.
        calls = {"naive": 6, "bucketed": 2}[name]
        assert counts == {("dp", "all-reduce"): Traffic(calls, 4 * parameters)}
        # The formula has the loss as well.
        assert expected == {("dp", "all-reduce"): Traffic(calls + 1, 4 * parameters + 4)}


@pytest.mark.parametrize("options", ["", "--dp-engine naive", "--bucket-mib 0.01 --dtype float64", "--steps 2"])
def test_ledger_of_a_run_equals_the_formula(small_run, options):
    args = [*small_run, "--ledger", "--eval-every", "1", *options.split()]
    table, silent = run_ranks(2, printed, args, STEP)
    (line,) = [line for line in table.splitlines() if line.startswith("dp all-reduce")]
    calls, nbytes, formula_calls, formula_bytes = re.findall(r"[\d,]+", line)
    assert (calls, nbytes) == (formula_calls, formula_bytes) and " = " in line
    assert "all-reduce" not in silent


def _unused(name):
    torch.manual_seed(0)
    used, _, shared = layers = nn.ModuleList(nn.Linear(3, 3) for _ in range(3))
    _, reducer = make_reducer(layers, name, 1e-5)
    for _ in range(2):
        for parameter in reducer.parameters:
            parameter.grad = None
        reducer.start(1)
        x = torch.full((1, 3), 1.0 + dist.get_rank())
        # `shared` is used twice, as a tied embedding is.
        shared(shared(used(x))).sum().backward()
        reducer.finish()
    return [p.grad for p in reducer.parameters]


@pytest.mark.parametrize("name", ["naive", "bucketed"])
def test_parameters_without_gradient_and_tied_ones(name):
    torch.manual_seed(0)
    used, _, shared = nn.Linear(3, 3), nn.Linear(3, 3), nn.Linear(3, 3)
    for rank in (0, 1):
        shared(shared(used(torch.full((1, 3), 1.0 + rank)))).sum().backward()
    expected = [p.grad for p in (*used.parameters(), *shared.parameters())]
    for grads in run_ranks(2, _unused, name):
        torch.testing.assert_close(grads[:2] + grads[4:], expected)
        assert not grads[2].any() and not grads[3].any()


def _overlap():
    """The order in which buckets leave and gradients arrive."""
    layers = nn.Sequential(*(nn.Linear(4, 4, bias=False) for _ in range(4)))
    _, reducer = make_reducer(layers, "bucketed", 1e-6)
    events = []
    launch = reducer._launch
    reducer._launch = lambda: events.append(f"launch {reducer.launched}") or launch()
    for i, layer in enumerate(layers):
        layer.weight.register_hook(lambda grad, i=i: events.append(f"layer {i}"))
    reducer.start(2)
    for _ in range(2):
        layers(torch.randn(2, 4)).sum().backward()
    reducer.finish()
    return events


def test_buckets_leave_while_the_last_backward_runs():
    quiet = ["layer 3", "layer 2", "layer 1", "layer 0"]
    busy = ["layer 3", "launch 0", "layer 2", "launch 1", "layer 1", "launch 2", "layer 0", "launch 3"]
    assert run_ranks(2, _overlap) == [quiet + busy] * 2


def _diverge(how):
    layer = nn.Linear(3, 3)
    nn.init.ones_(layer.weight), nn.init.ones_(layer.bias)
    _, reducer = make_reducer(layer, "naive")
    layer.weight.data[0, :2] = torch.tensor([1.0, 2.0])
    if dist.get_rank() == 1 and how == "one bit":
        layer.weight.data.view(torch.int32)[1, 1] ^= 1
    if dist.get_rank() == 1 and how == "exchanged":
        layer.weight.data[0, :2] = torch.tensor([2.0, 1.0])
    reducer.check_replicas()


@pytest.mark.quick
def test_replicas_are_compared_bit_by_bit():
    run_ranks(2, _diverge, None)
    for how in ("one bit", "exchanged"):
        with pytest.raises(RankFailed, match=r"replicas of parameters \[0\] have diverged"):
            run_ranks(2, _diverge, how)


@pytest.mark.quick
def test_comparing_takes_little_memory():
    checksum, tensor = load_step(STEP).data_parallel.checksum, torch.full((5_000_000,), 2.0**-126)
    with LiveBytes() as memory:
        # Whose bits are 2^23: the sum over i of 2^23 (2i + 1) is 2^23 n².
        assert checksum(tensor).item() == (2**23 * len(tensor) ** 2 + 2**63) % 2**64 - 2**63
    assert memory.peak - tensor.nbytes < 2e6


@pytest.mark.parametrize(
    ("args", "message"),
    [
        ("--dp 3", "dp 3 does not make 2 processes"),
        ("--dp 0", "dp 0 does not make 2 processes"),
        ("--micro-batch-size 8", "8 is not a multiple of 2 data-parallel ranks times --micro-batch-size 8"),
    ],
)
def test_errors_name_the_sizes(small_run, args, message):
    assert all(message in error for error in run_ranks(2, user_error, [*small_run, *args.split()], STEP))


def test_without_torchrun(small_run, monkeypatch):
    module = load_step(STEP)
    monkeypatch.setattr(sys, "argv", ["train.py", *small_run])
    with pytest.raises(
        SystemExit, match=r"^error: launch this step with torchrun: torchrun --nproc-per-node 2 train\.py"
    ):
        module.main()


def _different(step, validation):
    """A corpus of which training or validation is the same on ranks 0 and 2 alone."""
    module = load_step(step)
    config = module.Config(device="cpu")
    _, device = module.distributed.start_mesh(config)
    fingerprint = "odd" if dist.get_rank() in (1, 3) else "even"
    of_two, of_all = (Source("a", 1.0, Tokens.from_array(np.arange(9)), name) for name in (fingerprint, "same"))
    sources = ([of_all], [of_two]) if validation else ([of_two], [])
    module.distributed.check_same(Corpus(*sources, None), device)


@pytest.mark.parametrize("validation", [False, True])
def test_ranks_that_read_other_tokens_are_named(validation):
    with pytest.raises(RankFailed, match=r"ranks \[1, 3\] have other tokens than rank 0"):
        run_ranks(4, _different, STEP, validation)
