"""What of a configuration changes the result is implemented or refused by name; what goes in comes out again."""

import json
from dataclasses import fields

import pytest
import torch
from conftest import load_step
from ranks import run_ranks
from relatives import LINEAR, RELATIVES, YARN, random_model, relative, saved
from safetensors.torch import load_file
from torch.utils.flop_counter import FlopCounterMode
from transformers import CONFIG_MAPPING

from shared.config import BaseConfig, UserError, parse
from shared.families import FAMILIES, IMPLEMENTED, NEUTRAL, NO_EFFECT, not_implemented
from shared.flops import flops_per_token
from shared.llama_configs import load_model_config

pytestmark = pytest.mark.quick


@pytest.mark.parametrize("family", FAMILIES)
def test_each_key_is_implemented_neutral_or_without_effect(family):
    """One that a later version of transformers adds belongs to one of these, by a decision."""
    for key in (field.name for field in fields(CONFIG_MAPPING[family])):
        assert (key in IMPLEMENTED) + (key in NEUTRAL) + (key in NO_EFFECT) == 1, key
    assert not_implemented(relative(family), 64) == []


def config_of(directory, name, **changes):
    """The configuration that is read of a config.json with these changes."""
    values = relative(name).to_dict() | changes
    (directory / "config.json").write_text(json.dumps(values))
    return load_model_config(BaseConfig(model=str(directory), seq_len=64))


@pytest.mark.parametrize(
    ("name", "changes", "message"),
    [
        ("llama", {"hidden_act": "gelu"}, "uses hidden_act gelu, which"),
        ("llama", {"attention_dropout": 0.1}, "attention_dropout 0.1"),
        ("llama", {"quantization_config": {"quant_method": "fp8"}}, "quantization_config"),
        ("mistral", {"sliding_window": 63}, "sliding_window 63, shorter than --seq-len 64"),
        ("qwen2", {"use_sliding_window": True, "sliding_window": 32, "layer_types": None, "max_window_layers": 1},
         "sliding_window 32, shorter than --seq-len 64"),
        ("qwen3", {"layer_types": ["full_attention", "chunked_attention"]}, "layer_types .*chunked_attention"),
        ("smollm3", {"use_sliding_window": True, "sliding_window": 63, "layer_types": None}, "sliding_window 63"),
        ("smollm3", {"hidden_act": "relu", "attention_dropout": 0.5}, "hidden_act relu, attention_dropout 0.5"),
        ("llama", {"rope_parameters": {"rope_type": "dynamic", "rope_theta": 9.0, "factor": 2.0}}, "rope_type dynamic"),
        ("qwen2", {"rope_parameters": YARN | {"factor": None}}, "rope factor None"),
        ("qwen3", {"rope_parameters": {"rope_type": "default", "rope_theta": 10.0, "partial_rotary_factor": 0.5}},
         "partial_rotary_factor"),
        ("llama", {"model_type": "gemma3_text"}, "a gemma3_text model, but .* llama, mistral, qwen2, qwen3, smollm3"),
        ("llama", {"model_type": "qwen3_moe"}, "a qwen3_moe model"),
    ],
)  # fmt: skip
def test_what_would_change_the_result_is_refused_by_name(tmp_path, name, changes, message):
    with pytest.raises(UserError, match=message):
        config_of(tmp_path, name, **changes)


def test_a_key_that_nobody_knows_yet_is_refused_unless_it_has_its_default(monkeypatch):
    monkeypatch.setattr("shared.families.NO_EFFECT", NO_EFFECT - {"use_cache"})
    assert not_implemented(relative("qwen3"), 64) == []
    assert not_implemented(relative("qwen3", use_cache=False), 64) == ["use_cache False"]


@pytest.mark.parametrize(
    ("name", "changes"),
    [
        ("mistral", {"sliding_window": 64}),
        ("qwen2", {"use_sliding_window": True, "sliding_window": 32, "layer_types": None, "max_window_layers": 2}),
        ("smollm3", {"use_sliding_window": False, "sliding_window": 32}),
        # Of another class: transformers keeps it, and does not read it.
        ("mistral", {"attention_bias": True}),
        ("llama", {"sliding_window": 3}),
    ],
)
def test_what_would_not_is_not_refused(tmp_path, name, changes):
    config_of(tmp_path, name, **changes)


def test_older_files_say_rope_in_other_words(tmp_path):
    for rope in (LINEAR, YARN):
        new = config_of(tmp_path, "qwen2", rope_parameters=rope)
        scaling = {key: value for key, value in rope.items() if key != "rope_theta"}
        old = config_of(tmp_path, "qwen2", rope_parameters=None, rope_theta=rope["rope_theta"], rope_scaling=scaling)
        assert old.rope_parameters == new.rope_parameters == rope


def test_overrides_of_what_has_an_item_for_each_layer():
    config = load_model_config(BaseConfig(model="smollm3-3b", num_hidden_layers=5, hidden_size=64))
    assert config.no_rope_layers == [1, 1, 1, 0, 1] and config.layer_types == ["full_attention"] * 5
    assert (config.head_dim, load_model_config(BaseConfig(model="qwen3-0.6b", hidden_size=64)).head_dim) == (4, 4)
    assert load_model_config(BaseConfig(model="qwen3-0.6b", num_hidden_layers=2)).head_dim == 128


@pytest.mark.parametrize("name", RELATIVES)
def test_flops_equal_a_count_of_the_matmuls(name):
    """As in test_config.py, over transformers' model. Biases and norms are no matmuls."""
    config = relative(name)
    model = random_model(config)
    model.set_attn_implementation("eager")
    with FlopCounterMode(display=False) as counter:
        model(input_ids=torch.zeros(1, 32, dtype=torch.long)).logits.sum().backward()
    assert flops_per_token(config, 32, causal=False) * 32 == pytest.approx(counter.get_total_flops(), rel=2e-3)


def _copied(step, source, directory, *options):
    module = load_step(step)
    args = ["--init-from", str(source), "--tokenizer", "bpe", "--steps", "0", "--seq-len", "16", "--device", "cpu"]
    module.train(parse(module.Config, [*args, *options, "--export-dir", str(directory)]))


@pytest.mark.parametrize("name", RELATIVES)
def test_what_is_imported_is_exported(small_run, tmp_path, name):
    """No step is trained. Files have the same names and numbers, from one rank and from shards of four."""
    source, data = saved(tmp_path, name), small_run[:2]
    _copied("step01_single_gpu", source, tmp_path / "one", *data)
    run_ranks(4, _copied, "step06_4d", source, tmp_path / "four", *data, "--tp", "2", "--zero", "3")
    expected = load_file(source / "model.safetensors")
    for copy in (tmp_path / "one", tmp_path / "four"):
        tensors = load_file(copy / "model.safetensors")
        assert tensors.keys() == expected.keys()
        assert all(torch.equal(tensors[key], tensor) for key, tensor in expected.items())
        said, theirs = (json.loads((path / "config.json").read_text()) for path in (copy, source))
        alike = ("model_type", "architectures", "rope_parameters", "head_dim", "num_hidden_layers", "no_rope_layers")
        assert all(said.get(key) == theirs.get(key) for key in alike)
