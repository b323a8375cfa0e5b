"""IP-Adapter (Ye et al. 2023, arXiv:2308.06721): pictures as prompts, beside the text.

A projection makes tokens of what CLIP's vision encoder sees; each cross-attention layer of the UNet
attends to them too, by keys and values of its own. Attribute names are the keys of the files.

Shapes: b pictures, S and E tokens and channels of the vision encoder, B rows, n pictures per row, T
tokens per picture, D text channels, C channels of a layer, h heads.
"""

from __future__ import annotations

import math
import re
from collections.abc import Iterable, Mapping, Sequence
from numbers import Real
from typing import Any, NamedTuple

import torch
from torch import Tensor, nn
from torch.nn import functional as F

from ..errors import CheckpointError, RequestError, UnsupportedConfig
from .layers import Attention
from .unet import UNet2DConditionModel

Shapes = Mapping[str, Sequence[int]]

BASE_TOKENS = 4
HEAD_CHANNELS = 64  # of the resampler
GROUPS = ("image_proj", "ip_adapter")  # of names in a file
# Names that diffusers gives to the same tensors, inside image_proj, -> the files' names.
ALIASES = (
    (r"^image_embeds\.", "proj."),
    (r"^ff\.net\.0\.proj\.", "proj.0."),
    (r"^ff\.net\.2\.", "proj.2."),
    (r"\.ln0\.", ".0.norm1."),
    (r"\.ln1\.", ".0.norm2."),
    (r"\.attn\.to_out\.0\.", ".0.to_out."),
    (r"\.attn\.", ".0."),
    (r"\.ff\.0\.", ".1.0."),
    (r"\.ff\.1\.net\.0\.proj\.", ".1.1."),
    (r"\.ff\.1\.net\.2\.", ".1.3."),
)


# ── what the vision encoder sees -> tokens ──


class TokenProjection(nn.Module):
    """Four tokens (b, 4, D) of a picture as a whole (b, E)."""

    sees_hidden = False

    def __init__(self, image_dim: int, dim: int) -> None:
        super().__init__()
        self.channels = image_dim
        self.proj = nn.Linear(image_dim, BASE_TOKENS * dim)
        self.norm = nn.LayerNorm(dim)

    def forward(self, seen: Tensor) -> Tensor:
        return self.norm(self.proj(seen).unflatten(1, (BASE_TOKENS, -1)))


class FullProjection(nn.Module):
    """Each of the vision encoder's tokens (b, S, E) as one of ours (b, S, D)."""

    sees_hidden = True

    def __init__(self, image_dim: int, hidden_dim: int, dim: int) -> None:
        super().__init__()
        self.channels = image_dim
        self.proj = nn.Sequential(
            nn.Linear(image_dim, hidden_dim),
            nn.GELU(),
            nn.Linear(hidden_dim, dim),
            nn.LayerNorm(dim),
        )

    def forward(self, seen: Tensor) -> Tensor:
        return self.proj(seen)


class PerceiverAttention(nn.Module):
    """Attention of latents (b, T, K) over the picture's tokens (b, S, K) and themselves."""

    def __init__(self, channels: int, inner: int) -> None:
        super().__init__()
        self.heads = inner // HEAD_CHANNELS
        self.norm1 = nn.LayerNorm(channels)
        self.norm2 = nn.LayerNorm(channels)
        self.to_q = nn.Linear(channels, inner, bias=False)
        self.to_kv = nn.Linear(channels, 2 * inner, bias=False)
        self.to_out = nn.Linear(inner, channels, bias=False)

    def forward(self, seen: Tensor, latents: Tensor) -> Tensor:
        latents = self.norm2(latents)
        context = torch.cat([self.norm1(seen), latents], dim=1)
        parts = (self.to_q(latents), *self.to_kv(context).chunk(2, dim=-1))
        q, k, v = (split_heads(part, self.heads) for part in parts)
        attended = F.scaled_dot_product_attention(q, k, v)
        return self.to_out(attended.transpose(1, 2).flatten(2))


class Resampler(nn.Module):
    """T tokens (b, T, D) that gather what they need from all of a picture's (b, S, E)."""

    sees_hidden = True

    def __init__(
        self,
        image_dim: int,
        channels: int,
        inner: int,
        mlp: int,
        dim: int,
        tokens: int,
        depth: int,
    ) -> None:
        super().__init__()
        self.channels = image_dim
        self.latents = nn.Parameter(torch.randn(1, tokens, channels) / channels**0.5)
        self.proj_in = nn.Linear(image_dim, channels)
        self.proj_out = nn.Linear(channels, dim)
        self.norm_out = nn.LayerNorm(dim)
        self.layers = nn.ModuleList(
            nn.ModuleList([PerceiverAttention(channels, inner), feed_forward(channels, mlp)])
            for _ in range(depth)
        )

    def forward(self, seen: Tensor) -> Tensor:
        seen = self.proj_in(seen)
        latents = self.latents.expand(len(seen), -1, -1)
        for layer in self.layers:
            assert isinstance(layer, nn.ModuleList)
            attention, mlp = layer
            latents = latents + attention(seen, latents)
            latents = latents + mlp(latents)
        return self.norm_out(self.proj_out(latents))


def feed_forward(channels: int, inner: int) -> nn.Sequential:
    """Norm, a wider layer and back, without biases."""
    return nn.Sequential(
        nn.LayerNorm(channels),
        nn.Linear(channels, inner, bias=False),
        nn.GELU(),
        nn.Linear(inner, channels, bias=False),
    )


def split_heads(x: Tensor, heads: int) -> Tensor:
    """(B, N, C) as (B, h, N, C / h)."""
    return x.unflatten(2, (heads, -1)).transpose(1, 2)


# ── tokens -> the UNet ──


class PictureAttention(nn.Module):
    """What a cross-attention layer sees in picture tokens, by keys and values of their own."""

    def __init__(self, dim: int, channels: int) -> None:
        super().__init__()
        self.to_k_ip = nn.Linear(dim, channels, bias=False)
        self.to_v_ip = nn.Linear(dim, channels, bias=False)
        self.scale = 1.0

    def keys_values(self, tokens: Tensor) -> tuple[Tensor, Tensor]:
        """Keys and values (B, n T, C) of tokens (B, n T, D)."""
        return self.to_k_ip(tokens), self.to_v_ip(tokens)


class IPAdapter(nn.Module):
    """One IP-Adapter for one UNet; `layers` are the (D, C) of its cross-attentions in order."""

    def __init__(self, projection: nn.Module, layers: Iterable[tuple[int, int]]) -> None:
        super().__init__()
        self.image_proj = projection
        # Self-attentions have the even numbers.
        self.ip_adapter = nn.ModuleDict(
            {str(2 * i + 1): PictureAttention(*sizes) for i, sizes in enumerate(layers)}
        )

    @property
    def sees_hidden(self) -> bool:
        """Whether it takes all tokens of the encoder's last layer but one, not its result."""
        return bool(self.image_proj.sees_hidden)

    @property
    def channels(self) -> int:
        """The channels E of the vision encoder that it was made for."""
        return int(self.image_proj.channels)  # type: ignore[arg-type]

    def tokens(self, seen: Tensor) -> Tensor:
        """Tokens (B, n T, D) of what was seen, (B, n, E) or (B, n, S, E)."""
        rows, pictures = seen.shape[:2]
        tokens: Tensor = self.image_proj(seen.flatten(0, 1))
        return tokens.reshape(rows, pictures * tokens.shape[1], tokens.shape[2])


# ── files ──


def adapter_of(tensors: Mapping[str, Any], unet: UNet2DConditionModel, title: str) -> IPAdapter:
    """The IP-Adapter that a file's `tensors` hold, for `unet`, in its dtype and on its device.

    Raises CheckpointError for tensors that do not fit, naming the file by its `title`.
    """
    state = canonical(tensors, title)
    projection = {
        name.removeprefix("image_proj."): tuple(value.shape)
        for name, value in state.items()
        if name.startswith("image_proj.")
    }
    with torch.device("meta"):
        sizes = [layer.to_k.weight.shape for _, layer in cross_attentions(unet)]
        adapter = IPAdapter(projection_of(projection, title), ((d, c) for c, d in sizes))
    check_fit(state, {k: tuple(v.shape) for k, v in adapter.state_dict().items()}, title)
    adapter.load_state_dict(state, strict=True, assign=True)
    return adapter.to(unet.device, unet.dtype).eval().requires_grad_(False)


def canonical(tensors: Mapping[str, Any], title: str) -> dict[str, Tensor]:
    """Tensors under the files' names: from files, nested by group, or named as in diffusers."""
    flat = dict(tensors)
    for group in GROUPS:
        if isinstance(nested := flat.pop(group, None), Mapping):
            flat |= {f"{group}.{name}": value for name, value in nested.items()}
    found: dict[str, Tensor] = {}
    is_full = "image_proj.ff.net.0.proj.weight" in flat
    for key, value in flat.items():
        group, _, name = key.partition(".")
        if group not in GROUPS or not isinstance(value, Tensor):
            raise CheckpointError(
                f"{title} is not an IP-Adapter: it holds {key!r} ({type(value).__name__}), and "
                "tensors named image_proj.* and ip_adapter.* are expected"
            )
        if group == "image_proj":
            name = file_name(f"proj.3.{name[5:]}" if is_full and name[:5] == "norm." else name)
        found[f"{group}.{name}"] = value
    for key in [k for k in found if k.startswith("image_proj.") and k.endswith(".to_k.weight")]:
        pair = (found.pop(key), found.pop(key.replace("to_k", "to_v")))
        found[key.replace("to_k", "to_kv")] = torch.cat(pair)
    return found


def file_name(name: str) -> str:
    """The files' name of a tensor of image_proj that may have diffusers'."""
    for pattern, replacement in ALIASES:
        name = re.sub(pattern, replacement, name)
    return name


def projection_of(shapes: Shapes, title: str) -> nn.Module:
    """The projection that tensors of these shapes belong to."""

    def shape(name: str) -> Sequence[int]:
        if name not in shapes:
            raise CheckpointError(f"{title} does not hold image_proj.{name}")
        return shapes[name]

    if "proj.weight" in shapes:
        rows, image_dim = shape("proj.weight")
        return TokenProjection(image_dim, rows // BASE_TOKENS)
    if "proj.3.weight" in shapes:
        hidden, image_dim = shape("proj.0.weight")
        return FullProjection(image_dim, hidden, shape("proj.3.weight")[0])
    if "latents" in shapes:
        return Resampler(
            image_dim=shape("proj_in.weight")[1],
            channels=shape("latents")[2],
            inner=shape("layers.0.0.to_q.weight")[0],
            mlp=shape("layers.0.1.1.weight")[0],
            dim=shape("proj_out.weight")[0],
            tokens=shape("latents")[1],
            depth=1 + max(int(m[1]) for n in shapes if (m := re.match(r"layers\.(\d+)\.", n))),
        )
    if "proj.0.weight" in shapes:  # also with a perceiver_resampler
        raise UnsupportedConfig(
            f"{title} is an IP-Adapter FaceID, which needs a network that recognises faces and is "
            "not implemented; use ip-adapter-plus-face or ip-adapter-full-face"
        )
    raise CheckpointError(
        f"{title} holds no image projection of a known kind: {', '.join(sorted(shapes)[:5])}"
    )


def check_fit(state: Mapping[str, Tensor], wanted: Shapes, title: str) -> None:
    """Raises CheckpointError unless `state` has exactly the `wanted` names and shapes."""
    problems = [f"{key} is missing" for key in wanted if key not in state]
    problems += [f"{key} is surplus" for key in state if key not in wanted]
    problems += [
        f"{key} has shape {tuple(value.shape)}, expected {tuple(wanted[key])}"
        for key, value in state.items()
        if key in wanted and tuple(value.shape) != tuple(wanted[key])
    ]
    if problems:
        shown = "; ".join(problems[:5]) + (f"; and {len(problems) - 5} more" * (len(problems) > 5))
        raise CheckpointError(
            f"{title} does not fit this UNet: {shown}; use the file made for its family "
            "(sd15 or sdxl)"
        )


# ── where they are attached, and how strong they are ──


class Place(NamedTuple):
    """A cross-attention in the UNet: which way, which block ("" in the middle), which attention."""

    way: str
    block: str
    attention: int


_LAYER = re.compile(
    r"(down|mid|up)_block(?:s\.(\d+))?\.attentions\.(\d+)\.transformer_blocks\.\d+\.attn2"
)
_ORDER = ("down", "up", "mid")  # as files count the layers


def cross_attentions(unet: nn.Module) -> list[tuple[Place, Attention]]:
    """The cross-attentions of a UNet, in the order of files."""
    found = []
    for name, module in unet.named_modules():
        if (match := _LAYER.fullmatch(name)) and isinstance(module, Attention):
            block = f"block_{match[2]}" if match[2] else ""
            found.append((Place(match[1], block, int(match[3])), module))
    return sorted(found, key=lambda item: _ORDER.index(item[0].way))


def attach(unet: UNet2DConditionModel, adapters: Sequence[IPAdapter]) -> None:
    """Let exactly these adapters be the UNet's; none takes them off.

    They belong to no state dict of the UNet, but follow it to devices and dtypes.
    """
    unet.ip_adapters = tuple(adapters)
    for number, (_, layer) in enumerate(cross_attentions(unet)):
        layer.pictures = tuple(adapter.ip_adapter[str(2 * number + 1)] for adapter in adapters)


def set_scales(unet: UNet2DConditionModel, scales: Sequence[Any]) -> None:
    """Set each adapter's scale: a number, or a dict by way, block and attention.

    `{"up": {"block_0": [0.0, 1.0, 0.0]}}`: what a dict does not name is 0.
    """
    layers = cross_attentions(unet)
    places = [place for place, _ in layers]
    for given in scales:
        check_scale(given, places)
    for place, layer in layers:
        for attention, given in zip(layer.pictures, scales, strict=True):
            assert isinstance(attention, PictureAttention)
            attention.scale = scale_at(given, place)


def scale_at(given: Any, place: Place) -> float:
    """The scale that `given` means at a place."""
    for key in (place.way, place.block):
        if isinstance(given, Mapping) and key:
            given = given.get(key, 0.0)
    if isinstance(given, (list, tuple)):
        given = given[place.attention if len(given) > 1 else 0]
    return float(given)


def check_scale(given: Any, places: Sequence[Place]) -> None:
    """Raises RequestError for a scale that has no meaning in a UNet with these attentions."""
    if not isinstance(given, Mapping):
        return check_numbers(given, 0, "scale")
    refuse_unknown("scale", given, [place.way for place in places])
    for way, part in given.items():
        here = [place for place in places if place.way == way]
        if isinstance(part, Mapping):
            refuse_unknown(f"scale[{way!r}]", part, [place.block for place in here if place.block])
        for block in {place.block: None for place in here}:
            value = part.get(block, 0.0) if isinstance(part, Mapping) else part
            count = len({place.attention for place in here if place.block == block})
            check_numbers(value, count, f"scale[{way!r}]")
    return None


def check_numbers(value: Any, count: int, name: str) -> None:
    """Raises RequestError unless this is a finite number, or a list of one or of `count`."""
    listed = list(value) if isinstance(value, (list, tuple)) and count else [value]
    if len(listed) not in (1, count) and isinstance(value, (list, tuple)):
        raise RequestError(
            f"{name} holds {len(listed)} numbers, but there are {count} attentions; give one, or "
            "one for each"
        )
    for number in listed:
        if not isinstance(number, Real) or not math.isfinite(number):
            raise RequestError(f"{name} must be a finite number, got {number!r}")


def refuse_unknown(name: str, given: Iterable[str], known: Iterable[str]) -> None:
    """Raises RequestError for a key that is not `known`."""
    names = list(dict.fromkeys(known))
    if surplus := [key for key in given if key not in names]:
        raise RequestError(
            f"{name} names {surplus[0]!r}, but the blocks with attention there are: "
            f"{', '.join(names) or 'none'}"
        )
