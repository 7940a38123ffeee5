"""Options, presets and the schedule."""

import dataclasses
from itertools import pairwise

import pytest
import torch
from conftest import load_step
from torch.utils.flop_counter import FlopCounterMode
from transformers import LlamaConfig
from transformers import LlamaForCausalLM as HFLlama

from shared.config import BaseConfig, UserError, parse
from shared.flops import flops_per_token, matmul_parameters
from shared.llama_configs import PRESETS, load_model_config
from shared.model import LlamaForCausalLM
from shared.optim import learning_rate, make_optimizer


def test_defaults_then_file_then_command_line(tmp_path):
    (tmp_path / "run.yaml").write_text("lr: 3e-4\nseq_len: 128\nbetas: [0.8, 0.9]\ncompile: true\nmodel: null\n")
    config = parse(BaseConfig, ["--config", str(tmp_path / "run.yaml"), "--seq-len", "64"])
    assert (config.lr, config.betas, config.compile, config.model) == (3e-4, (0.8, 0.9), True, None)
    assert config.seq_len == 64 and config.steps == BaseConfig.steps


def test_file_sets_options_of_every_kind(tmp_path):
    (tmp_path / "run.yaml").write_text(
        "tie-word-embeddings: true\nstreaming: false\nmin-lr: null\nrun_name: a b\ndataset: null\n"
    )
    config = parse(BaseConfig, ["--config", str(tmp_path / "run.yaml")])
    assert (config.tie_word_embeddings, config.streaming, config.min_lr, config.run_name) == (True, False, None, "a b")
    # What is given as nothing is the default.
    assert config.dataset == BaseConfig.dataset


def test_unknown_option_and_key_suggest_the_right_one(tmp_path, capsys):
    (tmp_path / "run.yaml").write_text("globl_batch_size: 8\n")
    for args in (["--globl-batch-size", "8"], ["--config", str(tmp_path / "run.yaml")]):
        with pytest.raises(SystemExit) as exit:
            parse(BaseConfig, args)
        assert exit.value.code == 2
        assert "--global-batch-size" in capsys.readouterr().err


@pytest.mark.parametrize(
    ("content", "message"),
    [
        (b"a: [", "while parsing a flow"),
        (b"- a\n", "found list"),
        (b"config: other.yaml\n", "cannot name another"),
        (b"run-name: \xff\n", "can't decode"),
        (b"lr: 0.1\nseq-len: 8\nseq_len: 16\n", "seq-len is given twice"),
        (None, "No such file"),
    ],
)
def test_broken_yaml(tmp_path, content, message):
    if content is not None:
        (tmp_path / "run.yaml").write_bytes(content)
    with pytest.raises(UserError, match=message):
        parse(BaseConfig, ["--config", str(tmp_path / "run.yaml")])


def test_help_explains_every_option(capsys):
    with pytest.raises(SystemExit):
        parse(load_step("step01_single_gpu").Config, ["--help"])
    text = " ".join(capsys.readouterr().out.replace("│", " ").split())
    for field in dataclasses.fields(BaseConfig):
        name = field.name.replace("_", "-")
        assert f"--{name} " in text or f"--{name}, --no-{name} " in text, name
    # A field without a comment of its own would inherit the one above it.
    assert text.count("Tokens per sequence.") == text.count("Optimizer steps.") == 1


@pytest.mark.parametrize(
    ("args", "message"),
    [
        ("--global-batch-size 10 --micro-batch-size 4", "10 is not a multiple of --micro-batch-size 4"),
        ("--seq-len 0", "--seq-len must be at least 1"),
        ("--warmup-steps -1", "--warmup-steps must be a number that is not negative"),
        ("--lr nan", "--lr must be a number"),
        ("--lr 1e-4 --min-lr 2e-4", "--min-lr 0.0002 is above --lr 0.0001"),
        ("--betas 1.5 0.9", r"must be in \[0, 1\)"),
        ("--seed -1", "--seed must be in"),
        ("--ledger --compile", "torch then compiles nothing: leave --compile out"),
        ("--eval-steps 0", "--eval-steps must be at least 1"),
        ("--export-dir {here}/new --metrics-file {here}/new/metrics", "must not lie in --export-dir"),
        ("--export-dir {here}/new --tensorboard {here}/new/t", "--tensorboard .* must not lie in --export-dir"),
        ("--export-dir {here}/full", "is not empty"),
        ("--export-dir {here}/file", "is not empty"),
        ("--export-dir {here}/file/below", "cannot write to"),
        ("--metrics-file {here}/file", "exists already"),
        ("--tensorboard {here}/full", "--tensorboard .*full exists already"),
        ("--metrics-file /proc/metrics.jsonl", "cannot write to /proc"),
        ("--metrics-file s3://bucket/metrics", "--metrics-file s3:/bucket/metrics is no local path"),
        ("--metrics-file ~/metrics", "--metrics-file ~/metrics begins with ~, which is not expanded"),
        ("--export-dir gs://bucket/model", "--export-dir gs:/bucket/model is no local path"),
    ],
)
def test_invalid_values(tmp_path, args, message):
    (tmp_path / "full").mkdir()
    (tmp_path / "full" / "a").touch()
    (tmp_path / "file").touch()
    with pytest.raises(UserError, match=message):
        parse(BaseConfig, args.format(here=tmp_path).split())


# Billions of parameters by the makers' model cards, to the digits that they give.
PUBLISHED_SIZES = {
    "tiny": 0.004,
    "smollm-135m": 0.1345,
    "smollm-360m": 0.3618,
    "smollm-1.7b": 1.711,
    "tinyllama-1.1b": 1.100,
    "llama-2-7b": 6.738,
    "llama-2-13b": 13.02,
    "llama-2-70b": 68.98,
    "llama-3.1-8b": 8.030,
    "llama-3.1-70b": 70.55,
    "llama-3.1-405b": 405.9,
    "llama-3.2-1b": 1.236,
    "llama-3.2-3b": 3.213,
    "mistral-7b": 7.248,
    "qwen2.5-0.5b": 0.494,
    "qwen3-0.6b": 0.596,
    "smollm3-3b": 3.075,
}


@pytest.mark.parametrize("name", PRESETS)
def test_preset_has_the_published_size(name):
    with torch.device("meta"):
        size = sum(p.numel() for p in LlamaForCausalLM(PRESETS[name]).parameters())
    assert size / 1e9 == pytest.approx(PUBLISHED_SIZES[name], rel=1e-3)


def test_overrides():
    config = load_model_config(BaseConfig(model="llama-3.2-1b", num_hidden_layers=2, hidden_size=256, vocab_size=99))
    assert isinstance(config, LlamaConfig)
    assert (config.num_hidden_layers, config.hidden_size, config.vocab_size, config.head_dim) == (2, 256, 99, 8)
    assert config.rope_parameters["factor"] == 32.0 and config.tie_word_embeddings
    assert PRESETS["llama-3.2-1b"].hidden_size == 2048
    assert load_model_config(BaseConfig(tie_word_embeddings=False, head_dim=16)).head_dim == 16


def test_local_directory(tmp_path):
    LlamaConfig(
        hidden_size=48, num_attention_heads=6, rope_parameters={"rope_type": "default", "rope_theta": 7.0}
    ).save_pretrained(tmp_path)
    for config in (BaseConfig(model=str(tmp_path)), BaseConfig(init_from=str(tmp_path))):
        assert load_model_config(config).hidden_size == 48
        assert load_model_config(config).rope_parameters["rope_theta"] == 7.0


@pytest.mark.parametrize(
    ("overrides", "message"),
    [
        ({"model": "llama-3.1-9b"}, "did you mean llama-3.1-8b"),
        ({"model": "Llama-2-7B"}, "did you mean llama-2-7b"),
        ({"hidden_size": 100}, r"100\) is not a multiple of the number of attention heads \(8\)"),
        ({"num_key_value_heads": 3}, "8 attention heads are not a multiple of 3"),
        ({"head_dim": 31}, "requires an even rotary dimension"),
        ({"num_hidden_layers": 0}, "at least 1"),
        ({"vocab_size": -5}, "at least 1"),
        ({"num_key_value_heads": 0}, "at least 1"),
        ({"seq_len": 4096}, "beyond the model's 2048 positions"),
    ],
)
def test_impossible_models(overrides, message):
    with pytest.raises(UserError, match=message):
        load_model_config(BaseConfig(**overrides))


def test_broken_config_json_is_named(tmp_path):
    (tmp_path / "config.json").write_text('{"model_type": "lla')
    with pytest.raises(UserError, match=r"cannot read its config\.json"):
        load_model_config(BaseConfig(model=str(tmp_path)))
    # What transformers refuses, by errors of its own.
    (tmp_path / "config.json").write_text('{"model_type": "llama", "num_hidden_layers": "12"}')
    with pytest.raises(UserError, match=r"config\.json: .*num_hidden_layers"):
        load_model_config(BaseConfig(model=str(tmp_path)))


def test_learning_rate():
    def rates(**overrides):
        config = BaseConfig(**{"steps": 110, "warmup_steps": 10, "lr": 1.0, "min_lr": 0.1} | overrides)
        return [learning_rate(config, step) for step in range(110)]

    for schedule in ("cosine", "linear", "wsd", "constant"):
        rate = rates(schedule=schedule)
        assert rate[:10] == pytest.approx([0.1 * (i + 1) for i in range(10)])
        assert rate[10] == 1.0 and rate[-1] == pytest.approx(1.0 if schedule == "constant" else 0.1)
        assert all(a >= b for a, b in pairwise(rate[10:]))
    assert rates(schedule="cosine")[59] == pytest.approx(0.55, abs=0.01)
    # (1 + cos(24/99 π)) / 2 of 0.9 above the last.
    assert rates(schedule="cosine")[34] == pytest.approx(0.8757, abs=1e-3)
    assert rates(schedule="linear")[59] == pytest.approx(0.55, abs=0.01)
    assert rates(schedule="wsd")[89] == 1.0 and rates(schedule="wsd")[99] == pytest.approx(0.55, abs=0.05)
    assert rates(warmup_steps=0)[0] == 1.0
    # Without --min-lr the end follows the peak.
    assert rates(lr=1e-5, min_lr=None)[-1] == pytest.approx(1e-6)
    assert learning_rate(BaseConfig(steps=1, warmup_steps=0), 0) == BaseConfig.lr


def test_only_matrices_are_decayed():
    model = LlamaForCausalLM(load_model_config(BaseConfig()))
    optimizer = make_optimizer(BaseConfig(weight_decay=0.3, betas=(0.7, 0.8)), list(model.parameters()))
    decayed, other = optimizer.param_groups
    assert decayed["betas"] == other["betas"] == (0.7, 0.8)
    assert (decayed["weight_decay"], other["weight_decay"]) == (0.3, 0.0)
    norms = [p for name, p in model.named_parameters() if "norm" in name]
    assert len(other["params"]) == len(norms) == 9 and {*other["params"]} == {*norms}


@pytest.mark.parametrize("tied", [False, True])
def test_flops_equal_a_count_of_the_matmuls(tied):
    """torch's counter over transformers' model: forward and backward, attention as two full matmuls per pass."""
    config = load_model_config(
        BaseConfig(num_hidden_layers=2, hidden_size=64, vocab_size=300, tie_word_embeddings=tied)
    )
    config._attn_implementation = "eager"
    model = HFLlama(config)
    with FlopCounterMode(display=False) as counter:
        model(input_ids=torch.zeros(1, 32, dtype=torch.long)).logits.sum().backward()
    assert flops_per_token(config, 32, causal=False) * 32 == pytest.approx(counter.get_total_flops(), rel=2e-3)
    attention = 12 * 2 * 64 * 32
    assert flops_per_token(config, 32, causal=True) == 6 * matmul_parameters(config) + attention / 2
