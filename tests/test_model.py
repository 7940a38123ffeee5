"""Our Llama is transformers' Llama: logits and every gradient, in float32 and in float64."""

import pytest
import torch
import torch.nn.functional as F
from conftest import tiny_config
from transformers import LlamaForCausalLM as HFLlama
from transformers.models.llama.modeling_llama import LlamaRMSNorm

from shared.llama_configs import LLAMA3_ROPE
from shared.loss import MIN_CHUNK, linear_cross_entropy
from shared.model import LlamaForCausalLM, RMSNorm, causal_attention
from shared.ops import _RMSNorm, rotate

# Pairs turn fast, slowly and in between within the original context, so that all three branches are taken.
SHORT_LLAMA3_ROPE = LLAMA3_ROPE | {"original_max_position_embeddings": 64, "rope_theta": 1000.0}
CASES = {
    "gqa": {},
    "mha": {"num_key_value_heads": 4},
    "mqa": {"num_key_value_heads": 1},
    "tied": {"tie_word_embeddings": True},
    "llama3 rope": {"rope_parameters": SHORT_LLAMA3_ROPE, "head_dim": 16},
    "rope theta": {"rope_parameters": {"rope_type": "default", "rope_theta": 500000.0}},
    "wide heads": {"head_dim": 24, "num_hidden_layers": 3},
    "many heads": {"num_attention_heads": 8, "num_key_value_heads": 4, "vocab_size": 517},
}


def float64_transformers(monkeypatch):
    """Lift the three things that transformers computes in float32 whatever the model's dtype: norms and rotary angles
    here, the loss by not using its loss function."""

    def norm(self, x):
        return self.weight * (x * torch.rsqrt(x.pow(2).mean(-1, keepdim=True) + self.variance_epsilon))

    monkeypatch.setattr(LlamaRMSNorm, "forward", norm)
    monkeypatch.setattr(torch, "float", torch.float64)


def compare(config, dtype, seq_len=96):
    torch.manual_seed(0)
    hf = HFLlama(config).to(dtype)
    if dtype == torch.float64:
        # .to() rounded nothing here: `torch.float` was float64 when the frequencies were computed.
        assert hf.model.rotary_emb.inv_freq.dtype == torch.float64
    ours = LlamaForCausalLM(config).to(dtype)
    ours.load_state_dict(hf.state_dict())
    ids = torch.randint(config.vocab_size, (3, seq_len + 1))
    inputs, labels = ids[:, :-1], ids[:, 1:]
    positions = torch.arange(seq_len).expand(3, -1)

    hf_logits = hf(input_ids=inputs).logits
    logits = ours(inputs, positions)
    F.cross_entropy(hf_logits.flatten(0, 1), labels.flatten()).backward()
    (linear_cross_entropy(ours.model(inputs, positions), ours.lm_head.weight, labels) / labels.numel()).backward()

    hf_grads = {name: p.grad for name, p in hf.named_parameters()}
    grads = {name: p.grad for name, p in ours.named_parameters()}
    assert grads.keys() == hf_grads.keys()
    return (hf_logits, logits), (hf_grads, grads)


@pytest.mark.parametrize("name", CASES)
def test_float64_equals_transformers(name, monkeypatch):
    float64_transformers(monkeypatch)
    (hf_logits, logits), (hf_grads, grads) = compare(tiny_config(**CASES[name]), torch.float64)
    torch.testing.assert_close(logits, hf_logits, rtol=1e-10, atol=1e-12)
    for key, grad in grads.items():
        torch.testing.assert_close(grad, hf_grads[key], rtol=1e-10, atol=1e-12, msg=lambda m, key=key: f"{key}: {m}")


@pytest.mark.parametrize("name", CASES)
def test_float32_equals_transformers(name):
    (hf_logits, logits), (hf_grads, grads) = compare(tiny_config(**CASES[name]), torch.float32)
    torch.testing.assert_close(logits, hf_logits, rtol=1e-5, atol=2e-6)
    for key, grad in grads.items():
        torch.testing.assert_close(grad, hf_grads[key], rtol=1e-4, atol=2e-6, msg=lambda m, key=key: f"{key}: {m}")


def test_module_tree_and_names_equal_transformers():
    config = tiny_config()
    assert list(LlamaForCausalLM(config).state_dict()) == list(HFLlama(config).state_dict())


def test_position_ids_reach_rope():
    model = LlamaForCausalLM(tiny_config())
    ids, positions = torch.randint(300, (1, 8)), torch.arange(8)[None]
    torch.testing.assert_close(model(ids, positions + 5), model(ids, positions), rtol=1e-4, atol=1e-5)
    assert not torch.allclose(model(ids, positions * 2), model(ids, positions), atol=1e-4)


def test_attention_is_handed_what_the_model_is_given_besides():
    """Unseen: it could be anything."""
    model, handed, thing = LlamaForCausalLM(tiny_config()), [], object()
    for layer in model.model.layers.values():
        layer.self_attn.attention = lambda q, k, v, *args: handed.append(args) or causal_attention(q, k, v)
    ids, positions = torch.randint(300, (1, 8)), torch.arange(8)[None]
    hidden = model.model(ids, positions, thing, 3)
    assert handed == [(thing, 3)] * 2 and torch.equal(model.model(ids, positions), hidden)
    assert handed[2:] == [()] * 2


def test_heads_are_counted_from_the_projection_width():
    """The seam of tensor parallelism: a layer with half the rows of q, k, v and half the columns of o."""
    attention = LlamaForCausalLM(tiny_config()).model.layers["0"].self_attn
    x, cos, sin = torch.randn(1, 8, 32), torch.ones(1, 8, 1, 4), torch.zeros(1, 8, 1, 4)
    whole = attention(x, cos, sin)
    q, k, v, o = (getattr(attention, f"{n}_proj").weight.data for n in "qkvo")
    parts = []
    for half in (0, 1):
        for n, weight in zip("qkv", (q, k, v), strict=True):
            getattr(attention, f"{n}_proj").weight.data = weight.chunk(2)[half]
        attention.o_proj.weight.data = o.chunk(2, dim=1)[half]
        parts.append(attention(x, cos, sin))
    torch.testing.assert_close(sum(parts), whole)


def test_rms_norm_equals_torch():
    x = torch.randn(2, 3, 16, dtype=torch.float64, requires_grad=True)
    weight = torch.randn(16, dtype=torch.float64, requires_grad=True)
    torch.testing.assert_close(_RMSNorm.apply(x, weight, 1e-5), F.rms_norm(x, (16,), weight, 1e-5), rtol=1e-14, atol=0)
    assert torch.autograd.gradcheck(lambda x, w: _RMSNorm.apply(x, w, 1e-5), (x, weight))


def test_rotate_gradient():
    angles = torch.randn(2, 5, 1, 4, dtype=torch.float64)
    x = torch.randn(2, 5, 3, 8, dtype=torch.float64, requires_grad=True)
    assert torch.autograd.gradcheck(lambda x: rotate(x, angles.cos(), angles.sin()), x)


@pytest.mark.parametrize("tokens", [1, MIN_CHUNK - 1, MIN_CHUNK, 2 * MIN_CHUNK + 3])
def test_loss_equals_torch(tokens):
    hidden = torch.randn(1, tokens, 12, dtype=torch.float64, requires_grad=True)
    weight = torch.randn(37, 12, dtype=torch.float64, requires_grad=True)
    labels = torch.randint(37, (1, tokens))
    ours = linear_cross_entropy(hidden, weight, labels) * 0.3
    theirs = F.cross_entropy((hidden @ weight.T).flatten(0, 1), labels.flatten(), reduction="sum") * 0.3
    torch.testing.assert_close(ours, theirs, rtol=1e-13, atol=0)
    for a, b in zip(
        torch.autograd.grad(ours, (hidden, weight)), torch.autograd.grad(theirs, (hidden, weight)), strict=True
    ):
        torch.testing.assert_close(a, b, rtol=1e-12, atol=1e-13)


def test_bfloat16_keeps_loss_and_norms_in_float32():
    """Autocast runs the matmuls in bfloat16; the residual stream, the norms and the loss stay float32."""
    model = LlamaForCausalLM(tiny_config())
    ids, positions = torch.randint(300, (2, 16)), torch.arange(16).expand(2, -1)
    residuals = []
    model.model.layers["1"].register_forward_pre_hook(lambda module, args: residuals.append(args[0].dtype))
    with torch.autocast("cpu", torch.bfloat16):
        hidden = model.model(ids, positions)
        loss = linear_cross_entropy(hidden, model.lm_head.weight, ids)
    loss.backward()
    assert (residuals, hidden.dtype, loss.dtype) == ([torch.float32], torch.bfloat16, torch.float32)
    assert {p.grad.dtype for p in model.parameters()} == {torch.float32}
    # Not even the value of the loss went through bfloat16, which has 8 bits.
    assert loss.bfloat16().float() != loss
    norm, x = RMSNorm(512, 1e-6), torch.randn(4, 512)
    with torch.autocast("cpu", torch.bfloat16):
        rounded = norm(x)
    assert torch.equal(rounded, norm(x).bfloat16())


def test_no_grad_evaluation_equals_training_loss():
    hidden, weight, labels = torch.randn(2, 5, 8), torch.randn(11, 8), torch.randint(11, (2, 5))
    with torch.no_grad():
        evaluated = linear_cross_entropy(hidden, weight, labels)
    assert torch.equal(evaluated, linear_cross_entropy(hidden, weight.requires_grad_(), labels))
