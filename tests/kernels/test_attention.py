"""Attention by our kernel: exact as PyTorch's, for any shape, stride and number of threads."""

from __future__ import annotations

from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor

import pytest
import torch
from torch import Tensor
from torch.nn.functional import scaled_dot_product_attention

from fewstep.kernels import attention, build

TYPES = [torch.bfloat16, torch.float32]
SHAPES = [  # batch, heads, queries, keys, numbers of a head
    (1, 8, 64, 64, 40),
    (1, 2, 1000, 1000, 40),
    (1, 5, 256, 77, 80),
    (2, 2, 64, 500, 160),
    (2, 3, 70, 77, 16),
    (1, 1, 5, 3, 8),
    (1, 1, 1, 1, 8),
    (3, 2, 9, 49, 24),
    (1, 2, 33, 385, 64),
    (1, 2, 100, 769, 120),
    (2, 1, 17, 33, 32),
    (1, 1, 64, 3000, 64),
]


@pytest.fixture(autouse=True)
def _kernels() -> Iterator[None]:
    if build.library() is None:
        pytest.skip(build.kernels().reason)
    with torch.no_grad():
        yield


def kernel(q: Tensor, k: Tensor, v: Tensor, heads: int, scale: float | None = None) -> Tensor:
    if q.dtype == torch.bfloat16 and (not build.has("avx512_bf16") or build.has("amx_bf16")):
        pytest.skip("bfloat16 is left to PyTorch on this CPU")
    out = attention(q, k, v, heads, scale)
    assert out is not None
    return out


def draw(*shape: int, dtype: torch.dtype, seed: int = 0) -> Tensor:
    generator = torch.Generator().manual_seed(seed)
    return (2 * torch.randn(shape, generator=generator)).to(dtype)


def split(x: Tensor, heads: int) -> Tensor:
    return x.unflatten(-1, (heads, -1)).transpose(1, 2)


def exact(q: Tensor, k: Tensor, v: Tensor, heads: int, scale: float | None = None) -> Tensor:
    """Softmax attention in float64."""
    q, k, v = (split(x.double(), heads) for x in (q, k, v))
    scores = q @ k.mT * (q.shape[-1] ** -0.5 if scale is None else scale)
    return (scores.softmax(-1) @ v).transpose(1, 2).flatten(2)


def pytorch(q: Tensor, k: Tensor, v: Tensor, heads: int) -> Tensor:
    q, k, v = (split(x, heads) for x in (q, k, v))
    return scaled_dot_product_attention(q, k, v).transpose(1, 2).flatten(2)


def error(x: Tensor, right: Tensor) -> float:
    return float((x.double() - right).norm() / right.norm())


@pytest.mark.parametrize("dtype", TYPES, ids=str)
@pytest.mark.parametrize("shape", SHAPES, ids=str)
def test_it_errs_no_more_than_pytorch(shape: tuple[int, ...], dtype: torch.dtype) -> None:
    batch, heads, n, m, d = shape
    q = draw(batch, n, heads * d, dtype=dtype)
    k, v = (draw(batch, m, heads * d, dtype=dtype, seed=seed) for seed in (1, 2))
    right = exact(q, k, v, heads)
    out = kernel(q, k, v, heads)
    assert out.shape == q.shape and out.dtype == dtype and out.is_contiguous()
    factor = 1.1 if dtype == torch.bfloat16 else 2
    assert error(out, right) <= factor * error(pytorch(q, k, v, heads), right)


def test_the_one_wide_head_of_an_autoencoder_is_served_in_bfloat16_only() -> None:
    q, k, v = (draw(1, 90, 512, dtype=torch.bfloat16, seed=seed) for seed in range(3))
    right = exact(q, k, v, 1)
    assert error(kernel(q, k, v, 1), right) <= 1.1 * error(pytorch(q, k, v, 1), right)
    assert attention(q.float(), k.float(), v.float(), 1) is None


@pytest.mark.parametrize("dtype", TYPES, ids=str)
def test_slices_of_a_fused_projection_are_read_where_they_are(dtype: torch.dtype) -> None:
    fused = draw(2, 50, 3 * 96 + 8, dtype=dtype)
    q, k, v = fused[..., :96], fused[..., 96:192], fused[..., 192:288]
    dense = kernel(q.contiguous(), k.contiguous(), v.contiguous(), 2)
    assert torch.equal(kernel(q, k, v, 2), dense)
    rows = draw(2, 100, 96, dtype=dtype)[:, ::2]
    assert torch.equal(kernel(q, rows, rows, 2), kernel(q, rows.clone(), rows.clone(), 2))


@pytest.mark.parametrize("dtype", TYPES, ids=str)
def test_a_condition_for_all_rows_is_expanded_without_a_copy(dtype: torch.dtype) -> None:
    q, k = draw(3, 20, 32, dtype=dtype), draw(1, 9, 32, dtype=dtype, seed=1)
    shared = k.expand(3, -1, -1)
    assert torch.equal(kernel(q, shared, shared, 2), kernel(q, shared.clone(), shared.clone(), 2))


@pytest.mark.parametrize("dtype", TYPES, ids=str)
def test_the_number_of_threads_changes_no_bit(dtype: torch.dtype) -> None:
    q, k, v = (draw(1, 500, 80, dtype=dtype, seed=seed) for seed in range(3))
    before, results = torch.get_num_threads(), []
    try:
        for threads in (1, 2, 3, 7):
            torch.set_num_threads(threads)
            results.append(kernel(q, k, v, 2))
    finally:
        torch.set_num_threads(before)
    assert all(torch.equal(results[0], other) for other in results[1:])


@pytest.mark.parametrize("dtype", TYPES, ids=str)
def test_a_row_does_not_depend_on_its_neighbours(dtype: torch.dtype) -> None:
    q, k, v = (draw(2, 90, 80, dtype=dtype, seed=seed) for seed in range(3))
    whole = kernel(q, k, v, 2)
    assert torch.equal(kernel(q[1:, 5:30], k[1:], v[1:], 2), whole[1:, 5:30])


@pytest.mark.parametrize("dtype", TYPES, ids=str)
def test_the_scale_is_taken(dtype: torch.dtype) -> None:
    q, k, v = (draw(1, 40, 32, dtype=dtype, seed=seed) for seed in range(3))
    right = exact(q, k, v, 2, scale=0.03)
    assert error(kernel(q, k, v, 2, scale=0.03), right) < 3e-3
    assert error(kernel(q, k, v, 2), right) > 0.1


@pytest.mark.parametrize("dtype", TYPES, ids=str)
def test_scores_far_apart_neither_overflow_nor_vanish(dtype: torch.dtype) -> None:
    q = 100 * draw(1, 20, 16, dtype=dtype)
    k, v = (draw(1, 900, 16, dtype=dtype, seed=seed) for seed in (1, 2))
    assert error(kernel(q, k, v, 1), exact(q, k, v, 1)) < (
        4e-3 if dtype == torch.bfloat16 else 2e-5
    )


@pytest.mark.parametrize("dtype", TYPES, ids=str)
@pytest.mark.parametrize("bad", [float("nan"), float("inf"), float("-inf")])
@pytest.mark.parametrize("place", ["q", "k", "v"])
def test_what_is_not_finite_stays_so_as_in_pytorch(
    place: str, bad: float, dtype: torch.dtype
) -> None:
    inputs = {name: draw(1, 450, 32, dtype=dtype, seed=seed) for seed, name in enumerate("qkv")}
    inputs[place][0, 13, 3] = bad
    out = kernel(inputs["q"], inputs["k"], inputs["v"], 2)
    right = exact(inputs["q"], inputs["k"], inputs["v"], 2)
    assert torch.equal(out.isfinite(), right.isfinite())
    assert not out.isfinite().all()


def test_other_types_devices_and_shapes_are_left_to_pytorch() -> None:
    x = torch.ones(1, 4, 96)
    assert attention(x, x, x, 2) is not None
    for other in (x.half(), x.double(), x.to("meta"), x[:, :0]):
        assert attention(other, other, other, 2) is None
    assert attention(x, x[:, :0], x[:, :0], 2) is None  # no keys
    assert attention(x, x.bfloat16(), x, 2) is None
    assert attention(x, x, x, 16) is None  # heads of 6 numbers
    assert attention(x, x, x, 5) is None  # 96 numbers are not 5 heads


def test_gradients_are_left_to_pytorch() -> None:
    q, x = torch.ones(1, 4, 32, requires_grad=True), torch.ones(1, 4, 32)
    assert attention(q, x, x, 2) is not None  # the fixture's no_grad
    with torch.enable_grad():
        assert attention(q, x, x, 2) is None and attention(x, x, q, 2) is None
        assert attention(x, x, x, 2) is not None


@pytest.mark.parametrize("dtype", TYPES, ids=str)
def test_threads_of_python_may_call_at_one_time(dtype: torch.dtype) -> None:
    inputs = [draw(1, 200 + 50 * i, 80, dtype=dtype, seed=i) for i in range(6)]
    alone = [kernel(x, x, x, 2) for x in inputs]

    def call(x: Tensor) -> Tensor:
        with torch.no_grad():  # a setting of each thread
            return kernel(x, x, x, 2)

    with ThreadPoolExecutor(3) as pool:
        together = list(pool.map(call, inputs * 3))
    assert all(torch.equal(x, y) for x, y in zip(together, alone * 3, strict=True))


def test_rows_that_are_not_dense_are_left_to_pytorch() -> None:
    q = torch.ones(1, 4, 64)
    assert attention(q[..., ::2], q[..., ::2], q[..., ::2], 2) is None
    assert attention(q, q[..., :32], q[..., :32], 2) is None
