"""The layers that UNet and VAE are built from. Attribute names are the checkpoints' key names.

Shapes: B batch, C channels, H and W latent height and width, L text tokens, D text channels,
E time-embedding channels.
"""

from __future__ import annotations

import math
from typing import Any, NamedTuple, Protocol

import torch
from torch import Tensor, nn
from torch.nn import functional as F

from ..ops.attention import attention
from ..ops.layers import Conv2d, Linear, added
from ..ops.norm import fuses, gated, group_norm, norm_silu, normed


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
        self.linear_1 = Linear(in_channels, dim)
        self.cond_proj = None if cond_dim is None else Linear(cond_dim, in_channels, bias=False)
        self.linear_2 = Linear(dim, dim)

    def forward(self, embedding: Tensor, condition: Tensor | None = None) -> Tensor:
        if condition is not None and self.cond_proj is not None:
            embedding = embedding + self.cond_proj(condition.to(embedding.dtype))
        return self.linear_2(F.silu(self.linear_1(embedding)))


class Memo:
    """What does not change during a run, computed once: a network's calls at the run's times.

    A memo belongs to one text, guidance and set of added conditions. `index` is the step at hand.
    """

    def __init__(self, times: Tensor) -> None:
        self.times = times  # (N,)
        self.index = 0
        self.contexts: dict[Sees, tuple[Tensor, Tensor]] = {}  # keys and values by layer
        self.embeddings: dict[nn.Module, Tensor] = {}  # (N, B, E) by network, after SiLU
        self.shifts: dict[nn.Module, Tensor] = {}  # (N, B, C) by projection


class Time(NamedTuple):
    """The time embedding behind its SiLU (B, E), as resnets read it."""

    embedding: Tensor
    memo: Memo | None = None  # if there is one, `embedding` is (N, B, E), of all its times

    def shift(self, projection: nn.Module) -> Tensor:
        """What a resnet adds to its channels, (B, C)."""
        if self.memo is None:
            return projection(self.embedding)
        shifts = self.memo.shifts.get(projection)
        if shifts is None:
            shifts = self.memo.shifts[projection] = projection(self.embedding)
        return shifts[self.memo.index]


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
        self.conv1 = Conv2d(in_channels, out_channels, 3, padding=1)
        if temb_channels is not None:
            self.time_emb_proj = Linear(temb_channels, out_channels)
        self.norm2 = nn.GroupNorm(groups, out_channels, eps)
        self.conv2 = Conv2d(out_channels, out_channels, 3, padding=1)
        self.conv_shortcut = (
            Conv2d(in_channels, out_channels, 1) if in_channels != out_channels else None
        )

    def forward(self, x: Tensor, time: Time | None = None) -> Tensor:
        shift = None if time is None else time.shift(self.time_emb_proj)
        h = added(self.conv1, norm_silu(self.norm1, x), shift=shift)
        x = x if self.conv_shortcut is None else self.conv_shortcut(x)
        return added(self.conv2, norm_silu(self.norm2, h), plus=x)


class Context(NamedTuple):
    """A text (B, L, D), and the tokens (B, M, D) of picture prompts for each IP-Adapter."""

    text: Tensor
    pictures: tuple[Tensor, ...] = ()
    memo: Memo | None = None

    def keys_values(self, layer: Sees, tokens: Tensor) -> tuple[Tensor, Tensor]:
        """What a layer makes of `tokens`, which are the text or one of `pictures`."""
        if self.memo is None:
            return layer.keys_values(tokens)
        found = self.memo.contexts.get(layer)
        if found is None:
            found = self.memo.contexts[layer] = layer.keys_values(tokens)
        return found


class Sees(Protocol):
    """A layer that attends to the tokens of a context."""

    def keys_values(self, tokens: Tensor) -> tuple[Tensor, Tensor]:
        """Keys and values (B, L, C) of tokens (B, L, D)."""
        ...


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
        self.to_q = Linear(channels, channels, bias=bias)
        self.to_k = Linear(context_dim, channels, bias=bias)
        self.to_v = Linear(context_dim, channels, bias=bias)
        self.to_out = nn.ModuleList([Linear(channels, channels)])
        # What IP-Adapters add (ip_adapter.py). A tuple, so that they are no part of this module.
        self.pictures: tuple[Any, ...] = ()

    def forward(
        self,
        x: Tensor,
        context: Context | None = None,
        plus: Tensor | None = None,
        norm: nn.LayerNorm | None = None,
    ) -> Tensor:
        """(B, N, C), with `plus` of that shape added. x goes through `norm` first."""
        if context is None:
            q, k, v = normed(norm, x, self.to_q, self.to_k, self.to_v)
        else:
            (q,) = normed(norm, x, self.to_q)
            k, v = context.keys_values(self, context.text)
        if self.upcast:
            q, k, v = q.float(), k.float(), v.float()
        attended = attention(q, k, v, self.heads)
        if context is None:
            return added(self.to_out[0], attended.to(x.dtype), plus=plus)
        # None without picture prompts.
        for own, seen in zip(self.pictures, context.pictures, strict=False):
            if own.scale:
                seen_k, seen_v = (y.to(q.dtype) for y in context.keys_values(own, seen))
                attended = attended + own.scale * attention(q, seen_k, seen_v, self.heads)
        return added(self.to_out[0], attended.to(x.dtype), plus=plus)

    def keys_values(self, tokens: Tensor) -> tuple[Tensor, Tensor]:
        """Keys and values (B, L, C) of tokens (B, L, D)."""
        return self.to_k(tokens), self.to_v(tokens)


class AttentionPooling(nn.Module):
    """One vector (B, D) of a text (B, L, D): its mean, plus a learnt vector, attends to itself and
    to all tokens (DeepFloyd IF)."""

    def __init__(self, heads: int, dim: int) -> None:
        super().__init__()
        self.heads = heads
        self.positional_embedding = nn.Parameter(torch.empty(1, dim).normal_(std=dim**-0.5))
        self.k_proj = Linear(dim, dim)
        self.q_proj = Linear(dim, dim)
        self.v_proj = Linear(dim, dim)

    def forward(self, text: Tensor) -> Tensor:
        query = text.mean(dim=1, keepdim=True) + self.positional_embedding.to(text.dtype)
        context = torch.cat([query, text], dim=1)
        q, k, v = self.q_proj(query), self.k_proj(context), self.v_proj(context)
        return attention(q, k, v, self.heads).flatten(1)


class TextTimeEmbedding(nn.Module):
    """A text (B, L, D) as an addition (B, E) to the time embedding."""

    def __init__(self, text_dim: int, dim: int, heads: int) -> None:
        super().__init__()
        self.norm1 = nn.LayerNorm(text_dim)
        self.pool = AttentionPooling(heads, text_dim)
        self.proj = Linear(text_dim, dim)
        self.norm2 = nn.LayerNorm(dim)

    def forward(self, text: Tensor) -> Tensor:
        return self.norm2(self.proj(self.pool(self.norm1(text))))


class GEGLU(nn.Module):
    """A linear layer whose second half, through GELU, gates its first (Shazeer 2020)."""

    def __init__(self, in_channels: int, out_channels: int) -> None:
        super().__init__()
        self.proj = Linear(in_channels, 2 * out_channels)

    def forward(self, x: Tensor, norm: nn.LayerNorm | None = None) -> Tensor:
        """h gelu(gate) (..., C); x goes through `norm` first."""
        if norm is not None and not fuses(norm, x, self.proj):
            x, norm = norm(x), None
        return gated(self.proj, x, norm)


class FeedForward(nn.Module):
    """GEGLU to four times the channels and back; index 1 of `net` is the checkpoints' dropout."""

    def __init__(self, channels: int) -> None:
        super().__init__()
        self.net = nn.ModuleList(
            [GEGLU(channels, 4 * channels), nn.Identity(), Linear(4 * channels, channels)]
        )

    def forward(
        self, x: Tensor, plus: Tensor | None = None, norm: nn.LayerNorm | None = None
    ) -> Tensor:
        """(B, N, C), with `plus` of that shape added. x goes through `norm` first."""
        return added(self.net[2], self.net[0](x, norm), plus=plus)


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
        x = self.attn1(x, plus=x, norm=self.norm1)
        x = self.attn2(x, text, plus=x, norm=self.norm2)
        return self.ff(x, plus=x, norm=self.norm3)


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
        h = group_norm(self.norm, x)
        if not self.linear_projection:
            h = self.proj_in(h)
        h = h.flatten(2).transpose(1, 2)  # (B, HW, C)
        if self.linear_projection:
            h = self.proj_in(h)
        for block in self.transformer_blocks:
            h = block(h, text)
        if self.linear_projection:
            return self.proj_out(h).transpose(1, 2).reshape(x.shape) + x
        return added(self.proj_out, h.transpose(1, 2).reshape(x.shape), plus=x)


def projection(channels: int, linear: bool) -> nn.Module:
    """A per-pixel projection: linear over (B, HW, C), or a 1x1 convolution over (B, C, H, W)."""
    return Linear(channels, channels) if linear else Conv2d(channels, channels, 1)


class Downsample(nn.Module):
    """Half the size by a convolution of stride 2; `asymmetric` pads right and below only (VAE)."""

    def __init__(self, channels: int, asymmetric: bool = False) -> None:
        super().__init__()
        self.asymmetric = asymmetric
        self.conv = Conv2d(channels, channels, 3, stride=2, padding=0 if asymmetric else 1)

    def forward(self, x: Tensor) -> Tensor:
        return self.conv(F.pad(x, (0, 1, 0, 1)) if self.asymmetric else x)
