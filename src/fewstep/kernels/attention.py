"""Attention by our C kernel (attention.c), on CPUs with AVX-512."""

from __future__ import annotations

import ctypes
import functools
from typing import Any

import torch
from torch import Tensor

from . import build

NAMES = {torch.bfloat16: "fewstep_attention_bf16", torch.float32: "fewstep_attention_f32"}
Call = ctypes.c_int64 * 15
# Numbers of a head. PyTorch is as quick as we are with wider ones in float32.
DEPTHS = {torch.bfloat16: range(8, 513, 8), torch.float32: range(8, 161, 8)}


def attention(
    q: Tensor, k: Tensor, v: Tensor, heads: int, scale: float | None = None
) -> Tensor | None:
    """softmax(q kᵀ · scale) v of every head (B, N, H·D); None where PyTorch has to do.

    q (B, N, H·D), k and v (B, M, H·D) as linear layers leave them, also slices of one fused
    projection: only the last dimension must be dense. `scale` is 1/√D unless given.
    Flash attention (Dao et al., 2022): float32 sums, no N x M matrix.
    """
    if not _can(q, k, v, heads) or build.library() is None:
        return None
    batch, n, width = q.shape
    depth = width // heads
    out = torch.empty((batch, n, width), dtype=q.dtype)
    call = Call(
        *(out.data_ptr(), q.data_ptr(), k.data_ptr(), v.data_ptr()),
        *(batch, heads, n, k.shape[1], depth),
        *(*q.stride()[:2], *k.stride()[:2], *v.stride()[:2]),
    )
    factor = depth**-0.5 if scale is None else scale
    failed = _kernel(q.dtype)(call, factor, torch.get_num_threads())
    return None if failed else out


@functools.cache
def _kernel(dtype: torch.dtype) -> Any:
    """The kernel of a dtype, told once what it takes."""
    kernel = getattr(build.library(), NAMES[dtype])
    kernel.argtypes = [ctypes.c_void_p, ctypes.c_float, ctypes.c_int]
    return kernel


def _can(q: Tensor, k: Tensor, v: Tensor, heads: int) -> bool:
    """Whether the kernel serves this call: what it asks of each tensor, and of their shapes."""
    if q.dtype not in NAMES or (q.dtype == torch.bfloat16 and not _has_bfloat16()):
        return False
    dtype = q.dtype
    if torch.compiler.is_compiling() or not _is_plain(q, dtype):
        return False
    if not (_is_plain(k, dtype) and _is_plain(v, dtype)):
        return False
    if k.shape != v.shape or q.shape[::2] != k.shape[::2] or 0 in (*q.shape, *k.shape):
        return False
    return q.shape[2] % heads == 0 and q.shape[2] // heads in DEPTHS[q.dtype]


def _has_bfloat16() -> bool:
    """Whether bfloat16 gains here: not beside AMX, whose tiles PyTorch uses."""
    return build.has("avx512_bf16") and not build.has("amx_bf16")


def _is_plain(x: Tensor, dtype: torch.dtype) -> bool:
    """Whether x (B, N, C) is numbers in memory, dense in C, that no gradient is asked of."""
    ordinary = type(x) is Tensor and x.is_cpu and x.dtype == dtype
    return (
        ordinary
        and x.dim() == 3
        and x.stride(2) == 1
        and not (x.requires_grad and torch.is_grad_enabled())
    )
