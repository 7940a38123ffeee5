"""Scores: does any form of attention build their matrix on a GPU?

Each of s queries has a score for each of s keys: s² numbers for each head and sequence, 256 MiB in float32 at 8,192
tokens. Fused kernels compute them tile by tile and keep none. But `F.scaled_dot_product_attention` falls back to a form
that keeps them all where no fused kernel takes its arguments, and says nothing. On a CPU another kernel runs, which
takes more than those of GPUs do.

So here the code is told that its tensors are on a GPU. They are fake: they have shapes and no numbers, and the kernels
of GPUs are asked for the shapes of what they return. The largest allocation tells.
"""

from collections.abc import Iterator
from contextlib import contextmanager
from unittest.mock import patch

import torch
import torch.nn.functional as F
from fake_ranks import place, tensors
from torch import Tensor
from torch._subclasses.fake_tensor import FakeTensorMode
from torch.utils._python_dispatch import TorchDispatchMode

aten = torch.ops.aten


def scaled_dot_product_attention(
    q: Tensor,
    k: Tensor,
    v: Tensor,
    attn_mask: None = None,
    is_causal: bool = False,
    scale: float | None = None,
    enable_gqa: bool = False,
) -> Tensor:
    """What torch 2.13 chooses on CUDA, from sm80 on. Flash attention takes 16 bits, and fewer key-value heads than
    heads. Memory-efficient attention takes 32 bits, and as many of each. The rest is for the form that keeps scores."""
    options = {"is_causal": is_causal, "scale": scale}
    if q.dtype in (torch.float16, torch.bfloat16):
        return aten._scaled_dot_product_flash_attention(q, k, v, **options)[0]
    if q.dtype == torch.float32 and q.shape[1] == k.shape[1]:
        return aten._scaled_dot_product_efficient_attention(q, k, v, None, q.requires_grad, **options)[0]
    return aten._scaled_dot_product_attention_math(q, k, v, **options, enable_gqa=enable_gqa)[0]


class Largest(TorchDispatchMode):
    """While active, finds the largest tensor that an operator returns, in bytes of memory, and where."""

    def __init__(self) -> None:
        super().__init__()
        self.bytes, self.where = 0, ""

    def __torch_dispatch__(self, op, types, args=(), kwargs=None):
        out = op(*args, **(kwargs or {}))
        for tensor in tensors(out):
            if (nbytes := tensor.untyped_storage().nbytes()) > self.bytes:
                self.bytes, self.where = nbytes, f"{op._opname} of {tuple(tensor.shape)} ({place()})"
        return out


@contextmanager
def on_a_gpu() -> Iterator[Largest]:
    """As if on one: tensors made within are fake."""
    with (
        # What else attention takes, such as bounds of documents, is real.
        FakeTensorMode(allow_non_fake_inputs=True),
        patch.object(torch.Tensor, "is_cuda", True),
        patch.object(F, "scaled_dot_product_attention", scaled_dot_product_attention),
        Largest() as largest,
    ):
        yield largest
