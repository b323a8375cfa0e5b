"""One training step on the meta device: its operations and its bytes, without computing anything.

Shapes alone decide both. The networks are the real ones, so adapters, gradient checkpointing and
every layout are counted as they are. PyTorch's autocast and fused attention do not reach the meta
device: `as_on_device` does there what they do on a GPU.
"""

from __future__ import annotations

import weakref
from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn import functional as F
from torch.overrides import TorchFunctionMode
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_leaves
from torch.utils.flop_counter import flop_registry

from ..models.layers import Attention
from ..models.unet import UNet2DConditionModel
from .loop import DTYPES

Forward = Callable[..., Any]


class Trace(TorchDispatchMode):
    """Counts what runs within it: floating-point operations, and bytes alive, now and at most.

    A product and its sum are two operations. Bytes are those of storages that came to be within.
    """

    def __init__(self) -> None:
        super().__init__()
        self.operations = 0.0
        self.alive = self.peak = 0
        self.seen: set[int] = set()

    def __torch_dispatch__(
        self, func: Any, types: Any, args: tuple[Any, ...] = (), kwargs: Any = None
    ) -> Any:
        kwargs = kwargs or {}
        for value in tree_leaves((args, kwargs)):  # older than this, or known already
            if isinstance(value, Tensor):
                self.note(value.untyped_storage(), 0)
        result = func(*args, **kwargs)
        count = flop_registry.get(func.overloadpacket)
        if count is not None:
            self.operations += count(*args, **kwargs, out_val=result)
        for value in tree_leaves(result):
            if isinstance(value, Tensor):
                self.note(value.untyped_storage(), value.untyped_storage().nbytes())
        return result

    def note(self, storage: torch.UntypedStorage, size: int) -> None:
        """Count a storage as `size` bytes until it is freed; one that is counted stays as it is."""
        key = storage._cdata
        if key in self.seen:
            return
        self.seen.add(key)
        self.alive += size
        self.peak = max(self.peak, self.alive)
        weakref.finalize(storage, self.freed, key, size).atexit = False

    def freed(self, key: int, size: int) -> None:
        """A storage is gone."""
        self.seen.discard(key)
        self.alive -= size


class Precision(TorchFunctionMode):
    """Products in `dtype`, norms in float32, as autocast has them on CUDA; attention fused."""

    def __init__(self, dtype: torch.dtype | None, fused: bool) -> None:
        super().__init__()
        self.dtype, self.fused = dtype, fused

    def __torch_function__(
        self, func: Any, types: Any, args: tuple[Any, ...] = (), kwargs: Any = None
    ) -> Any:
        kwargs = kwargs or {}
        if func is F.scaled_dot_product_attention and self.fused:
            q, k, v = (cast(value, self.dtype) for value in args)
            return torch.ops.aten._scaled_dot_product_efficient_attention(q, k, v, None, True)[0]
        if func in (F.linear, F.conv2d):
            dtype = self.dtype
        elif func in (torch.layer_norm, torch.group_norm) and self.fused:
            dtype = torch.float32
        else:
            return func(*args, **kwargs)
        args = tuple(cast(value, dtype) for value in args)
        return func(*args, **{name: cast(value, dtype) for name, value in kwargs.items()})


def cast(value: Any, dtype: torch.dtype | None) -> Any:
    """A tensor in `dtype`; anything else, and with None everything, as it is."""
    return value if dtype is None or not isinstance(value, Tensor) else value.to(dtype)


def as_on_device(network: nn.Module, device: str, precision: str) -> None:
    """Let a network run on the meta device as it does on `device` in a precision.

    Layer by layer, as checkpointing calls layers again from within the backward pass.
    """
    low = DTYPES.get(precision)
    fused = device != "cpu"
    for module in network.modules():
        if isinstance(module, (nn.Linear, nn.Conv2d, nn.GroupNorm, nn.LayerNorm, Attention)):
            module.forward = _within(module.forward, low, fused)  # type: ignore[method-assign]


def _within(forward: Forward, dtype: torch.dtype | None, fused: bool) -> Forward:
    def inside(*args: Any, **kwargs: Any) -> Any:
        with Precision(dtype, fused):
            return forward(*args, **kwargs)

    return inside


def call(unet: UNet2DConditionModel, count: int, size: int, tokens: int) -> Tensor:
    """The output (count, C, size, size) of a UNet for zeros, and `tokens` of text."""
    config = unet.config
    widths = config.per_level("cross_attention_dim")

    def numbers(*shape: int) -> Tensor:
        return torch.zeros(count, *shape, device=unet.device)

    arguments: dict[str, Any] = {"encoder_hidden_states": numbers(tokens, widths[0])}
    if config.addition_embed_type == "text_time":
        sizes = 6 * (config.addition_time_embed_dim or 0)
        pooled = (config.projection_class_embeddings_input_dim or 0) - sizes
        arguments["added_cond_kwargs"] = {"text_embeds": numbers(pooled), "time_ids": numbers(6)}
    if config.time_cond_proj_dim is not None:
        arguments["timestep_cond"] = numbers(config.time_cond_proj_dim)
    z = numbers(config.in_channels, size, size)
    return unet(z, numbers(), **arguments).sample.float()
