from pathlib import Path

import numpy as np
import pytest
import torch

from fewstep.errors import CheckpointError, RequestError
from fewstep.evaluation.probe import LinearProbe

NAMES = ["apple", "bear", "car", "dog", "eye", "fish"]


def blobs(seed: int, spread: float = 0.3, count: int = 20) -> tuple[np.ndarray, list[str]]:
    """Features around one random centre for each name, on very unequal scales, and their names."""
    centres = np.random.default_rng(0).normal(size=(len(NAMES), 12))
    random = np.random.default_rng(seed)
    labels = [name for name in NAMES for _ in range(count)]
    x = centres.repeat(count, axis=0) + spread * random.normal(size=(len(labels), 12))
    return (x * np.logspace(-3, 3, 12)).astype(np.float32), labels


@pytest.fixture(scope="module")
def probe() -> LinearProbe:
    return LinearProbe.fit(*blobs(1), l2=1e-3)


def test_separable_classes_are_told_apart_on_new_rows(probe: LinearProbe) -> None:
    assert probe.accuracy(*blobs(2)) == 1.0
    assert probe.classes == tuple(NAMES)


def test_the_gradient_vanishes_at_the_fit() -> None:
    features, labels = blobs(1)
    probe = LinearProbe.fit(features, labels, l2=1e-2, iterations=300)
    weight = probe.weight.clone().requires_grad_()
    x = (torch.tensor(features) - probe.mean) / probe.std
    target = torch.tensor([NAMES.index(name) for name in labels])
    loss = torch.nn.functional.cross_entropy(x @ weight.T + probe.bias, target)
    (loss + 0.005 * weight.square().sum()).backward()
    assert weight.grad is not None and weight.grad.abs().max() < 1e-4


def test_top_k_rises_to_one_and_chance_is_chance(probe: LinearProbe) -> None:
    features, labels = blobs(3, spread=3.0)
    recalls = [probe.accuracy(features, labels, k) for k in range(1, 7)]
    assert recalls == sorted(recalls) and recalls[-1] == 1.0
    wrong = labels[20:] + labels[:20]
    assert probe.accuracy(blobs(4)[0], wrong) == 0.0


def test_among_restricts_the_answers(probe: LinearProbe) -> None:
    features, labels = blobs(3, spread=3.0)
    answers = probe.top(features, 2, among=["dog", "apple"])
    assert all(sorted(row) == ["apple", "dog"] for row in answers)
    mine = [i for i, name in enumerate(labels) if name in ("dog", "apple")]
    few = probe.accuracy(features[mine], [labels[i] for i in mine], among=["dog", "apple"])
    assert few > probe.accuracy(features[mine], [labels[i] for i in mine])


def test_save_and_load_give_the_same_logits(probe: LinearProbe, tmp_path: Path) -> None:
    probe.save(tmp_path / "probe.safetensors")
    loaded = LinearProbe.load(tmp_path / "probe.safetensors")
    features, _ = blobs(2)
    assert loaded.classes == probe.classes
    assert torch.equal(loaded.logits(features), probe.logits(features))


def test_what_cannot_be_answered_is_refused(probe: LinearProbe, tmp_path: Path) -> None:
    features, labels = blobs(2)
    with pytest.raises(RequestError, match="no class 'zebra'"):
        probe.accuracy(features, ["zebra"] * len(labels))
    with pytest.raises(RequestError, match=r"k must be in \[1, 2\]"):
        probe.top(features, 3, among=["dog", "car"])
    with pytest.raises(RequestError, match=r"\[N, 12\]"):
        probe.logits(features[:, :3])
    with pytest.raises(RequestError, match="l2 must be positive"):
        LinearProbe.fit(features, labels, l2=0)
    with pytest.raises(CheckpointError, match="no probe at"):
        LinearProbe.load(tmp_path / "none.safetensors")
