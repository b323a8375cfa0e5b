"""Open-prompt score: a linear map from pictures to sentences, and how well it finds the right one.

A weak substitute for a CLIP score with a known error: ridge regression from picture features to
sentence embeddings, fitted on real pictures of *other* concepts than those it then judges. The real
pictures' own score is its ceiling.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path

import numpy as np
from safetensors.numpy import load_file, save_file

from fewstep.errors import CheckpointError, RequestError


@dataclass(frozen=True, eq=False)
class RidgeMap:
    """((features - mean) / std) @ weight + bias: picture features [N, D] -> text space [N, E]."""

    mean: np.ndarray  # (D,)
    std: np.ndarray  # (D,)
    weight: np.ndarray  # (D, E)
    bias: np.ndarray  # (E,)

    @classmethod
    def fit(cls, features: np.ndarray, texts: np.ndarray, *, strength: float) -> RidgeMap:
        """Least squares with `strength` * N * |weight|^2 added; features [N, D], texts [N, E]."""
        return cls.fit_each(features, texts, [strength])[0]

    @classmethod
    def fit_each(
        cls, features: np.ndarray, texts: np.ndarray, strengths: Sequence[float]
    ) -> list[RidgeMap]:
        """`fit` for several strengths, which share the costly product of all features."""
        if len(features) != len(texts) or len(features) < 2:
            raise RequestError(
                f"features and texts must pair up, two at least, got {len(features)} "
                f"and {len(texts)}"
            )
        if not min(strengths) > 0:
            raise RequestError(f"strength must be positive, got {min(strengths)}")
        mean, std = features.mean(0), np.maximum(features.std(0), 1e-6)
        bias = texts.mean(0)
        weights = _ridge_weights(
            ((features - mean) / std).astype(np.float64),
            (texts - bias).astype(np.float64),
            [strength * len(features) for strength in strengths],
        )
        return [
            cls(*(array.astype(np.float32) for array in (mean, std, weight, bias)))
            for weight in weights
        ]

    def __call__(self, features: np.ndarray) -> np.ndarray:
        """Unit vectors float32 [N, E] in the space of the texts."""
        mapped = ((features - self.mean) / self.std) @ self.weight + self.bias
        return _normalised(mapped).astype(np.float32)

    def save(self, file: str | Path) -> None:
        """Write a safetensors file."""
        save_file({name: np.ascontiguousarray(array) for name, array in vars(self).items()}, file)

    @classmethod
    def load(cls, file: str | Path) -> RidgeMap:
        """The map that `save` wrote."""
        if not Path(file).is_file():
            raise CheckpointError(f"no ridge map at {file}")
        return cls(**load_file(file))


def _ridge_weights(x: np.ndarray, y: np.ndarray, penalties: Sequence[float]) -> list[np.ndarray]:
    """argmin |x w - y|^2 + penalty |w|^2 for each penalty; x [N, D], y [N, E], w [D, E].

    By the smaller of the two systems of equations, D x D or N x N.
    """
    if len(x) < x.shape[1]:
        product = x @ x.T
        return [x.T @ np.linalg.solve(product + p * np.eye(len(x)), y) for p in penalties]
    product, target = x.T @ x, x.T @ y
    return [np.linalg.solve(product + p * np.eye(x.shape[1]), target) for p in penalties]


def choose_strength(
    features: np.ndarray,
    texts: np.ndarray,
    groups: Sequence[str],
    *,
    strengths: Sequence[float] = (0.03, 0.1, 0.3, 1.0),
    folds: int = 3,
    seed: int = 0,
) -> float:
    """The ridge strength with the best retrieval at 5 on groups left out of the fit.

    `groups` names each row's concept; all its pictures are left out together, and it is retrieved
    among the left-out concepts only. No group that the final score uses may be passed here.
    """
    names = np.asarray(groups)
    distinct = np.random.default_rng(seed).permutation(np.unique(names))
    if not 2 <= folds <= len(distinct) // 2:
        raise RequestError(
            f"folds must be in [2, {len(distinct) // 2}], two groups in each, got {folds}"
        )

    recalls = np.zeros(len(strengths))
    for left_out in np.array_split(distinct, folds):
        rows = np.flatnonzero(np.isin(names, left_out))
        fitted_on = np.flatnonzero(~np.isin(names, left_out))
        candidates = [rows[names[rows] == name][0] for name in left_out]
        answers = [int(np.flatnonzero(left_out == name)[0]) for name in names[rows]]
        maps = RidgeMap.fit_each(features[fitted_on], texts[fitted_on], strengths)
        k = min(5, len(candidates))
        recalls += [retrieval(m(features[rows]), texts[candidates], answers, k) for m in maps]
    return strengths[int(recalls.argmax())]


def retrieval(
    mapped: np.ndarray, candidates: np.ndarray, answers: Sequence[int], k: int = 1
) -> float:
    """Recall at k: the share of rows whose own text is among the k candidates of highest cosine.

    mapped [N, E], candidates [M, E], answers: N row numbers of `candidates`.
    """
    if len(mapped) != len(answers) or len(mapped) == 0:
        raise RequestError(f"mapped and answers must pair up, got {len(mapped)}, {len(answers)}")
    if not 1 <= k <= len(candidates):
        raise RequestError(f"k must be in [1, {len(candidates)}], got {k}")
    similarity = _normalised(mapped) @ _normalised(candidates).T
    own = similarity[np.arange(len(mapped)), np.asarray(answers)]
    # Ties count against the picture, or a constant picture would find every text.
    better = (similarity >= own[:, None]).sum(1) - 1
    return float((better < k).mean())


def _normalised(rows: np.ndarray) -> np.ndarray:
    return rows / np.maximum(np.linalg.norm(rows, axis=1, keepdims=True), 1e-12)
