"""Attention by the fastest exact way for a dtype, a shape and a machine.

Shapes: B batch, N and L tokens of the queries and of the context, C channels of all heads.
"""

from __future__ import annotations

from torch import Tensor
from torch.nn import functional as F

from .. import kernels
from .layers import infers


def attention(q: Tensor, k: Tensor, v: Tensor, heads: int) -> Tensor:
    """softmax(q k' / sqrt(C / heads)) v by heads, (B, N, C), of q (B, N, C) and k, v (B, L, C)."""
    if infers(q):
        flash = kernels.attention(q, k, v, heads)
        if flash is not None:
            return flash
    q, k, v = (y.unflatten(2, (heads, -1)).transpose(1, 2) for y in (q, k, v))
    return F.scaled_dot_product_attention(q, k, v).transpose(1, 2).flatten(2)
