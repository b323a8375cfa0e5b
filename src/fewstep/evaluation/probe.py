"""Concept recall: a linear probe that names what a picture shows, from frozen features.

Multinomial logistic regression on standardised features. It is trained on real pictures in *other*
styles than the one that is generated, so that it has to recognise the thing and not the picture.
"""

from __future__ import annotations

import json
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path

import numpy as np
import torch
from safetensors import safe_open
from safetensors.torch import save_file
from torch import Tensor

from fewstep.errors import CheckpointError, RequestError

_MIN_STD = 1e-6  # a feature that never varies must not become infinite


@dataclass(frozen=True, eq=False)
class LinearProbe:
    """logits = ((features - mean) / std) @ weight.T + bias; `classes` names the rows of weight.

    weight (C, D), bias (C,), mean and std (D,), all float32.
    """

    classes: tuple[str, ...]
    weight: Tensor
    bias: Tensor
    mean: Tensor
    std: Tensor

    @classmethod
    def fit(
        cls,
        features: np.ndarray,
        labels: Sequence[str],
        *,
        l2: float = 1e-3,
        iterations: int = 40,
    ) -> LinearProbe:
        """Minimise mean cross-entropy + l2 / 2 * |weight|^2 by L-BFGS from zero weights.

        features [N, D] and N labels; the classes are the distinct labels, sorted. Deterministic.
        On 1,538 classes 100 iterations recall within 0.1 % of what 40 do.
        """
        if len(features) != len(labels) or len(labels) == 0:
            raise RequestError(
                f"features and labels must pair up, got {len(features)} and {len(labels)}"
            )
        if not l2 > 0:
            # Without it separable classes would drive the weights to infinity.
            raise RequestError(f"l2 must be positive, got {l2}")
        classes = tuple(sorted(set(labels)))
        index = {name: i for i, name in enumerate(classes)}
        target = torch.tensor([index[name] for name in labels])
        x = torch.tensor(features, dtype=torch.float32)
        mean, std = x.mean(0), x.std(0, correction=0).clamp_min(_MIN_STD)
        weight, bias = _minimise((x - mean) / std, target, len(classes), l2, iterations)
        return cls(classes, weight, bias, mean, std)

    def logits(self, features: np.ndarray) -> Tensor:
        """(N, C) for features [N, D]."""
        if features.ndim != 2 or features.shape[1] != len(self.mean):
            raise RequestError(
                f"features must be [N, {len(self.mean)}], got {list(features.shape)}"
            )
        x = torch.tensor(features, dtype=torch.float32)
        return ((x - self.mean) / self.std) @ self.weight.T + self.bias

    def top(
        self, features: np.ndarray, k: int = 1, *, among: Sequence[str] | None = None
    ) -> list[list[str]]:
        """The k likeliest classes of each row, best first; `among` restricts the candidates."""
        candidates = self.classes if among is None else tuple(among)
        if not 1 <= k <= len(candidates):
            raise RequestError(f"k must be in [1, {len(candidates)}], got {k}")
        columns = torch.tensor(self._indices(candidates))
        best = self.logits(features)[:, columns].topk(k).indices
        return [[candidates[j] for j in row] for row in best.tolist()]

    def accuracy(
        self,
        features: np.ndarray,
        labels: Sequence[str],
        k: int = 1,
        *,
        among: Sequence[str] | None = None,
    ) -> float:
        """The share of rows whose label is among their k likeliest classes."""
        if len(features) != len(labels) or len(labels) == 0:
            raise RequestError(
                f"features and labels must pair up, got {len(features)} and {len(labels)}"
            )
        self._indices(labels)  # a label that the probe cannot answer would count as a miss
        found = self.top(features, k, among=among)
        return sum(label in names for label, names in zip(labels, found, strict=True)) / len(labels)

    def save(self, file: str | Path) -> None:
        """Write a safetensors file with the class names in its metadata."""
        tensors = {
            name: getattr(self, name).contiguous() for name in ("weight", "bias", "mean", "std")
        }
        save_file(tensors, file, metadata={"classes": json.dumps(self.classes)})

    @classmethod
    def load(cls, file: str | Path) -> LinearProbe:
        """The probe that `save` wrote."""
        if not Path(file).is_file():
            raise CheckpointError(f"no probe at {file}")
        with safe_open(file, framework="pt") as opened:
            metadata = opened.metadata() or {}
            if "classes" not in metadata:
                raise CheckpointError(f"{file} is not a probe: its metadata name no classes")
            tensors = {name: opened.get_tensor(name) for name in ("weight", "bias", "mean", "std")}
        return cls(tuple(json.loads(metadata["classes"])), **tensors)

    def _indices(self, names: Sequence[str]) -> list[int]:
        index = {name: i for i, name in enumerate(self.classes)}
        unknown = sorted({name for name in names if name not in index})
        if unknown:
            raise RequestError(
                f"the probe has no class {unknown[0]!r} ({len(unknown)} unknown of {len(names)}; "
                f"it has {len(self.classes)} classes)"
            )
        return [index[name] for name in names]


def _minimise(
    x: Tensor, target: Tensor, classes: int, l2: float, iterations: int
) -> tuple[Tensor, Tensor]:
    weight = torch.zeros(classes, x.shape[1], requires_grad=True)
    bias = torch.zeros(classes, requires_grad=True)
    optimizer = torch.optim.LBFGS(
        [weight, bias],
        max_iter=iterations,
        history_size=10,
        tolerance_grad=1e-6,
        tolerance_change=1e-9,
        line_search_fn="strong_wolfe",
    )

    def closure() -> Tensor:
        optimizer.zero_grad()
        loss = torch.nn.functional.cross_entropy(x @ weight.T + bias, target)
        loss = loss + 0.5 * l2 * weight.square().sum()
        loss.backward()
        return loss

    optimizer.step(closure)
    return weight.detach(), bias.detach()
