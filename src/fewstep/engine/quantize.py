"""A loaded network with its layers' weights in eight bits: named approximations, off unless asked.

    int8          weights and inputs in 8 bits, by oneDNN on CPUs with AVX-512 VNNI: quicker
    int8-weights  weights in 8 bits, computed in the network's dtype, on any device: smaller
    fp8           weights and inputs of linear layers in e4m3, on GPUs from Ada and Hopper on

A weight W (O, I, K...) is codes times a scale for each output, W ~ s_o C, s_o = max |W_o| / 127
(Jacob et al. 2018). Inputs are quantised at each call, each picture by its own range, so that none
depends on who shares its batch. A layer becomes a subclass of itself and lets the weight go: what
needs it (LoRAs, saving) comes before.
"""

from __future__ import annotations

from collections.abc import Iterator
from typing import Any

import torch
from torch import nn

from ..errors import RequestError
from ..ops.layers import Conv2d, Linear, Packs, held
from ..ops.upsample import UpConv2d
from . import machines
from .quantized import (
    Fp8Linear,
    Int8Conv2d,
    Int8Linear,
    Int8WeightConv2d,
    Int8WeightLinear,
    Quantized,
)

STEP = 16  # what both sides of an fp8 product are a multiple of
FEWEST = 4096  # numbers of a weight; with less, quantising takes what it saves
# What is computed once per run, or what the whole picture passes through in few channels.
KEPT = ("conv_in", "conv_out", "time_embedding", "add_embedding", "time_emb_proj")
ONCE = ("attn2.to_k", "attn2.to_v")  # of the text, once per run: quicker would not be seen

LINEAR: dict[str, type[Quantized]] = {
    "int8": Int8Linear,
    "int8-weights": Int8WeightLinear,
    "fp8": Fp8Linear,
}
CONVOLUTION: dict[str, type[Quantized]] = {"int8": Int8Conv2d, "int8-weights": Int8WeightConv2d}
KINDS = tuple(LINEAR)


@torch.no_grad()
def quantize(network: nn.Module, kind: str) -> list[str]:
    """Quantise the layers of a network in place; the names of those that it pays for.

    Raises RequestError, before anything is changed, for what cannot be done here.
    """
    check(network, kind)
    chosen = list(suited(network, kind))
    if not chosen:
        raise RequestError(
            f"{kind}: this network has no layers of {FEWEST} weights or more, with which it would "
            "gain; leave it out"
        )
    for parameter in held(network):
        parameter.requires_grad_(False)
    for _, layer in chosen:
        layer.unpack()
        layer.__class__ = becomes(layer, kind)
        layer.take_over()
    network.quantized_as = kind  # type: ignore[assignment]
    return [name for name, _ in chosen]


def check(network: nn.Module, kind: str) -> None:
    """Raises RequestError unless a network can be quantised so on its device and in its dtype."""
    if kind not in KINDS:
        raise RequestError(f"quantize({kind!r}): is unknown; give one of {', '.join(KINDS)}")
    now = quantization_of(network)
    if now is not None:
        raise RequestError(f"{kind}: this network is {now} already; load the model again")
    example = next(held(network))
    if (why := machines.refusal(kind, example.dtype, example.device)) is not None:
        raise RequestError(f"{kind}: {why}")


def quantization_of(network: nn.Module) -> str | None:
    """The kind that a network's layers are quantised as, None if they are not."""
    kind: str | None = getattr(network, "quantized_as", None)
    return kind


def suited(network: nn.Module, kind: str) -> Iterator[tuple[str, Packs]]:
    """The layers of a network that are quantised, by name."""
    for name, layer in network.named_modules():
        parts = name.split(".")
        once = kind != "int8-weights" and name.endswith(ONCE)
        if once or any(part in KEPT for part in parts) or becomes(layer, kind) is None:
            continue
        assert isinstance(layer, (Linear, Conv2d))
        weight = layer._parameters["weight"]
        if weight is None or weight.numel() < FEWEST:
            continue
        if kind == "fp8" and (weight.shape[0] % STEP or weight.shape[1] % STEP):
            continue
        yield name, layer


def becomes(layer: nn.Module, kind: str) -> Any:
    """The class that a layer becomes, None if it stays as it is."""
    if type(layer) is Linear:
        return LINEAR[kind]
    if type(layer) is UpConv2d and kind == "int8-weights":
        return CONVOLUTION[kind]  # in int8 it has fewer products as it is
    usual = type(layer) is Conv2d and layer.padding_mode == "zeros" and layer.groups == 1
    return CONVOLUTION.get(kind) if usual and not isinstance(layer.padding, str) else None
