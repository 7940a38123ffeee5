"""step01 end to end: what it computes, what it writes, and how it fails."""

import json

import numpy as np
import pytest
import torch
import torch.nn.functional as F
from conftest import ROOT, load_step, make_trainer
from launcher import run_command
from transformers import AutoModelForCausalLM, AutoTokenizer, LlamaForCausalLM

from shared.config import parse
from shared.corpus import prepare_corpus
from shared.data import GlobalBatches, split_corpus
from shared.live_bytes import LiveBytes, live_state
from shared.llama_configs import load_model_config
from shared.optim import learning_rate
from shared.weights import full_weights

step01 = load_step("step01_single_gpu")


def train(args, *more):
    step01.train(parse(step01.Config, [*args, *map(str, more)]))


def records(path):
    return [json.loads(line) for line in path.read_text().splitlines()]


def gradients(args, *more):
    """Loss and gradients of the first step."""
    trainer = make_trainer(step01, [*args, *more])
    batches = trainer.batches.next()
    loss = trainer.forward_backward(batches)
    return loss, {name: p.grad for name, p in trainer.model.named_parameters()}, trainer, batches


def test_micro_batch_size_changes_nothing(small_run):
    reference_loss, reference, trainer, batches = gradients(small_run, "--dtype", "float64", "--micro-batch-size", "8")
    logits = trainer.model(batches[0].input_ids, batches[0].position_ids)
    assert reference_loss.item() == pytest.approx(F.cross_entropy(logits.mT, batches[0].labels).item(), rel=1e-13)
    for size in ("1", "2", "4"):
        loss, grads, *_ = gradients(small_run, "--dtype", "float64", "--micro-batch-size", size)
        assert loss.item() == pytest.approx(reference_loss.item(), rel=1e-13)
        for name, grad in grads.items():
            torch.testing.assert_close(grad, reference[name], rtol=1e-11, atol=1e-14)


def test_memory_is_what_the_readme_says():
    trainer = make_trainer(step01, ["--device", "cpu"], np.arange(100_000) % 4096)
    model, optimizer, batches = trainer.model, trainer.optimizer, trainer.batches

    def step():
        trainer.forward_backward(batches.next())
        trainer.clip_grad_norm()
        optimizer.step()
        optimizer.zero_grad()

    step()
    with LiveBytes() as memory:
        memory.track(live_state(model, optimizer))
        state = memory.now
        batch = batches.next()[0]
        hidden = model.model(batch.input_ids, batch.position_ids)
        activations = memory.now - state
        del hidden
        memory.peak = memory.now
        step()
    parameters = sum(p.nbytes for p in model.parameters())
    readme = (ROOT / "step01_single_gpu" / "README.md").read_text()
    for nbytes in (parameters, state - parameters, parameters, activations, memory.peak):
        assert f"| {nbytes / 2**20:.1f} |" in readme
    assert f"N = {parameters // 4:,}" in readme


def test_clip_grad_norm(small_run):
    _, grads, trainer, _ = gradients(small_run, "--grad-clip", "0.5")
    before = torch.cat([grad.flatten() for grad in grads.values()]).clone()
    assert before.norm() > 0.5
    assert trainer.clip_grad_norm().item() == pytest.approx(before.norm().item(), rel=1e-5)
    after = torch.cat([p.grad.flatten() for p in trainer.model.parameters()])
    torch.testing.assert_close(after, before * (0.5 / before.norm()), rtol=1e-4, atol=0)
    trainer.config.grad_clip = 0
    trainer.clip_grad_norm()
    assert torch.equal(after, torch.cat([p.grad.flatten() for p in trainer.model.parameters()]))


@pytest.mark.parametrize(
    "options", ["", "--dtype bfloat16", "--dtype float64", "--optimizer sgd --lr 1", "--schedule wsd"]
)
def test_loss_falls_and_metrics_say_so(small_run, tmp_path, capsys, options):
    path = tmp_path / "new" / "metrics.jsonl"
    train(small_run, "--metrics-file", path, "--steps", "60", "--eval-every", "30", *options.split())
    steps = [record for record in records(path) if "loss" in record]
    evaluations = [record for record in records(path) if "validation_loss" in record]
    assert [record["step"] for record in steps] == list(range(1, 61))
    assert [record["step"] for record in evaluations] == [30, 60]
    assert steps[0]["loss"] == pytest.approx(torch.tensor(300.0).log().item(), abs=0.05)
    assert steps[-1]["loss"] < steps[0]["loss"] - 1
    assert abs(evaluations[-1]["validation_loss"] - steps[-1]["loss"]) < 0.5
    assert steps[-1]["tokens"] == 60 * 8 * 16
    for key in (
        "grad_norm",
        "lr",
        "tokens_per_second",
        "tokens_per_second_per_device",
        "mfu",
        "mfu_causal",
        "peak_memory",
    ):
        assert all(record[key] > 0 for record in steps), key
    assert steps[0]["mfu_causal"] < steps[0]["mfu"] < 1.5
    # Full precision: more digits than the console shows.
    assert len(str(steps[0]["loss"])) > 8 and len(str(steps[0]["grad_norm"])) > 8
    assert "step 60 | loss" in capsys.readouterr().out


def test_train_equals_a_loop_written_by_hand(small_run, tmp_path):
    """On transformers' model and torch's plain AdamW, with fresh gradients each step."""
    options = ("--dtype", "float64", "--steps", "4", "--lr", "0.01", "--grad-clip", "0.7", "--betas", "0.8", "0.9")
    train(small_run, *options, "--export-dir", tmp_path / "out")
    config = parse(step01.Config, [*small_run, *options])
    model_config = load_model_config(config)
    weights = full_weights(config, model_config)
    model = LlamaForCausalLM(model_config).double()
    for name, parameter in model.named_parameters():
        parameter.data.copy_(weights(name))
    matrices = [p for p in model.parameters() if p.ndim == 2]
    norms = [p for p in model.parameters() if p.ndim == 1]
    groups = [{"params": matrices, "weight_decay": 0.1}, {"params": norms, "weight_decay": 0.0}]
    optimizer = torch.optim.AdamW(groups, betas=(0.8, 0.9), foreach=False)
    sequences, _ = split_corpus(prepare_corpus(config, model_config.vocab_size), config)
    batches = GlobalBatches(sequences, config, 0, 1)
    for step in range(4):
        inputs, labels = (torch.cat(parts) for parts in list(zip(*batches.next(), strict=True))[:2])
        optimizer.zero_grad()
        F.cross_entropy(model(input_ids=inputs).logits.mT, labels).backward()
        torch.nn.utils.clip_grad_norm_(model.parameters(), 0.7)
        for group in optimizer.param_groups:
            group["lr"] = learning_rate(config, step)
        optimizer.step()
    trained = AutoModelForCausalLM.from_pretrained(tmp_path / "out", dtype=torch.float64).state_dict()
    # transformers computes its norms and angles in float32 here, ours in float64.
    for name, weight in model.state_dict().items():
        torch.testing.assert_close(trained[name], weight, rtol=1e-4, atol=1e-5)


def test_validation_sees_the_same_held_out_sequences_each_time(small_run, tmp_path):
    train(small_run, "--lr", 0, "--eval-every", 1, "--eval-steps", 1, "--metrics-file", tmp_path / "a")
    losses = {record["validation_loss"] for record in records(tmp_path / "a") if "validation_loss" in record}
    trainer = make_trainer(step01, small_run)
    config, model, (batches,) = trainer.config, trainer.model, trainer.validation.values()
    (validation,) = batches.sequences.sources
    # As many are held out as a global batch takes: this one holds them all.
    rows = torch.tensor(np.stack([validation[i] for i in range(len(validation))]).astype(np.int64))
    logits = model(rows[:, :-1], torch.arange(config.seq_len).expand(len(rows), -1))
    assert len(rows) == config.global_batch_size and len(losses) == 1
    assert losses.pop() == pytest.approx(F.cross_entropy(logits.mT, rows[:, 1:]).item(), rel=1e-5)


def test_bfloat16_is_used_and_near(small_run):
    loss, grads, *_ = gradients(small_run)
    half_loss, half, *_ = gradients(small_run, "--dtype", "bfloat16")
    assert half_loss != loss and half_loss.item() == pytest.approx(loss.item(), rel=1e-2)
    for name, grad in half.items():
        assert grad.dtype == torch.float32 and not torch.equal(grad, grads[name])
        assert (grad - grads[name]).norm() < 0.1 * grads[name].norm()


def test_export_dir_may_be_a_link_or_the_current_directory(small_run, tmp_path, monkeypatch):
    (tmp_path / "real").mkdir()
    (tmp_path / "link").symlink_to("real")
    train(small_run, "--export-dir", tmp_path / "link")
    assert (tmp_path / "real" / "model.safetensors").exists()
    (tmp_path / "here").mkdir()
    monkeypatch.chdir(tmp_path / "here")
    train(small_run, "--export-dir", ".")
    assert (tmp_path / "here" / "model.safetensors").exists()


def test_runs_are_reproducible(small_run, tmp_path):
    for name in "ab":
        train(small_run, "--metrics-file", tmp_path / name)
    first, second = (records(tmp_path / name) for name in "ab")
    assert [(r["loss"], r["grad_norm"]) for r in first] == [(r["loss"], r["grad_norm"]) for r in second]


def test_export_then_train_on_from_it(small_run, tmp_path):
    train(
        small_run,
        "--steps",
        "40",
        "--export-dir",
        tmp_path / "out",
        "--metrics-file",
        tmp_path / "a",
        "--eval-every",
        "40",
    )
    # Whoever may read the directory may read its files.
    assert len({file.stat().st_mode & 0o666 for file in (tmp_path / "out").iterdir()}) == 1
    model = AutoModelForCausalLM.from_pretrained(tmp_path / "out")
    tokenizer = AutoTokenizer.from_pretrained(tmp_path / "out")
    prompt = tokenizer("12 plus 5", return_tensors="pt")
    assert tokenizer.decode(model.generate(**prompt, max_new_tokens=8, do_sample=False)[0]).startswith("12 plus 5")

    again = small_run[: small_run.index("--num-hidden-layers")] + small_run[small_run.index("--seq-len") :]
    train(again, "--init-from", tmp_path / "out", "--steps", "1", "--metrics-file", tmp_path / "b", "--lr", "0")
    train(again, "--init-from", tmp_path / "out", "--steps", "0", "--export-dir", tmp_path / "copy")
    assert records(tmp_path / "b")[0]["loss"] == pytest.approx(records(tmp_path / "a")[-1]["validation_loss"], abs=0.5)
    copy = AutoModelForCausalLM.from_pretrained(tmp_path / "copy")
    assert all(torch.equal(a, b) for a, b in zip(model.state_dict().values(), copy.state_dict().values(), strict=True))


def test_init_from_gives_transformers_loss_and_gradients(small_run, tmp_path):
    """Through the whole path: export, --init-from, and a step's gradients against transformers' on the same tokens."""
    train(small_run, "--steps", "20", "--export-dir", tmp_path / "out")
    args = small_run[: small_run.index("--num-hidden-layers")] + small_run[small_run.index("--seq-len") :]
    loss, grads, _, batches = gradients(args, "--init-from", str(tmp_path / "out"))
    model = AutoModelForCausalLM.from_pretrained(tmp_path / "out")
    inputs, labels = (torch.cat([getattr(batch, key) for batch in batches]) for key in ("input_ids", "labels"))
    theirs = F.cross_entropy(model(input_ids=inputs).logits.mT, labels)
    theirs.backward()
    assert loss.item() == pytest.approx(theirs.item(), rel=1e-6)
    for name, p in model.named_parameters():
        torch.testing.assert_close(grads[name], p.grad, rtol=1e-4, atol=1e-6)


def test_an_error_ends_the_process_without_traceback(small_run):
    result = run_command(step01.main, *small_run, "--global-batch-size", "9")
    assert result.returncode == 1
    line = "error: --global-batch-size 9 is not a multiple of --micro-batch-size 4: change one of the two"
    assert result.stderr.strip() == line


def test_more_than_one_process_is_refused(small_run, monkeypatch):
    monkeypatch.setenv("WORLD_SIZE", "2")
    with pytest.raises(ValueError, match="one device"):
        train(small_run)


def test_files_stay_small():
    assert len((ROOT / "step01_single_gpu" / "train.py").read_text().splitlines()) < 200
    assert len((ROOT / "shared" / "model.py").read_text().splitlines()) < 200
    for path in [*ROOT.glob("shared/**/*.py"), *ROOT.glob("step*/**/*.py")]:
        assert len(path.read_text().splitlines()) <= 300, path
