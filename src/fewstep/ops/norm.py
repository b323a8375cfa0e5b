"""Group normalisation and the activations, by our kernels where they serve."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn import functional as F

from ..kernels import linear, pointwise
from .layers import Linear, infers
from .ways import OURS, is_watched, norm_of


def group_norm(norm: nn.GroupNorm, x: Tensor) -> Tensor:
    """A normed x (B, C, H, W)."""
    return _normed(norm, x, silu=False)


def norm_silu(norm: nn.GroupNorm, x: Tensor) -> Tensor:
    """SiLU of a normed x (B, C, H, W)."""
    return _normed(norm, x, silu=True)


def _normed(norm: nn.GroupNorm, x: Tensor, silu: bool) -> Tensor:
    weight, bias = norm._parameters["weight"], norm._parameters["bias"]
    if type(norm) is nn.GroupNorm and weight is not None and bias is not None and infers(x, norm):
        y = pointwise.group_norm(x, norm.num_groups, weight, bias, norm.eps, silu)
        if y is not None:
            return y
    y = norm(x)
    # In place where no gradient needs what was before it.
    return F.silu(y, inplace=not torch.is_grad_enabled()) if silu else y


def geglu(x: Tensor) -> Tensor:
    """h gelu(gate) (..., C) of x (..., 2 C) = (h, gate) (Shazeer 2020)."""
    if infers(x):
        y = pointwise.geglu(x)
        if y is not None:
            return y
    h, gate = x.chunk(2, dim=-1)
    return h * F.gelu(gate)


def gated(layer: nn.Module, x: Tensor, norm: nn.LayerNorm | None = None) -> Tensor:
    """h gelu(gate) (..., C) of (h, gate) = layer(x); `norm` is one that `fuses` with the layer."""
    if type(layer) is Linear and not is_watched(layer):
        y = layer.gated(x, norm)
        if y is not None:
            return y
    return geglu(layer(x) if norm is None else layer(x, norm=norm))


def fuses(norm: nn.Module, x: Tensor, *layers: nn.Module) -> bool:
    """Whether each layer can take x through a layer norm by itself."""
    if type(norm) is not nn.LayerNorm or len(norm.normalized_shape) != 1:
        return False
    weight, bias = norm._parameters["weight"], norm._parameters["bias"]
    if weight is None or bias is None or weight.dtype != torch.float32 or not infers(x, norm):
        return False
    return all(
        type(layer) is Linear and layer.is_few(x) and not is_watched(layer) for layer in layers
    ) and not is_watched(norm)


def normed(norm: nn.Module | None, x: Tensor, *layers: nn.Module) -> tuple[Tensor, ...]:
    """What each layer makes of x behind a norm, if there is one; at once where they can."""
    if norm is None or not fuses(norm, x, *layers):
        x = x if norm is None else norm(x)
        return tuple(layer(x) for layer in layers)
    return at_once(norm, x, layers) or tuple(layer(x, norm=norm) for layer in layers)


def at_once(norm: Any, x: Tensor, layers: Sequence[Any]) -> tuple[Tensor, ...] | None:
    """What linear layers that fuse with a norm make of x; None unless they are alike."""
    if len(layers) == 1 or any(layer._parameters["bias"] is not None for layer in layers):
        return None
    packs = [layer.packed(x, OURS) for layer in layers]
    alike = all(type(p) is linear.Panels and p.shape == packs[0].shape for p in packs)
    return linear.several(x, packs, norm_of(norm)) if alike else None
