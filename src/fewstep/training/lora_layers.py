"""LoRA layers that train: W x + (alpha / rank) up(down(x)), with W shared and frozen.

A targeted layer becomes a subclass of itself that holds the very same parameters, so the keys and
the code of the network stay as they are; with the adapters off it is the network that it was. One
network in memory is so both student and teacher of a distillation (LCM-LoRA, Luo et al. 2023b).
"""

from __future__ import annotations

import contextlib
from collections.abc import Iterable, Iterator
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn import functional as F

from ..errors import RequestError


class Switch:
    """Whether the adapters of one network take part in its forward pass."""

    def __init__(self) -> None:
        self.on = True


class LoRALinear(nn.Linear):
    """A linear layer with an adapter, (..., I) to (..., O)."""

    lora_down: nn.Linear
    lora_up: nn.Linear
    lora_scale: float
    lora_switch: Switch

    def forward(self, x: Tensor) -> Tensor:
        y = F.linear(x, self.weight, self.bias)
        if not self.lora_switch.on:
            return y
        return y + self.lora_scale * self.lora_up(self.lora_down(x))


class LoRAConv2d(nn.Conv2d):
    """A convolution with an adapter: a convolution to `rank` channels, then a 1x1 one."""

    lora_down: nn.Conv2d
    lora_up: nn.Conv2d
    lora_scale: float
    lora_switch: Switch

    def forward(self, x: Tensor) -> Tensor:
        y = self._conv_forward(x, self.weight, self.bias)
        if not self.lora_switch.on:
            return y
        return y + self.lora_scale * self.lora_up(self.lora_down(x))


def attach(
    network: nn.Module, targets: Iterable[str], rank: int, alpha: float, seed: int
) -> dict[str, nn.Module]:
    """Give every layer whose name ends with a target an adapter; the layers by name.

    All other parameters are frozen. `down` is drawn as Kaiming's uniform from `seed`, `up` is zero,
    so nothing changes at the start. Raises RequestError for a target that matches no layer.
    """
    targets = tuple(targets)
    chosen: dict[str, nn.Module] = {}
    for target in targets:
        found = {
            name: module
            for name, module in network.named_modules()
            if name == target or name.endswith(f".{target}")
        }
        layers = {n: m for n, m in found.items() if isinstance(m, (nn.Linear, nn.Conv2d))}
        if not layers and target not in OPTIONAL:
            raise RequestError(
                f"lora.targets names {target!r}, but no linear layer or convolution of the network "
                f"ends so; the network's are: {', '.join(sorted(kinds(network)))}"
            )
        chosen |= layers
    network.requires_grad_(False)
    switch = Switch()
    network.lora_switch = switch  # type: ignore[assignment]
    generator = torch.Generator().manual_seed(seed)
    for name in sorted(chosen):
        _adapt(chosen[name], rank, alpha / rank, switch, generator)
    return chosen


# Recommended targets of which a small network may have none.
OPTIONAL = frozenset({"conv_shortcut", "downsamplers.0.conv", "upsamplers.0.conv"})


def kinds(network: nn.Module) -> set[str]:
    """The last parts of the names of the layers that an adapter can go to."""
    return {
        name.rpartition(".")[2] if not name.rpartition(".")[2].isdigit() else name.split(".")[-2]
        for name, module in network.named_modules()
        if isinstance(module, (nn.Linear, nn.Conv2d))
    }


def _adapt(
    layer: nn.Module, rank: int, scale: float, switch: Switch, generator: torch.Generator
) -> None:
    if isinstance(layer, nn.Conv2d):
        options: dict[str, Any] = {
            "kernel_size": layer.kernel_size,
            "stride": layer.stride,
            "padding": layer.padding,
        }
        down: nn.Module = nn.Conv2d(layer.in_channels, rank, bias=False, **options)
        up: nn.Module = nn.Conv2d(rank, layer.out_channels, 1, bias=False)
        layer.__class__ = LoRAConv2d
    else:
        assert isinstance(layer, nn.Linear)
        down = nn.Linear(layer.in_features, rank, bias=False)
        up = nn.Linear(rank, layer.out_features, bias=False)
        layer.__class__ = LoRALinear
    assert isinstance(down.weight, Tensor) and isinstance(up.weight, Tensor)
    nn.init.kaiming_uniform_(down.weight, a=5**0.5, generator=generator)
    nn.init.zeros_(up.weight)
    device = layer.weight.device
    layer.lora_down, layer.lora_up = down.to(device), up.to(device)
    layer.lora_scale, layer.lora_switch = scale, switch  # type: ignore[assignment]


@contextlib.contextmanager
def adapters_off(network: nn.Module) -> Iterator[None]:
    """Within this context the network is what it was before `attach`; nothing if it has none."""
    switch = getattr(network, "lora_switch", None)
    if switch is None:
        yield
        return
    switch.on = False
    try:
        yield
    finally:
        switch.on = True


def adapters(network: nn.Module) -> dict[str, tuple[Tensor, Tensor]]:
    """The adapters (down, up) by the name of their layer."""
    return {
        name: (module.lora_down.weight.detach(), module.lora_up.weight.detach())
        for name, module in network.named_modules()
        if isinstance(module, (LoRALinear, LoRAConv2d))
    }
