"""What one step learns from: latents, and what the network is told about them.

Shapes: B samples; latents (B, C, h, w); L tokens of D channels; P channels of a pooled text.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import TYPE_CHECKING, Any, Protocol

import numpy as np
import torch
from torch import Tensor

from .draws import Draws

if TYPE_CHECKING:
    from .data.survey import Counts


@dataclass(frozen=True, eq=False)
class Condition:
    """What a UNet is told beside z and t: the text, and with SDXL its summary, size and crop."""

    text: Tensor  # (B, L, D)
    pooled: Tensor | None = None  # (B, P)
    time_ids: Tensor | None = None  # (B, 6): original height and width, top, left, height, width

    @property
    def arguments(self) -> dict[str, Any]:
        """Keyword arguments of a UNet's call."""
        arguments: dict[str, Any] = {"encoder_hidden_states": self.text}
        if self.pooled is not None:
            arguments["added_cond_kwargs"] = {
                "text_embeds": self.pooled,
                "time_ids": self.time_ids,
            }
        return arguments

    def to(self, dtype: torch.dtype) -> Condition:
        """The same in another dtype; sizes stay as they are."""
        pooled = None if self.pooled is None else self.pooled.to(dtype)
        return Condition(self.text.to(dtype), pooled, self.time_ids)

    def without_text(self, empty: Condition) -> Condition:
        """The same sizes and crops with the text of `empty` (1, ...)."""
        pooled = None if empty.pooled is None else empty.pooled.expand(len(self.text), -1)
        return Condition(empty.text.expand_as(self.text), pooled, self.time_ids)

    def beside(self, other: Condition) -> Condition:
        """The rows of both, one after the other (2B)."""
        return Condition(
            torch.cat([self.text, other.text]),
            *(
                None if a is None or b is None else torch.cat([a, b])
                for a, b in ((self.pooled, other.pooled), (self.time_ids, other.time_ids))
            ),
        )


@dataclass(frozen=True, eq=False)
class Batch:
    """Latents of about unit deviation, float32, and their condition; on one device."""

    z: Tensor
    condition: Condition


class TrainingSet(Protocol):
    """Encoded samples, read row by row."""

    empty: Condition  # one row: what classifier-free guidance takes for "no text"; no time_ids
    held_out: np.ndarray  # rows that are never trained on
    counts: Counts  # of pictures: kept, and dropped by rule

    def __len__(self) -> int:
        """The number of rows, those held out included."""

    def rows(self, step: int, batch: int) -> np.ndarray:
        """The rows (batch,) of the batch of this step: all of one latent shape, none held out.

        They depend on the data, the seed and `step` alone; every row comes once an epoch.
        """

    def batch(self, rows: np.ndarray, draws: Draws) -> Batch:
        """The samples, on the device of `draws`, which decide variant, posterior and dropout."""
