"""Linear layers and small 3x3 convolutions in float32 by our C kernel (linear.c).

A weight is packed once, in panels of 32 outputs, and in half the bytes where float16 holds each of
its numbers, as it does for weights that come from a float16 file.
"""

from __future__ import annotations

import ctypes
import functools
import math
from collections.abc import Sequence
from typing import Any

import torch
from torch import Tensor
from torch.nn import functional as F

from ..errors import RequestError
from . import build

LANES = 16  # inputs are filled up to a multiple
PANEL = 32  # outputs, too

Norm = tuple[Tensor, Tensor, float]  # of a layer norm: weight (I,), bias (I,) and eps


@functools.cache
def available() -> bool:
    """Whether the kernel can run here."""
    return build.library() is not None


class Panels:
    """A packed float32 weight (O, I) or (O, I, 3, 3); `gated`: for `linear` with a gate."""

    def __init__(self, values: Tensor, shape: torch.Size, gated: bool) -> None:
        self.values = values  # (outputs / 32, inputs, 32), float32 or float16
        self.shape = shape
        self.gated = gated
        self.width = shape[0] // 2 if gated else shape[0]  # of what `linear` gives
        half = values.dtype == torch.float16
        self._facts = (ctypes.c_int64 * 5)(values.data_ptr(), shape[1], shape[0], gated, half)
        self.address = ctypes.addressof(self._facts)  # what the kernel reads

    def to_dense(self) -> Tensor:
        """The weight as it was, bit for bit."""
        rows = self.values.float().transpose(1, 2).flatten(0, 1)
        if self.gated:
            rows = rows.unflatten(0, (-1, 2, LANES)).transpose(0, 1).flatten(0, 2)
        outputs, inputs, *kernel = self.shape
        rows = rows[:outputs].unflatten(1, (math.prod(kernel), -1))[..., :inputs]
        return rows.transpose(1, 2).reshape(self.shape).contiguous()


def pack(weight: Tensor, gated: bool = False) -> Panels:
    """The panels of a float32 weight; `gated` needs halves of a multiple of 16 outputs."""
    rows = weight.detach().flatten(2) if weight.ndim > 2 else weight.detach()[..., None]
    rows = rows.transpose(1, 2)
    rows = F.pad(rows, (0, -rows.shape[2] % LANES)).flatten(1)
    if gated:
        rows = rows.unflatten(0, (2, -1, LANES)).transpose(0, 1).flatten(0, 2)
    rows = F.pad(rows, (0, 0, 0, -len(rows) % PANEL))
    values = rows.unflatten(0, (-1, PANEL)).transpose(1, 2)
    half = values.half()
    exact = torch.equal(half.float(), values)
    return Panels((half if exact else values).contiguous(), weight.shape, gated)


def linear(
    x: Tensor,
    panels: Panels,
    bias: Tensor | None = None,
    plus: Tensor | None = None,
    norm: Norm | None = None,
) -> Tensor:
    """x W' + bias + plus (..., O) of x (..., I); with gated panels h gelu(gate) (..., O / 2).

    x goes through `norm` first. Neither the other rows nor the number of threads changes a bit of a
    row.
    """
    x = x.contiguous()
    *rows, inputs = x.shape
    y = x.new_empty((*rows, panels.width))
    plus = None if plus is None else _like(plus, y).contiguous()
    scale, offset, eps = norm or (None, None, 0.0)
    failed = _kernel("fewstep_linear")(
        y.data_ptr(),
        _numbers(x),
        panels.address,
        *(_address(bias), _address(plus), _address(scale), _address(offset)),
        *(eps, x.numel() // inputs, torch.get_num_threads()),
    )
    _check(failed)
    return y


def several(x: Tensor, panels: Sequence[Panels], norm: Norm | None = None) -> tuple[Tensor, ...]:
    """`linear` of x by each of several weights of one size."""
    x = x.contiguous()
    *rows, inputs = x.shape
    y = x.new_empty((len(panels), *rows, panels[0].width))
    scale, offset, eps = norm or (None, None, 0.0)
    failed = _kernel("fewstep_linears")(
        y.data_ptr(),
        _numbers(x),
        (ctypes.c_void_p * len(panels))(*(one.address for one in panels)),
        *(_address(scale), _address(offset), eps),
        *(len(panels), x.numel() // inputs, torch.get_num_threads()),
    )
    _check(failed)
    return y.unbind()


def convolution(
    x: Tensor,
    panels: Panels,
    bias: Tensor | None = None,
    shift: Tensor | None = None,
    plus: Tensor | None = None,
    stride: int = 1,
) -> Tensor:
    """(B, O, H', W') channels last: conv2d(x, weight, bias, stride, padding=1) + shift + plus.

    x (B, I, H, W), shift (B, O), plus (B, O, H', W'). A weight (O, I) is that of a 1x1 convolution.
    """
    x = x.contiguous(memory_format=torch.channels_last)
    b, _, h, w = x.shape
    high, wide, outputs = (h - 1) // stride + 1, (w - 1) // stride + 1, panels.shape[0]
    size, layout = (b, outputs, high, wide), torch.channels_last
    y = torch.empty(size, dtype=x.dtype, device=x.device, memory_format=layout)
    plus = None if plus is None else _like(plus, y).contiguous(memory_format=layout)
    shift = None if shift is None else shift.contiguous()
    failed = _kernel("fewstep_convolution")(
        y.data_ptr(),
        _numbers(x),
        panels.address,
        *(_address(bias), _address(shift), _address(plus)),
        *(b * high * wide, h if len(panels.shape) == 4 else 0, w, high, wide, stride),
        torch.get_num_threads(),
    )
    _check(failed)
    return y


def _like(plus: Tensor, y: Tensor) -> Tensor:
    if plus.shape != y.shape or plus.dtype != y.dtype:
        raise RequestError(
            f"plus is {plus.dtype} of shape {tuple(plus.shape)}: give {y.dtype} of {tuple(y.shape)}"
        )
    return plus


def _address(tensor: Tensor | None) -> int | None:
    return None if tensor is None else tensor.data_ptr()


def _numbers(x: Tensor) -> int:
    if x.dtype != torch.float32 or not x.is_cpu:
        raise RequestError(
            f"x is {x.dtype} on {x.device}: this kernel computes in float32 on the CPU; use "
            "PyTorch's own layers"
        )
    return x.data_ptr()


def _check(failed: int) -> None:
    if failed:
        raise MemoryError("no memory for the rows of a linear layer")


_POINTER, _NUMBER, _FLOAT = ctypes.c_void_p, ctypes.c_int64, ctypes.c_float
_ARGUMENTS = {
    "fewstep_linear": [*[_POINTER] * 7, _FLOAT, *[_NUMBER] * 2],
    "fewstep_linears": [*[_POINTER] * 5, _FLOAT, *[_NUMBER] * 3],
    "fewstep_convolution": [*[_POINTER] * 6, *[_NUMBER] * 7],
}


@functools.cache
def _kernel(name: str) -> Any:
    """A kernel, told once what it takes."""
    library = build.library()
    assert library is not None, "ask available() first"
    kernel = getattr(library, name)
    kernel.argtypes = _ARGUMENTS[name]
    return kernel
