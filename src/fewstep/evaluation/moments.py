"""Mean and covariance of features in one pass, and the Fréchet distance of two of them (FID).

Sums are kept in float64 and simply add up, so that chunks, processes and machines can each count
their own and be joined afterwards, in any order.
"""

from __future__ import annotations

from collections.abc import Iterable
from dataclasses import dataclass
from functools import cached_property

import numpy as np

from fewstep.errors import RequestError


@dataclass(frozen=True, eq=False)
class Moments:
    """Sums over the rows of features: their `count`, their `total` (D,) and `outer` (D, D)."""

    count: int
    total: np.ndarray
    outer: np.ndarray

    @classmethod
    def of(cls, features: np.ndarray) -> Moments:
        """The sums of features [N, D], N >= 0, of any float type."""
        if features.ndim != 2:
            raise RequestError(f"features must be [N, D], got {list(features.shape)}")
        x = features.astype(np.float64)
        return cls(len(x), x.sum(0), x.T @ x)

    @classmethod
    def over(cls, chunks: Iterable[np.ndarray], size: int) -> Moments:
        """The sums over chunks of rows [n, size], which are never all in memory."""
        moments = cls(0, np.zeros(size), np.zeros((size, size)))
        for chunk in chunks:
            moments = moments.merge(cls.of(chunk))
        return moments

    def merge(self, other: Moments) -> Moments:
        """The sums over both sets of rows."""
        if self.total.shape != other.total.shape:
            raise RequestError(
                f"moments of {len(self.total)} and of {len(other.total)} features cannot be merged"
            )
        return Moments(self.count + other.count, self.total + other.total, self.outer + other.outer)

    @property
    def mean(self) -> np.ndarray:
        """(D,); needs one row."""
        self._need(1)
        return self.total / self.count

    @cached_property
    def covariance(self) -> np.ndarray:
        """(D, D), unbiased (divided by N - 1) like `np.cov`; needs two rows."""
        self._need(2)
        centred = self.outer - self.count * np.outer(self.mean, self.mean)
        return centred / (self.count - 1)

    @cached_property
    def root(self) -> np.ndarray:
        """(D, D), the symmetric square root of the covariance."""
        values, vectors = np.linalg.eigh(self.covariance)
        # Fewer rows than features leave eigenvalues of 0, which rounding makes slightly negative.
        return (vectors * np.sqrt(values.clip(0))) @ vectors.T

    def _need(self, rows: int) -> None:
        if self.count < rows:
            raise RequestError(f"moments of {self.count} rows; at least {rows} are needed")


def frechet_distance(x: Moments, y: Moments) -> float:
    """|mean_x - mean_y|^2 + tr(C_x + C_y - 2 (C_x C_y)^(1/2)), of Gaussians (Dowson, Landau 1982).

    With Inception's features this is FID (Heusel et al. 2017); biased upwards when pictures are
    few, so compare only equal numbers of them. The trace of the root is that of the symmetric
    (R C_y R)^(1/2), R the root of C_x: real and stable where (C_x C_y)^(1/2) need not be. The root
    of `x` is kept, so give the reference first.
    """
    if x.total.shape != y.total.shape:
        raise RequestError(
            f"features must be of one size, got {len(x.total)} and {len(y.total)} numbers"
        )
    inner = x.root @ y.covariance @ x.root
    values = np.linalg.eigvalsh((inner + inner.T) / 2)
    trace_of_root = np.sqrt(values.clip(0)).sum()
    shift = x.mean - y.mean
    traces = np.trace(x.covariance) + np.trace(y.covariance)
    return float(shift @ shift + traces - 2 * trace_of_root)
