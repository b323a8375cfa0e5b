import numpy as np
import pytest

from fewstep.errors import RequestError
from fewstep.evaluation.kid import kid, squared_mmd


def kernel(a: np.ndarray, b: np.ndarray) -> float:
    return (float(a @ b) / len(a) + 1) ** 3


def test_squared_mmd_equals_the_sums_written_out() -> None:
    random = np.random.default_rng(0)
    x, y = random.normal(size=(7, 5)), random.normal(1.0, 2.0, size=(9, 5))
    direct = (
        sum(kernel(a, b) for i, a in enumerate(x) for j, b in enumerate(x) if i != j) / (7 * 6)
        + sum(kernel(a, b) for i, a in enumerate(y) for j, b in enumerate(y) if i != j) / (9 * 8)
        - 2 * sum(kernel(a, b) for a in x for b in y) / (7 * 9)
    )
    assert squared_mmd(x, y) == pytest.approx(direct)


def test_kid_of_one_distribution_is_zero_within_its_error_and_grows_with_a_shift() -> None:
    random = np.random.default_rng(1)
    x = random.normal(0.0, 1.0, size=(400, 16)).astype(np.float32)
    same, near, far = (
        kid(x, random.normal(shift, 1.0, size=(400, 16)), subset_size=200)
        for shift in (0.0, 0.2, 0.5)
    )
    assert abs(same.mean) < 3 * same.std
    assert same.mean < near.mean < far.mean
    assert near.mean > 3 * near.std


def test_kid_is_unbiased_in_the_number_of_pictures() -> None:
    random = np.random.default_rng(2)
    x, y = random.normal(size=(600, 8)), random.normal(0.3, 1.0, size=(600, 8))
    few = kid(x, y, subsets=400, subset_size=10)
    many = kid(x, y, subsets=40, subset_size=300)
    assert few.mean == pytest.approx(many.mean, abs=3 * few.std / 400**0.5)


def test_the_same_seed_gives_the_same_subsets() -> None:
    random = np.random.default_rng(3)
    x, y = random.normal(size=(50, 4)), random.normal(size=(60, 4))
    arguments = {"subsets": 3, "subset_size": 20}
    assert kid(x, y, seed=1, **arguments) == kid(x, y, seed=1, **arguments)
    assert kid(x, y, seed=1, **arguments) != kid(x, y, seed=2, **arguments)


def test_a_subset_larger_than_a_set_is_refused() -> None:
    x = np.zeros((10, 4))
    with pytest.raises(RequestError, match=r"subset_size must be in \[2, 10\]"):
        kid(x, np.zeros((99, 4)), subset_size=50)
    with pytest.raises(RequestError, match=r"\[M, d\]"):
        kid(x, np.zeros((10, 5)), subset_size=5)
