"""3x3 convolutions by Winograd's F(4x4, 3x3) in float32: a quarter of the multiplications.

Lavin & Gray 2016, section 4.1, with points that round less: 1e-6 relative to float64 at 320
channels, 3e-6 at 1280. Tensors of bfloat16 are widened as they are read and rounded once, as the
result with all that is added to it is written: faster than direct convolution in bfloat16, and as
exact. Transformed weights are 4 times as many numbers: they are made at the call and forgotten,
unless `prepare` made them.

    if winograd.available() and winograd.pays(*weight.shape[1::-1], *x.shape[2:], dtype=x.dtype):
        y = winograd.conv3x3(x, weight, bias)  # as conv2d(x, weight, bias, padding=1)
"""

from __future__ import annotations

import ctypes
import functools
import math
from typing import Any

import torch
from torch import Tensor

from fewstep.errors import RequestError
from fewstep.kernels import build

POINTS = 36  # products for a tile of 4x4 outputs and a channel
TILE = 4
LANES = 16  # `in_channels` is a multiple
PANEL = 32  # `out_channels` is a multiple
SUFFIXES = {torch.float32: "f32", torch.bfloat16: "bf16"}
TILES = 64  # at most in a block, so that what belongs to it stays in the caches ...
WIDE = 1 << 16  # ... and if tiles times channels are more, down to half as many
COLUMNS = 64  # outputs of a block at a time
# Plain weights that come to fewer numbers are made once for all blocks, others by each block anew.
SMALL = 1 << 20
# Of direct convolution by oneDNN, in its time for a pixel, on Zen 4: a tile's time with many
# channels, what making the weights adds, and the gain that is asked for.
TILE_COST = 5.1
COSTS = {torch.float32: (TILE_COST, 27, 1.5), torch.bfloat16: (9.4, 36, 1.15)}
FEW = 7  # channels in and out at which the two outer stages take as long as the products


def available() -> bool:
    """Whether the kernel can run here; else the caller convolves directly."""
    return build.library() is not None


def pays(
    in_channels: int,
    out_channels: int,
    height: int,
    width: int,
    dtype: torch.dtype = torch.float32,
) -> bool:
    """Whether direct convolution takes 1.5 times as long, in bfloat16 1.15 times as long."""
    if in_channels % LANES or out_channels % PANEL or dtype not in COSTS:
        return False
    if dtype == torch.bfloat16 and build.has("amx_bf16"):  # whose direct products are faster still
        return False
    tile, make, gain = COSTS[dtype]
    tile *= 1 + FEW / in_channels + FEW / out_channels
    return height * width >= gain * (tile * _tiles(height, width) + make)


def prepare(weight: Tensor) -> Tensor:
    """(36, out / 32, in, 32) in float32, G w G^T of a weight (out, in, 3, 3): 4 times as many."""
    _check_weight(weight)
    o, c = weight.shape[:2]
    weight, next_tap = _dense(weight)
    packed = weight.new_empty((POINTS, o // PANEL, c, PANEL), dtype=torch.float32)
    _kernel("winograd_weights", weight.dtype)(
        *_pointers(weight, packed), *_numbers(next_tap, c, o, torch.get_num_threads())
    )
    return packed


def conv3x3(
    x: Tensor,
    weight: Tensor,
    bias: Tensor | None = None,
    shift: Tensor | None = None,
    residual: Tensor | None = None,
) -> Tensor:
    """(B, out, H, W) channels last: conv2d(x, weight, bias, padding=1) + shift + residual.

    x (B, in, H, W); weight (out, in, 3, 3), or what `prepare` made of it; bias (out); shift
    (B, out), such as the time's; residual (B, out, H, W): all float32 or all bfloat16. Neither the
    rest of the batch nor the number of threads changes a bit of a row.
    """
    _check(x, weight, {"bias": bias, "shift": shift, "residual": residual})
    b, _, h, w = x.shape
    size, layout = (b, _outputs(weight), h, w), torch.channels_last
    y = torch.empty(size, dtype=x.dtype, device=x.device, memory_format=layout)
    if y.numel():
        plus = None if residual is None else _channels_last(residual)
        bias, shift = (None if v is None else v.contiguous() for v in (bias, shift))
        _convolve(y, _channels_last(x), weight, bias, shift, plus)
    return y


def _convolve(
    y: Tensor,
    x: Tensor,
    weight: Tensor,
    bias: Tensor | None,
    shift: Tensor | None,
    residual: Tensor | None,
) -> None:
    """Into y. Weights that come plain are made once if small, else by each block anew."""
    (b, o, h, w), threads = y.shape, torch.get_num_threads()
    total, c = b * _tiles(h, w), x.shape[1]
    if not _is_packed(weight) and total > TILES and POINTS * o * c < SMALL:
        weight = prepare(weight)
    plain, next_tap = (None, 0) if _is_packed(weight) else _dense(weight)
    most = min(TILES, max(TILES // 2, WIDE // c))
    blocks, tiles, share = _parts(total, o, threads, most)
    columns = min(share, COLUMNS) if plain is None else PANEL
    numbers = _numbers(next_tap, b, h, w, c, o, blocks, tiles, columns, share, threads)
    packed = weight if plain is None else None
    pointers = _pointers(x, packed, plain, bias, shift, residual, y)
    kernel = _kernel("winograd", x.dtype)
    floats = kernel(*pointers, *_pointers(None), *numbers)
    size = floats * min(threads, blocks * math.ceil(o / share))
    scratch = torch.empty(size, dtype=torch.float32, device=x.device)
    kernel(*pointers, *_pointers(scratch), *numbers)


def _tiles(height: int, width: int) -> int:
    return math.ceil(height / TILE) * math.ceil(width / TILE)


def _is_packed(weight: Tensor) -> bool:
    return weight.ndim == 4 and weight.shape[::3] == (POINTS, PANEL)


def _outputs(weight: Tensor) -> int:
    return weight.shape[1] * PANEL if _is_packed(weight) else weight.shape[0]


def _channels_last(x: Tensor) -> Tensor:
    return x.contiguous(memory_format=torch.channels_last)


def _dense(weight: Tensor) -> tuple[Tensor, int]:
    """A weight as it lies, contiguous or channels last, and the stride of its taps."""
    weight = weight.detach()
    if weight.is_contiguous(memory_format=torch.channels_last):
        return weight, weight.shape[1]
    return weight.contiguous(), 1


def _parts(total: int, columns: int, threads: int, most: int) -> tuple[int, int, int]:
    """Blocks, tiles of the largest and columns of a share, so that every thread has as much."""
    blocks = math.ceil(total / most)
    if blocks >= threads:
        blocks = min(total, math.ceil(blocks / threads) * threads)
        return blocks, math.ceil(total / blocks), columns
    shares = math.ceil(threads / blocks)
    return blocks, math.ceil(total / blocks), math.ceil(columns / PANEL / shares) * PANEL


def _check(x: Tensor, weight: Tensor, added: dict[str, Tensor | None]) -> None:
    """Refuse what the kernel would read wrongly."""
    packed = _is_packed(weight) and weight.is_contiguous()
    if not packed:
        _check_weight(weight)
    inputs, o = weight.shape[2 if packed else 1], _outputs(weight)
    if x.ndim != 4 or x.shape[1] != inputs:
        raise RequestError(f"x has shape {tuple(x.shape)}: give (B, {inputs}, H, W)")
    b, _, h, w = x.shape
    shapes = {"bias": (o,), "shift": (b, o), "residual": (b, o, h, w)}
    for name, value in added.items():
        if value is not None and tuple(value.shape) != shapes[name]:
            raise RequestError(f"{name} has shape {tuple(value.shape)}: give {shapes[name]}")
    for name, value in {"x": x, "weight": weight, **added}.items():
        _check_kind(name, value)
        made = packed and name == "weight"
        wanted, source = (torch.float32, "prepare makes it") if made else (x.dtype, "x is")
        if value is not None and value.dtype != wanted:
            raise RequestError(f"{name} is {value.dtype}: give {wanted}, as {source}")


def _check_kind(name: str, value: Tensor | None) -> None:
    if value is None:
        return
    if value.dtype not in SUFFIXES or value.device.type != "cpu":
        raise RequestError(
            f"{name} is {value.dtype} on {value.device}: this kernel takes float32 and bfloat16 on "
            "the CPU; use torch.nn.functional.conv2d"
        )
    if torch.is_grad_enabled() and value.requires_grad:
        raise RequestError(
            f"{name} requires a gradient, which this kernel does not give: call it under "
            "torch.no_grad(), or use torch.nn.functional.conv2d"
        )


def _check_weight(weight: Tensor) -> None:
    fits = weight.ndim == 4 and tuple(weight.shape[2:]) == (3, 3)
    if not fits or weight.shape[0] % PANEL or weight.shape[1] % LANES or not weight.numel():
        raise RequestError(
            f"weight has shape {tuple(weight.shape)}: give (out, in, 3, 3) with out a multiple of "
            f"{PANEL} and in of {LANES}, or use torch.nn.functional.conv2d"
        )
    _check_kind("weight", weight)


@functools.cache
def _kernel(name: str, dtype: torch.dtype) -> Any:
    library = build.library()
    if library is None:
        raise RequestError(
            f"there is no Winograd kernel here ({build.kernels().reason}): ask available() first "
            "and use torch.nn.functional.conv2d without it"
        )
    kernel = getattr(library, f"fewstep_{name}_{SUFFIXES[dtype]}")
    kernel.restype = ctypes.c_int64 if name == "winograd" else None
    return kernel


def _pointers(*tensors: Tensor | None) -> list[ctypes.c_void_p]:
    return [ctypes.c_void_p(None if t is None else t.data_ptr()) for t in tensors]


def _numbers(*values: int) -> list[ctypes.c_int64]:
    return [ctypes.c_int64(value) for value in values]
