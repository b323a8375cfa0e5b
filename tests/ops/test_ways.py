"""Our own kernels within the layers: the same results, and the weights back for whoever asks."""

from __future__ import annotations

import copy
from typing import Any

import pytest
import torch
from torch import Tensor, nn
from torch.nn import functional as F

from fewstep.kernels import linear
from fewstep.models.layers import Context, TransformerBlock
from fewstep.ops import ways
from fewstep.ops.layers import Conv2d, Linear, plain
from fewstep.ops.norm import fuses
from fewstep.ops.upsample import Upsample

pytestmark = pytest.mark.skipif(not linear.available(), reason="no AVX-512 or no C compiler")


def block() -> tuple[TransformerBlock, Tensor, Context]:
    torch.manual_seed(0)
    made = TransformerBlock(64, 4, 24, upcast=False).eval()
    for parameter in made.parameters():  # norms that do something
        nn.init.normal_(parameter, std=0.3)
    return made, torch.randn(2, 9, 64), Context(torch.randn(2, 7, 24))


def beside_plain(compute: Any) -> tuple[Tensor, Tensor]:
    with torch.no_grad():
        with plain():
            expected = compute()
        return compute(), expected


def test_a_transformer_block_fuses_norms_and_gates_and_gives_the_same() -> None:
    made, x, text = block()
    found, expected = beside_plain(lambda: made(x, text))
    torch.testing.assert_close(found, expected, rtol=1e-5, atol=1e-5)
    proj = made.ff.net[0].proj
    assert proj._pack_size == ways.GATED
    assert all(type(m._pack) is linear.Panels for m in made.modules() if isinstance(m, Linear))


def test_fused_weights_come_back_bit_for_bit() -> None:
    made, x, text = block()
    before = {name: value.clone() for name, value in made.state_dict().items()}
    with torch.no_grad():
        made(x, text)
    for name, value in copy.deepcopy(made).state_dict().items():
        assert torch.equal(value, before[name]), name


@pytest.mark.parametrize("name", ["norm3", "ff.net.0.proj", "norm1", "attn1.to_k"])
def test_who_watches_a_layer_sees_what_goes_through(name: str) -> None:
    made, x, text = block()
    seen: list[Tensor] = []
    made.get_submodule(name).register_forward_hook(lambda m, args, y: seen.append(y))
    found, expected = beside_plain(lambda: made(x, text))
    torch.testing.assert_close(found, expected, rtol=1e-5, atol=1e-5)
    assert len(seen) == 2
    torch.testing.assert_close(seen[1], seen[0], rtol=1e-5, atol=1e-5)


@pytest.mark.parametrize("why", ["gradient", "many rows", "no bias", "another layer", "dtype"])
def test_what_cannot_be_fused_is_not(why: str) -> None:
    norm, layer, x = nn.LayerNorm(16), Linear(16, 32), torch.randn(1, 9, 16)
    with torch.no_grad():
        assert fuses(norm.eval(), x, layer.eval())
    if why == "gradient":
        assert not fuses(norm, x, layer)
        return
    x = torch.randn(1, 257, 16) if why == "many rows" else x
    norm = nn.LayerNorm(16, bias=False).eval() if why == "no bias" else norm
    x = x.bfloat16() if why == "dtype" else x
    layers = [layer, nn.Linear(16, 32)] if why == "another layer" else [layer]
    with torch.no_grad():
        assert not fuses(norm, x, *layers)


def test_a_layer_keeps_its_pack_for_any_number_of_rows() -> None:
    torch.manual_seed(0)
    layer = Linear(16, 32).eval()
    weight, bias = layer.weight.detach().clone(), layer.bias.detach()
    for rows in (3, 300, 3):
        x = torch.randn(1, rows, 16)
        with torch.no_grad():
            found, expected = layer(x), F.linear(x, weight, bias)
        torch.testing.assert_close(found, expected, rtol=1e-5, atol=1e-5)
        assert type(layer._pack) is linear.Panels
    with torch.no_grad():
        assert layer.gated(x).shape == (1, 3, 16)
        torch.testing.assert_close(layer(x), expected, rtol=1e-5, atol=1e-5)  # packed anew


WAYS = {  # channels, outputs, kernel, stride, size -> how the weight is packed
    "pixels": ((24, 40, 1, 1, 9), linear.Panels),
    "gathered": ((32, 64, 3, 1, 4), linear.Panels),
    "halved": ((32, 64, 3, 2, 8), linear.Panels),
    "odd channels": ((8, 24, 3, 1, 16), linear.Panels),
    "prepared": ((32, 64, 3, 1, 12), ways.Prepared),
    "plain": ((32, 64, 3, 1, 40), type(None)),
}


@pytest.mark.parametrize("name", WAYS)
def test_each_size_of_convolution_goes_its_way(name: str) -> None:
    (c, o, kernel, stride, size), kind = WAYS[name]
    torch.manual_seed(0)
    layer = Conv2d(c, o, kernel, stride=stride, padding=kernel // 2).eval()
    before = layer.weight.detach().clone()
    x, shift = torch.randn(2, c, size, size), torch.randn(1, o)
    x = x[:1] if kernel == 3 and stride == 1 and kind is linear.Panels else x
    found, expected = beside_plain(lambda: layer(x, shift=shift))
    torch.testing.assert_close(found, expected, rtol=1e-5, atol=1e-5)
    assert type(layer._pack) is kind
    assert torch.equal(layer.weight, before)
    assert layer._pack is None


def test_a_convolution_changes_its_way_with_the_size() -> None:
    torch.manual_seed(0)
    layer = Conv2d(32, 32, 3, padding=1).eval()
    for size in (4, 40, 12, 4):
        x = torch.randn(1, 32, size, size)
        found, expected = beside_plain(lambda x=x: layer(x))
        torch.testing.assert_close(found, expected, rtol=1e-5, atol=1e-5)


def test_weights_written_after_a_call_take_effect() -> None:
    torch.manual_seed(0)
    layer, x = Conv2d(32, 32, 3, padding=1).eval(), torch.randn(1, 32, 12, 12)
    with torch.no_grad():
        before = layer(x)
        assert type(layer._pack) is ways.Prepared
        layer.weight.data.mul_(2)
        layer.bias.data.mul_(2)
        torch.testing.assert_close(layer(x), 2 * before, rtol=1e-5, atol=1e-5)


def test_an_enlargement_of_a_small_picture_gives_the_same() -> None:
    torch.manual_seed(0)
    layer, x = Upsample(128).eval(), torch.randn(1, 128, 6, 6)
    found, expected = beside_plain(lambda: layer(x))
    torch.testing.assert_close(found, expected, rtol=1e-5, atol=1e-5)
    assert type(layer.conv._pack) is ways.Prepared
