"""A dry run is a training step on fake tensors: it says what a real one says. And the configs of real runs train."""

import contextlib
import dataclasses
import io
import math
import multiprocessing
import os
import re
import runpy
import sys
from pathlib import Path

import pytest
from conftest import ROOT, load_step
from planner import sibling, train
from ranks import run_ranks
from torch._subclasses.fake_tensor import FakeTensorMode

from shared.config import UserError, parse
from shared.llama_configs import load_model_config
from shared.weights import parameter_shapes

STEP = "step06_4d"
# Of presets that are larger.
SIZES = "--num-hidden-layers 2 --hidden-size 64 --num-attention-heads 4 --num-key-value-heads 2 --vocab-size 300"
CONFIGS = sorted((ROOT / STEP / "configs").glob("*.yaml"))


def _real(args):
    """The same step of this rank, with other ranks and numbers."""
    module = load_step(STEP)
    dry_run = sys.modules["observe.dry_run"]
    dry_run.FakeTensorMode = contextlib.nullcontext
    return dry_run.audited_step(parse(module.Config, args), module.Trainer)


def split_peak(report):
    """A report without what depends on when gloo lets go of a message's memory, and that, the peak."""
    lines = report.splitlines()
    (peak,) = (float(line.split()[-1]) for line in lines if line.startswith("GiB peak"))
    return [line for line in lines if not line.startswith(("GiB peak", "GiB activations"))], peak


@pytest.mark.parametrize(
    ("ranks", "layout"),
    [
        (2, "--dp 1 --tp 2 --sequence-parallel --dtype bfloat16 --global-batch-size 4 --seq-len 16"),
        (4, "--dp 4 --zero 1 --shard 2 --dtype bfloat16 --global-batch-size 8 --seq-len 16"),
        pytest.param(2, "--dp 2 --zero 3 --global-batch-size 4", marks=pytest.mark.quick),
        (4, "--dp 1 --pp 2 --cp 2 --recompute full --global-batch-size 8"),
        (8, "--dp 2 --pp 2 --tp 2 --pp-schedule zero-bubble --recompute selective"),
        (4, f"--dp 2 --tp 2 --zero 1 --global-batch-size 4 --model qwen3-0.6b {SIZES}"),
        (4, f"--dp 1 --tp 4 --sequence-parallel --global-batch-size 4 --model qwen2.5-0.5b {SIZES}"),
    ],
)
def test_a_dry_run_says_what_a_real_step_does(capsys, ranks, layout):
    args = ["--device", "cpu", "--micro-batch-size", "2", "--model", "tiny", "--seq-len", "64", *layout.split()]
    module = load_step(STEP)
    module.train(parse(module.Config, [*args, "--dry-run"]))
    faked = re.split(r"^(?=rank)", capsys.readouterr().out, flags=re.MULTILINE)[1:]
    reports = run_ranks(ranks, _real, args)
    for ours, theirs in zip(faked, (reports[0], reports[-1]), strict=True):
        (ours, our_peak), (theirs, their_peak) = split_peak(ours), split_peak(theirs)
        assert ours == theirs and "≠" not in "".join(ours)
        assert our_peak == pytest.approx(their_peak, rel=0.2)


def _dry_run(path):
    """What its dry run prints of few micro-batches and layers, which repeat each other. And what the first and the last
    rank take of the host's memory, with all layers."""
    config, hosts = _parsed(path), []
    with contextlib.redirect_stdout(io.StringIO()) as out:
        train().train(_with_few(config))
    axes = {axis: getattr(config, axis) for axis in ("pp", "dp", "cp", "tp")}
    observed = sibling("observe.dry_run")
    for rank in (0, math.prod(axes.values()) - 1):
        with observed.fake_rank(rank, **axes), FakeTensorMode():
            hosts.append(observed.on_host(observed.fake_trainer(config, train().Trainer)))
    return out.getvalue(), hosts


def _parsed(path):
    return parse(train().Config, ["--config", str(path), "--device", "cpu"])


def _with_few(config):
    """With two or three layers per rank, and one or two per chunk of several, as unevenly split as all are."""
    few = config.dp * config.micro_batch_size * (config.pp if config.virtual_stages > 1 else 1)
    layers, chunks = load_model_config(config).num_hidden_layers, config.pp * config.virtual_stages
    layers -= max(0, layers // chunks - (1 if config.virtual_stages > 1 else 2)) * chunks
    return dataclasses.replace(config, global_batch_size=few, num_hidden_layers=layers, dry_run=True)


@pytest.fixture(scope="module")
def dry_runs():
    """Of all configurations, as many at a time as there are cores."""
    train()
    with multiprocessing.get_context("fork").Pool(os.cpu_count()) as pool:
        return dict(zip(CONFIGS, pool.map(_dry_run, CONFIGS, chunksize=1), strict=True))


def _planned(config):
    """GiB at the peak of the first rank of each stage, by the planner."""
    model, planned, found = load_model_config(config), sibling("planning.layout"), []
    sizes, layout = planned.Model.of(model), planned.Layout.of(config)
    for stage in range(config.pp):
        chunks = sibling("pipeline.chunks").layers_of(stage, config.pp, config.virtual_stages, model, config.seq_len)
        place = planned.Place(stage)
        held = sibling("planning.memory").memory(sizes, layout, place, [len(chunk) for chunk in chunks])
        found.append(held.total / 2**30)
    return found


@pytest.mark.parametrize("path", CONFIGS, ids=lambda path: path.stem)
def test_configs_of_real_runs(dry_runs, path):
    config, (out, hosts) = _parsed(path), dry_runs[path]
    assert config.dp * config.tp * config.pp * config.cp == int(re.search(r"(\d+)gpu", path.stem)[1])
    assert config.global_batch_size % (config.dp * config.micro_batch_size) == 0
    assert "≠" not in out and out.count("formula") == 2
    # A start and a save take an even share of the host's memory, twice that on the fullest rank at most.
    numbers = sum(shape.numel() for shape in parameter_shapes(load_model_config(config)).values())
    share = 12 * numbers / (config.dp * config.tp * config.pp * config.cp)
    assert all(0 < nbytes < 2 * share for host in hosts for nbytes in host.values())
    assert all(out.count(f"of the host, {name}") == 2 for name in ("start", "saves"))
    # The planner knows the sizes of real runs as well as small ones ...
    peaks = [float(peak) for peak in re.findall(r"GiB peak +([\d.]+)", out)]
    planned = _planned(_with_few(config))
    assert peaks == pytest.approx([planned[0], planned[-1]], rel=0.03)
    # ... and all the micro-batches of a step. An H100 has 80 GB; some must be left for the kernels' and NCCL's own
    # buffers, and for fragmentation.
    assert max(_planned(config)) < 60


def test_the_planner_is_named_for_what_is_in_the_file(tmp_path, capsys):
    path = tmp_path / "run.yaml"
    path.write_text("dp: 1\nnum-hidden-layers: 1\nseq-len: 16\n")
    for more, is_named in (([], True), (["--dp", "1"], True), (["--tp", "2"], False)):
        train().train(parse(train().Config, ["--config", str(path), "--dry-run", *more]))
        command = f"python step06_4d/plan.py --config {path} --gpu h100\n"
        assert capsys.readouterr().out.endswith(command) == is_named


@pytest.mark.quick
def test_needs_dp():
    with pytest.raises(UserError, match="--dry-run needs --dp"):
        parse(load_step(STEP).Config, ["--dry-run"])


def test_needs_sizes():
    with pytest.raises(UserError, match="--dp 1, --pp 0, --cp 1 and --tp 1 must be at least 1"):
        parse(load_step(STEP).Config, ["--dry-run", "--dp", "1", "--pp", "0"])


@pytest.mark.quick
def test_prepare_leaves_nothing_to_tokenize(small_run, tmp_path, monkeypatch, capfd):
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path))
    monkeypatch.setattr(sys, "argv", ["prepare.py", *small_run])
    for prepared in ("once", ""):
        runpy.run_path(str(ROOT / "prepare.py"), run_name="__main__")
        out, err = capfd.readouterr()
        (path,) = re.findall(r"^[\d,]+ tokens in (\S+)$", out, re.MULTILINE)
        assert Path(path).is_relative_to(tmp_path) and Path(path).exists()
        assert ("(once)" in out + err) == bool(prepared)
