"""Winograd's 3x3 convolution beside float64, for every size, dtype, thread, batch; its refusals."""

from __future__ import annotations

from collections.abc import Iterator

import pytest
import torch
from torch import Tensor
from torch.nn import functional as F

from fewstep.errors import RequestError
from fewstep.kernels import build, winograd
from fewstep.kernels.winograd import conv3x3, pays, prepare

needs_kernel = pytest.mark.skipif(not winograd.available(), reason="no AVX-512 or no C compiler")


@pytest.fixture(autouse=True)
def threads() -> Iterator[None]:
    before = torch.get_num_threads()
    yield
    torch.set_num_threads(before)


def draw(*shape: int, seed: int = 0) -> Tensor:
    return torch.randn(shape, generator=torch.Generator().manual_seed(seed))


def layer(c: int, o: int) -> tuple[Tensor, Tensor]:
    """A weight that keeps the variance, and a bias."""
    return draw(o, c, 3, 3, seed=1) / (9 * c) ** 0.5, draw(o, seed=2)


def exact(x: Tensor, weight: Tensor, bias: Tensor | None = None) -> Tensor:
    bias = None if bias is None else bias.double()
    return F.conv2d(x.double(), weight.double(), bias, padding=1)


def error(y: Tensor, reference: Tensor) -> float:
    return float((y - reference).norm() / reference.norm())


SIZES = [
    (1, 16, 32, 1, 1),
    (2, 16, 32, 3, 4),
    (1, 32, 64, 4, 4),
    (3, 48, 96, 5, 7),
    (1, 16, 160, 17, 9),
    (2, 64, 64, 33, 31),  # 144 tiles: several blocks
    (1, 320, 320, 16, 16),
    (1, 512, 512, 33, 32),  # weights made by each of several blocks
]


@needs_kernel
@pytest.mark.parametrize("size", SIZES, ids=str)
@pytest.mark.parametrize("prepared", [False, True], ids=["plain", "prepared"])
def test_every_size_agrees_with_float64(size: tuple[int, ...], prepared: bool) -> None:
    b, c, o, h, w = size
    x, (weight, bias) = draw(b, c, h, w), layer(c, o)
    y = conv3x3(x, prepare(weight) if prepared else weight, bias)
    assert y.shape == (b, o, h, w)
    assert y.is_contiguous(memory_format=torch.channels_last)
    assert error(y, exact(x, weight, bias)) < 2e-6


@needs_kernel
@pytest.mark.parametrize("size", SIZES, ids=str)
@pytest.mark.parametrize("prepared", [False, True], ids=["plain", "prepared"])
def test_bfloat16_is_float64_rounded_once_but_for_one_output_in_a_hundred(
    size: tuple[int, ...], prepared: bool
) -> None:
    b, c, o, h, w = size
    x, weight, bias = (t.bfloat16() for t in (draw(b, c, h, w), *layer(c, o)))
    y = conv3x3(x, prepare(weight) if prepared else weight, bias)
    reference = exact(x, weight, bias)
    assert y.shape == (b, o, h, w) and y.dtype == torch.bfloat16
    assert y.is_contiguous(memory_format=torch.channels_last)
    assert float((y != reference.bfloat16()).float().mean()) < 0.01
    assert error(y, reference) < error(F.conv2d(x, weight, bias, padding=1), reference) + 1e-6


@needs_kernel
def test_bfloat16_with_added_terms_rounds_less_than_the_direct_convolution() -> None:
    given = draw(2, 64, 9, 14), *layer(64, 96), draw(2, 96, seed=3), draw(2, 96, 9, 14, seed=4)
    x, weight, bias, shift, residual = (t.bfloat16() for t in given)
    reference = exact(x, weight, bias) + shift.double()[:, :, None, None] + residual.double()
    y = conv3x3(x, weight, bias, shift, residual)
    direct = F.conv2d(x, weight, bias, padding=1) + shift[:, :, None, None] + residual
    assert float((y != reference.bfloat16()).float().mean()) < 0.01
    assert error(y, reference) < 0.8 * error(direct, reference)
    for name, term in {"bias": bias, "shift": shift, "residual": residual}.items():
        added = term.double().reshape((-1, 96, 1, 1) if term.ndim < 4 else term.shape)
        assert error(conv3x3(x, weight, **{name: term}), exact(x, weight) + added) < 2e-3


@needs_kernel
def test_bfloat16_rounds_ties_to_even_and_keeps_infinities_and_nan() -> None:
    x, weight = torch.zeros(1, 16, 1, 1).bfloat16(), torch.zeros(32, 16, 3, 3).bfloat16()
    bias, residual = torch.ones(32).bfloat16(), torch.zeros(1, 32, 1, 1).bfloat16()
    special = [torch.inf, -torch.inf, torch.nan]
    residual[0, :6, 0, 0] = torch.tensor([2**-8, 3 * 2**-8, -(2**-9), *special])
    y = conv3x3(x, weight, bias, residual=residual)[0, :7, 0, 0].float()
    wanted = torch.tensor([1, 1 + 2**-6, 1, *special, 1])
    torch.testing.assert_close(y, wanted, rtol=0, atol=0, equal_nan=True)
    for bits in (0x7FFF, 0x7F81, -1):
        nan = torch.full((32,), bits, dtype=torch.int16).view(torch.bfloat16)
        assert conv3x3(x, weight, nan).isnan().all()
        assert conv3x3(nan[:16].view_as(x), weight).isnan().all()


@needs_kernel
def test_rounding_stays_below_1e_5_at_the_most_channels_and_of_inputs_with_a_mean() -> None:
    x, (weight, bias) = F.silu(draw(1, 1280, 8, 8)), layer(1280, 64)
    assert error(conv3x3(x, weight), exact(x, weight)) < 6e-6
    assert error(conv3x3(x, weight, bias), exact(x, weight, bias)) < 6e-6


@needs_kernel
def test_each_position_and_tap_is_met_once() -> None:
    # One pixel lit: the weight's taps, mirrored, lie around it, also over the edges of tiles.
    weight = draw(32, 16, 3, 3)
    for row, column in [(0, 0), (3, 4), (4, 3), (8, 8), (5, 0)]:
        x = torch.zeros(1, 16, 9, 9)
        x[0, 7, row, column] = 1
        torch.testing.assert_close(
            conv3x3(x, weight), F.conv2d(x, weight, padding=1), rtol=0, atol=5e-6
        )


@needs_kernel
def test_bias_shift_and_residual_are_added_each_alone_and_together() -> None:
    x, (weight, bias) = draw(3, 16, 6, 5), layer(16, 64)
    shift, residual = draw(3, 64, seed=3), draw(3, 64, 6, 5, seed=4)
    plain = exact(x, weight)
    terms = {
        "bias": (bias, bias[:, None, None]),
        "shift": (shift, shift[:, :, None, None]),
        "residual": (residual, residual),
    }
    for name, (given, added) in terms.items():
        assert error(conv3x3(x, weight, **{name: given}), plain + added) < 2e-6
    every = {name: given for name, (given, _) in terms.items()}
    total = plain + sum(added for _, added in terms.values())
    assert error(conv3x3(x, weight, **every), total) < 2e-6
    channels_last = residual.contiguous(memory_format=torch.channels_last)
    assert torch.equal(
        conv3x3(x, weight, residual=channels_last), conv3x3(x, weight, None, None, residual)
    )


@needs_kernel
def test_shift_follows_its_row_where_a_block_spans_pictures() -> None:
    x, (weight, _) = draw(1, 16, 4, 4).expand(5, 16, 4, 4), layer(16, 32)
    shift = torch.arange(5.0)[:, None].expand(5, 32)
    y = conv3x3(x, weight, shift=shift)
    torch.testing.assert_close(y[4] - y[0], torch.full_like(y[0], 4.0), rtol=0, atol=1e-5)


@needs_kernel
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=str)
@pytest.mark.parametrize("size", [8, 36], ids=["one block", "several blocks"])
def test_threads_batch_and_preparation_change_no_bit(size: int, dtype: torch.dtype) -> None:
    given = draw(3, 144, size, size), *layer(144, 96)  # more channels than are made at a time
    x, weight, bias = (t.to(dtype) for t in given)
    torch.set_num_threads(1)
    y = conv3x3(x, weight, bias)
    for threads in (2, 3, 5):
        torch.set_num_threads(threads)
        assert torch.equal(conv3x3(x, weight, bias), y)
        assert torch.equal(conv3x3(x, prepare(weight), bias), y)
        assert torch.equal(conv3x3(x[1:2], weight, bias), y[1:2])


@needs_kernel
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=str)
def test_layouts_of_input_and_weight_change_no_bit(dtype: torch.dtype) -> None:
    x, weight, bias = (t.to(dtype) for t in (draw(2, 32, 9, 9), *layer(32, 64)))
    y = conv3x3(x, weight, bias)
    assert torch.equal(conv3x3(x.contiguous(memory_format=torch.channels_last), weight, bias), y)
    assert torch.equal(conv3x3(x.mT.contiguous().mT, weight, bias), y)
    permuted = weight.permute(2, 3, 1, 0).contiguous().permute(3, 2, 0, 1)
    flipped = weight.mT.contiguous().mT  # its taps lie at two distances
    for same in (weight.contiguous(memory_format=torch.channels_last), permuted, flipped):
        assert torch.equal(conv3x3(x, same, bias), y)
        assert torch.equal(prepare(same), prepare(weight))


@needs_kernel
def test_the_default_dtype_does_not_matter(monkeypatch: pytest.MonkeyPatch) -> None:
    x, (weight, bias) = draw(1, 32, 9, 9), layer(32, 64)
    y, before = conv3x3(x, weight, bias), torch.get_default_dtype()
    try:
        for dtype in (torch.bfloat16, torch.float64):
            torch.set_default_dtype(dtype)
            assert torch.equal(conv3x3(x, weight, bias), y)
    finally:
        torch.set_default_dtype(before)


@needs_kernel
def test_a_call_leaves_its_arguments_as_they_are() -> None:
    x, (weight, bias) = draw(1, 16, 8, 8), layer(16, 32)
    residual = draw(1, 32, 8, 8, seed=5)
    before = [t.clone() for t in (x, weight, bias, residual)]
    conv3x3(x, weight, bias, None, residual)
    assert all(torch.equal(a, b) for a, b in zip(before, (x, weight, bias, residual), strict=True))


@needs_kernel
def test_prepared_weights_are_four_times_as_large_and_an_empty_batch_is_empty() -> None:
    weight, _ = layer(32, 64)
    packed = prepare(weight)
    assert packed.shape == (36, 2, 32, 32)
    assert packed.numel() == 4 * weight.numel()
    assert conv3x3(draw(0, 32, 8, 8), packed).shape == (0, 64, 8, 8)


def test_the_rule_takes_large_pictures_and_refuses_few_pixels_and_odd_channels() -> None:
    assert pays(320, 320, 64, 64) and pays(128, 128, 512, 512) and pays(64, 64, 16, 16)
    assert pays(1280, 1280, 12, 12) and not pays(1280, 1280, 8, 8)
    assert not pays(4, 320, 64, 64) and not pays(320, 4, 64, 64) and not pays(320, 48, 64, 64)


def test_the_rule_for_bfloat16_asks_for_more_pixels_or_channels_and_for_a_cpu_without_amx(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    def takes(c: int, size: int) -> bool:
        return pays(c, c, size, size, dtype=torch.bfloat16)

    monkeypatch.setattr(build, "flags", lambda: frozenset({"avx512_bf16"}))
    assert takes(1280, 16) and takes(320, 64) and takes(128, 512) and takes(64, 64)
    assert not takes(1280, 8) and not takes(1280, 17) and pays(1280, 1280, 17, 17)
    assert not pays(16, 32, 64, 64, dtype=torch.bfloat16) and pays(16, 32, 64, 64)
    assert not pays(320, 320, 64, 64, dtype=torch.float16)
    monkeypatch.setattr(build, "flags", lambda: frozenset({"avx512_bf16", "amx_bf16"}))
    assert not takes(320, 64) and pays(320, 320, 64, 64)


@needs_kernel
def test_what_the_kernel_would_read_wrongly_is_refused_by_name() -> None:
    x, (weight, bias) = draw(2, 16, 4, 4), layer(16, 32)
    with pytest.raises(RequestError, match=r"x has shape \(2, 32, 4, 4\): give \(B, 16, H, W\)"):
        conv3x3(draw(2, 32, 4, 4), weight)
    with pytest.raises(RequestError, match=r"bias has shape \(16,\): give \(32,\)"):
        conv3x3(x, weight, bias[:16])
    with pytest.raises(RequestError, match=r"shift has shape \(1, 32\): give \(2, 32\)"):
        conv3x3(x, weight, shift=draw(1, 32))
    with pytest.raises(RequestError, match="residual has shape"):
        conv3x3(x, weight, residual=draw(2, 32, 4, 5))
    with pytest.raises(RequestError, match=r"weight is torch\.float32: give torch\.bfloat16, as x"):
        conv3x3(x.bfloat16(), weight)
    with pytest.raises(RequestError, match=r"bias is torch\.bfloat16: give torch\.float32, as x"):
        conv3x3(x, prepare(weight), bias.bfloat16())
    with pytest.raises(RequestError, match=r"x is torch\.float16"):
        conv3x3(x.half(), weight)
    with pytest.raises(
        RequestError, match=r"weight is torch\.bfloat16: give torch\.float32, as pre"
    ):
        conv3x3(x.bfloat16(), prepare(weight).bfloat16())
    with pytest.raises(RequestError, match=r"weight is torch\.float64"):
        prepare(weight.double())
    for shape in [(32, 8, 3, 3), (16, 16, 3, 3), (32, 16, 1, 1), (32, 16, 3)]:
        with pytest.raises(RequestError, match="weight has shape"):
            conv3x3(x, draw(*shape))


@needs_kernel
def test_a_gradient_that_it_would_lose_is_refused() -> None:
    x, (weight, bias) = draw(1, 16, 4, 4), layer(16, 32)
    with pytest.raises(RequestError, match="bias requires a gradient"):
        conv3x3(x, weight, bias.requires_grad_())
    with torch.no_grad():
        assert not conv3x3(x, weight.requires_grad_(), bias).requires_grad


def test_without_a_kernel_the_call_says_why(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(build, "kernels", lambda: build.Kernels(None, "no compiler"))
    monkeypatch.setattr(build, "library", lambda: None)
    winograd._kernel.cache_clear()
    assert not winograd.available()
    with pytest.raises(
        RequestError, match=r"no Winograd kernel here \(no compiler\): ask available"
    ):
        conv3x3(draw(1, 16, 4, 4), draw(32, 16, 3, 3))
    winograd._kernel.cache_clear()
