"""Our linear layers and small convolutions beside float64; packed weights, bit for bit."""

from __future__ import annotations

from collections.abc import Iterator

import pytest
import torch
from torch import Tensor
from torch.nn import functional as F

from fewstep.errors import RequestError
from fewstep.kernels import linear

pytestmark = pytest.mark.skipif(not linear.available(), reason="no AVX-512 or no C compiler")


@pytest.fixture(autouse=True)
def threads() -> Iterator[None]:
    before = torch.get_num_threads()
    yield
    torch.set_num_threads(before)


def draw(*shape: int, seed: int = 0) -> Tensor:
    return torch.randn(shape, generator=torch.Generator().manual_seed(seed))


def weights(*shape: int, half: bool = False) -> Tensor:
    """A weight that keeps the variance; `half`: of numbers that float16 holds."""
    weight = draw(*shape, seed=1) / (weight_size(shape)) ** 0.5
    return weight.half().float() if half else weight


def weight_size(shape: tuple[int, ...]) -> int:
    return torch.Size(shape[1:]).numel()


def error(y: Tensor, reference: Tensor) -> float:
    return float((y - reference).norm() / reference.norm())


@pytest.mark.parametrize("half", [False, True], ids=["float32", "float16"])
@pytest.mark.parametrize("outputs", [3, 32, 40, 192])
@pytest.mark.parametrize("inputs", [1, 8, 16, 40, 192])
@pytest.mark.parametrize("rows", [1, 13, 15, 29, 256])
def test_every_size_agrees_with_float64(rows: int, inputs: int, outputs: int, half: bool) -> None:
    x, weight, bias = draw(1, rows, inputs), weights(outputs, inputs, half=half), draw(outputs)
    panels = linear.pack(weight)
    assert panels.values.dtype == (torch.float16 if half else torch.float32)
    exact = F.linear(x.double(), weight.double(), bias.double())
    assert error(linear.linear(x, panels, bias), exact) < 1e-6
    plus = draw(1, rows, outputs, seed=3)
    assert error(linear.linear(x, panels, None, plus), exact - bias + plus) < 1e-6


@pytest.mark.parametrize("count", [1, 3])
def test_rows_of_several_blocks_and_threads_agree_with_float64(count: int) -> None:
    torch.set_num_threads(count)
    x, weight = draw(2, 300, 640), weights(96, 640)
    y = linear.linear(x, linear.pack(weight))
    assert error(y, F.linear(x.double(), weight.double())) < 1e-6


@pytest.mark.parametrize("inputs", [8, 40, 192])
def test_a_layer_norm_is_applied_first(inputs: int) -> None:
    x, weight = 3 * draw(2, 9, inputs) + 5, weights(32, inputs)
    scale, offset = draw(inputs, seed=4), draw(inputs, seed=5)
    y = linear.linear(x, linear.pack(weight), None, None, (scale, offset, 1e-5))
    normed = F.layer_norm(x.double(), (inputs,), scale.double(), offset.double(), 1e-5)
    assert error(y, F.linear(normed, weight.double())) < 2e-6


@pytest.mark.parametrize("outputs", [32, 96, 160])
@pytest.mark.parametrize("biased", [False, True])
def test_gated_panels_give_geglu(outputs: int, biased: bool) -> None:
    x, weight = draw(2, 15, 48), weights(outputs, 48)
    bias = draw(outputs, seed=2) if biased else None
    panels = linear.pack(weight, gated=True)
    both = F.linear(x.double(), weight.double(), None if bias is None else bias.double())
    h, gate = both.chunk(2, dim=-1)
    assert error(linear.linear(x, panels, bias), h * F.gelu(gate)) < 2e-6
    assert torch.equal(panels.to_dense(), weight)


@pytest.mark.parametrize(("kernel", "stride"), [(1, 1), (3, 1), (3, 2)])
@pytest.mark.parametrize("size", [(1, 8, 64, 4, 4), (2, 40, 24, 7, 5), (1, 64, 8, 16, 16)])
def test_convolutions_agree_with_float64(size: tuple[int, ...], kernel: int, stride: int) -> None:
    b, c, o, h, w = size
    x, weight, bias = draw(b, c, h, w), weights(o, c, kernel, kernel), draw(o, seed=2)
    panels = linear.pack(weight if kernel == 3 else weight.flatten(1))
    exact = F.conv2d(x.double(), weight.double(), bias.double(), stride, kernel // 2)
    shift, plus = draw(b, o, seed=3), draw(*exact.shape, seed=4)
    y = linear.convolution(x, panels, bias, shift, plus, stride)
    assert error(y, exact + shift[:, :, None, None] + plus) < 1e-6
    assert y.is_contiguous(memory_format=torch.channels_last)
    assert error(linear.convolution(x, panels, stride=stride), exact - bias[:, None, None]) < 1e-6


@pytest.mark.parametrize("shape", [(40, 24), (32, 16), (3, 5), (40, 24, 3, 3), (7, 130, 3, 3)])
@pytest.mark.parametrize("half", [False, True])
def test_a_packed_weight_comes_back_bit_for_bit(shape: tuple[int, ...], half: bool) -> None:
    weight = weights(*shape, half=half)
    back = linear.pack(weight).to_dense()
    assert torch.equal(back.view(torch.int32), weight.view(torch.int32)) and back.shape == shape


@pytest.mark.parametrize("odd", [-0.0, float("inf"), float("nan"), 65536.0, 1e-8, 2.0**-24])
def test_numbers_that_float16_does_not_hold_are_kept(odd: float) -> None:
    weight = weights(32, 16, half=True)
    weight[3, 5] = odd
    panels = linear.pack(weight)
    holds = odd in (0, float("inf"), 2.0**-24)
    assert panels.values.dtype == (torch.float16 if holds else torch.float32)
    assert torch.equal(panels.to_dense().view(torch.int32), weight.view(torch.int32))


def test_neither_threads_nor_other_rows_change_a_bit_of_a_row() -> None:
    x, panels, bias = draw(1, 250, 400), linear.pack(weights(320, 400)), draw(320)
    torch.set_num_threads(1)
    whole = linear.linear(x, panels, bias)
    for count in (2, 3):
        torch.set_num_threads(count)
        assert torch.equal(linear.linear(x, panels, bias), whole)
    assert torch.equal(linear.linear(x[:, 17:18], panels, bias), whole[:, 17:18])


def test_pictures_do_not_meet() -> None:
    x, panels = draw(3, 32, 4, 4), linear.pack(weights(32, 32, 3, 3))
    both = linear.convolution(x, panels)
    assert torch.equal(linear.convolution(x[1:2], panels), both[1:2])


def test_nothing_is_made_of_no_rows() -> None:
    panels = linear.pack(weights(32, 16))
    assert linear.linear(draw(0, 3, 16), panels).shape == (0, 3, 32)


def test_x_may_lie_anyhow() -> None:
    weight = weights(32, 16)
    x = draw(2, 16, 9).transpose(1, 2)
    assert (
        error(linear.linear(x, linear.pack(weight)), F.linear(x.double(), weight.double())) < 1e-6
    )


def test_several_weights_give_what_each_gives() -> None:
    x, norm = draw(2, 9, 48), (draw(48, seed=4), draw(48, seed=5), 1e-5)
    panels = [linear.pack(draw(64, 48, seed=seed)) for seed in range(3)]
    for found, one in zip(linear.several(x, panels, norm), panels, strict=True):
        assert torch.equal(found, linear.linear(x, one, norm=norm))


def test_the_default_dtype_of_others_does_not_matter() -> None:
    x, panels = draw(1, 9, 16), linear.pack(weights(32, 16))
    expected = linear.linear(x, panels)
    torch.set_default_dtype(torch.float64)
    try:
        assert torch.equal(linear.linear(x, panels), expected)
    finally:
        torch.set_default_dtype(torch.float32)


def test_what_would_be_read_wrongly_is_refused() -> None:
    x, panels = draw(1, 9, 16), linear.pack(weights(32, 16))
    for plus in (draw(1, 1, 32), draw(1, 9, 32).double()):
        with pytest.raises(RequestError, match=r"plus is .*: give torch\.float32 of \(1, 9, 32\)"):
            linear.linear(x, panels, None, plus)
    with pytest.raises(RequestError, match=r"x is torch\.float64 on cpu: this kernel computes"):
        linear.linear(x.double(), panels)
