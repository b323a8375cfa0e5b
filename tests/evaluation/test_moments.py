import numpy as np
import pytest

from fewstep.errors import RequestError
from fewstep.evaluation.moments import Moments, frechet_distance


def gaussian(mean: np.ndarray, covariance: np.ndarray, count: int = 100) -> Moments:
    """The moments that a sample of exactly this mean and covariance would have."""
    outer = (count - 1) * covariance + count * np.outer(mean, mean)
    return Moments(count, count * mean, outer)


def random_covariance(random: np.random.Generator, size: int) -> np.ndarray:
    factor = random.normal(size=(size, 2 * size))
    return factor @ factor.T / size


def test_chunks_in_any_split_give_numpys_mean_and_covariance() -> None:
    random = np.random.default_rng(0)
    features = (20.0 + random.normal(size=(1003, 12)) * np.arange(1, 13)).astype(np.float32)
    exact = features.astype(np.float64)
    for chunk in (1, 7, 64, 1003):
        pieces = (features[i : i + chunk] for i in range(0, len(features), chunk))
        moments = Moments.over(pieces, 12)
        assert moments.count == 1003
        np.testing.assert_allclose(moments.mean, exact.mean(0), rtol=1e-12)
        error = np.abs(moments.covariance - np.cov(exact, rowvar=False)).max()
        assert error < 1e-10 * np.abs(np.cov(exact, rowvar=False)).max()


def test_merging_does_not_depend_on_the_order_and_an_empty_part_adds_nothing() -> None:
    random = np.random.default_rng(1)
    a, b, c = (Moments.of(random.normal(size=(n, 5))) for n in (4, 9, 0))
    one, other = a.merge(b).merge(c), c.merge(b.merge(a))
    assert one.count == other.count == 13
    np.testing.assert_allclose(one.covariance, other.covariance, rtol=1e-12)


def test_the_distance_of_gaussians_that_commute_is_the_closed_form() -> None:
    random = np.random.default_rng(2)
    turn, _ = np.linalg.qr(random.normal(size=(6, 6)))
    s, t = random.uniform(0.1, 4.0, (2, 6))
    mean, shift = random.normal(size=(2, 6))
    x = gaussian(mean, turn @ np.diag(s**2) @ turn.T)
    y = gaussian(mean + shift, turn @ np.diag(t**2) @ turn.T)
    closed = shift @ shift + ((s - t) ** 2).sum()
    assert frechet_distance(x, y) == pytest.approx(closed, rel=1e-9)
    assert frechet_distance(y, x) == pytest.approx(closed, rel=1e-9)
    # and not that of covariances that merely have these eigenvalues
    assert frechet_distance(x, gaussian(mean + shift, np.diag(t**2))) > 1.01 * closed


def test_the_distance_agrees_with_the_square_root_of_the_product() -> None:
    linalg = pytest.importorskip("scipy.linalg")
    random = np.random.default_rng(3)
    c, d = (random_covariance(random, 24) for _ in range(2))
    mean = random.normal(size=24)
    direct = mean @ mean + np.trace(c + d - 2 * linalg.sqrtm(c @ d).real)
    measured = frechet_distance(gaussian(np.zeros(24), c), gaussian(mean, d))
    assert measured == pytest.approx(direct, rel=1e-8)


def test_a_set_has_no_distance_from_itself_with_fewer_pictures_than_features_too() -> None:
    features = np.random.default_rng(4).normal(size=(10, 40))
    few = Moments.of(features)
    assert abs(frechet_distance(few, few)) < 1e-6 * np.trace(few.covariance)
    assert frechet_distance(few, Moments.of(features + 0.5)) == pytest.approx(10.0, rel=1e-6)


def test_what_has_no_moments_is_refused() -> None:
    with pytest.raises(RequestError, match=r"\[N, D\], got \[3\]"):
        Moments.of(np.zeros(3))
    with pytest.raises(RequestError, match="of 2 and of 3 features cannot be merged"):
        Moments.of(np.zeros((4, 2))).merge(Moments.of(np.zeros((4, 3))))
    with pytest.raises(RequestError, match="1 rows; at least 2"):
        _ = Moments.of(np.zeros((1, 2))).covariance
    with pytest.raises(RequestError, match="of one size, got 2 and 3"):
        frechet_distance(Moments.of(np.zeros((4, 2))), Moments.of(np.zeros((4, 3))))
