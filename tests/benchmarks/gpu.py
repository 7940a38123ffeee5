"""Tokens/s, MFU and peak memory of a 1B model on one GPU: step01, transformers, and a Llama of plain torch.

    python tests/benchmarks/gpu.py [--model llama-3.2-1b] [--seq-len 4096] [--micro-batch-size 2] [--steps 10]

bfloat16 by autocast, the same weights and batches, one after the other, eager and compiled. Plain torch: each op as
torch has it and as most trainers write it, with the logits of a micro-batch whole. Takes less than 5 minutes.
"""

import argparse
import gc
import sys
import time
from pathlib import Path
from statistics import median

import numpy as np
import torch
import torch.nn.functional as F
from torch import Tensor, nn
from transformers import LlamaConfig, LlamaForCausalLM

ROOT = Path(__file__).parents[2]
sys.path += [str(ROOT / "step01_single_gpu"), str(ROOT / "tests")]
import train as step01

from shared.corpus import Corpus
from shared.data import Batch
from shared.flops import flops_per_token, peak_flops
from shared.llama_configs import load_model_config
from shared.model import rope_cos_sin
from shared.weights import full_weights


class PlainLayer(nn.Module):
    """Parameters have the names of transformers' layer."""

    def __init__(self, config: LlamaConfig) -> None:
        super().__init__()
        h, d, f = config.hidden_size, config.head_dim, config.intermediate_size
        heads, kv_heads = config.num_attention_heads, config.num_key_value_heads
        shapes = {"q_proj": (h, heads * d), "k_proj": (h, kv_heads * d), "v_proj": (h, kv_heads * d)}
        self.self_attn = nn.ModuleDict({name: nn.Linear(*shape, bias=False) for name, shape in shapes.items()})
        self.self_attn["o_proj"] = nn.Linear(heads * d, h, bias=False)
        shapes = {"gate_proj": (h, f), "up_proj": (h, f), "down_proj": (f, h)}
        self.mlp = nn.ModuleDict({name: nn.Linear(*shape, bias=False) for name, shape in shapes.items()})
        self.input_layernorm = nn.RMSNorm(h, config.rms_norm_eps)
        self.post_attention_layernorm = nn.RMSNorm(h, config.rms_norm_eps)
        self.head_dim = d

    def forward(self, x: Tensor, cos: Tensor, sin: Tensor) -> Tensor:
        normed, attention, mlp = self.input_layernorm(x), self.self_attn, self.mlp
        q, k, v = (attention[f"{name}_proj"](normed).unflatten(-1, (-1, self.head_dim)) for name in "qkv")
        q, k = (
            t.float() * cos + torch.cat((-t[..., t.shape[-1] // 2 :], t[..., : t.shape[-1] // 2]), -1) * sin
            for t in (q, k)
        )
        q, k, v = (t.to(v.dtype).transpose(1, 2) for t in (q, k, v))
        out = F.scaled_dot_product_attention(q, k, v, is_causal=True, enable_gqa=True)
        x = x + attention["o_proj"](out.transpose(1, 2).flatten(2))
        normed = self.post_attention_layernorm(x)
        return x + mlp["down_proj"](F.silu(mlp["gate_proj"](normed)) * mlp["up_proj"](normed))


class PlainLlama(nn.Module):
    def __init__(self, config: LlamaConfig) -> None:
        super().__init__()
        self.model = nn.Module()
        self.model.embed_tokens = nn.Embedding(config.vocab_size, config.hidden_size)
        self.model.layers = nn.ModuleList(PlainLayer(config) for _ in range(config.num_hidden_layers))
        self.model.norm = nn.RMSNorm(config.hidden_size, config.rms_norm_eps)
        self.lm_head = nn.Linear(config.hidden_size, config.vocab_size, bias=False)
        if config.tie_word_embeddings:
            self.lm_head.weight = self.model.embed_tokens.weight
        self.config = config

    def loss(self, batch: Batch) -> Tensor:
        """Mean over the tokens of a micro-batch."""
        angles = rope_cos_sin(self.config, batch.position_ids, torch.float32)
        cos, sin = (torch.cat((half, half), -1) for half in angles)
        x = self.model.embed_tokens(batch.input_ids)
        for layer in self.model.layers:
            x = layer(x, cos, sin)
        logits = self.lm_head(self.model.norm(x)).float()
        return F.cross_entropy(logits.flatten(0, 1), batch.labels.flatten())


class HuggingFace(LlamaForCausalLM):
    def loss(self, batch: Batch) -> Tensor:
        labels = batch.labels.contiguous()
        return self(input_ids=batch.input_ids, labels=labels, shift_labels=labels, use_cache=False).loss


def ours(config: step01.Config, model_config: LlamaConfig, batches: list[Batch]) -> tuple:
    corpus = Corpus.from_array(np.zeros(3 * config.global_batch_size * config.seq_len, np.uint16))
    trainer = step01.Trainer(config, model_config, corpus, full_weights(config, model_config))
    return trainer.optimizer, lambda: trainer.forward_backward(batches), trainer.clip_grad_norm


def theirs(kind: type, config: step01.Config, model_config: LlamaConfig, batches: list[Batch]) -> tuple:
    with torch.device(config.device):
        model = kind(model_config)
    weights = full_weights(config, model_config)
    with torch.no_grad():
        for name, parameter in model.named_parameters():
            parameter.copy_(weights(name))
    if config.compile:
        for layer in model.model.layers:
            layer.compile(dynamic=False)
    optimizer = torch.optim.AdamW(model.parameters(), lr=config.lr, betas=config.betas, fused=True)

    def forward_backward() -> Tensor:
        total = torch.zeros((), device=config.device)
        for batch in batches:
            with torch.autocast(config.device, torch.bfloat16):
                loss = model.loss(batch) / len(batches)
            loss.backward()
            total += loss.detach()
        return total

    return optimizer, forward_backward, lambda: nn.utils.clip_grad_norm_(model.parameters(), config.grad_clip)


VARIANTS = {
    "step01": ours,
    "transformers": lambda *args: theirs(HuggingFace, *args),
    "plain torch": lambda *args: theirs(PlainLlama, *args),
}


def measure(make, config: step01.Config, model_config: LlamaConfig, batches: list[Batch], steps: int) -> tuple:
    """The loss of the first step, seconds of the first step and of a later one, and bytes at most."""
    gc.collect()
    torch.cuda.empty_cache()
    optimizer, forward_backward, clip = make(config, model_config, batches)
    losses, seconds = [], []
    for i in range(steps + 2):
        if i == 2:
            torch.cuda.reset_peak_memory_stats()
        torch.cuda.synchronize()
        start = time.perf_counter()
        losses.append(forward_backward())
        clip()
        optimizer.step()
        optimizer.zero_grad()
        torch.cuda.synchronize()
        seconds.append(time.perf_counter() - start)
    return losses[0].item(), seconds[0], median(seconds[2:]), torch.cuda.max_memory_allocated()


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--model", default="llama-3.2-1b")
    parser.add_argument("--seq-len", type=int, default=4096)
    parser.add_argument("--micro-batch-size", type=int, default=2)
    parser.add_argument("--steps", type=int, default=10)
    args = parser.parse_args()
    if not torch.cuda.is_available():
        sys.exit("error: torch finds no GPU")
    torch.set_float32_matmul_precision("high")
    sizes = {"micro_batch_size": args.micro_batch_size, "global_batch_size": 2 * args.micro_batch_size}
    options = {"model": args.model, "seq_len": args.seq_len, "dtype": "bfloat16", "device": "cuda", "lr": 1e-5, **sizes}
    model_config = load_model_config(step01.Config(**options))
    rows = torch.randint(model_config.vocab_size, (sizes["global_batch_size"], args.seq_len + 1)).cuda()
    positions = torch.arange(args.seq_len, device="cuda").expand(args.micro_batch_size, -1)
    batches = [Batch(micro[:, :-1], micro[:, 1:], positions) for micro in rows.split(args.micro_batch_size)]
    peak = peak_flops(torch.device("cuda"), torch.bfloat16)
    flops = flops_per_token(model_config, args.seq_len, causal=False)
    print(
        f"{args.model}, sequences of {args.seq_len}, micro-batches of {args.micro_batch_size}, bfloat16, torch "
        f"{torch.__version__}, {torch.cuda.get_device_name()} of {peak / 1e12:,.0f} TFLOP/s"
    )
    print(f"{'':14}{'compiled':10}{'tokens/s':>10}{'MFU':>8}{'peak GiB':>10}{'first step':>12}{'loss':>9}")
    for name, make in VARIANTS.items():
        for compiled in (False, True):
            try:
                result = measure(make, step01.Config(**options, compile=compiled), model_config, batches, args.steps)
            except torch.OutOfMemoryError:
                print(f"{name:14}{'yes' if compiled else 'no':10}{'out of memory':>20}", flush=True)
                continue
            loss, first, seconds, nbytes = result
            rate = rows.shape[0] * args.seq_len / seconds
            print(
                f"{name:14}{'yes' if compiled else 'no':10}{rate:10,.0f}{rate * flops / peak:8.1%}"
                f"{nbytes / 2**30:10.2f}{first:10.1f} s{loss:9.4f}",
                flush=True,
            )


if __name__ == "__main__":
    main()
