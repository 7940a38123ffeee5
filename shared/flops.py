"""Model FLOPs per token and the device's peak, for MFU (model FLOPs utilisation, arXiv 2204.02311)."""

import re
import time
from itertools import pairwise

import torch
from transformers import PreTrainedConfig

# Dense bfloat16 peak in TFLOP/s, by words of the name that CUDA or ROCm reports. From the makers' data sheets of these
# products. Where these give numbers with sparsity only, as NVIDIA's since Hopper, half of that.
PEAK_TFLOPS = {
    # DGX and HGX B200 and B300; GB200 and GB300 NVL72.
    "B200": 2250,
    "B300": 2250,
    "GB200": 2500,
    "GB300": 2500,
    # H100 (SXM, PCIe, NVL), H200 (SXM, NVL), GH200; H800 is an H100 with fewer links, H20 one with fewer processors.
    "H100": 989,
    "H100 PCIe": 756,
    "H100 NVL": 835,
    "H200": 989,
    "H200 NVL": 835,
    "GH200": 989,
    "H800": 989,
    "H800 PCIe": 756,
    "H20": 148,
    # A100, and A800 with fewer links; A30, A40, A10.
    "A100": 312,
    "A800": 312,
    "A30": 165,
    "A40": 150,
    "A10": 125,
    # L40S, L40, L4; Ada white paper, with float32 accumulation.
    "L40S": 362,
    "L40": 181,
    "L4": 121,
    "RTX 4090": 165,
    # CDNA 3.
    "MI300X": 1307,
    "MI325X": 1307,
}
# Part of a GPU (MIG, vGPU), or a slower one of the same name.
OTHERS = re.compile(r"\bMIG\b|-\d+C\b|\bLaptop\b|\b4090 D\b")


def matmul_parameters(config: PreTrainedConfig) -> int:
    """Parameters that take part in a matmul: all but norms, biases and the input embedding."""
    h, heads, kv_heads = config.hidden_size, config.num_attention_heads, config.num_key_value_heads
    attention = 2 * h * (heads + kv_heads) * config.head_dim
    mlp = 3 * h * config.intermediate_size
    return config.num_hidden_layers * (attention + mlp) + h * config.vocab_size


def flops_per_token(config: PreTrainedConfig, seq_len: int, causal: bool) -> int:
    """Forward and backward: 6 per matmul parameter, plus 12·L·H·d·s for attention, or half of that if what a causal
    mask hides is not counted. Nothing recomputed counts."""
    attention = 12 * config.num_hidden_layers * config.num_attention_heads * config.head_dim * seq_len
    return 6 * matmul_parameters(config) + (attention // 2 if causal else attention)


def data_sheet_flops(name: str) -> float | None:
    """Dense bfloat16 peak of a GPU of this name, in FLOP/s, or None if it is not known."""
    known = [words for words in PEAK_TFLOPS if re.search(rf"\b{words}\b", name)]
    # "H100 NVL" says more than "H100".
    return None if OTHERS.search(name) or not known else PEAK_TFLOPS[max(known, key=len)] * 1e12


def peak_flops(device: torch.device, dtype: torch.dtype) -> float:
    """FLOP/s that the device can reach at best: its bfloat16 data sheet, or else the fastest of a few matmuls."""
    if device.type == "cuda":
        sheet = data_sheet_flops(torch.cuda.get_device_name(device)) if dtype == torch.bfloat16 else None
        return sheet or _measured_on_gpu(device, dtype)
    best = 0.0
    for n in (256, 512, 1024):
        a = torch.randn(n, n).to(dtype)
        for _ in range(10):
            start = time.perf_counter()
            a @ a
            seconds = time.perf_counter() - start
            best = max(best, 2 * n**3 / seconds)
            if seconds > 0.1:
                # A CPU without matmuls in this precision: a larger one would take seconds, and be no faster.
                return best
    return best


def _measured_on_gpu(device: torch.device, dtype: torch.dtype) -> float:
    """By the GPU's own clock, one matmul after the other: the CPU, which launches them, would be slower than some."""
    n, best = 4096, 0.0
    a = torch.randn(n, n, device=device).to(dtype)
    for _ in range(5):
        events = [torch.cuda.Event(enable_timing=True) for _ in range(11)]
        for event in events[:-1]:
            event.record()
            a @ a
        events[-1].record()
        events[-1].synchronize()
        seconds = min(start.elapsed_time(end) for start, end in pairwise(events)) / 1000
        best = max(best, 2 * n**3 / max(seconds, 1e-9))
    return best
