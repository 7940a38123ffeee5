"""Operators whose gradient is written by hand, because autograd would keep more tensors than it needs."""

import torch
import torch.nn.functional as F
from torch import Tensor
from torch.autograd.function import FunctionCtx


def at_least_float32(x: Tensor) -> Tensor:
    return x.to(torch.promote_types(x.dtype, torch.float32))


class _RMSNorm(torch.autograd.Function):
    @staticmethod
    def forward(ctx: FunctionCtx, x: Tensor, weight: Tensor, eps: float) -> Tensor:
        wide = at_least_float32(x)
        rstd = torch.linalg.vector_norm(wide, dim=-1, keepdim=True).square_().div_(x.shape[-1]).add_(eps).rsqrt_()
        ctx.save_for_backward(x, weight, rstd)
        return (wide * rstd).mul_(weight).to(x.dtype)

    @staticmethod
    def backward(ctx: FunctionCtx, grad: Tensor) -> tuple[Tensor, Tensor, None]:
        # With n = x · rstd:  dweight = Σ grad · n,  dx = rstd · (grad · weight − n · mean(grad · weight · n)).
        saved_x, saved_weight, rstd = ctx.saved_tensors
        grad, x, weight = (at_least_float32(tensor) for tensor in (grad, saved_x, saved_weight))
        grad_times_x = grad * x
        grad_weight = rstd.flatten() @ grad_times_x.flatten(0, -2)
        projection = (grad_times_x @ weight).unsqueeze(-1).mul_(rstd.pow(3)).div_(x.shape[-1])
        grad_x = (grad * weight).mul_(rstd).addcmul_(x, projection, value=-1)
        return grad_x.to(saved_x.dtype), grad_weight.to(saved_weight.dtype), None


def rms_norm(x: Tensor, weight: Tensor, eps: float) -> Tensor:
    """`F.rms_norm(x, weight.shape, weight, eps)`, which is one kernel on CUDA but on a CPU keeps a second copy of x."""
    if not x.is_cuda:
        return _RMSNorm.apply(x, weight, eps)
    # The kernel computes in float32 itself, if both have one dtype. Autocast would hand it a copy of x in float32, and
    # keep that for backward, as torch does without the kernel: a norm of heads has x in bfloat16.
    with torch.autocast(x.device.type, enabled=False):
        return F.rms_norm(x, weight.shape, weight.to(x.dtype), eps)


class _Rotate(torch.autograd.Function):
    @staticmethod
    def rotate(x: Tensor, cos: Tensor, sin: Tensor) -> Tensor:
        x1, x2 = x.chunk(2, dim=-1)
        out1 = (x1 * cos).addcmul_(x2, sin, value=-1)
        out2 = (x2 * cos).addcmul_(x1, sin)
        return torch.cat((out1, out2), dim=-1).to(x.dtype)

    @staticmethod
    def forward(ctx: FunctionCtx, x: Tensor, cos: Tensor, sin: Tensor) -> Tensor:
        ctx.save_for_backward(cos, sin)
        return _Rotate.rotate(x, cos, sin)

    @staticmethod
    def backward(ctx: FunctionCtx, grad: Tensor) -> tuple[Tensor, None, None]:
        # The gradient of a rotation is the rotation back: nothing of x is kept.
        cos, sin = ctx.saved_tensors
        return _Rotate.rotate(grad, cos, -sin), None, None


def rotate(x: Tensor, cos: Tensor, sin: Tensor) -> Tensor:
    """Rotate the pairs (x[i], x[i + d/2]) of x (b, s, heads, d) by angles given as cos and sin (b, s, 1, d/2),
    in their precision."""
    return _Rotate.apply(x, cos, sin)


class _Embedding(torch.autograd.Function):
    @staticmethod
    def forward(ctx: FunctionCtx, ids: Tensor, weight: Tensor) -> Tensor:
        ctx.save_for_backward(ids)
        ctx.rows, ctx.dtype = len(weight), weight.dtype
        return F.embedding(ids, weight)

    @staticmethod
    def backward(ctx: FunctionCtx, grad: Tensor) -> tuple[None, Tensor]:
        (ids,) = ctx.saved_tensors
        grad_weight = torch.ops.aten.embedding_dense_backward(at_least_float32(grad), ids, ctx.rows, -1, False)
        return None, grad_weight.to(ctx.dtype)


def embedding(ids: Tensor, weight: Tensor) -> Tensor:
    """`F.embedding`, whose gradient sums over tokens in at least float32. In bfloat16, a CPU's would stop growing once
    it is 256 times what a token adds."""
    return _Embedding.apply(ids, weight)
