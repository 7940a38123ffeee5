"""Tokens/s and peak memory of step01 against transformers' LlamaForCausalLM with torch's AdamW.

    python tests/benchmarks/step01_against_transformers.py [--rounds 5] [--threads 1] [--only NAME]

Same weights, batches, dtype and threads, in rounds that alternate between the two. Figures are ratios of one run.
"""

import argparse
import gc
import sys
import time
from pathlib import Path
from statistics import median

import numpy as np
import torch
from transformers import LlamaConfig, LlamaForCausalLM

ROOT = Path(__file__).parents[2]
sys.path += [str(ROOT / "step01_single_gpu"), str(ROOT / "tests")]
import train as step01

from shared.corpus import Corpus
from shared.data import Batch
from shared.live_bytes import LiveBytes, live_state
from shared.weights import full_weights

# vocab, h, f, layers, heads, kv heads, sequence length, global batch, micro-batch
SHAPES = {
    "32M, 8k vocabulary": (8192, 512, 1408, 8, 8, 4, 256, 16, 4),
    "32M, 32k, small batch": (32000, 512, 1408, 8, 8, 4, 256, 8, 4),
    "32M, 32k vocabulary": (32000, 512, 1408, 8, 8, 4, 256, 32, 16),
    "128k vocabulary, tied": (128256, 256, 704, 4, 4, 2, 256, 8, 4),
    "default, untied": (4096, 256, 704, 4, 8, 4, 256, 16, 8),
    "long sequences": (8192, 384, 1024, 4, 6, 6, 2048, 2, 1),
    "deep and narrow": (8192, 192, 512, 16, 3, 3, 256, 16, 8),
    "wide": (8192, 1024, 2816, 2, 16, 4, 256, 8, 4),
}


def ours(config, model_config, batches):
    corpus = Corpus.from_array(np.zeros(3 * config.global_batch_size * config.seq_len, np.uint16))
    trainer = step01.Trainer(config, model_config, corpus, full_weights(config, model_config))

    def step():
        loss = trainer.forward_backward(batches)
        trainer.clip_grad_norm()
        trainer.optimizer.step()
        trainer.optimizer.zero_grad()
        return loss.item()

    return trainer.model, trainer.optimizer, step


def theirs(config, model_config, batches):
    model = LlamaForCausalLM(model_config)
    weights = full_weights(config, model_config)
    with torch.no_grad():
        for name, parameter in model.named_parameters():
            parameter.copy_(weights(name))
    optimizer = torch.optim.AdamW(model.parameters(), lr=config.lr, betas=config.betas, fused=True)

    def step():
        total = 0.0
        for batch in batches:
            with torch.autocast("cpu", torch.bfloat16, enabled=config.dtype == "bfloat16"):
                # `shift_labels` are labels that are shifted already, as ours are.
                labels = batch.labels.contiguous()
                out = model(input_ids=batch.input_ids, labels=labels, shift_labels=labels, use_cache=False)
            (out.loss / len(batches)).backward()
            total += out.loss.item() / len(batches)
            del out
        torch.nn.utils.clip_grad_norm_(model.parameters(), config.grad_clip)
        optimizer.step()
        optimizer.zero_grad()
        return total

    return model, optimizer, step


def peak_bytes(model, optimizer, step):
    gc.collect()
    with LiveBytes() as memory:
        memory.track(live_state(model, optimizer))
        step()
    return memory.peak


def compare(shape, dtype, rounds):
    vocab, h, f, layers, heads, kv_heads, seq_len, global_batch, micro_batch = shape
    model_config = LlamaConfig(
        vocab_size=vocab,
        hidden_size=h,
        intermediate_size=f,
        num_hidden_layers=layers,
        num_attention_heads=heads,
        num_key_value_heads=kv_heads,
        tie_word_embeddings=vocab > 100_000,
    )
    config = step01.Config(
        seq_len=seq_len, global_batch_size=global_batch, micro_batch_size=micro_batch, dtype=dtype, device="cpu"
    )
    rows = torch.randint(vocab, (global_batch, seq_len + 1), generator=torch.Generator().manual_seed(0))
    positions = torch.arange(seq_len).expand(micro_batch, -1)
    batches = [Batch(micro[:, :-1], micro[:, 1:], positions) for micro in rows.split(micro_batch)]
    runs = [make(config, model_config, batches) for make in (ours, theirs)]
    losses = [step() for _, _, step in runs]
    assert abs(losses[0] - losses[1]) < 2e-2, f"not the same model: {losses}"
    seconds = [[], []]
    for _ in range(rounds):
        for i, (_, _, step) in enumerate(runs):
            start = time.perf_counter()
            step()
            seconds[i].append(time.perf_counter() - start)
    speedup = median(b / a for a, b in zip(*seconds, strict=True))
    peaks = [peak_bytes(*run) for run in runs]
    return global_batch * seq_len / median(seconds[0]), speedup, peaks[0] / 2**20, peaks[0] / peaks[1]


def main():
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--rounds", type=int, default=5)
    parser.add_argument("--threads", type=int, default=1)
    parser.add_argument("--only", default="", help="part of a shape's name")
    args = parser.parse_args()
    torch.set_num_threads(args.threads)
    print(f"{'shape':24}{'dtype':10}{'tokens/s':>10}{'× theirs':>10}{'peak MiB':>10}{'× theirs':>10}")
    for name, shape in SHAPES.items():
        if args.only in name:
            for dtype in ("float32", "bfloat16"):
                rate, speedup, peak, memory = compare(shape, dtype, args.rounds)
                print(f"{name:24}{dtype:10}{rate:10.0f}{speedup:10.2f}{peak:10.0f}{memory:10.2f}", flush=True)


if __name__ == "__main__":
    main()
