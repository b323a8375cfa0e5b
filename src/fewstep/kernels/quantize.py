"""Tensors as 8-bit codes: by our C kernel (quantize.c), and by PyTorch where it does not serve."""

from __future__ import annotations

import ctypes

import torch
from torch import Tensor

from . import build

SUFFIXES = {torch.float32: "f32", torch.bfloat16: "bf16"}


def range_of(x: Tensor) -> tuple[float, float]:
    """The smallest and the largest number of x; NaN if it holds one."""
    library = _library(x)
    if library is None:
        low, high = torch.aminmax(x)
        return float(low), float(high)
    found = (ctypes.c_float * 2)()
    getattr(library, f"fewstep_range_{SUFFIXES[x.dtype]}")(
        found,
        ctypes.c_void_p(x.data_ptr()),
        ctypes.c_int64(x.numel()),
        ctypes.c_int(torch.get_num_threads()),
    )
    return found[0], found[1]


def codes_of(x: Tensor, scale: float, zero: int) -> Tensor:
    """round(x / scale) + zero, clamped to 0 .. 255: uint8, in the shape and layout of x."""
    library = _library(x)
    if library is None:
        codes = x.float().mul(1 / scale).round_().add_(zero).clamp_(0, 255)
        return codes.to(torch.uint8)
    codes = torch.empty_like(x, dtype=torch.uint8)
    getattr(library, f"fewstep_codes_{SUFFIXES[x.dtype]}")(
        ctypes.c_void_p(codes.data_ptr()),
        ctypes.c_void_p(x.data_ptr()),
        ctypes.c_int64(x.numel()),
        ctypes.c_float(1 / scale),
        ctypes.c_int(zero),
        ctypes.c_int(torch.get_num_threads()),
    )
    return codes


def _library(x: Tensor) -> ctypes.CDLL | None:
    """The object, if it serves tensors like x: numbers without gaps, in any order."""
    dense = x.is_contiguous() or (
        x.dim() == 4 and x.is_contiguous(memory_format=torch.channels_last)
    )
    ordinary = type(x) is Tensor and x.device.type == "cpu" and x.dtype in SUFFIXES
    return build.library() if ordinary and dense and x.numel() else None
