from pathlib import Path

import numpy as np
import pytest

from fewstep.errors import RequestError
from fewstep.evaluation.open_prompt import RidgeMap, choose_strength, retrieval

GROUPS = [f"thing {i}" for i in range(60) for _ in range(3)]


@pytest.fixture(scope="module")
def pairs() -> tuple[np.ndarray, np.ndarray]:
    """Three noisy pictures [180, 30] of each of 60 texts [180, 8] that depend on them linearly."""
    random = np.random.default_rng(0)
    texts = random.normal(size=(60, 8)).repeat(3, axis=0)
    features = texts @ random.normal(size=(8, 30)) + 0.5 * random.normal(size=(180, 30))
    return features.astype(np.float32), texts.astype(np.float32)


@pytest.mark.parametrize("count", [180, 20])  # more and fewer rows than features
def test_ridge_equals_the_augmented_least_squares(
    pairs: tuple[np.ndarray, np.ndarray], count: int
) -> None:
    features, texts = pairs[0][:count], pairs[1][:count]
    fitted = RidgeMap.fit(features, texts, strength=0.2)
    x = (features - features.mean(0)) / features.std(0)
    rows = np.concatenate([x, np.sqrt(0.2 * len(x)) * np.eye(30)])
    wanted = np.concatenate([texts - texts.mean(0), np.zeros((30, 8))])
    np.testing.assert_allclose(fitted.weight, np.linalg.lstsq(rows, wanted)[0], atol=1e-5)


def test_texts_of_things_never_fitted_are_found(pairs: tuple[np.ndarray, np.ndarray]) -> None:
    features, texts = pairs
    fitted = RidgeMap.fit(features[:120], texts[:120], strength=0.01)
    candidates, answers = texts[120::3], [i for i in range(20) for _ in range(3)]
    mapped = fitted(features[120:])
    assert retrieval(mapped, candidates, answers) > 0.9
    assert retrieval(mapped, candidates, answers[3:] + answers[:3]) < 0.1
    np.testing.assert_allclose(np.linalg.norm(mapped, axis=1), 1.0, rtol=1e-5)


def test_a_constant_answer_finds_nothing() -> None:
    candidates = np.eye(5)
    assert retrieval(np.ones((5, 5)), candidates, range(5), 4) == 0.0
    assert retrieval(np.ones((5, 5)), candidates, range(5), 5) == 1.0


def test_the_strength_is_chosen_by_groups_left_out(pairs: tuple[np.ndarray, np.ndarray]) -> None:
    features, texts = pairs
    assert choose_strength(features, texts, GROUPS, strengths=(1e-3, 1e6)) == 1e-3
    with pytest.raises(RequestError, match="folds must be in"):
        choose_strength(features, texts, ["one"] * len(texts))


def test_save_and_load_give_the_same_map(
    pairs: tuple[np.ndarray, np.ndarray], tmp_path: Path
) -> None:
    fitted = RidgeMap.fit(*pairs, strength=0.1)
    fitted.save(tmp_path / "ridge.safetensors")
    loaded = RidgeMap.load(tmp_path / "ridge.safetensors")
    np.testing.assert_array_equal(loaded(pairs[0]), fitted(pairs[0]))
