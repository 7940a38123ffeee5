"""step06: a checkpoint of any layout is taken up by any other, and by the same one bit for bit."""

import re
import shutil
import sys
import threading
from pathlib import Path

import parity
import pytest
import torch
from conftest import ROOT, load_step, make_trainer
from launcher import run_command
from ranks import run_ranks
from running import check_ledger, ledger_of, train
from safetensors.torch import load_file
from test_step06_stability import spoiled_norm
from torch.distributed.checkpoint import default_planner
from transformers import AutoModelForCausalLM, AutoTokenizer

from shared.config import UserError, parse
from shared.llama_configs import load_model_config
from shared.weights import parameter_shapes

STEP = "step06_4d"
FOUR_STEPS = ["--steps", "4", "--warmup-steps", "2", "--eval-every", "0"]
SGD, TIED = "--optimizer sgd --lr 0.5", "--tie-word-embeddings True"
ODD = "--vocab-size 301 --num-hidden-layers 3"
HYBRID = "--zero 3 --shard 2"


def arguments(small_run, directory, *options):
    saving = ["--save-every", "2", "--checkpoint-dir", str(directory)]
    return (*small_run, *FOUR_STEPS, *saving, *(word for option in options for word in option.split()))


def forget(directory, *steps):
    """As if a run had been killed before these were saved."""
    for step in steps:
        shutil.rmtree(directory / f"step-{step:06}")


PAIRS = [
    (2, "", 2, "--tp 2", ""),
    (3, "--zero 1", 2, "--pp 2 --micro-batch-size 4", "--global-batch-size 24"),
    # Two key-value heads on four ranks: copies, of which one is saved and all are loaded.
    (2, "--zero 3", 4, "--tp 4", ""),
    (4, "--tp 4 --zero 1", 2, "--zero 2", ""),
    (2, "--pp 2", 1, "", TIED),
    (4, "--dp 2 --pp 2 --zero 1", 3, "--zero 3", f"{TIED} --global-batch-size 24 --micro-batch-size 4"),
    (2, "--pp 2 --virtual-stages 2 --micro-batch-size 2", 2, "--cp 2", "--num-hidden-layers 4"),
    (8, "--zero 1 --dp 2 --tp 2 --pp 2 --micro-batch-size 2", 1, "", ODD),
    (8, f"{HYBRID} --dp 2 --tp 2 --cp 2 --micro-batch-size 2", 4, "--zero 1 --shard 2 --micro-batch-size 2", ODD),
    (1, "", 4, f"{HYBRID} --micro-batch-size 2", SGD),
    (4, "--tp 4 --sequence-parallel", 4, "--zero 3 --dp 4 --micro-batch-size 2", f"{SGD} {ODD}"),
    (4, "--zero 2 --dp 2 --tp 2", 2, "--pp 2", f"{SGD} {TIED}"),
]


@pytest.mark.parametrize(("ranks", "layout", "new_ranks", "new_layout", "model"), PAIRS)
def test_another_layout_goes_on_as_one_device_would(small_run, tmp_path, ranks, layout, new_ranks, new_layout, model):
    args = arguments(small_run, tmp_path, "--dtype float64", model)
    run_ranks(ranks, parity.record, STEP, (*args, *layout.split(), "--stop-after", "2"))
    expected = parity.reference((*small_run, *FOUR_STEPS, "--dtype", "float64", *model.split()))[2:]
    for records in run_ranks(new_ranks, parity.record, STEP, (*args, *new_layout.split())):
        assert len(records) == 2
        # The gradients of the first step after the checkpoint: the reference has those of the run's first.
        error, where = parity.difference([record._replace(gradients={}) for record in records], expected)
        assert error <= parity.TOLERANCE, f"{where} is off by {error:.1e}"


def same(records, expected):
    for ours, theirs in zip(records, expected, strict=True):
        assert (ours.loss, ours.grad_norm) == (theirs.loss, theirs.grad_norm)
        for kind in ("gradients", "weights"):
            for name, tensor in getattr(theirs, kind).items():
                assert torch.equal(getattr(ours, kind)[name], tensor), name


@pytest.mark.parametrize(
    ("ranks", "layout"),
    [
        (1, "--dtype bfloat16 --optimizer sgd"),
        (2, "--zero 1 --dtype bfloat16"),
        (4, "--zero 3 --dp 2 --tp 2 --dtype bfloat16"),
        (4, "--pp 2 --tp 2 --micro-batch-size 2"),
    ],
)
def test_the_same_layout_goes_on_bit_by_bit(small_run, tmp_path, ranks, layout):
    args = arguments(small_run, tmp_path, layout)
    expected = run_ranks(ranks, parity.record, STEP, args)
    forget(tmp_path, 4)
    for ours, theirs in zip(run_ranks(ranks, parity.record, STEP, args), expected, strict=True):
        assert len(ours) == 2
        same(ours, theirs[2:])


def _trained(args, **replaced):
    """This rank's good steps and weights after training."""
    module, seen = load_step(STEP), {}
    run = module.survival.Run

    def observed(trainer, *rest):
        seen.update(trainer=trainer, run=run(trainer, *rest))
        return seen["run"]

    module.survival.Run = observed
    for name, wrapper in replaced.items():
        setattr(module.Trainer, name, wrapper(getattr(module.Trainer, name)))
    module.train(parse(module.Config, [*args]))
    weights = {name: p.detach().clone() for name, p in seen["trainer"].model.named_parameters()}
    return list(seen["run"].bad_steps.good), weights


def _trained_with_a_bad_step(args):
    return _trained(args, **spoiled_norm(float("nan"), {2}, {0}))


def test_skipped_steps_stay_skipped(small_run, tmp_path):
    """AdamW has counted one step fewer; and what a spike is measured against is what it was."""
    args = arguments(small_run, tmp_path, "--on-bad-step skip --spike-factor 1000 --save-every 3")
    ((history, expected),) = run_ranks(1, _trained_with_a_bad_step, args)
    forget(tmp_path, 4)
    ((good, weights),) = run_ranks(1, _trained, args)
    assert good == history and len(good) == 3
    assert all(torch.equal(weights[name], weight) for name, weight in expected.items())


def _train(args):
    train([*args], STEP)


@pytest.mark.quick
def test_a_master_is_not_rounded_and_the_export_is_what_training_exports(small_run, tmp_path, monkeypatch):
    """From bfloat16 weights to float32: what is loaded is the optimizer's, and export.py finds the same."""
    checkpoints, trained, own = (tmp_path / name for name in ("checkpoints", "trained", "own"))
    args = arguments(small_run, checkpoints)
    run_ranks(2, _train, [*args, "--zero", "1", "--dtype", "bfloat16", "--export-dir", str(tmp_path / "rounded")])
    run_ranks(1, _train, [*args, "--export-dir", str(trained)])
    load_step(STEP)
    monkeypatch.syspath_prepend(str(ROOT / STEP))
    import export
    import generate

    small_files = run_command(export.main, checkpoints, own, "--dtype", "float32", "--max-shard-gb", "0.00004")
    assert small_files.returncode == 0, small_files.stderr
    assert len(list(own.glob("*.safetensors"))) > 2
    ours, theirs = (AutoModelForCausalLM.from_pretrained(path).state_dict() for path in (own, trained))
    assert ours.keys() == theirs.keys()
    for name, weight in theirs.items():
        assert ours[name].dtype == torch.float32 and torch.equal(ours[name], weight), name
    assert not torch.equal(weight, weight.bfloat16().float())
    tokenizers = [AutoTokenizer.from_pretrained(path).get_vocab() for path in (own, trained)]
    assert tokenizers[0] == tokenizers[1]
    # The default is bfloat16, as the first run's own weights are.
    greedy = {"prompt": "3 plus 3", "max_new_tokens": 8, "temperature": 0}
    texts = [generate.generate(generate.GenerateConfig(path, **greedy)) for path in (checkpoints, own, trained)]
    assert texts[0] == texts[1] == texts[2] and texts[0].startswith("3 plus 3") and len(texts[0]) > 8
    drawn, considered = [], []

    def multinomial(probabilities, *args, draw=torch.multinomial, **kwargs):
        considered.append((probabilities > 0).all())
        return draw(probabilities, *args, **kwargs)

    with monkeypatch.context() as patch:
        patch.setattr(torch, "multinomial", multinomial)
        for seed in (1, 1, 2):
            drawn.append(generate.generate(generate.GenerateConfig(own, "3 plus 3", 8, seed=seed)))
    assert drawn[0] == drawn[1] != drawn[2]
    # Among all tokens.
    assert considered and all(considered)
    # Drawn as cold as this, it is the likeliest.
    assert generate.generate(generate.GenerateConfig(own, "3 plus 3", 8, temperature=1e-4)) == texts[1]
    with pytest.raises(UserError, match=r"manifest.json is missing: choose another checkpoint"):
        generate.generate(generate.GenerateConfig(tmp_path / "nothing", "3"))
    for options in ({"prompt": ""}, {"max_new_tokens": 0}, {"temperature": -1.0}):
        with pytest.raises(UserError, match="--prompt must not be empty, --max-new-tokens at least 1"):
            generate.generate(generate.GenerateConfig(own, **(greedy | options)))
    with pytest.raises(UserError, match="--directory s3:/bucket is no local path"):
        export.export_checkpoint(export.ExportConfig(checkpoints, Path("s3://bucket")))

    export.export_checkpoint(export.ExportConfig(checkpoints / "latest", tmp_path / "again"))
    again, rounded = (load_file(tmp_path / name / "model.safetensors") for name in ("again", "rounded"))
    assert again.keys() == rounded.keys() and all(torch.equal(again[name], rounded[name]) for name in rounded)


def _resumed_without_initial_weights(args):
    module = load_step(STEP)
    module.state.full_weights = None
    module.train(parse(module.Config, [*args]))


def _train_with_a_slow_disk(args):
    """Training in which the first checkpoint is written only once the step after it is done."""
    module, events, copied, planned, done = load_step(STEP), [], [], [], threading.Event()
    from survive import checkpoint
    from survive.bad_steps import BadSteps

    def slow(group, final, *args, write=checkpoint.write):
        events.append(f"writes {final.name}")
        copied.append(sum(box.nbytes for boxes in args[0].values() for box in boxes.boxes.values()))
        assert done.wait(30) or final.name != "step-000002"
        nbytes = write(group, final, *args)
        events.append(f"has written {final.name}")
        return nbytes

    def log(bad_steps, metrics, step, *args, log=BadSteps.log):
        log(bad_steps, metrics, step, *args)
        events.append(step)
        if step == 4:
            done.set()

    def plan(plans, plan=default_planner.create_default_global_save_plan):
        planned.append(len(plans))
        return plan(plans)

    checkpoint.write, BadSteps.log, default_planner.create_default_global_save_plan = slow, log, plan
    module.train(parse(module.Config, [*args]))
    return events, copied, planned


def test_training_goes_on_while_a_checkpoint_is_written(small_run, tmp_path, capfd):
    """And what is written is what the weights were, though the optimizer has changed them since."""
    args = arguments(small_run, tmp_path)
    expected = run_ranks(2, parity.record, STEP, (*small_run, *FOUR_STEPS))
    found = run_ranks(2, _train_with_a_slow_disk, args)
    # Each replica copies its half: weights and two moments of four bytes.
    half = 12 * sum(weight.numel() for weight in expected[0][-1].weights.values()) / 2
    assert [copied for _, copied, _ in found] == [[half, half]] * 2
    # Who writes what is found for all ranks, by the first, at the first save.
    assert [planned for *_, planned in found] == [[2], []]
    for events, *_ in found:
        assert events.index("writes step-000002") < events.index(3) < events.index("has written step-000002")
        # The next waits for it.
        assert events.index("has written step-000002") < events.index("writes step-000004")
    saved = re.findall(
        r"saved \S+/step-(\d+) .* writing took [\d.]+ s(, steps [\d.]+ s meanwhile)?", capfd.readouterr().out
    )
    assert [(step, bool(meanwhile)) for step, meanwhile in saved] == [("000002", True), ("000004", False)]
    forget(tmp_path, 4)
    same(run_ranks(2, parity.record, STEP, args)[0], expected[0][2:])
    # Which neither draws nor reads weights that the checkpoint would overwrite.
    forget(tmp_path, 4)
    run_ranks(2, _resumed_without_initial_weights, args)


def _copied_bytes(args):
    """Of the numbers that this rank copies for a save, and whether two saves copy them to the same memory."""
    trainer = make_trainer(load_step(STEP), args)
    state = sys.modules["survive.state"].TrainedState(trainer)
    first, second = ([box for boxes in state.copies().values() for box in boxes.boxes.values()] for _ in range(2))
    assert [box.data_ptr() for box in first] == [box.data_ptr() for box in second]
    nbytes = sum(box.nbytes for box in first)
    # What a dry run says.
    assert trainer.config.copied_bytes(trainer) == nbytes
    return nbytes


@pytest.mark.parametrize("layout", ["", "--zero 1", "--zero 1 --shard 2", HYBRID])
def test_ranks_that_hold_the_same_share_the_copying(small_run, layout):
    args = [*small_run, *layout.split(), "--micro-batch-size", "2"]
    copied = run_ranks(4, _copied_bytes, args)
    shapes = parameter_shapes(load_model_config(parse(load_step(STEP).Config, args)))
    # Weights and two moments of four bytes.
    whole = 12 * sum(shape.numel() for shape in shapes.values())
    assert sum(copied) == whole and max(copied) <= whole / 4 + 12 * len(shapes)


def test_a_step_sends_four_bytes_for_checkpoints(small_run, tmp_path):
    for found in run_ranks(2, ledger_of, [*arguments(small_run, tmp_path, "--save-every 1 --zero 1")], STEP):
        check_ledger(found)
