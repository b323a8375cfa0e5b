"""Random draws that do not depend on the device or on who shares the batch."""

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch import Tensor

from .errors import RequestError

Generators = torch.Generator | Sequence[torch.Generator] | None


def randn(
    shape: Sequence[int],
    generator: Generators = None,
    device: torch.device | str | None = None,
    dtype: torch.dtype | None = None,
) -> Tensor:
    """Standard normal noise of `shape` on `device`, drawn on the generator's own device.

    A CPU generator gives the same numbers whatever the device. A list holds one generator per row:
    each row is then what it would be alone.
    """
    device = torch.device(device or "cpu")
    if generator is None or isinstance(generator, torch.Generator):
        source = generator.device if generator is not None else device
        if source.type != device.type and source.type != "cpu":
            raise RequestError(
                f"generator is on {source}, but the latents are on {device}; "
                f"use torch.Generator('cpu') or torch.Generator('{device}')"
            )
        drawn = torch.randn(tuple(shape), generator=generator, device=source, dtype=dtype)
        return drawn.to(device)
    generators = list(generator)
    if len(generators) == 1:
        return randn(shape, generators[0], device, dtype)
    if len(generators) != shape[0]:
        raise RequestError(
            f"generator holds {len(generators)} generators, but the batch has {shape[0]} rows; "
            "give one, or one per picture"
        )
    return torch.cat([randn((1, *shape[1:]), g, device, dtype) for g in generators])
