"""How the times of a run are spread over those of the training."""

from __future__ import annotations

import numpy as np
import torch
from torch import Tensor

from ..errors import RequestError

SPACINGS = ("leading", "linspace", "trailing")
RHO = 7.0  # Karras et al. 2022, sec. 3


def spaced(steps: int, train_steps: int, spacing: str, offset: int = 0) -> np.ndarray:
    """`steps` times, descending floats, spread over [0, train_steps) (Lin et al. 2024, Tab. 2).

    `offset` is added to times of leading spacing; all but those of linspace are whole.
    """
    match spacing:
        case "leading":
            return np.arange(steps)[::-1] * float(train_steps // steps) + offset
        case "linspace":
            return np.linspace(0, train_steps - 1, steps)[::-1]
        case "trailing":
            # The float stride may yield one time more than asked for, at the end.
            return np.round(np.arange(train_steps, 0, -train_steps / steps))[:steps] - 1
    raise RequestError(f"spacing must be one of {SPACINGS}, got {spacing!r}")


def spaced_timesteps(
    steps: int, train_steps: int = 1000, spacing: str = "leading", offset: int = 0
) -> Tensor:
    """`steps` times, descending int64, spread over [0, train_steps); arguments as in `spaced`."""
    return torch.from_numpy(spaced(steps, train_steps, spacing, offset).round().astype(np.int64))


def karras_times(steps: int, ratios: Tensor, lowest: float, highest: float) -> np.ndarray:
    """`steps` times, descending floats, at which sigma / alpha is spread from highest to lowest.

    Evenly in its power 1 / 7 (Karras et al. 2022, eq. 5). `ratios` (T,) is sigma / alpha at the
    times of the training, whose logarithm is interpolated.
    """
    high, low = highest ** (1 / RHO), lowest ** (1 / RHO)
    sigmas = (high + np.linspace(0, 1, steps) * (low - high)) ** RHO
    return np.interp(np.log(sigmas), np.log(ratios.double().numpy()), np.arange(len(ratios)))


def followers(times: Tensor) -> Tensor:
    """For each of `times` (N,) the next one, -1 for the last."""
    return torch.cat([times[1:], times.new_tensor([-1])])


def rows(t: Tensor | float, like: Tensor) -> Tensor:
    """The one time `t` for every row of `like`: (B,) on the CPU."""
    return torch.as_tensor(t, device="cpu").reshape(()).expand(len(like))
