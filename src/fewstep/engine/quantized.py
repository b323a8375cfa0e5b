"""Layers with their weights in eight bits, each a subclass of what it was; see quantize.py.

Shapes: B batch, C and I channels in, O channels out, K the kernel of a convolution.
"""

from __future__ import annotations

import math
import threading
from collections.abc import Callable
from functools import cache
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn import functional as F

from ..errors import RequestError
from ..kernels.quantize import codes_of, range_of
from ..ops.layers import HOLE, Conv2d, Linear, Packs
from ..ops.memory import release_pages
from . import machines

onednn: Any = torch.ops.onednn
E4M3 = torch.float8_e4m3fn
LARGEST = 448.0  # of e4m3
USUAL = (32, 32)  # the size that convolutions are packed for at first
_lock = threading.Lock()
_spaces = threading.local()


# ── the numbers ──


def quantized_weight(weight: Tensor) -> tuple[Tensor, Tensor]:
    """Codes (O, I, K...) int8 and scales (O,) float32 of a weight (O, I, K...).

    The scales are numbers of bfloat16 as well, so that weights in any dtype have them exactly.
    """
    weight = weight.float()
    largest = weight.flatten(1).abs().amax(1)
    scales = (largest / 127).clamp(min=torch.finfo(torch.float32).tiny).bfloat16().float()
    codes = (weight / along_outputs(scales, weight)).round_().clamp_(-127, 127)
    return codes.to(torch.int8), scales


def along_outputs(scales: Tensor, weight: Tensor) -> Tensor:
    """Scales (O,) in a shape that multiplies a weight (O, I, K...)."""
    return scales.reshape(-1, *[1] * (weight.ndim - 1))


def quantized_input(x: Tensor) -> tuple[Tensor, float, int]:
    """Codes (uint8, in the shape and layout of x), scale and zero: x ~ scale (codes - zero)."""
    low, high = range_of(x)
    low, high = min(low, 0.0), max(high, 0.0)  # 0 is a code, for the padding
    scale = (high - low) / 254  # one code less: the zero is rounded, and stays within 1 .. 254
    if not math.isfinite(scale):
        return torch.empty_like(x, dtype=torch.uint8).zero_(), math.nan, 1
    scale = max(scale, torch.finfo(torch.float32).tiny)
    zero = min(max(round(-low / scale), 1), 254)
    return codes_of(x, scale, zero), scale, zero


def by_picture(compute: Callable[..., Tensor], x: Tensor, *more: Tensor | None) -> Tensor:
    """`compute` of each row of x (B, ...) and of what goes with it, so that each is alone."""
    if len(x) == 1:
        return compute(x, *more)
    rows = [[None] * len(x) if y is None else y.split(1) for y in more]
    return torch.cat([compute(*row) for row in zip(x.split(1), *rows, strict=True)])


# ── the layers ──


class Quantized(Packs):
    """Base of the quantised layers. Their parameter `weight` is hollow."""

    kind = ""
    codes: Tensor | None  # None: `ready` has them
    scales: Tensor
    ready: Any = None  # the codes as a library reads them

    def take_over(self) -> None:
        """Quantise the weight, and let it go."""
        weight = self._parameters["weight"]
        assert weight is not None
        self.codes, self.scales = self.coded(weight.detach())
        self.hollow_out(weight.dtype, weight.device, weight.shape)
        self.__dict__.pop("_places", None)  # an UpConv2d's
        release_pages(weight.detach())

    def coded(self, weight: Tensor) -> tuple[Tensor, Tensor]:
        """Codes and scales of a weight."""
        return quantized_weight(weight)

    def hollow_out(self, dtype: torch.dtype, device: torch.device, shape: torch.Size) -> None:
        """The parameter as it looks like, without numbers: NaN, so that a mistake is seen."""
        empty = torch.full((), torch.nan, dtype=dtype, device=device).expand(shape)
        self._parameters["weight"] = nn.Parameter(empty, requires_grad=False)

    def check_call(self, x: Tensor) -> None:
        """Raises RequestError where a gradient is asked of the layer."""
        if torch.is_grad_enabled() and x.requires_grad:
            raise RequestError(
                f"a network in {self.kind} gives no gradients; load the model again to train it"
            )

    def unpack(self) -> None:
        """Raises RequestError: whoever asks for the weight comes too late."""
        raise RequestError(
            f"the network's weights are {self.kind} now, and the original ones were let go: load "
            "the model again, and load LoRAs, move it or save it before quantize"
        )

    def refusal(self, dtype: torch.dtype, device: torch.device) -> str | None:
        """Why the layer cannot compute so, None if it can."""
        return machines.refusal(self.kind, dtype, device)

    def _apply(self, fn: Any, recurse: bool = True) -> Any:
        weight = self._parameters["weight"]
        assert weight is not None
        like = fn(torch.empty(1, dtype=weight.dtype, device=weight.device))
        if (why := self.refusal(like.dtype, like.device)) is not None:
            raise RequestError(f"{self.kind}: {why}; load the model again")
        self._parameters["weight"] = None
        nn.Module._apply(self, fn, recurse)
        self.codes = None if self.codes is None else self.codes.to(like.device)
        self.scales = self.scales.to(like.device)
        self.hollow_out(like.dtype, like.device, weight.shape)
        return self


class Int8Weight(Quantized):
    """Weights in int8, multiplied out at each call."""

    kind = "int8-weights"

    def multiplied_out(self, dtype: torch.dtype) -> Tensor:
        """The weight (O, I, K...) that the codes stand for, until the next call in this thread."""
        assert self.codes is not None
        weight = workspace(self.codes, dtype).copy_(self.codes)
        return weight.mul_(along_outputs(self.scales.to(dtype), self.codes))


def workspace(like: Tensor, dtype: torch.dtype) -> Tensor:
    """Memory in the shape of `like`; a CPU's is kept, since new memory costs as much as filling it.

    It is as large as the largest weight, for each thread.
    """
    if like.device.type != "cpu":
        return torch.empty_like(like, dtype=dtype)
    kept = _spaces.__dict__.get(str(dtype))
    if kept is None or kept.numel() < like.numel():
        kept = _spaces.__dict__[str(dtype)] = torch.empty(like.numel(), dtype=dtype)
    return kept[: like.numel()].view(like.shape)


class Int8WeightLinear(Int8Weight, Linear):
    """A linear layer with its weight in int8."""

    def forward(
        self, x: Tensor, plus: Tensor | None = None, norm: nn.LayerNorm | None = None
    ) -> Tensor:
        self.check_call(x)
        x = x if norm is None else norm(x)
        y = F.linear(x, self.multiplied_out(x.dtype), self._parameters["bias"])
        return y if plus is None else y + plus


class Int8WeightConv2d(Int8Weight, Conv2d):
    """A convolution with its weight in int8."""

    def forward(self, x: Tensor, shift: Tensor | None = None, plus: Tensor | None = None) -> Tensor:
        self.check_call(x)
        y = self._conv_forward(x, self.multiplied_out(x.dtype), self._parameters["bias"])
        y = y if shift is None else y + shift[:, :, None, None]
        return y if plus is None else y + plus


class Int8(Quantized):
    """Weights and inputs in int8, products summed in int32 and given in the dtype of x."""

    kind = "int8"

    def take_over(self) -> None:
        super().take_over()
        self.zeros = torch.zeros(len(self.scales), dtype=torch.int32)
        self.ready, self.codes = self.packed_codes(), None

    def packed_codes(self) -> Any:
        """The codes as oneDNN reads them."""
        raise NotImplementedError

    def bias_with(self, shift: Tensor | None = None) -> Tensor | None:
        """The bias and a shift of the channels (1, O), float32."""
        given = self._parameters["bias"]
        bias = None if given is None else given.detach().float()
        if shift is None:
            return bias
        return shift[0].float() if bias is None else bias + shift[0]


class Int8Linear(Int8, Linear):
    """A linear layer in int8, x (B, ..., I) to (B, ..., O)."""

    def packed_codes(self) -> Any:
        return onednn.qlinear_prepack(self.codes, None)

    def forward(
        self, x: Tensor, plus: Tensor | None = None, norm: nn.LayerNorm | None = None
    ) -> Tensor:
        x = x if norm is None else norm(x)
        self.check_call(x)
        return by_picture(self.product, x, plus)

    def product(self, x: Tensor, plus: Tensor | None) -> Tensor:
        """x W' + b + plus of one picture."""
        given = (*quantized_input(x.contiguous()), self.ready, self.scales, self.zeros)
        bias, to = self.bias_with(), (1.0, 0, x.dtype)
        if plus is None:
            return onednn.qlinear_pointwise(*given, bias, *to, "none", [], "")
        how: tuple[Any, ...] = (1.0, 0, "add", 1.0, "none", [], "")
        return onednn.qlinear_pointwise.binary(*given, plus.contiguous(), bias, *to, *how)


class Int8Conv2d(Int8, Conv2d):
    """A convolution in int8 of x (B, C, H, W)."""

    ready_for: bytes = b""

    def packed_codes(self) -> Any:
        assert self.codes is not None
        self.ready_for = self.layout(USUAL)
        return int8_packed(self.codes, self.scales, self.how, USUAL)

    def forward(self, x: Tensor, shift: Tensor | None = None, plus: Tensor | None = None) -> Tensor:
        self.check_call(x)
        x = x.contiguous(memory_format=torch.channels_last)
        self.make_ready((int(x.shape[2]), int(x.shape[3])))
        shift = None if shift is None else shift.expand(len(x), -1)
        return by_picture(self.convolved_int8, x, shift, plus)

    @property
    def how(self) -> tuple[Any, ...]:
        """Stride, padding, dilation and groups, as oneDNN takes them."""
        return list(self.stride), list(self.padding), list(self.dilation), self.groups

    def layout(self, size: tuple[int, int]) -> bytes:
        """What oneDNN wants for inputs of a size."""
        shape = (self.out_channels, self.in_channels, *self.kernel_size)
        return int8_layout(shape, tuple(map(as_tuple, self.how)), size)

    def make_ready(self, size: tuple[int, int]) -> None:
        """Have the codes in the layout that oneDNN wants for inputs of a size."""
        layout = self.layout(size)
        with _lock:  # threads may meet here
            if self.ready_for != layout:
                self.ready = int8_packed(self.ready.to_dense(), self.scales, self.how, size)
                self.ready_for = layout

    def convolved_int8(self, x: Tensor, shift: Tensor | None, plus: Tensor | None) -> Tensor:
        """The convolution of one picture (1, C, H, W), with `shift` and `plus`."""
        given = (*quantized_input(x), self.ready, self.scales, self.zeros, self.bias_with(shift))
        y = onednn.qconv_pointwise(*given, *self.how, 1.0, 0, x.dtype, "none", [], "")
        return y if plus is None else y.add_(plus)


def as_tuple(value: Any) -> Any:
    return tuple(value) if isinstance(value, list) else value


def int8_packed(codes: Tensor, scales: Tensor, how: Any, size: tuple[int, int]) -> Any:
    """Codes (O, I, k, k) as oneDNN reads them for inputs (1, I, *size); 128 stands for any zero."""
    return onednn.qconv_prepack(codes, scales, 1.0, 128, *how, [1, codes.shape[1], *size])


@cache
def int8_layout(shape: tuple[int, ...], how: tuple[Any, ...], size: tuple[int, int]) -> bytes:
    """What oneDNN says of the layout that it wants; with another it reorders at every call."""
    codes = torch.empty(shape, dtype=torch.int8)
    packed = int8_packed(codes, torch.ones(shape[0]), how, size)
    described = bytes(torch.ops.mkldnn._get_mkldnn_serialized_md(packed).numpy())
    return described[:HOLE] + described[HOLE + 4 :]


class Fp8Linear(Quantized, Linear):
    """A linear layer in e4m3, with a scale for each row of x and of the weight."""

    kind = "fp8"

    def coded(self, weight: Tensor) -> tuple[Tensor, Tensor]:
        codes, scales = fp8(weight)
        return codes, scales.T.contiguous()

    def forward(
        self, x: Tensor, plus: Tensor | None = None, norm: nn.LayerNorm | None = None
    ) -> Tensor:
        x = x if norm is None else norm(x)
        self.check_call(x)
        codes, scales = fp8(x.reshape(-1, x.shape[-1]))
        assert self.codes is not None
        y = scaled_product(codes, scales, self.codes, self.scales, x.dtype)
        y = y.unflatten(0, x.shape[:-1])
        bias = self._parameters["bias"]
        y = y if bias is None else y + bias
        return y if plus is None else y + plus


def fp8(x: Tensor) -> tuple[Tensor, Tensor]:
    """Codes (N, C) in e4m3 and scales (N, 1) float32 of rows x (N, C)."""
    scales = x.abs().amax(1, keepdim=True).float().clamp(min=1e-12) / LARGEST
    return (x / scales).clamp(-LARGEST, LARGEST).to(E4M3), scales


def scaled_product(a: Tensor, s: Tensor, b: Tensor, t: Tensor, dtype: torch.dtype) -> Tensor:
    """(N, O) of codes a (N, I) with scales s (N, 1) and codes b (O, I) with scales t (1, O)."""
    return torch._scaled_mm(a, b.T, scale_a=s, scale_b=t, out_dtype=dtype)
