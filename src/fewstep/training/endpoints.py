"""The times of a consistency loss: the grid, its pairs, how it refines, and where f leads to.

The grid of N steps over T training steps has the times k, 2k, ..., Nk, each less one, with
k = T // N, the paper's skipping interval: N = 50 is k = 20. It is the grid of the LCM sampler with
`original_inference_steps` N. If N does not divide T, the times above Nk - 1 are left out.

Times are int64 (B,) and ascend with noise. Draws come in as uniform numbers (B,) in [0, 1).
"""

from __future__ import annotations

import math

import torch
from torch import Tensor

from ..errors import RequestError


def stride_of(grid_steps: int, train_steps: int) -> int:
    """k, the training steps between neighbours on the grid."""
    if not 1 <= grid_steps <= train_steps:
        raise RequestError(
            f"grid_steps must lie in [1, {train_steps}] (the training steps), got {grid_steps}"
        )
    return train_steps // grid_steps


def grid_times(grid_steps: int = 50, train_steps: int = 1000) -> Tensor:
    """The grid (N,), ascending: 19, 39, ..., 999 for 50 steps."""
    return torch.arange(1, grid_steps + 1) * stride_of(grid_steps, train_steps) - 1


def previous_times(t: Tensor, grid_steps: int = 50, train_steps: int = 1000) -> Tensor:
    """The time (B,) one grid step below `t` (B,); below the first is 0."""
    return (t - stride_of(grid_steps, train_steps)).clamp(min=0)


def draw_times(
    uniform: Tensor, grid_steps: int = 50, train_steps: int = 1000
) -> tuple[Tensor, Tensor]:
    """(t, t_prev), each (B,): every time of the grid is equally likely (LCM, Alg. 1)."""
    stride = stride_of(grid_steps, train_steps)
    t = (_floor(uniform, torch.full_like(uniform, grid_steps)) + 1) * stride - 1
    return t, previous_times(t, grid_steps, train_steps)


def grid_steps_at(step: int, steps: int, first: int, last: int) -> int:
    """The grid's steps at training step `step` of `steps`: `first`, doubled until it is `last`.

    All stages are equally long (Song and Dhariwal 2024, iCT): far-apart times teach fast
    at first, near ones teach well in the end.
    """
    if not 1 <= first <= last:
        raise RequestError(
            f"first_grid_steps must lie in [1, {last}] (grid_steps), got {first}: "
            "the grid becomes finer, not coarser"
        )
    if not 0 <= step < steps:
        raise RequestError(f"step must lie in [0, {steps - 1}], got {step}")
    stages = math.ceil(math.log2(last / first)) + 1
    return min(first * 2 ** (step * stages // steps), last)


def phase_edges(
    t_prev: Tensor, phases: int, grid_steps: int = 50, train_steps: int = 1000
) -> Tensor:
    """The lower edge (B,) of the phase in which the pair (t, t_prev) lies (arXiv:2405.18407).

    `phases` equal parts of the grid; t is the grid time above `t_prev`, so a pair whose t_prev is
    an edge belongs to the phase above, and its target is z_prev itself. One phase ends at 0.
    """
    stride = stride_of(grid_steps, train_steps)
    if not 1 <= phases <= grid_steps:
        raise RequestError(
            f"phases must lie in [1, {grid_steps}] (grid_steps), got {phases}; "
            "each phase holds a grid step or more"
        )
    edges = torch.arange(phases, device=t_prev.device) * grid_steps // phases
    index = _index(t_prev, stride)
    edge = edges[torch.searchsorted(edges, index, right=True) - 1]
    return _time(edge, stride)


def sampled_endpoints(
    t_prev: Tensor, uniform: Tensor, grid_steps: int = 50, train_steps: int = 1000
) -> Tensor:
    """Endpoints (B,), equally likely among the grid times up to `t_prev`, and 0.

    So that f learns every way down the trajectory (CTM, arXiv:2310.02279; TCD, arXiv:2402.19159).
    """
    stride = stride_of(grid_steps, train_steps)
    return _time(_floor(uniform, _index(t_prev, stride) + 1), stride)


def _index(t: Tensor, stride: int) -> Tensor:
    """How many grid times are at or below `t`."""
    return (t + 1) // stride


def _time(index: Tensor, stride: int) -> Tensor:
    """The time of the grid's number `index`, counted from 1; number 0 is the time 0."""
    return (index * stride - 1).clamp(min=0)


def _floor(uniform: Tensor, count: Tensor) -> Tensor:
    """Whole numbers below `count`; rounding must not reach it."""
    return torch.minimum((uniform * count).long(), count.long() - 1)
