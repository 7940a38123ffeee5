"""Exports load in both majors of transformers, with the same logits and ids, bit for bit."""

import json
import os
import subprocess
import sys

import pytest
import torch
from conftest import tiny_config
from relatives import RELATIVES, random_model, relative
from transformers import AutoModelForCausalLM, AutoTokenizer

from shared.corpus.tokenizers import train_bpe
from shared.llama_configs import LLAMA32_ROPE
from shared.weights import export

TEXT = "some words <|endoftext|><|im_start|> there"
MODELS = {
    "default": {},
    "tied": {"tie_word_embeddings": True},
    "grouped": {"num_key_value_heads": 1},
    "theta": {"rope_parameters": {"rope_type": "default", "rope_theta": 500000.0}},
    "llama3": {"rope_parameters": LLAMA32_ROPE | {"original_max_position_embeddings": 64}},
    "head_dim": {"head_dim": 16},
    "vocabulary": {"vocab_size": 301},
}
MODELS = {name: tiny_config(**changes) for name, changes in MODELS.items()}
# With each family's class, and each kind of RoPE.
MODELS |= {name: relative(name) for name in RELATIVES}
# Run with transformers 4 in front of all other packages: it must see nothing of ours.
LOAD = """
import sys
sys.path.insert(0, sys.argv[1])
import torch, transformers
from transformers import AutoModelForCausalLM, AutoTokenizer
assert transformers.__version__.startswith("4."), transformers.__version__
for directory in sys.argv[2:]:
    model = AutoModelForCausalLM.from_pretrained(directory)
    assert [type(model).__name__] == model.config.architectures
    with torch.no_grad():
        logits = model(torch.arange(200)[None] % 300).logits
    encoded = AutoTokenizer.from_pretrained(directory)(sys.stdin.readline().rstrip("\\n"), return_tensors="pt")
    assert model.generate(**encoded, max_new_tokens=1, do_sample=False).shape[1] == encoded["input_ids"].shape[1] + 1
    torch.save((encoded["input_ids"][0].tolist(), logits), f"{directory}/found")
"""


@pytest.fixture(scope="module")
def exports(tmp_path_factory):
    """Directories by name, with what transformers 5 finds in them."""
    directory = tmp_path_factory.mktemp("exports")
    tokenizer, found = train_bpe(["some words are here", "and there " * 30], 290), {}
    tokenizer.add_special_tokens({"extra_special_tokens": ["<|im_start|>"]})
    for name, model_config in MODELS.items():
        weights = {key: p.detach() for key, p in random_model(model_config).named_parameters()}
        export(weights, model_config, tokenizer, directory / name)
        model = AutoModelForCausalLM.from_pretrained(directory / name)
        assert [type(model).__name__] == model.config.architectures
        with torch.no_grad():
            logits = model(torch.arange(200)[None] % 300).logits
        found[directory / name] = AutoTokenizer.from_pretrained(directory / name)(TEXT)["input_ids"], logits
    return found


def test_names_of_both_majors(exports):
    for directory in exports:
        config = json.loads((directory / "config.json").read_text())
        rope = dict(config["rope_parameters"])
        assert config["rope_theta"] == rope.pop("rope_theta") and config["torch_dtype"] == config["dtype"] == "float32"
        assert config["rope_scaling"] == (None if rope == {"rope_type": "default"} else rope)
        written = json.loads((directory / "tokenizer_config.json").read_text())
        assert written["tokenizer_class"] != "TokenizersBackend" and "extra_special_tokens" not in written
        assert AutoTokenizer.from_pretrained(directory).extra_special_tokens == ["<|im_start|>"]


@pytest.mark.skipif("TRANSFORMERS_4" not in os.environ, reason="TRANSFORMERS_4 names no directory with transformers 4")
def test_transformers_4_finds_the_same(exports):
    command = [sys.executable, "-I", "-c", LOAD, os.environ["TRANSFORMERS_4"], *map(str, exports)]
    subprocess.run(command, input=f"{TEXT}\n" * len(exports), text=True, check=True)
    for directory, (ids, logits) in exports.items():
        theirs, found = torch.load(directory / "found")
        assert theirs == ids and torch.equal(found, logits), directory.name
