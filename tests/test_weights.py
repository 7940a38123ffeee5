"""Initial weights depend on names only; import and export are bitwise, in every layout of files that exists."""

import json
from pathlib import Path

import pytest
import torch
from conftest import tiny_config
from safetensors.torch import load_file, save_file
from tokenizers import ByteLevelBPETokenizer
from transformers import AutoModelForCausalLM, AutoTokenizer, PreTrainedTokenizerFast
from transformers import LlamaForCausalLM as HFLlama

from shared.config import BaseConfig, UserError
from shared.llama_configs import load_model_config
from shared.model import LlamaForCausalLM
from shared.weights import export, full_weights, materialize


def build(config, model_config, dtype=torch.float32):
    with torch.device("meta"):
        model = LlamaForCausalLM(model_config)
    materialize(model, full_weights(config, model_config), dtype, torch.device("cpu"))
    return model


@pytest.fixture(scope="module")
def tokenizer():
    bpe = ByteLevelBPETokenizer()
    bpe.train_from_iterator(["a few words"], 260, special_tokens=["<eos>"])
    return PreTrainedTokenizerFast(tokenizer_object=bpe._tokenizer, eos_token="<eos>", bos_token="<eos>")


def test_each_parameter_depends_on_seed_and_name_only():
    small, large = (build(BaseConfig(), tiny_config(num_hidden_layers=n)).state_dict() for n in (2, 3))
    assert all(torch.equal(small[name], large[name]) for name in small)
    other_seed = build(BaseConfig(seed=1), tiny_config()).state_dict()
    matrices = [name for name in small if small[name].ndim == 2]
    assert not any(torch.equal(small[name], other_seed[name]) for name in matrices)
    same_shape = [small[f"model.layers.{i}.mlp.{p}_proj.weight"] for i in (0, 1) for p in ("gate", "up")]
    assert not any(torch.equal(a, b) for i, a in enumerate(same_shape) for b in same_shape[:i])


@pytest.mark.parametrize("tile", [1, 200, 2**22])
def test_rows_are_those_of_the_whole(monkeypatch, tile):
    """A tile is one row, or six, of which the last has fewer: or all, as of these tests' other models."""
    monkeypatch.setattr("shared.weights.TILE", tile)
    weights = full_weights(BaseConfig(), tiny_config())
    for name in ("model.embed_tokens.weight", "model.norm.weight"):
        full = weights(name)
        for begin, end in ((0, 1), (5, 7), (6, 12), (17, 32), (0, len(full)), (len(full) - 1, len(full))):
            assert torch.equal(weights(name, slice(begin, end)), full[begin:end])
    assert len(weights("lm_head.weight").unique(dim=0)) == 300


def test_initial_distribution_is_transformers():
    weights = build(BaseConfig(), tiny_config(hidden_size=256, initializer_range=0.05)).state_dict()
    assert weights["lm_head.weight"].std().item() == pytest.approx(0.05, rel=0.02)
    assert weights["lm_head.weight"].mean().item() == pytest.approx(0, abs=1e-3)
    assert torch.equal(weights["model.norm.weight"], torch.ones(256))


def test_dtype_does_not_change_the_model():
    single, double = (
        build(BaseConfig(), tiny_config(), dtype).state_dict() for dtype in (torch.float32, torch.float64)
    )
    assert all(torch.equal(single[name].double(), double[name]) for name in single)


@pytest.mark.parametrize("tied", [False, True])
def test_new_tokens_get_the_mean_of_the_others_on_request(tmp_path, tied, tokenizer):
    model_config = tiny_config(tie_word_embeddings=tied)
    weights = dict(build(BaseConfig(), model_config).named_parameters())
    export({name: p.detach() for name, p in weights.items()}, model_config, tokenizer, tmp_path / "model")
    config = BaseConfig(init_from=str(tmp_path / "model"), vocab_size=303)
    grown = build(config, load_model_config(config)).state_dict()
    for name in ("model.embed_tokens.weight", "lm_head.weight"):
        old = weights.get(name, weights["model.embed_tokens.weight"])
        assert torch.equal(grown[name][:300], old)
        torch.testing.assert_close(grown[name][300:], old.mean(0).expand(3, -1))
    rows = full_weights(config, load_model_config(config))("model.embed_tokens.weight", slice(299, 302))
    assert torch.equal(rows, grown["model.embed_tokens.weight"][299:302])
    with pytest.raises(UserError, match=r"is .300, 32. in model.safetensors, but the model's is .299, 32."):
        config = BaseConfig(init_from=str(tmp_path / "model"), vocab_size=299)
        build(config, load_model_config(config))


@pytest.mark.parametrize("tied", [False, True])
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize("max_shard_size", ["5GB", "30KB"])
def test_import_is_bitwise(tmp_path, tied, dtype, max_shard_size):
    hf = HFLlama(tiny_config(tie_word_embeddings=tied)).to(dtype)
    hf.save_pretrained(tmp_path, max_shard_size=max_shard_size)
    assert (tmp_path / "model.safetensors.index.json").exists() == (max_shard_size == "30KB")
    config = BaseConfig(init_from=str(tmp_path), seq_len=64)
    model = build(config, load_model_config(config))
    assert (model.lm_head.weight is model.model.embed_tokens.weight) == tied
    for name, weight in hf.state_dict().items():
        assert torch.equal(model.state_dict()[name], weight.float()), name


def test_a_part_is_read_without_the_rest(tmp_path):
    """Files are mapped into memory: a rank that keeps some rows of a tensor reads the pages that these lie in."""
    model_config = tiny_config(vocab_size=100_000, hidden_size=128, num_hidden_layers=1, tie_word_embeddings=True)
    HFLlama(model_config).save_pretrained(tmp_path)
    full = full_weights(BaseConfig(init_from=str(tmp_path)), model_config)("model.embed_tokens.weight")
    part = full.tensor_split(8)[3].clone()
    _, *lines = Path("/proc/self/smaps").read_text().partition(str(tmp_path / "model.safetensors"))[2].splitlines()
    resident = next(int(line.split()[1]) for line in lines if line.startswith("Rss:")) * 1024
    # What lies around it comes with it, at most 2 MiB at each end.
    assert part.nbytes <= resident <= part.nbytes + 2**22 < full.nbytes / 4


@pytest.mark.parametrize("tied", [False, True])
def test_export_loads_in_transformers_bitwise(tmp_path, tied, tokenizer):
    model_config = tiny_config(tie_word_embeddings=tied, auto_map={"AutoConfig": "its_own_code.Config"})
    model = build(BaseConfig(), model_config)
    (tmp_path / "out").mkdir()
    export(dict(model.named_parameters()), model_config, tokenizer, tmp_path / "out")
    assert "its_own_code" not in (tmp_path / "out" / "config.json").read_text()
    hf = AutoModelForCausalLM.from_pretrained(tmp_path / "out")
    assert hf.dtype == torch.float32
    for name, weight in hf.state_dict().items():
        assert torch.equal(model.state_dict()[name], weight), name
    tokens = AutoTokenizer.from_pretrained(tmp_path / "out")("a few words", return_tensors="pt")
    assert hf.generate(**tokens, max_new_tokens=5, do_sample=False).shape[1] > tokens["input_ids"].shape[1]
    again = build(config := BaseConfig(init_from=str(tmp_path / "out"), seq_len=64), load_model_config(config))
    assert all(torch.equal(again.state_dict()[name], weight) for name, weight in model.state_dict().items())
    assert [path.name for path in tmp_path.iterdir()] == ["out"]


def test_interrupted_export_leaves_nothing(tmp_path, tokenizer, monkeypatch):
    model = build(BaseConfig(), tiny_config())
    monkeypatch.setattr(tokenizer, "save_pretrained", lambda path: 1 / 0)
    with pytest.raises(ZeroDivisionError):
        export(dict(model.named_parameters()), tiny_config(), tokenizer, tmp_path / "out")
    assert list(tmp_path.iterdir()) == []


def test_export_never_deletes_the_model(tmp_path, tokenizer):
    """Somebody else has filled the directory while the run was training."""
    model = build(BaseConfig(), tiny_config())
    (tmp_path / "out").mkdir()
    (tmp_path / "out" / "theirs").touch()
    with pytest.raises(UserError, match=r"in use by now; the model is in (.*)") as error:
        export(dict(model.named_parameters()), tiny_config(), tokenizer, tmp_path / "out")
    assert AutoModelForCausalLM.from_pretrained(str(error.value).split("the model is in ")[1])
    assert [path.name for path in (tmp_path / "out").iterdir()] == ["theirs"]


def damage(directory, how):
    weights = directory / "model.safetensors"
    match how:
        case "truncated":
            weights.write_bytes(weights.read_bytes()[:-100])
        case "not found":
            weights.unlink()
        case "lacks 1 of 21 tensors, such as model.norm.weight":
            save_file({k: v for k, v in load_file(weights).items() if k != "model.norm.weight"}, weights)
        case r"is \(300, 32\) in model.safetensors, but the model's is \(400, 32\)":
            config = json.loads((directory / "config.json").read_text())
            (directory / "config.json").write_text(json.dumps(config | {"vocab_size": 400}))
        case "holds 9 tensors that the model lacks: model.layers.1":
            config = json.loads((directory / "config.json").read_text())
            (directory / "config.json").write_text(json.dumps(config | {"num_hidden_layers": 1}))
        case "cannot read model.safetensors.index.json":
            (directory / "model.safetensors.index.json").write_text('{"weight_map": {"a"')
        case "model-00002-of-00002.safetensors not found":
            weight_map = {"a": "model.safetensors", "b": "model-00002-of-00002.safetensors"}
            (directory / "model.safetensors.index.json").write_text(json.dumps({"weight_map": weight_map}))
        case _:
            raise AssertionError(how)


@pytest.mark.parametrize(
    "how",
    [
        "truncated",
        "not found",
        "lacks 1 of 21 tensors, such as model.norm.weight",
        r"is \(300, 32\) in model.safetensors, but the model's is \(400, 32\)",
        "model-00002-of-00002.safetensors not found",
        "holds 9 tensors that the model lacks: model.layers.1",
        "cannot read model.safetensors.index.json",
    ],
)
def test_damaged_checkpoint_is_named(tmp_path, how):
    HFLlama(tiny_config()).save_pretrained(tmp_path)
    damage(tmp_path, how)
    config = BaseConfig(init_from=str(tmp_path), seq_len=64)
    with pytest.raises(UserError, match=how):
        full_weights(config, load_model_config(config))


def test_a_head_of_its_own_is_not_lost(tmp_path):
    HFLlama(tiny_config()).save_pretrained(tmp_path)
    config = BaseConfig(init_from=str(tmp_path), seq_len=64, tie_word_embeddings=True)
    with pytest.raises(UserError, match=r"holds 1 tensors that the model lacks: lm_head\.weight"):
        full_weights(config, load_model_config(config))


def test_a_head_that_is_no_copy_is_not_lost(tmp_path):
    """The configuration says tied. A copy of the embedding is one thing, what was trained by itself another."""
    model = HFLlama(tiny_config())
    for copied in (True, False):
        if copied:
            model.lm_head.weight.data.copy_(model.model.embed_tokens.weight.data)
        else:
            model.lm_head.weight.data[0, 0] += 1
        model.save_pretrained(tmp_path)
        written = json.loads((tmp_path / "config.json").read_text())
        (tmp_path / "config.json").write_text(json.dumps(written | {"tie_word_embeddings": True}))
        config = BaseConfig(init_from=str(tmp_path), seq_len=64)
        if copied:
            full_weights(config, load_model_config(config))
    with pytest.raises(UserError, match="holds another one: give --tie-word-embeddings False"):
        full_weights(config, load_model_config(config))
    config.tie_word_embeddings = False
    weights = full_weights(config, load_model_config(config))
    assert torch.equal(weights("lm_head.weight"), model.lm_head.weight)


def test_a_directory_of_a_presets_name(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    HFLlama(tiny_config()).save_pretrained("llama-2-7b")
    assert load_model_config(BaseConfig(init_from="llama-2-7b", seq_len=64)).hidden_size == 32
    assert load_model_config(BaseConfig(model="llama-2-7b", seq_len=64)).hidden_size == 4096


def test_unreachable_checkpoint():
    with pytest.raises(UserError, match="no such directory"):
        full_weights(BaseConfig(init_from="no/such-model"), tiny_config())
