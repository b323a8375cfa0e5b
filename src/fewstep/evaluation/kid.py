"""Kernel distance between two sets of features (KID with whatever network made them).

Bińkowski et al., "Demystifying MMD GANs", 2018: the squared maximum mean discrepancy under the
kernel k(x, y) = (x·y / d + 1)^3. Its estimate is unbiased in the number of pictures, which FID's is
not; it can come out slightly below zero for equal distributions.
"""

from __future__ import annotations

from typing import NamedTuple

import numpy as np

from fewstep.errors import RequestError


class Kid(NamedTuple):
    """Mean over the subsets, and the standard deviation between subsets (not of the mean)."""

    mean: float
    std: float


def polynomial_kernel(x: np.ndarray, y: np.ndarray) -> np.ndarray:
    """(x·y / d + 1)^3 for all pairs: [M, d], [N, d] -> [M, N]."""
    return (x @ y.T / x.shape[1] + 1.0) ** 3


def squared_mmd(x: np.ndarray, y: np.ndarray) -> float:
    """The unbiased estimate of MMD^2 between the rows of x [M, d] and of y [N, d], M, N >= 2."""
    m, n = len(x), len(y)
    within_x = polynomial_kernel(x, x)
    within_y = polynomial_kernel(y, y)
    # A row is not compared with itself: this is what makes the estimate unbiased.
    sum_x = (within_x.sum() - np.trace(within_x)) / (m * (m - 1))
    sum_y = (within_y.sum() - np.trace(within_y)) / (n * (n - 1))
    return float(sum_x + sum_y - 2.0 * polynomial_kernel(x, y).mean())


def kid(
    x: np.ndarray, y: np.ndarray, *, subsets: int = 20, subset_size: int = 500, seed: int = 0
) -> Kid:
    """`squared_mmd` of `subsets` pairs of random subsets drawn without replacement.

    x [M, d], y [N, d] with M, N >= subset_size >= 2. The same seed gives the same subsets.
    """
    if subsets < 1:
        raise RequestError(f"subsets must be at least 1, got {subsets}")
    if not 2 <= subset_size <= min(len(x), len(y)):
        raise RequestError(
            f"subset_size must be in [2, {min(len(x), len(y))}], the smaller set's size, "
            f"got {subset_size}"
        )
    if x.ndim != 2 or y.ndim != 2 or x.shape[1] != y.shape[1]:
        raise RequestError(
            f"features must be [M, d] and [N, d], got {list(x.shape)} and {list(y.shape)}"
        )
    # float64: the three sums nearly cancel.
    x, y = x.astype(np.float64), y.astype(np.float64)
    random = np.random.default_rng(seed)
    values = [
        squared_mmd(
            x[random.choice(len(x), subset_size, replace=False)],
            y[random.choice(len(y), subset_size, replace=False)],
        )
        for _ in range(subsets)
    ]
    return Kid(float(np.mean(values)), float(np.std(values)))
