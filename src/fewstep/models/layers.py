"""The layers that UNet and VAE are built from. Attribute names are the checkpoints' key names.

Shapes: B batch, C channels, H and W latent height and width, L text tokens, D text channels,
E time-embedding channels.
"""

from __future__ import annotations

import math
from typing import NamedTuple

import torch
from torch import Tensor, nn
from torch.nn import functional as F


def timestep_embedding(
    t: Tensor, dim: int, flip_sin_to_cos: bool = True, freq_shift: float = 0
) -> Tensor:
    """Sinusoidal embedding (B, dim) float32 of times `t` (B,); cosines first if flipped."""
    half = dim // 2
    frequencies = torch.exp(
        torch.arange(half, dtype=torch.float32, device=t.device)
        * (-math.log(10000.0) / (half - freq_shift))
    )
    angles = t.float()[:, None] * frequencies
    waves = (angles.cos(), angles.sin()) if flip_sin_to_cos else (angles.sin(), angles.cos())
    return F.pad(torch.cat(waves, dim=1), (0, dim % 2))


class TimestepEmbedding(nn.Module):
    """Two linear layers over a sinusoidal embedding, to which a condition may be added first."""

    def __init__(self, in_channels: int, dim: int, cond_dim: int | None = None) -> None:
        super().__init__()
        self.linear_1 = nn.Linear(in_channels, dim)
        self.cond_proj = None if cond_dim is None else nn.Linear(cond_dim, in_channels, bias=False)
        self.linear_2 = nn.Linear(dim, dim)

    def forward(self, embedding: Tensor, condition: Tensor | None = None) -> Tensor:
        if condition is not None and self.cond_proj is not None:
            embedding = embedding + self.cond_proj(condition.to(embedding.dtype))
        return self.linear_2(F.silu(self.linear_1(embedding)))


class ResnetBlock(nn.Module):
    """GroupNorm, SiLU, convolution, twice, around an added time embedding (E channels, or none)."""

    def __init__(
        self,
        in_channels: int,
        out_channels: int,
        temb_channels: int | None,
        groups: int,
        eps: float,
    ) -> None:
        super().__init__()
        self.norm1 = nn.GroupNorm(groups, in_channels, eps)
        self.conv1 = nn.Conv2d(in_channels, out_channels, 3, padding=1)
        if temb_channels is not None:
            self.time_emb_proj = nn.Linear(temb_channels, out_channels)
        self.norm2 = nn.GroupNorm(groups, out_channels, eps)
        self.conv2 = nn.Conv2d(out_channels, out_channels, 3, padding=1)
        self.conv_shortcut = (
            nn.Conv2d(in_channels, out_channels, 1) if in_channels != out_channels else None
        )

    def forward(self, x: Tensor, temb: Tensor | None = None) -> Tensor:
        h = self.conv1(F.silu(self.norm1(x)))
        if temb is not None:
            h = h + self.time_emb_proj(F.silu(temb))[:, :, None, None]
        h = self.conv2(F.silu(self.norm2(h)))
        return (x if self.conv_shortcut is None else self.conv_shortcut(x)) + h


class Prompted(NamedTuple):
    """A text (B, L, D), and the tokens (B, N, D) of picture prompts for each IP-Adapter."""

    text: Tensor
    pictures: tuple[Tensor, ...]


Context = Tensor | Prompted


class Attention(nn.Module):
    """Multi-head attention of x (B, N, C) over a context (B, L, D), by default over x itself."""

    def __init__(
        self,
        channels: int,
        heads: int,
        context_dim: int | None = None,
        bias: bool = False,
        upcast: bool = False,
    ) -> None:
        super().__init__()
        self.heads = heads
        self.upcast = upcast
        context_dim = channels if context_dim is None else context_dim
        self.to_q = nn.Linear(channels, channels, bias=bias)
        self.to_k = nn.Linear(context_dim, channels, bias=bias)
        self.to_v = nn.Linear(context_dim, channels, bias=bias)
        self.to_out = nn.ModuleList([nn.Linear(channels, channels)])
        # What IP-Adapters add (ip_adapter.py). A tuple, so that they are no part of this module.
        self.pictures: tuple[nn.Module, ...] = ()

    def forward(self, x: Tensor, context: Context | None = None) -> Tensor:
        tokens: tuple[Tensor, ...] = ()
        if isinstance(context, Prompted):
            context, tokens = context
        context = x if context is None else context
        q, k, v = (
            y.unflatten(2, (self.heads, -1)).transpose(1, 2)  # (B, heads, N, C / heads)
            for y in (self.to_q(x), self.to_k(context), self.to_v(context))
        )
        if self.upcast:
            q, k, v = q.float(), k.float(), v.float()
        attended = F.scaled_dot_product_attention(q, k, v)
        for own, seen in zip(self.pictures, tokens, strict=False):  # none without picture prompts
            if own.scale:
                attended = attended + own.scale * own(q, seen)
        return self.to_out[0](attended.to(x.dtype).transpose(1, 2).flatten(2))


class AttentionPooling(nn.Module):
    """One vector (B, D) of a text (B, L, D): its mean, plus a learnt vector, attends to itself and
    to all tokens (DeepFloyd IF)."""

    def __init__(self, heads: int, dim: int) -> None:
        super().__init__()
        self.heads = heads
        self.positional_embedding = nn.Parameter(torch.randn(1, dim) / dim**0.5)
        self.k_proj = nn.Linear(dim, dim)
        self.q_proj = nn.Linear(dim, dim)
        self.v_proj = nn.Linear(dim, dim)

    def forward(self, text: Tensor) -> Tensor:
        query = text.mean(dim=1, keepdim=True) + self.positional_embedding.to(text.dtype)
        context = torch.cat([query, text], dim=1)
        q, k, v = (
            y.unflatten(2, (self.heads, -1)).transpose(1, 2)  # (B, heads, tokens, D / heads)
            for y in (self.q_proj(query), self.k_proj(context), self.v_proj(context))
        )
        return F.scaled_dot_product_attention(q, k, v).transpose(1, 2).flatten(1)


class TextTimeEmbedding(nn.Module):
    """A text (B, L, D) as an addition (B, E) to the time embedding."""

    def __init__(self, text_dim: int, dim: int, heads: int) -> None:
        super().__init__()
        self.norm1 = nn.LayerNorm(text_dim)
        self.pool = AttentionPooling(heads, text_dim)
        self.proj = nn.Linear(text_dim, dim)
        self.norm2 = nn.LayerNorm(dim)

    def forward(self, text: Tensor) -> Tensor:
        return self.norm2(self.proj(self.pool(self.norm1(text))))


class GEGLU(nn.Module):
    """A linear layer whose second half, through GELU, gates its first (Shazeer 2020)."""

    def __init__(self, in_channels: int, out_channels: int) -> None:
        super().__init__()
        self.proj = nn.Linear(in_channels, 2 * out_channels)

    def forward(self, x: Tensor) -> Tensor:
        h, gate = self.proj(x).chunk(2, dim=-1)
        return h * F.gelu(gate)


class FeedForward(nn.Module):
    """GEGLU to four times the channels and back; index 1 of `net` is the checkpoints' dropout."""

    def __init__(self, channels: int) -> None:
        super().__init__()
        self.net = nn.ModuleList(
            [GEGLU(channels, 4 * channels), nn.Identity(), nn.Linear(4 * channels, channels)]
        )

    def forward(self, x: Tensor) -> Tensor:
        for layer in self.net:
            x = layer(x)
        return x


class TransformerBlock(nn.Module):
    """Self-attention, cross-attention to the text and feed-forward, each normed and residual."""

    def __init__(self, channels: int, heads: int, context_dim: int, upcast: bool) -> None:
        super().__init__()
        self.norm1 = nn.LayerNorm(channels)
        self.attn1 = Attention(channels, heads, upcast=upcast)
        self.norm2 = nn.LayerNorm(channels)
        self.attn2 = Attention(channels, heads, context_dim, upcast=upcast)
        self.norm3 = nn.LayerNorm(channels)
        self.ff = FeedForward(channels)

    def forward(self, x: Tensor, text: Context) -> Tensor:
        x = x + self.attn1(self.norm1(x))
        x = x + self.attn2(self.norm2(x), text)
        return x + self.ff(self.norm3(x))


class Transformer2D(nn.Module):
    """Transformer blocks over the pixels of x (B, C, H, W), with the text (B, L, D) as context."""

    def __init__(
        self,
        channels: int,
        heads: int,
        context_dim: int,
        layers: int,
        groups: int,
        linear_projection: bool,
        upcast: bool,
    ) -> None:
        super().__init__()
        self.linear_projection = linear_projection
        self.norm = nn.GroupNorm(groups, channels, eps=1e-6)
        self.proj_in = projection(channels, linear_projection)
        self.transformer_blocks = nn.ModuleList(
            TransformerBlock(channels, heads, context_dim, upcast) for _ in range(layers)
        )
        self.proj_out = projection(channels, linear_projection)

    def forward(self, x: Tensor, text: Context) -> Tensor:
        h = self.norm(x)
        if not self.linear_projection:
            h = self.proj_in(h)
        h = h.flatten(2).transpose(1, 2)  # (B, HW, C)
        if self.linear_projection:
            h = self.proj_in(h)
        for block in self.transformer_blocks:
            h = block(h, text)
        if self.linear_projection:
            h = self.proj_out(h)
        h = h.transpose(1, 2).reshape(x.shape)
        if not self.linear_projection:
            h = self.proj_out(h)
        return h + x


def projection(channels: int, linear: bool) -> nn.Module:
    """A per-pixel projection: linear over (B, HW, C), or a 1x1 convolution over (B, C, H, W)."""
    return nn.Linear(channels, channels) if linear else nn.Conv2d(channels, channels, 1)


class Downsample(nn.Module):
    """Half the size by a convolution of stride 2; `asymmetric` pads right and below only (VAE)."""

    def __init__(self, channels: int, asymmetric: bool = False) -> None:
        super().__init__()
        self.asymmetric = asymmetric
        self.conv = nn.Conv2d(channels, channels, 3, stride=2, padding=0 if asymmetric else 1)

    def forward(self, x: Tensor) -> Tensor:
        return self.conv(F.pad(x, (0, 1, 0, 1)) if self.asymmetric else x)


class Upsample(nn.Module):
    """Nearest-neighbour enlargement to twice the size, or to a given (H, W), and a convolution."""

    def __init__(self, channels: int) -> None:
        super().__init__()
        self.conv = nn.Conv2d(channels, channels, 3, padding=1)

    def forward(self, x: Tensor, size: tuple[int, int] | None = None) -> Tensor:
        size = (2 * x.shape[2], 2 * x.shape[3]) if size is None else size
        return self.conv(F.interpolate(x, size=size, mode="nearest"))
