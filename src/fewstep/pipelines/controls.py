"""ControlNets and T2I-Adapters in the loop: from a request's values to the job's controls.

Shapes: B rows of a job, b pictures, C channels, h and w latent height and width, H and W those of
the pictures in pixels.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor
from torch.nn import functional as F

from ..errors import RequestError
from ..models.controlnet import ControlNetModel, MultiControlNetModel
from ..models.layers import Memo
from ..models.t2i_adapter import MultiAdapter, T2IAdapter
from ..models.unet import UNetEncoder
from .control_images import by_network, per_network_pictures, spread, unit_pictures
from .control_images import size_of as size_of
from .denoise import Conditioning, Control, Residuals, sums
from .images import Pictures
from .notices import warn_caller
from .request import is_number

Numbers = float | Sequence[float]


@dataclass(frozen=True, eq=False)
class ControlNetControl:
    """A ControlNet with its picture, for the steps that lie within [start, end] of the run."""

    net: ControlNetModel
    hint: Tensor  # (B, C, h, w), the picture as `net.embed_hint` gives it
    scale: float = 1.0
    start: float = 0.0
    end: float = 1.0
    guess_mode: bool = False  # steer the rows with text alone, and by depth

    def __call__(
        self,
        z: Tensor,
        t: Tensor,
        cond: Conditioning,
        *,
        doubled: bool,
        span: tuple[float, float],
        memo: Memo | None = None,
    ) -> Residuals | None:
        if not within(span, self.start, self.end):
            return None
        first = len(z) // 2 if doubled and self.guess_mode else 0
        if first:  # other rows than those that the memo is of
            memo, cond = None, cond.rows(first, len(z))
        down, mid = self.residuals(z[first:], t[first:], cond, memo)
        before = (0, 0, 0, 0, 0, 0, first, 0)  # zeros for the rows that are not steered
        return Residuals(
            tuple(F.pad(x, before).to(z.dtype) for x in down), F.pad(mid, before).to(z.dtype)
        )

    def residuals(
        self, z: Tensor, t: Tensor, cond: Conditioning, memo: Memo | None
    ) -> tuple[tuple[Tensor, ...], Tensor]:
        """What the network adds for rows z (B, C, h, w); it is never told the guidance."""
        dtype = self.net.dtype
        found = self.net.residuals(
            z.to(dtype), t, cond.text.to(dtype), tiled(self.hint, len(z)), cond.added, memo
        )
        return self.net.scaled(*found, self.scale, self.guess_mode)


@dataclass(frozen=True, eq=False)
class T2IAdapterControl:
    """The features of T2I-Adapters, for the steps that end by `end`, a part of the run."""

    features: tuple[Tensor, ...]  # (B, C, h, w) of each block
    end: float = 1.0

    def __call__(
        self,
        z: Tensor,
        t: Tensor,
        cond: Conditioning,
        *,
        doubled: bool,
        span: tuple[float, float],
        memo: Memo | None = None,
    ) -> Residuals | None:
        if not within(span, 0.0, self.end):
            return None
        return Residuals(features=tuple(tiled(f, len(z)).to(z.dtype) for f in self.features))


def within(span: tuple[float, float], start: float, end: float) -> bool:
    """Whether a step that covers `span` lies wholly in [start, end]."""
    return span[0] >= start and span[1] <= end


def tiled(rows: Tensor, count: int) -> Tensor:
    """`rows` one time behind another until there are `count`."""
    return rows if len(rows) == count else torch.cat([rows] * (count // len(rows)))


# ── from a request's values ──


@torch.no_grad()
def controlnet_controls(
    controlnet: ControlNetModel | MultiControlNetModel,
    images: Pictures | Sequence[Pictures] | None,
    *,
    unet: UNetEncoder,
    shape: Sequence[int],
    size: tuple[int, int],
    steps: int,
    scale: Numbers = 1.0,
    start: Numbers = 0.0,
    end: Numbers = 1.0,
    guess_mode: bool = False,
    name: str = "image",
) -> tuple[Control, ...]:
    """A control for each ControlNet whose scale is not 0.

    `images`: a picture, or a list of one per prompt; with several ControlNets a list of pictures or
    batches, one for each, or a list per prompt of one picture for each. `shape` is the latents'
    (B, C, h, w), `size` the pictures' (H, W); `name` is the argument that `images` came in as.

    Raises RequestError for values that do not fit the networks or each other.
    """
    nets = controlnet.members if isinstance(controlnet, MultiControlNetModel) else [controlnet]
    scales = per_network("controlnet_conditioning_scale", scale, len(nets))
    starts = per_network("control_guidance_start", start, len(nets))
    ends = per_network("control_guidance_end", end, len(nets))
    for first, last in zip(starts, ends, strict=True):
        check_span(first, last, steps)
    for net in nets:
        check_controlnet(net, unet, shape[1])
    if isinstance(controlnet, MultiControlNetModel):
        images = by_network(images, name)
    batches = [
        unit_pictures(batch, size, net.config.conditioning_channels, name)
        for net, batch in zip(nets, per_network_pictures(images, len(nets), name), strict=True)
    ]
    rows = zip(nets, batches, scales, starts, ends, strict=True)
    return tuple(
        ControlNetControl(
            net,
            hint_of(net, spread(batch, shape[0], name), shape),
            factor,
            first,
            last,
            guess_mode or net.config.global_pool_conditions,
        )
        for net, batch, factor, first, last in rows
        if factor != 0
    )


@torch.no_grad()
def adapter_controls(
    adapter: T2IAdapter | MultiAdapter,
    images: Pictures | Sequence[Pictures] | None,
    *,
    unet: UNetEncoder,
    shape: Sequence[int],
    size: tuple[int, int],
    steps: int,
    scale: Numbers = 1.0,
    factor: float = 1.0,
    name: str = "image",
) -> tuple[Control, ...]:
    """One control with the features of all adapters, made now; none if `factor` or `scale` is 0.

    `images`: a picture or a list of one per prompt; with several adapters a list of these, one for
    each. Other arguments are those of `controlnet_controls`; `factor` is the part of the run.

    Raises RequestError for values that do not fit the networks or each other.
    """
    adapters = adapter.members if isinstance(adapter, MultiAdapter) else [adapter]
    weights = per_network("adapter_conditioning_scale", scale, len(adapters))
    if not is_number(factor) or not 0 <= factor <= 1:
        raise RequestError(f"adapter_conditioning_factor must be in [0, 1], got {factor!r}")
    check_sides(size, adapter.downscale_factor)
    batches = [
        unit_pictures(batch, size, net.config.in_channels, name)
        for net, batch in zip(
            adapters, per_network_pictures(images, len(adapters), name), strict=True
        )
    ]
    if factor == 0 or not any(weights):
        return ()
    warn_if_idle("adapter_conditioning_factor", factor, 0.0, factor, steps)
    features: tuple[Tensor, ...] = ()
    for net, batch, weight in zip(adapters, batches, weights, strict=True):
        found = tuple(net(batch.to(net.device, net.dtype)))
        check_features(found, unet, shape)
        features = sums(features, tuple(spread(f * weight, shape[0], name) for f in found))
    return (T2IAdapterControl(features, float(factor)),)


# ── values ──


def per_network(name: str, value: Any, count: int) -> list[float]:
    """The numbers of `count` networks, from one for all or a list of them."""
    values = list(value) if isinstance(value, (list, tuple)) else [value] * count
    if len(values) != count:
        raise RequestError(
            f"{name} holds {len(values)} numbers, but there are {count} networks; "
            "give one, or one for each"
        )
    for number in values:
        if not is_number(number):
            raise RequestError(f"{name} must be a finite number, got {number!r}")
    return [float(number) for number in values]


def check_span(start: float, end: float, steps: int) -> None:
    """Raises RequestError unless 0 <= start < end <= 1; warns if no step lies in between."""
    if not 0 <= start < end <= 1:
        raise RequestError(
            "control_guidance_start must be less than control_guidance_end, both in [0, 1], "
            f"got {start:g} and {end:g}"
        )
    warn_if_idle("control_guidance_start, control_guidance_end", (start, end), start, end, steps)


def warn_if_idle(names: str, values: Any, start: float, end: float, steps: int) -> None:
    """Warn if no step of a run lies within [start, end]: few steps make that likely."""
    if not any(within((i / steps, (i + 1) / steps), start, end) for i in range(steps)):
        warn_caller(
            f"{names}={values!r} holds none of the {steps} steps as a whole, so that nothing is "
            "steered; widen it, or take more steps"
        )


def check_sides(size: tuple[int, int], multiple: int) -> None:
    """Raises RequestError unless an adapter can take pictures of a size."""
    for name, side in zip(("height", "width"), size, strict=True):
        if side % multiple:
            raise RequestError(
                f"{name} must be a multiple of {multiple} (the adapter's downscale_factor), "
                f"got {side}; use {max(side // multiple, 1) * multiple}"
            )


# ── networks ──


def check_controlnet(net: ControlNetModel, unet: UNetEncoder, channels: int) -> None:
    """Raises RequestError unless a ControlNet was made for UNets like `unet`."""
    own, theirs = net.config.encoder, unet.config
    facts = [
        ("in_channels", own.in_channels, channels),
        ("block_out_channels", own.block_out_channels, theirs.block_out_channels),
        *(
            (name, own.per_level(name), theirs.per_level(name))
            for name in ("layers_per_block", "cross_attention_dim")
        ),
    ]
    if own.addition_embed_type is not None:
        facts.append(
            ("addition_embed_type", own.addition_embed_type, theirs.addition_embed_type),
        )
    for name, has, needs in facts:
        if has != needs:
            raise RequestError(
                f"controlnet has {name}={has}, but this UNet needs {needs}; "
                "use a ControlNet made for the same kind of model"
            )


def hint_of(net: ControlNetModel, pictures: Tensor, shape: Sequence[int]) -> Tensor:
    """Pictures (B, C, H, W) embedded for latents of `shape`."""
    hint = net.embed_hint(pictures.to(net.device, net.dtype))
    if hint.shape[2:] != torch.Size(shape[-2:]):
        raise RequestError(
            f"controlnet makes {tuple(hint.shape[2:])} of pictures {tuple(pictures.shape[2:])}, "
            f"but the latents are {tuple(shape[-2:])}; use a ControlNet made for this VAE"
        )
    return hint


def check_features(features: Sequence[Tensor], unet: UNetEncoder, shape: Sequence[int]) -> None:
    """Raises RequestError unless an adapter's features fit the blocks of a UNet in turn."""
    got = [tuple(feature.shape[1:]) for feature in features]
    places = feature_places(unet, shape[-2], shape[-1])
    if got != places[: len(got)]:
        raise RequestError(
            f"adapter gives features (channels, height, width) {got}, but this UNet takes "
            f"{places}; use an adapter made for the same kind of model"
        )


def feature_places(unet: UNetEncoder, h: int, w: int) -> list[tuple[int, int, int]]:
    """(channels, height, width) where features are added: in each down block, then in the middle.

    A block with attention takes them before it halves the size, one without afterwards.
    """
    places, levels = [], unet.config.block_out_channels
    for level, (kind, channels) in enumerate(
        zip(unet.config.down_block_types, levels, strict=True)
    ):
        half = (-(-h // 2), -(-w // 2)) if level < len(levels) - 1 else (h, w)
        here = (h, w) if kind.startswith("CrossAttn") else half
        places.append((channels, *here))
        h, w = half
    return [*places, (levels[-1], h, w)]
