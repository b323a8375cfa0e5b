"""Quantised layers and networks: how far they are off, what they cost, what they refuse."""

from __future__ import annotations

import copy
from typing import Any

import pytest
import torch
from torch import Tensor, nn
from torch.nn import functional as F

from fewstep import RequestError, UNet2DConditionModel
from fewstep.engine import machines, quantized
from fewstep.engine.quantize import quantization_of, quantize
from fewstep.engine.quantized import (
    Fp8Linear,
    Int8Conv2d,
    Int8Linear,
    fp8,
    quantized_input,
    quantized_weight,
    scaled_product,
)
from fewstep.kernels import build
from fewstep.kernels import quantize as codes
from fewstep.models import lora
from fewstep.ops.layers import Conv2d, Linear, added, held
from fewstep.ops.upsample import UpConv2d

int8_only = pytest.mark.skipif(not build.has("avx512_vnni"), reason="a CPU without avx512_vnni")
# Of 8 bits a weight or an input is off by about 1 % of its deviation.
ERROR = 2e-2
KIND = [pytest.param("int8", marks=int8_only), "int8-weights"]


def off(found: Tensor, exact: Tensor) -> float:
    return float((found.float() - exact.float()).norm() / exact.float().norm())


def wrapped(layer: nn.Module) -> nn.Module:
    return nn.Sequential(layer).eval()


@pytest.fixture(autouse=True)
def no_gradients() -> Any:
    torch.manual_seed(0)
    with torch.no_grad():
        yield


def unet() -> UNet2DConditionModel:
    """With layers that quantising pays for and layers that it does not."""
    torch.manual_seed(3)
    return UNet2DConditionModel(
        block_out_channels=(32, 64),
        down_block_types=("DownBlock2D", "CrossAttnDownBlock2D"),
        up_block_types=("CrossAttnUpBlock2D", "UpBlock2D"),
        layers_per_block=1,
        cross_attention_dim=64,
        attention_head_dim=4,
        norm_num_groups=8,
    ).eval()


def inputs(rows: int = 1) -> dict[str, Tensor]:
    made = torch.Generator().manual_seed(5)
    return {
        "sample": torch.randn(rows, 4, 16, 16, generator=made),
        "timestep": torch.full((rows,), 499),
        "encoder_hidden_states": torch.randn(rows, 7, 64, generator=made),
    }


def output(network: nn.Module, given: dict[str, Tensor]) -> Tensor:
    return network(**given, return_dict=False)[0]


# ── the numbers ──


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize("count", [1, 15, 16, 17, 1000, 70_001])
def test_the_kernel_gives_pytorchs_ranges_and_codes(
    dtype: torch.dtype, count: int, monkeypatch: pytest.MonkeyPatch
) -> None:
    x = torch.randn(count).to(dtype)
    ours = quantized_input(x)
    monkeypatch.setattr(codes, "_library", lambda x: None)
    theirs = quantized_input(x)
    assert ours[1:] == theirs[1:]
    assert (ours[0] == theirs[0]).all()


def test_the_number_of_threads_changes_no_code() -> None:
    x, before = torch.randn(200_001), torch.get_num_threads()
    alone = quantized_input(x)
    try:
        torch.set_num_threads(3)
        together = quantized_input(x)
    finally:
        torch.set_num_threads(before)
    assert alone[1:] == together[1:]
    assert torch.equal(alone[0], together[0])


def test_an_input_is_off_by_half_a_code_at_most_and_zero_by_nothing() -> None:
    x = torch.cat([torch.zeros(5), torch.randn(5000) + 1])
    found, scale, zero = quantized_input(x)
    again = scale * (found.float() - zero)
    assert float((again - x).abs().max()) <= 0.51 * scale
    assert (again[:5] == 0).all()


@pytest.mark.parametrize("x", [torch.zeros(40), torch.full((40,), 3.0), torch.full((40,), -1e-20)])
def test_inputs_of_one_value_are_kept(x: Tensor) -> None:
    found, scale, zero = quantized_input(x)
    assert torch.allclose(scale * (found.float() - zero), x, rtol=5e-3, atol=1e-30)


def test_nan_in_an_input_is_nan_in_the_output() -> None:
    for place in (0, 20, 39):
        x = torch.randn(40)
        x[place] = torch.nan
        assert quantized_input(x)[1] != quantized_input(x)[1]


def test_a_weights_scale_is_its_outputs_own() -> None:
    weight = torch.randn(8, 5, 3, 3) * torch.logspace(-4, 4, 8)[:, None, None, None]
    weight[3] = 0
    found, scales = quantized_weight(weight)
    again = found * scales[:, None, None, None]
    error = (again - weight).flatten(1).abs().amax(1)
    assert (error <= 0.6 * scales).all()
    assert (again[3] == 0).all()
    assert (scales == scales.bfloat16()).all()


# ── the layers ──


@pytest.mark.parametrize("kind", KIND)
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize("bias", [True, False])
def test_a_linear_layer_is_off_by_a_percent_or_two(
    kind: str, dtype: torch.dtype, bias: bool
) -> None:
    layer, x, plus = Linear(96, 64, bias), torch.randn(2, 50, 96), torch.randn(2, 50, 64)
    exact = layer(x) + plus
    network = wrapped(layer).to(dtype)
    assert quantize(network, kind) == ["0"]
    found = added(network[0], x.to(dtype), plus=plus.to(dtype))
    assert found.dtype == dtype
    assert off(found, exact) < ERROR
    assert off(network[0](x.to(dtype)), exact - plus) < ERROR


@pytest.mark.parametrize("kind", KIND)
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize("how", [{}, {"stride": 2}, {"kernel_size": 1, "padding": 0}], ids=str)
def test_a_convolution_is_off_by_a_percent_or_two(
    kind: str, dtype: torch.dtype, how: dict[str, Any]
) -> None:
    layer = Conv2d(**{"in_channels": 96, "out_channels": 64, "kernel_size": 3, "padding": 1} | how)
    weight, bias = layer.weight.clone(), layer.bias.clone()
    network = wrapped(layer).to(dtype)
    quantize(network, kind)
    for size in (8, 12, 33):  # oneDNN wants its weights in another layout for some of them
        x = torch.randn(2, 96, size, size)
        exact = F.conv2d(x, weight, bias, layer.stride, layer.padding)
        plus, shift = torch.randn_like(exact), torch.randn(2, 64)
        given, given_plus, given_shift = (y.to(dtype) for y in (x, plus, shift))
        assert off(layer(given), exact) < ERROR
        shifted = exact + shift[:, :, None, None]
        assert off(layer(given, given_shift, given_plus), shifted + plus) < ERROR
        shifted = exact + shift[:1, :, None, None]
        assert off(layer(given, shift=given_shift[:1]), shifted) < ERROR


@int8_only
def test_a_picture_does_not_depend_on_who_shares_its_batch() -> None:
    network = unet()
    quantize(network, "int8")
    both = inputs(2)
    both["sample"][1] *= 30
    alone = {name: value[:1] for name, value in both.items()}
    assert torch.allclose(output(network, both)[:1], output(network, alone), atol=1e-5)


def test_fp8s_products_are_what_its_codes_say() -> None:
    x, weight = torch.randn(40, 64) * 30, torch.randn(48, 64) / 8
    (a, s), (b, t) = fp8(x), fp8(weight)
    assert off(s * a.float(), x) < 4e-2
    assert float(a.float().abs().max()) == 448
    exact = (s * a.float()) @ (t * b.float()).T
    try:
        found = scaled_product(a, s, b, t.T.contiguous(), torch.bfloat16)
    except RuntimeError as error:
        pytest.skip(f"this PyTorch emulates no fp8 products: {error}")
    assert off(found, exact) < 5e-3


def test_an_fp8_layer_is_off_by_a_few_percent(monkeypatch: pytest.MonkeyPatch) -> None:
    def emulated(a: Tensor, s: Tensor, b: Tensor, t: Tensor, dtype: torch.dtype) -> Tensor:
        return (s * a.float() @ b.float().T * t).to(dtype)

    monkeypatch.setattr(quantized, "scaled_product", emulated)
    monkeypatch.setattr(machines, "fp8_refusal", lambda dtype, device: None)
    layer, x, plus = Linear(96, 64), torch.randn(2, 50, 96), torch.randn(2, 50, 64)
    exact = layer(x) + plus
    network = wrapped(nn.Sequential(layer, Linear(40, 200), Conv2d(96, 64, 3)))
    network.to(torch.bfloat16)
    assert quantize(network, "fp8") == ["0.0"]  # 40 inputs are no multiple of 16
    assert isinstance(layer, Fp8Linear)
    found = layer(x.bfloat16(), plus=plus.bfloat16())
    assert 1e-2 < off(found, exact) < 5e-2


@pytest.mark.skipif(not torch.cuda.is_available(), reason="no GPU")
def test_fp8_on_a_gpu_is_off_by_a_few_percent() -> None:
    layer, x = Linear(640, 1280), torch.randn(2, 50, 640)
    exact = layer(x)
    network = wrapped(layer).to("cuda", torch.bfloat16)
    quantize(network, "fp8")
    assert off(network[0](x.to("cuda", torch.bfloat16)).cpu(), exact) < 5e-2


# ── networks ──


@pytest.mark.parametrize("kind", KIND)
def test_a_network_is_off_by_a_few_percent(kind: str) -> None:
    exact = output(unet(), inputs())
    network = unet()
    changed = quantize(network, kind)
    assert quantization_of(network) == kind
    assert 1e-4 < off(output(network, inputs()), exact) < 3e-2
    assert "down_blocks.0.resnets.0.conv1" in changed
    assert not [name for name in changed if name.startswith(("conv_", "time_"))]
    assert not [name for name in changed if name.endswith("time_emb_proj")]


@pytest.mark.parametrize("kind", KIND)
def test_weights_take_a_quarter_of_float32s_memory(kind: str) -> None:
    network = wrapped(nn.Sequential(Linear(256, 256), Conv2d(64, 64, 3, padding=1))).eval()
    quantize(network, kind)
    network[0][0](torch.randn(1, 3, 256))
    network[0][1](torch.randn(1, 64, 8, 8))
    held_bytes = sum(p.untyped_storage().nbytes() for p in held(network))
    for layer in network[0]:
        assert layer.scales.dtype == torch.float32
        held_bytes += layer.scales.nbytes
        if kind == "int8":
            assert layer.codes is None  # oneDNN's copy is the only one
        else:
            assert layer.codes.dtype == torch.int8
    assert held_bytes < 4 * 2 * 400


@pytest.mark.parametrize("kind", KIND)
def test_the_dtype_may_change_afterwards(kind: str) -> None:
    network = unet()
    quantize(network, kind)
    exact = output(network, inputs())
    network.to("cpu")
    assert torch.equal(output(network, inputs()), exact)
    network.to(torch.bfloat16)
    assert network.dtype == torch.bfloat16
    given = {n: v.bfloat16() if v.is_floating_point() else v for n, v in inputs().items()}
    assert off(output(network, given), exact) < 4e-2


@pytest.mark.parametrize("kind", KIND)
@pytest.mark.parametrize(
    "use",
    [
        lambda network: network.state_dict(),
        lambda network: list(network.parameters()),
        lambda network: copy.deepcopy(network),
        lambda network: network.down_blocks[0].resnets[0].conv1.weight,
        lambda network: network.load_state_dict({}),
        lambda network: network.train(),
        lora.targets,  # which loading a LoRA begins with
    ],
)
def test_whoever_needs_the_weights_is_told_that_it_is_too_late(kind: str, use: Any) -> None:
    network = unet()
    quantize(network, kind)
    with pytest.raises(RequestError, match="load the model again, and load LoRAs, move it or save"):
        use(network)


@int8_only
def test_gradients_are_refused() -> None:
    network = unet()
    quantize(network, "int8")
    given = inputs()
    given["sample"].requires_grad_(True)
    with torch.enable_grad(), pytest.raises(RequestError, match="gives no gradients"):
        output(network, given)


def test_what_cannot_be_done_is_refused_and_changes_nothing(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    network = unet()
    before = output(network, inputs())
    cases = [
        ("int4", "quantize\\('int4'\\): is unknown; give one of int8, int8-weights, fp8"),
        ("fp8", "needs an NVIDIA GPU of compute capability 8.9 or more .* got cpu"),
    ]
    for kind, said in cases:
        with pytest.raises(RequestError, match=said):
            quantize(network, kind)
    with pytest.raises(RequestError, match="has no layers of 4096 weights or more"):
        quantize(wrapped(Linear(8, 8)), "int8-weights")
    monkeypatch.setattr(build, "has", lambda flag: False)
    with pytest.raises(RequestError, match="needs a CPU with avx512_vnni"):
        quantize(network, "int8")
    assert torch.equal(output(network, inputs()), before)


@int8_only
def test_int8_computes_beside_float32_and_bfloat16_only() -> None:
    network = unet()
    with pytest.raises(RequestError, match=r"not torch\.float16"):
        quantize(unet().half(), "int8")
    quantize(network, "int8")
    with pytest.raises(RequestError, match=r"not torch\.float16; load the model"):
        network.half()
    with pytest.raises(RequestError, match="is int8 already; load the model again"):
        quantize(network, "int8-weights")


@int8_only
def test_the_convolution_behind_an_enlargement_stays() -> None:
    network = unet()
    quantize(network, "int8")
    kinds = {type(m) for m in network.modules() if isinstance(m, (Linear, Conv2d))}
    assert {Int8Linear, Int8Conv2d, UpConv2d, Linear, Conv2d} <= kinds
