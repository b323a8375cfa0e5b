"""Group norm with SiLU and GEGLU: as exact as float64 allows, whatever the shape."""

from __future__ import annotations

import pytest
import torch
from torch import Tensor
from torch.nn import functional as F

from fewstep.kernels import build, pointwise

pytestmark = pytest.mark.skipif(build.library() is None, reason="no kernels here")
DTYPES = [
    torch.float32,
    pytest.param(
        torch.bfloat16,
        marks=pytest.mark.skipif(not build.has("avx512_bf16"), reason="no avx512_bf16"),
    ),
]


def picture(*shape: int, dtype: torch.dtype = torch.float32, mean: float = 3.0) -> Tensor:
    torch.manual_seed(sum(shape))
    x = torch.randn(*shape) * 2 + mean
    return x.to(dtype).contiguous(memory_format=torch.channels_last)


def exact(x: Tensor, groups: int, weight: Tensor, bias: Tensor, silu: bool) -> Tensor:
    y = F.group_norm(x.double().contiguous(), groups, weight.double(), bias.double(), 1e-5)
    return F.silu(y) if silu else y


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("silu", [False, True])
@pytest.mark.parametrize(
    ("shape", "groups"), [((2, 64, 16, 16), 32), ((1, 192, 4, 4), 32), ((3, 30, 5, 7), 3)]
)
def test_group_norm_equals_float64(
    shape: tuple[int, ...], groups: int, silu: bool, dtype: torch.dtype
) -> None:
    x = picture(*shape, dtype=dtype)
    weight, bias = torch.randn(2, shape[1]).to(dtype)
    y = pointwise.group_norm(x, groups, weight, bias, 1e-5, silu)
    assert y is not None and y.is_contiguous(memory_format=torch.channels_last)
    tolerance = (
        {"rtol": 0, "atol": 5e-6} if dtype == torch.float32 else {"rtol": 8e-3, "atol": 1e-2}
    )
    torch.testing.assert_close(y.double(), exact(x, groups, weight, bias, silu), **tolerance)


def test_large_pictures_keep_their_digits() -> None:
    # PyTorch's sums for channels last lose three digits here: 2e-4.
    x = picture(1, 32, 512, 640, mean=20.0)
    weight, bias = torch.ones(32), torch.zeros(32)
    y = pointwise.group_norm(x, 4, weight, bias, 1e-5, True)
    assert y is not None
    assert (y.double() - exact(x, 4, weight, bias, True)).abs().max() < 5e-6


def test_neither_threads_nor_neighbours_change_a_bit() -> None:
    x = picture(3, 64, 40, 40)
    weight, bias = torch.randn(2, 64)
    found = []
    before = torch.get_num_threads()
    try:
        for threads in (1, 2, 3):
            torch.set_num_threads(threads)
            found.append(pointwise.group_norm(x, 32, weight, bias, 1e-5, True))
    finally:
        torch.set_num_threads(before)
    alone = pointwise.group_norm(picture(3, 64, 40, 40)[1:2], 32, weight, bias, 1e-5, True)
    assert all(f is not None and torch.equal(f, found[0]) for f in found)
    assert found[0] is not None and alone is not None and torch.equal(alone, found[0][1:2])


def test_numbers_without_end_stay_so_within_their_group() -> None:
    x = picture(1, 32, 4, 4)
    x[0, 1, 2, 2] = torch.nan
    y = pointwise.group_norm(x, 4, torch.ones(32), torch.zeros(32), 1e-5, True)
    assert y is not None and y[0, :8].isnan().all() and y[0, 8:].isfinite().all()


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("shape", [(2, 16, 96), (1, 1, 14), (7, 2)])
def test_geglu_equals_float64(shape: tuple[int, ...], dtype: torch.dtype) -> None:
    torch.manual_seed(0)
    x = (torch.randn(*shape) * 4).to(dtype)
    h, gate = x.double().chunk(2, dim=-1)
    tolerance = (
        {"rtol": 0, "atol": 1e-5} if dtype == torch.float32 else {"rtol": 8e-3, "atol": 1e-2}
    )
    y = pointwise.geglu(x)
    assert y is not None
    torch.testing.assert_close(y.double(), h * F.gelu(gate), **tolerance)


def test_gelu_holds_at_the_ends() -> None:
    gate = torch.tensor([-1e30, -90.0, -6.0, 0.0, 6.0, 90.0, 1e30, torch.nan])
    x = torch.cat([torch.ones(8), gate])[None]
    y = pointwise.geglu(x)
    assert y is not None
    torch.testing.assert_close(y[0], F.gelu(gate), rtol=1e-6, atol=1e-6, equal_nan=True)


def test_what_the_kernel_does_not_serve_is_left_to_pytorch() -> None:
    weight, bias = torch.ones(32), torch.zeros(32)
    serve = pointwise.group_norm
    assert serve(torch.randn(1, 32, 4, 4), 4, weight, bias, 1e-5, True) is None  # not channels last
    assert serve(picture(1, 32, 4, 4).double(), 4, weight, bias, 1e-5, True) is None
    assert pointwise.geglu(torch.randn(4, 6).half()) is None
    assert pointwise.geglu(torch.randn(6, 4).T) is None
