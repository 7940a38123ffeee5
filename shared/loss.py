"""Cross entropy of a linear head, chunk by chunk, so that the logits of all tokens never exist at once."""

import torch
from torch import Tensor
from torch.autograd.function import FunctionCtx

# Tokens whose logits are alive at a time: enough rows for the matmuls to run at full speed.
CHUNK = 128


class _LinearCrossEntropy(torch.autograd.Function):
    """The gradients of a chunk are taken in forward, while its logits exist; backward only scales them."""

    @staticmethod
    def forward(ctx: FunctionCtx, hidden: Tensor, weight: Tensor, labels: Tensor, needs_grad: bool) -> Tensor:
        head = weight.to(hidden.dtype)
        # The softmax, the loss and the sum of the weight gradient over chunks are never below float32.
        dtype = torch.promote_types(hidden.dtype, torch.float32)
        loss = hidden.new_zeros((), dtype=dtype)
        grad_hidden = torch.empty_like(hidden) if needs_grad else None
        grad_weight = torch.zeros_like(weight, dtype=dtype) if needs_grad else None
        for start in range(0, len(hidden), CHUNK):
            rows = slice(start, start + CHUNK)
            label = labels[rows, None]
            logits = (hidden[rows] @ head.T).to(dtype)
            logits -= logits.logsumexp(-1, keepdim=True)
            loss -= logits.gather(-1, label).sum()
            if needs_grad:
                # d loss / d logits = softmax − one-hot
                grad = logits.exp_().scatter_add_(-1, label, logits.new_full(label.shape, -1)).to(hidden.dtype)
                torch.mm(grad, head, out=grad_hidden[rows])
                if grad.dtype == dtype:
                    grad_weight.addmm_(grad.T, hidden[rows])
                else:
                    grad_weight += grad.T @ hidden[rows]
        ctx.save_for_backward(grad_hidden, grad_weight)
        ctx.weight_dtype = weight.dtype
        return loss

    @staticmethod
    def backward(ctx: FunctionCtx, grad_loss: Tensor) -> tuple[Tensor, Tensor, None, None]:
        grad_hidden, grad_weight = ctx.saved_tensors
        return grad_hidden.mul_(grad_loss), grad_weight.mul_(grad_loss).to(ctx.weight_dtype), None, None


def linear_cross_entropy(hidden: Tensor, weight: Tensor, labels: Tensor) -> Tensor:
    """Sum over tokens of −log softmax(hidden · weightᵀ)[label], in nats, at least in float32.

    hidden (b, s, h), in whose dtype the matmuls run; weight (vocab, h); labels (b, s). `F.linear_cross_entropy` of
    torch 2.13 chunks too, but in bfloat16 it returns a bfloat16 loss.
    """
    return _LinearCrossEntropy.apply(hidden.flatten(0, 1), weight, labels.flatten(), torch.is_grad_enabled())
