"""Model FLOPs per token and the device's peak, for MFU (model FLOPs utilisation, arXiv 2204.02311)."""

import time

import torch
from transformers import LlamaConfig

# Dense bfloat16 peak in TFLOP/s, by a part of the name that CUDA reports, from the makers' data sheets.
PEAK_TFLOPS = {"B200": 2250, "H200": 989, "H100 PCIe": 756, "H100": 989, "A100": 312, "L40S": 362}


def matmul_parameters(config: LlamaConfig) -> int:
    """Parameters that take part in a matmul: all but the norms and the input embedding."""
    h, heads, kv_heads = config.hidden_size, config.num_attention_heads, config.num_key_value_heads
    attention = 2 * h * (heads + kv_heads) * config.head_dim
    mlp = 3 * h * config.intermediate_size
    return config.num_hidden_layers * (attention + mlp) + h * config.vocab_size


def flops_per_token(config: LlamaConfig, seq_len: int, causal: bool) -> int:
    """Forward and backward: 6 per matmul parameter, plus 12·L·H·d·s for attention, or half of that if what a causal
    mask hides is not counted. Nothing recomputed counts."""
    attention = 12 * config.num_hidden_layers * config.num_attention_heads * config.head_dim * seq_len
    return 6 * matmul_parameters(config) + (attention // 2 if causal else attention)


def peak_flops(device: torch.device, dtype: torch.dtype) -> float:
    """FLOP/s that the device can reach at best: its bfloat16 data sheet, or else the fastest of a few matmuls."""
    if device.type == "cuda" and dtype == torch.bfloat16:
        name = torch.cuda.get_device_name(device)
        for part, tflops in PEAK_TFLOPS.items():
            if part in name:
                return tflops * 1e12
    best = 0.0
    for n in (4096,) if device.type == "cuda" else (256, 512, 1024):
        a = torch.randn(n, n, device=device).to(dtype)
        for _ in range(10):
            start = time.perf_counter()
            (a @ a)[0, 0].item()
            seconds = time.perf_counter() - start
            best = max(best, 2 * n**3 / seconds)
            if seconds > 0.1:
                # A CPU without matmuls in this precision: a larger one would take seconds, and be no faster.
                return best
    return best
