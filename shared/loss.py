"""Cross entropy of a linear head, chunk by chunk, so that the logits of all tokens never exist at once."""

from collections.abc import Callable

import torch
from torch import Tensor
from torch.autograd.function import FunctionCtx

# Fewest tokens whose logits are computed at a time: the matmuls need that many rows to run at full speed.
MIN_CHUNK = 128


def chunk_size(hidden_size: int) -> int:
    """Tokens per chunk: their logits take half the memory of the head's gradient, to which each chunk has to add."""
    return max(hidden_size // 2, MIN_CHUNK)


def cross_entropy(logits: Tensor, label: Tensor) -> Tensor:
    """−log softmax(logits)[label] of each token, (n, 1), for logits (n, vocab) and label (n, 1).

    Replaces the logits, the largest tensor of a training step, by their gradient.
    """
    logits -= logits.amax(-1, keepdim=True)
    label_logits = logits.gather(-1, label)
    total = logits.exp_().sum(-1, keepdim=True)
    # d loss / d logits = softmax − one-hot
    logits /= total
    logits.scatter_add_(-1, label, logits.new_full(label.shape, -1))
    return total.log() - label_logits


CrossEntropy = Callable[[Tensor, Tensor], Tensor]


def _chunk_loss(
    hidden: Tensor,
    head: Tensor,
    label: Tensor,
    cross_entropy: CrossEntropy,
    grad_hidden: Tensor | None,
    grad_weight: Tensor | None,
) -> Tensor:
    """Loss of a chunk of tokens. Writes its gradient to `grad_hidden` and adds to `grad_weight`, if they are given."""
    # The softmax is never below float32.
    logits = (hidden @ head.T).to(torch.promote_types(hidden.dtype, torch.float32))
    loss = cross_entropy(logits, label).sum()
    if grad_hidden is not None:
        grad = logits.to(hidden.dtype)
        torch.mm(grad, head, out=grad_hidden)
        if grad.dtype == grad_weight.dtype:
            grad_weight.addmm_(grad.T, hidden)
        else:
            grad_weight += grad.T @ hidden
    return loss


class _LinearCrossEntropy(torch.autograd.Function):
    """The gradients of a chunk are taken in forward, while its logits exist; backward only scales them."""

    @staticmethod
    def forward(
        ctx: FunctionCtx, hidden: Tensor, weight: Tensor, label: Tensor, cross_entropy: CrossEntropy, needs_grad: bool
    ) -> Tensor:
        head = weight.to(hidden.dtype)
        grad_hidden = grad_weight = None
        if needs_grad:
            grad_hidden = torch.empty_like(hidden)
            grad_weight = torch.zeros_like(weight, dtype=torch.promote_types(hidden.dtype, torch.float32))
        size = chunk_size(weight.shape[1])
        chunks = [slice(start, start + size) for start in range(0, len(hidden), size)]
        loss = sum(
            _chunk_loss(
                hidden[rows],
                head,
                label[rows],
                cross_entropy,
                grad_hidden[rows] if needs_grad else None,
                grad_weight,
            )
            for rows in chunks
        )
        ctx.save_for_backward(grad_hidden, grad_weight)
        ctx.weight_dtype = weight.dtype
        return loss

    @staticmethod
    def backward(ctx: FunctionCtx, grad_loss: Tensor) -> tuple[Tensor, Tensor, None, None, None]:
        grad_hidden, grad_weight = ctx.saved_tensors
        return grad_hidden.mul_(grad_loss), grad_weight.mul_(grad_loss).to(ctx.weight_dtype), None, None, None


def linear_cross_entropy(
    hidden: Tensor, weight: Tensor, labels: Tensor, cross_entropy: CrossEntropy = cross_entropy
) -> Tensor:
    """Sum over tokens of −log softmax(hidden · weightᵀ)[label], in nats, at least in float32.

    hidden (b, s, h), in whose dtype the matmuls run; weight (vocab, h); labels (b, s); `cross_entropy` as above.
    `F.linear_cross_entropy` of torch 2.13 chunks too, but in bfloat16 it returns a bfloat16 loss.
    """
    label, needs_grad = labels.reshape(-1, 1), torch.is_grad_enabled()
    return _LinearCrossEntropy.apply(hidden.flatten(0, 1), weight, label, cross_entropy, needs_grad)
