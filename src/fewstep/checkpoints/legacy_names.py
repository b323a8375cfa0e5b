"""Names and shapes of older checkpoints -> today's."""

from __future__ import annotations

import re

from torch import Tensor

# The VAE's attention, before it shared the UNet's attention layer.
_ATTENTION = {
    "query": "to_q",
    "key": "to_k",
    "value": "to_v",
    "proj_attn": "to_out.0",
}
_PATTERN = re.compile(rf"(.*attentions\.\d+)\.({'|'.join(_ATTENTION)})\.(weight|bias)")


def modern_name(key: str) -> str:
    """`key`, or today's name of the parameter that it was."""
    match = _PATTERN.fullmatch(key)
    return f"{match[1]}.{_ATTENTION[match[2]]}.{match[3]}" if match else key


def modern_shape(value: Tensor, shape: tuple[int, ...]) -> Tensor:
    """`value` as `shape`, if one is a linear layer's weight and the other a 1x1 convolution's.

    (O, I) and (O, I, 1, 1) compute the same; proj_in, proj_out and the VAE's attention come in
    both. Any other `value` is returned as it is.
    """
    given = tuple(value.shape)
    alike = given[:2] == tuple(shape[:2]) and {given[2:], tuple(shape[2:])} == {(), (1, 1)}
    return value.reshape(shape) if alike and len(given) >= 2 else value
