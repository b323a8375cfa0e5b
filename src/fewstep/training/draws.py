"""Random numbers of training: each sample of each step has its own stream.

A stream depends on (seed, step, position in the batch) alone: not on the number of devices, on how
a batch is parted, or on whether a run was interrupted. Numbers are drawn on the CPU, so they are
the same on every device.
"""

from __future__ import annotations

from collections.abc import Sequence

import numpy as np
import torch
from torch import Tensor


class Draws:
    """The random numbers of the samples at `positions` of the batch of one step."""

    def __init__(
        self, seed: int, step: int, positions: Sequence[int], device: torch.device | str = "cpu"
    ) -> None:
        self.generators = [self._generator(seed, step, position) for position in positions]
        self.device = torch.device(device)

    @staticmethod
    def _generator(seed: int, step: int, position: int) -> torch.Generator:
        high, low = np.random.SeedSequence([seed, step, position]).generate_state(2, np.uint32)
        return torch.Generator().manual_seed(int(high) << 32 | int(low))

    def __len__(self) -> int:
        return len(self.generators)

    def normal(self, shape: Sequence[int]) -> Tensor:
        """Standard normal numbers (B, *shape)."""
        rows = [torch.randn(tuple(shape), generator=g) for g in self.generators]
        return torch.stack(rows).to(self.device)

    def uniform(self, low: float = 0.0, high: float = 1.0) -> Tensor:
        """Numbers (B,) in [low, high)."""
        rows = [torch.rand((), generator=g) for g in self.generators]
        return low + (high - low) * torch.stack(rows).to(self.device)

    def integers(self, low: int, high: int) -> Tensor:
        """Numbers (B,) int64 from `low` to `high` - 1."""
        rows = [torch.randint(low, high, (), generator=g) for g in self.generators]
        return torch.stack(rows).to(self.device)

    def times(self, steps: int, power: float = 1.0) -> Tensor:
        """Times (B,) from 0 to `steps` - 1, of a density that grows as t^(power - 1)."""
        if power == 1.0:
            return self.integers(0, steps)
        return (steps * self.uniform() ** (1 / power)).long().clamp(max=steps - 1)
