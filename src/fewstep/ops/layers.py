"""Linear layers and convolutions that keep their weights as the CPU's kernels read them.

During inference on a CPU, oneDNN copies a weight into its own blocked layout at every call, and for
small pictures falls back to a slow loop. These layers make that copy once, at their first call, and
then hold it in place of the weight: one copy in memory. Whoever asks for the weight (`weight`,
`parameters()` of a network, `state_dict()`, `to()`) gets it back first, bit for bit.

Shapes: B batch, C and O channels, H and W picture height and width.
"""

from __future__ import annotations

import os
import threading
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from functools import cache
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn import functional as F

from ..kernels import linear, winograd
from . import ways
from .memory import release_pages

onednn: Any = torch.ops.mkldnn
_lock = threading.Lock()
_records, _autocasts = torch.is_grad_enabled, torch.is_autocast_enabled
_is_compiling, _is_tracing = torch.compiler.is_compiling, torch.jit.is_tracing
_plain = os.environ.get("FEWSTEP_KERNELS") == "0"


@contextmanager
def plain() -> Iterator[None]:
    """Within it layers compute as PyTorch's own do: what packed ones are compared with."""
    global _plain
    before, _plain = _plain, True
    try:
        yield
    finally:
        _plain = before


def is_plain() -> bool:
    """Whether PyTorch's own ways are asked for."""
    return _plain


def infers(x: Tensor, layer: nn.Module | None = None) -> bool:
    """Whether a layer runs for the result alone, in plain sight, on a CPU."""
    return (
        x.is_cpu
        and not (layer is not None and layer.training)
        and not _plain
        and type(x) is Tensor
        and not _records()
        and not _autocasts("cpu")
        and not _is_compiling()
        and not _is_tracing()
    )


def serves(x: Tensor) -> bool:
    """Whether our own kernel for few rows serves numbers of this kind, here and now."""
    return x.dtype == torch.float32 and infers(x) and linear.available()


@cache
def packable(dtype: torch.dtype) -> bool:
    """Whether this build of PyTorch can hold weights of a dtype in oneDNN's layout."""
    names = ("_reorder_linear_weight", "_reorder_convolution_weight", "_get_mkldnn_serialized_md")
    if not torch.backends.mkldnn.is_available() or not all(hasattr(onednn, n) for n in names):
        return False
    if dtype == torch.bfloat16:
        return bool(onednn._is_mkldnn_bf16_supported())
    return dtype == torch.float32


@cache
def hollow(dtype: torch.dtype) -> Tensor:
    """What a parameter holds while its weight is packed: NaN, so that a mistake is seen."""
    return torch.full((), torch.nan, dtype=dtype)


class Packs(nn.Module):
    """Base of the layers whose `weight` may be packed."""

    weight: Tensor
    _pack: Any = None  # the packed weight; None: it lies in the parameter
    _pack_size: tuple[int, ...] = ()  # the input size that it was packed for

    def reordered(self, weight: Tensor, size: tuple[int, ...]) -> Any:
        """`weight` in oneDNN's layout, for inputs of a size."""
        raise NotImplementedError

    def fits(self, size: tuple[int, ...]) -> bool:
        """Whether the pack has the layout that oneDNN wants for inputs of a size."""
        return True

    def packed(self, x: Tensor, size: tuple[int, ...] = ()) -> Any:
        """The packed weight for an input, or None if PyTorch's own way is to be taken."""
        weight = self._parameters["weight"]
        assert weight is not None
        if not infers(x, self) or x.dtype != weight.dtype:
            return None
        pack = self._pack
        if pack is not None and weight.data_ptr() == hollow(weight.dtype).data_ptr():
            if size == self._pack_size:
                return pack
            if self.fits(size):
                self._pack_size = size
                return pack
            self.unpack()
        return self.pack(size)

    def pack(self, size: tuple[int, ...]) -> Any:
        """Take the weight over; None if that cannot be done for it."""
        with _lock:  # threads may meet here, and the second would pack what is hollow
            weight = self._parameters["weight"]
            assert weight is not None
            empty = hollow(weight.dtype) if packable(weight.dtype) else None
            if empty is None or type(weight) is not nn.Parameter or weight.device.type != "cpu":
                return None
            if self._pack is None or weight.data_ptr() != empty.data_ptr():
                given = weight.detach()
                self._pack, self._pack_size = self.reordered(given, size), size
                weight.data = empty.expand(weight.shape)
                release_pages(given)
            return self._pack

    def unpack(self) -> None:
        """Put the weight back into the parameter, if it was taken."""
        if self._pack is None:
            return
        with _lock:
            pack, self._pack = self._pack, None
            weight = self._parameters["weight"]
            if pack is None or weight is None:
                return
            if weight.data_ptr() == hollow(weight.dtype).data_ptr():
                weight.data = pack.to_dense().reshape(weight.shape)

    # ── whoever wants the weight gets it ──

    def __getattr__(self, name: str) -> Any:
        if name == "weight":
            self.unpack()
        return super().__getattr__(name)

    def __getstate__(self) -> dict[str, Any]:  # copies and pickles
        self.unpack()
        return self.__dict__

    def _apply(self, fn: Any, recurse: bool = True) -> Any:
        self.unpack()
        return super()._apply(fn, recurse)

    def _save_to_state_dict(self, *args: Any, **kwargs: Any) -> None:
        self.unpack()
        super()._save_to_state_dict(*args, **kwargs)

    def _load_from_state_dict(self, *args: Any, **kwargs: Any) -> None:
        self.unpack()
        super()._load_from_state_dict(*args, **kwargs)


def unpack(network: nn.Module) -> None:
    """Put every weight of a network back into its parameter."""
    for module in network.modules():
        if isinstance(module, Packs):
            module.unpack()


def held(network: nn.Module) -> Iterator[nn.Parameter]:
    """The parameters of a network as they are, packed ones without their values."""
    seen = set()
    for module in network.modules():
        for parameter in module._parameters.values():
            if parameter is not None and parameter not in seen:
                seen.add(parameter)
                yield parameter


class Linear(Packs, nn.Linear):
    """x W' + b over the last dimension; `plus` is added to the result."""

    def reordered(self, weight: Tensor, size: tuple[int, ...]) -> Any:
        if size in (ways.OURS, ways.GATED):
            return linear.pack(weight, gated=size == ways.GATED)
        return onednn._reorder_linear_weight(weight, None)

    def fits(self, size: tuple[int, ...]) -> bool:
        # Without a gate, either library's pack serves any number of rows.
        return ways.GATED not in (size, self._pack_size)

    def forward(
        self, x: Tensor, plus: Tensor | None = None, norm: nn.LayerNorm | None = None
    ) -> Tensor:
        """`norm`: one that x goes through first, which `fuses` with this layer."""
        pack = self.packed(x, ways.OURS if self.is_few(x) else ())
        if type(pack) is linear.Panels:
            return linear.linear(x, pack, self._parameters["bias"], plus, ways.norm_of(norm))
        x = x if norm is None else norm(x)
        if pack is None:
            y = F.linear(x, self.weight, self.bias)
            return y if plus is None else y + plus
        return products(x, pack, self._parameters["bias"], plus)

    def gated(self, x: Tensor, norm: nn.LayerNorm | None = None) -> Tensor | None:
        """h gelu(gate), h and gate the halves of the result, if our own kernel serves."""
        fits = self.out_features % (2 * linear.LANES) == 0 and self.is_few(x)
        pack = self.packed(x, ways.GATED) if fits else None
        if pack is None:
            return None
        return linear.linear(x, pack, self._parameters["bias"], None, ways.norm_of(norm))

    def is_few(self, x: Tensor) -> bool:
        """Whether x has as few rows as our own kernel is for."""
        return x.numel() <= ways.FEW * self.in_features and serves(x)


def products(x: Tensor, pack: Any, bias: Tensor | None, plus: Tensor | None) -> Tensor:
    """x W' + b + plus over the last dimension, W packed."""
    if plus is None:
        return onednn._linear_pointwise(x, pack, bias, "none", [], "")
    return onednn._linear_pointwise.binary(x, plus, pack, bias, "add")


class Conv2d(Packs, nn.Conv2d):
    """A convolution of x (B, C, H, W).

    `shift` (B, O) or (1, O) is added per channel, `plus` (B, O, H', W') to the result.
    """

    def __init__(self, *args: Any, **kwargs: Any) -> None:
        super().__init__(*args, **kwargs)
        plainly = self.stride == (1, 1) and self.padding in ((0, 0), "valid") and self.groups == 1
        self.is_pointwise = plainly and self.kernel_size == (1, 1)  # a linear layer of pixels
        usual = (self.dilation, self.groups, self.padding_mode) == ((1, 1), 1, "zeros")
        padded = (self.kernel_size, self.padding) == ((3, 3), (1, 1))
        gathered = usual and padded and self.stride in ((1, 1), (2, 2))
        few = self.in_channels * self.out_channels <= ways.FEW_WEIGHTS
        self.is_gathered = self.is_pointwise or (gathered and few)  # what our own kernel convolves
        self.is_3x3 = gathered and self.stride == (1, 1)

    def size_of(self, x: Tensor) -> tuple[int, ...]:
        """The size, or what else, that a weight is packed for, to convolve x."""
        if self.winograd_way(x) == "prepared":
            return ways.WINOGRAD
        if self.is_gathered and x.numel() <= ways.FEW * self.in_channels and serves(x):
            return ways.OURS
        return () if self.is_pointwise else tuple(x.shape[2:])

    def reordered(self, weight: Tensor, size: tuple[int, ...]) -> Any:
        if size == ways.OURS:
            return linear.pack(weight.flatten(1) if self.is_pointwise else weight)
        if size == ways.WINOGRAD:
            return ways.Prepared(winograd.prepare(weight), weight)
        if self.is_pointwise:
            return onednn._reorder_linear_weight(weight.flatten(1), None)
        how = (self.padding, self.stride, self.dilation, self.groups)
        return onednn._reorder_convolution_weight(weight, *how, [1, self.in_channels, *size])

    def fits(self, size: tuple[int, ...]) -> bool:
        if self.is_pointwise:
            return True
        if len(size) != 2 or len(self._pack_size) != 2:
            return False
        weight = self._parameters["weight"]
        assert weight is not None
        how = (self.padding, self.stride, self.dilation, self.groups)
        key = (weight.dtype, tuple(weight.shape), how)
        return layout_for(*key, size) == layout_for(*key, self._pack_size)

    def forward(self, x: Tensor, shift: Tensor | None = None, plus: Tensor | None = None) -> Tensor:
        bias: Tensor | None = self._parameters["bias"]
        if self.winograd_way(x) == "plain" and self.reads_plain(x):
            return winograd.conv3x3(x, self.weight, bias, ways.by_row(shift, x), plus)
        pack = self.packed(x, self.size_of(x)) if self.padding_mode == "zeros" else None
        if pack is None:
            y = self._conv_forward(x, self.weight, self.bias)
            y = y if shift is None else y + shift[:, :, None, None]
            return y if plus is None else y + plus
        if type(pack) is ways.Prepared:
            return winograd.conv3x3(x, pack.values, bias, ways.by_row(shift, x), plus)
        if type(pack) is linear.Panels:
            return linear.convolution(x, pack, bias, ways.by_row(shift, x), plus, self.stride[0])
        if shift is not None and len(shift) == 1:
            bias, shift = shift[0] if bias is None else bias + shift[0], None
        y = self.convolved(x, pack, bias, plus)
        return y if shift is None else y.add_(shift[:, :, None, None])

    def winograd_way(self, x: Tensor, size: Sequence[int] | None = None) -> str | None:
        """Which weights Winograd's algorithm reads for x, or one like it of a size; None: not."""
        if not self.is_3x3 or x.dtype not in winograd.COSTS or not infers(x):
            return None
        height, width = size or x.shape[2:]
        return ways.winograd_way(self.in_channels, self.out_channels, height, width, x.dtype)

    def reads_plain(self, x: Tensor) -> bool:
        """Whether the weight can be read as it lies."""
        weight = self._parameters["weight"]
        assert weight is not None
        if weight.dtype != x.dtype or type(weight) is not nn.Parameter or not infers(x, self):
            return False
        self.unpack()
        return True

    def convolved(self, x: Tensor, pack: Any, bias: Tensor | None, plus: Tensor | None) -> Tensor:
        """The convolution and `plus`, W packed, channels last."""
        if self.is_pointwise:
            pixels = None if plus is None else plus.permute(0, 2, 3, 1)
            return products(x.permute(0, 2, 3, 1), pack, bias, pixels).permute(0, 3, 1, 2)
        how = (self.padding, self.stride, self.dilation, self.groups)
        x = x.contiguous(memory_format=torch.channels_last)
        if plus is None:
            return onednn._convolution_pointwise(x, pack, bias, *how, "none", [], "")
        plus = plus.contiguous(memory_format=torch.channels_last)
        return onednn._convolution_pointwise.binary(
            x, plus, pack, bias, *how, "add", None, None, [], None
        )


@cache
def layout_for(
    dtype: torch.dtype, shape: tuple[int, ...], how: tuple[Any, ...], size: tuple[int, ...]
) -> bytes:
    """The layout that oneDNN wants for a convolution's weights and inputs of a size.

    With the wrong one it reorders them at every call, at a hundred times the convolution's cost.
    """
    empty = torch.empty(shape, dtype=dtype)
    inputs = shape[1] * how[-1]
    pack = onednn._reorder_convolution_weight(empty, *how, [1, inputs, *size])
    described = bytes(onednn._get_mkldnn_serialized_md(pack).numpy())
    return described[:HOLE] + described[HOLE + 4 :]


# Four bytes of no meaning in oneDNN's description: they align what follows the data type.
HOLE = 108


def added(layer: nn.Module, x: Tensor, **terms: Tensor | None) -> Tensor:
    """`layer(x)` with terms added, `plus` and `shift`, whatever the layer was replaced by.

    A LoRA in training, for one, is a layer of its own that takes x alone.
    """
    if isinstance(layer, Packs):
        return layer(x, **terms)
    y = layer(x)
    shift, plus = terms.get("shift"), terms.get("plus")
    y = y if shift is None else y + shift[:, :, None, None]
    return y if plus is None else y + plus
