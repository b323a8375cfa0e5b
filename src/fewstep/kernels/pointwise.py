"""Group normalisation with SiLU, and GEGLU, by our C kernel (pointwise.c)."""

from __future__ import annotations

import ctypes
import functools
from typing import Any

import torch
from torch import Tensor

from . import build

SUFFIXES = {torch.float32: "f32", torch.bfloat16: "bf16"}


def group_norm(
    x: Tensor, groups: int, weight: Tensor, bias: Tensor, eps: float, silu: bool
) -> Tensor | None:
    """x (B, C, H, W), channels last, normed by groups, then SiLU if asked; None: ask PyTorch.

    `weight` and `bias` (C,) are of the dtype of x.
    """
    library = _library(x)
    if library is None or x.dim() != 4 or not x.is_contiguous(memory_format=torch.channels_last):
        return None
    batch, channels, height, width = x.shape
    y = torch.empty_like(x)
    weight, bias = weight.float(), bias.float()  # kept here while C reads them
    failed = _group_norm(x.dtype)(
        *(y.data_ptr(), x.data_ptr(), weight.data_ptr(), bias.data_ptr()),
        *(batch, height * width, channels, groups, eps, silu, torch.get_num_threads()),
    )
    return None if failed else y


@functools.cache
def _group_norm(dtype: torch.dtype) -> Any:
    """The kernel of a dtype, told once what it takes: conversions at each call cost as much."""
    kernel = getattr(build.library(), f"fewstep_group_norm_{SUFFIXES[dtype]}")
    pointers, numbers = [ctypes.c_void_p] * 4, [ctypes.c_int64] * 4
    kernel.argtypes = [*pointers, *numbers, ctypes.c_double, ctypes.c_int, ctypes.c_int]
    return kernel


def geglu(x: Tensor) -> Tensor | None:
    """h gelu(gate) (..., C) of x (..., 2 C) = (h, gate); None: ask PyTorch."""
    library = _library(x)
    if library is None or not x.is_contiguous():
        return None
    width = x.shape[-1] // 2
    y = x.new_empty(*x.shape[:-1], width)
    getattr(library, f"fewstep_geglu_{SUFFIXES[x.dtype]}")(
        *_pointers(y, x),
        ctypes.c_int64(y.numel() // width),
        ctypes.c_int64(width),
        ctypes.c_int(torch.get_num_threads()),
    )
    return y


def _library(x: Tensor) -> ctypes.CDLL | None:
    """The object, if it serves tensors like x."""
    if x.dtype not in SUFFIXES or x.device.type != "cpu" or type(x) is not Tensor or not x.numel():
        return None
    if x.dtype == torch.bfloat16 and not build.has("avx512_bf16"):
        return None
    return build.library()


def _pointers(*tensors: Tensor) -> list[ctypes.c_void_p]:
    return [ctypes.c_void_p(tensor.data_ptr()) for tensor in tensors]
