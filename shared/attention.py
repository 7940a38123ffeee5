"""Which of torch's kernels computes attention, so that a matrix of scores, (b, heads, s, s), never exists.

A CPU has one kernel for every dtype. A GPU has one for bfloat16, whose heads may share keys and values, and one for
float32, whose heads may not: `F.scaled_dot_product_attention` would fall back to the matrix there. For the rest, above
all float64, the scores of a few queries at a time do.

Shapes: b sequences, s tokens, d head dimension.
"""

from collections.abc import Iterator

import torch
import torch.nn.functional as F
from torch import Tensor
from torch.autograd.function import FunctionCtx

from shared.ops import at_least_float32

aten = torch.ops.aten

# Queries whose scores exist at a time, where no kernel computes them: (b, heads, CHUNK, s).
CHUNK = 128
# The widest heads that the kernel for bfloat16 takes.
MAX_HEAD_DIM = 256


def _has_kernel(q: Tensor) -> bool:
    return q.dtype == torch.float32 or (q.dtype == torch.bfloat16 and q.shape[-1] <= MAX_HEAD_DIM)


def _expanded(x: Tensor, q: Tensor) -> Tensor:
    """Keys or values (b, kv_heads, s, d), once for each head of q: (b, heads, s, d)."""
    return x.repeat_interleave(q.shape[1] // x.shape[1], 1)


def _summed(gradient: Tensor, x: Tensor) -> Tensor:
    """The gradient of what `_expanded` has made of x, as that of x."""
    return gradient.unflatten(1, (x.shape[1], -1)).sum(2)


def _padded(x: Tensor) -> Tensor:
    """With zeros up to a multiple of 8 numbers per head, which GPUs ask for. Zeros change no score."""
    missing = -x.shape[-1] % 8
    return F.pad(x, (0, missing)) if missing else x


def block_forward(q: Tensor, k: Tensor, v: Tensor, causal: bool) -> tuple[Tensor, Tensor, list]:
    """Attention of q (b, heads, s, d): output (b, heads, s, d), log-sum-exp (b, heads, s), backward's extras.

    k and v (b, kv_heads, keys, d). Causal: as many keys as queries, and query i sees keys up to i.
    """
    if not q.is_cuda:
        return *aten._scaled_dot_product_flash_attention_for_cpu(q, k, v, 0.0, causal), []
    if not _has_kernel(q):
        return *chunked_forward(q, k, v, causal), []
    d = q.shape[-1]
    if q.dtype == torch.float32:
        q, k, v = map(_padded, (q, _expanded(k, q), _expanded(v, q)))
        out, lse, *extras = aten._scaled_dot_product_efficient_attention(
            q, k, v, None, True, 0.0, causal, scale=d**-0.5
        )
        # The kernel pads it to a multiple of 32.
        return out[..., :d], lse[..., : q.shape[2]], extras
    q, k, v = map(_padded, (q, k, v))
    out, lse, *extras = aten._scaled_dot_product_flash_attention(q, k, v, 0.0, causal, scale=d**-0.5)
    return out[..., :d], lse, extras[:6]


def block_backward(
    grad: Tensor, q: Tensor, out: Tensor, lse: Tensor, k: Tensor, v: Tensor, causal: bool, extras: list
) -> tuple[Tensor, Tensor, Tensor]:
    """Gradients of q, k and v. `out` and `lse` may be those over more keys: this is then a share of the gradients."""
    if not q.is_cuda:
        backward = aten._scaled_dot_product_flash_attention_for_cpu_backward
        return backward(grad, q, k, v, out, lse, 0.0, causal)
    if not _has_kernel(q):
        return chunked_backward(grad, q, out, lse, k, v, causal)
    d, scale = q.shape[-1], q.shape[-1] ** -0.5
    padded_grad, padded_q, padded_out = map(_padded, (grad, q, out))
    if q.dtype == torch.float32:
        lse = F.pad(lse, (0, -lse.shape[-1] % 32), value=float("inf"))
        tensors = padded_grad, padded_q, *(_padded(_expanded(x, q)) for x in (k, v)), None, padded_out, lse, *extras
        backward = aten._scaled_dot_product_efficient_attention_backward
        dq, dk, dv, _ = backward(*tensors, 0.0, [True, True, True, False], causal, scale=scale)
        return dq[..., :d], _summed(dk[..., :d], k), _summed(dv[..., :d], v)
    tensors = padded_grad, padded_q, _padded(k), _padded(v), padded_out, lse, *extras[:4]
    backward = aten._scaled_dot_product_flash_attention_backward
    return tuple(x[..., :d] for x in backward(*tensors, 0.0, causal, *extras[4:], scale=scale))


def _scores(q: Tensor, k: Tensor, causal: bool) -> Iterator[tuple[slice, Tensor]]:
    """Some queries at a time, and their scores (b, heads, CHUNK, keys)."""
    for start in range(0, q.shape[2], CHUNK):
        rows = slice(start, min(start + CHUNK, q.shape[2]))
        scores = q[:, :, rows] @ k.mT * q.shape[-1] ** -0.5
        if causal:
            later = torch.ones(scores.shape[-2:], dtype=torch.bool, device=q.device).triu_(start + 1)
            scores.masked_fill_(later, float("-inf"))
        yield rows, scores


def chunked_forward(q: Tensor, k: Tensor, v: Tensor, causal: bool) -> tuple[Tensor, Tensor]:
    """Output and log-sum-exp as of `block_forward`, by plain matmuls in at least float32."""
    q, k, v, dtype = *map(at_least_float32, (q, _expanded(k, q), _expanded(v, q))), q.dtype
    out, lse = torch.empty_like(q), q.new_empty(q.shape[:3])
    with torch.autocast(q.device.type, enabled=False):
        for rows, scores in _scores(q, k, causal):
            lse[:, :, rows] = scores.logsumexp(-1)
            out[:, :, rows] = scores.softmax(-1) @ v
    return out.to(dtype), lse


def chunked_backward(
    grad: Tensor, q: Tensor, out: Tensor, lse: Tensor, k: Tensor, v: Tensor, causal: bool
) -> tuple[Tensor, Tensor, Tensor]:
    """Gradients as of `block_backward`: the scores are computed again."""
    given, kv_heads = (q, k, v), k
    k, v = _expanded(k, q), _expanded(v, q)
    grad, q, out, k, v = map(at_least_float32, (grad, q, out, k, v))
    dq, dk, dv = torch.empty_like(q), torch.zeros_like(k), torch.zeros_like(v)
    # Σ weight · d weight of each query.
    mean = (grad * out).sum(-1, keepdim=True)
    for rows, scores in _scores(q, k, causal):
        weights = (scores - lse[:, :, rows].unsqueeze(-1)).exp_()
        dv += weights.mT @ grad[:, :, rows]
        dscores = (grad[:, :, rows] @ v.mT).sub_(mean[:, :, rows]).mul_(weights).mul_(q.shape[-1] ** -0.5)
        dq[:, :, rows] = dscores @ k
        dk += dscores.mT @ q[:, :, rows]
    gradients = dq, _summed(dk, kv_heads), _summed(dv, kv_heads)
    return tuple(gradient.to(x.dtype) for gradient, x in zip(gradients, given, strict=True))


class _ChunkedAttention(torch.autograd.Function):
    @staticmethod
    def forward(ctx: FunctionCtx, q: Tensor, k: Tensor, v: Tensor) -> Tensor:
        out, lse = chunked_forward(q, k, v, causal=True)
        ctx.save_for_backward(q, out, lse, k, v)
        return out

    @staticmethod
    def backward(ctx: FunctionCtx, grad: Tensor) -> tuple[Tensor, Tensor, Tensor]:
        return chunked_backward(grad, *ctx.saved_tensors, causal=True)


def takes_documents(q: Tensor) -> bool:
    """Whether a kernel attends within many documents at once."""
    return q.is_cuda and q.dtype == torch.bfloat16 and _has_kernel(q)


def documents_attention(q: Tensor, k: Tensor, v: Tensor, bounds: Tensor, longest: int) -> Tensor:
    """Causal attention as below, within documents of at most `longest` tokens, by one call of a kernel.

    All sequences, one after the other, hold documents from each of `bounds` (n + 1,) int32 to the next.
    """
    # It loads torch's compiler, which takes seconds.
    from torch.nn.attention.varlen import varlen_attn

    d = q.shape[-1]
    packed = (_padded(x).transpose(1, 2).flatten(0, 1) for x in (q, k, v))
    options = {"scale": d**-0.5, "window_size": (-1, 0), "enable_gqa": True}
    out = varlen_attn(*packed, bounds, bounds, longest, longest, **options)
    return out[..., :d].unflatten(0, (len(q), -1)).transpose(1, 2)


def causal_attention(q: Tensor, k: Tensor, v: Tensor) -> Tensor:
    """Attention of q (b, heads, s, d) over k and v (b, kv_heads, s, d), where query i sees keys up to i."""
    if not q.is_cuda or (q.dtype == torch.bfloat16 and _has_kernel(q)):
        return F.scaled_dot_product_attention(q, k, v, is_causal=True, enable_gqa=True)
    if not _has_kernel(q):
        return _ChunkedAttention.apply(q, k, v)
    d = q.shape[-1]
    q, k, v = map(_padded, (q, _expanded(k, q), _expanded(v, q)))
    return F.scaled_dot_product_attention(q, k, v, is_causal=True, scale=d**-0.5)[..., :d]
