"""Packed weights: the same results, one copy, and the weight back for whoever asks."""

from __future__ import annotations

import copy
import threading
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor, nn

from fewstep import AutoencoderKL, UNet2DConditionModel
from fewstep.ops.layers import Conv2d, Linear, hollow, packable, plain
from fewstep.ops.memory import release_pages
from fewstep.ops.upsample import Upsample

pytestmark = pytest.mark.skipif(
    not packable(torch.float32), reason="this build of PyTorch cannot pack weights"
)

TINY: dict[str, Any] = {
    "sample_size": 8,
    "block_out_channels": (16, 32),
    "norm_num_groups": 4,
    "down_block_types": ("DownBlock2D", "CrossAttnDownBlock2D"),
    "up_block_types": ("CrossAttnUpBlock2D", "UpBlock2D"),
    "layers_per_block": 1,
    "attention_head_dim": 2,
    "cross_attention_dim": 8,
}


@pytest.fixture
def unet() -> UNet2DConditionModel:
    torch.manual_seed(0)
    return UNet2DConditionModel(**TINY).eval()


def inputs(size: int = 8) -> tuple[Tensor, Tensor, Tensor]:
    generator = torch.Generator().manual_seed(1)
    return (
        torch.randn(2, 4, size, size, generator=generator),
        torch.tensor([999, 19]),
        torch.randn(2, 5, 8, generator=generator),
    )


def run(unet: UNet2DConditionModel, size: int = 8) -> Tensor:
    with torch.no_grad():
        return unet(*inputs(size)).sample


def packed_layers(network: nn.Module) -> list[nn.Module]:
    return [m for m in network.modules() if getattr(m, "_pack", None) is not None]


def test_packed_weights_change_nothing_but_rounding(unet: UNet2DConditionModel) -> None:
    with plain():
        expected = run(unet)
        assert not packed_layers(unet)
    torch.testing.assert_close(run(unet), expected, rtol=1e-5, atol=1e-5)
    assert len(packed_layers(unet)) > 20


def test_there_is_one_copy_of_a_packed_weight(unet: UNet2DConditionModel) -> None:
    run(unet)
    for layer in packed_layers(unet):
        held = layer._parameters["weight"]
        assert held is not None and held.untyped_storage().nbytes() == held.element_size()


def test_every_way_to_the_weights_gives_them_back_bit_for_bit(unet: UNet2DConditionModel) -> None:
    before = {name: value.clone() for name, value in unet.state_dict().items()}
    ways = {
        "state_dict": lambda: unet.state_dict(),
        "parameters": lambda: dict(unet.named_parameters()),
        "copy": lambda: copy.deepcopy(unet).state_dict(),
        "weight": lambda: {
            f"{name}.weight": module.weight
            for name, module in unet.named_modules()
            if isinstance(module, (Linear, Conv2d))
        },
        "part": lambda: {f"mid_block.{k}": v for k, v in unet.mid_block.state_dict().items()},
        "to": lambda: unet.to(torch.float64).to(torch.float32).state_dict(),
        "training": lambda: unet.train().eval().state_dict(),
    }
    for way, values in ways.items():
        run(unet)
        assert packed_layers(unet), way
        for name, value in values().items():
            assert torch.equal(value, before[name]), (way, name)


def test_weights_that_are_loaded_or_written_take_effect(unet: UNet2DConditionModel) -> None:
    other = UNet2DConditionModel(**TINY).eval()
    expected = run(other)
    run(unet)
    unet.load_state_dict(other.state_dict())
    torch.testing.assert_close(run(unet), expected, rtol=0, atol=1e-5)
    with torch.no_grad():
        unet.conv_in.weight.mul_(2)
    assert not torch.allclose(run(unet), expected, atol=1e-3)


def test_a_parameter_that_was_held_from_before_can_be_replaced(unet: UNet2DConditionModel) -> None:
    parameter = unet.conv_out.weight
    before = run(unet)
    parameter.data = torch.zeros_like(before[0, :1, :1, :1]).expand(4, 16, 3, 3).clone()
    after = run(unet)
    expected = unet.conv_out.bias[None, :, None, None].expand_as(after)
    torch.testing.assert_close(after, expected, rtol=0, atol=1e-6)


def test_an_optimizer_keeps_its_parameters_through_packing(unet: UNet2DConditionModel) -> None:
    optimizer = torch.optim.SGD(unet.parameters(), lr=0.1)
    before = run(unet)
    unet(*inputs()).sample.square().mean().backward()
    optimizer.step()
    assert not torch.allclose(run(unet), before)
    assert all(p.grad is not None for p in unet.parameters())


@pytest.mark.parametrize("why", ["gradient", "training", "autocast", "plain"])
def test_weights_stay_where_packing_would_be_in_the_way(
    unet: UNet2DConditionModel, why: str
) -> None:
    if why == "gradient":
        unet(*inputs())
    elif why == "training":
        run(unet.train())
    elif why == "autocast":
        with torch.autocast("cpu", torch.bfloat16):
            run(unet)
    else:
        with plain():
            run(unet)
    assert not packed_layers(unet)


def test_what_is_packed_is_not_a_number_to_whoever_reads_it_behind_the_networks_back(
    unet: UNet2DConditionModel,
) -> None:
    run(unet)
    layer = packed_layers(unet)[0]
    (held,) = (p for n, p in layer._parameters.items() if n == "weight")
    assert held is not None and held.isnan().all()
    assert held.data_ptr() == hollow(torch.float32).data_ptr()


def test_another_size_is_packed_anew_where_the_layout_is_another() -> None:
    # oneDNN lays 192 channels out by 32 or by 48, as the size of the picture asks.
    torch.manual_seed(0)
    layer = Conv2d(40, 192, 3, padding=1).eval()
    with torch.no_grad():
        for size in (4, 32, 4, 7):
            x = torch.randn(1, 40, size, size)
            with plain():
                expected = layer(x)
            torch.testing.assert_close(layer(x), expected, rtol=1e-5, atol=1e-5)


def test_threads_may_meet_at_the_first_call(unet: UNet2DConditionModel) -> None:
    with plain():
        expected = run(unet)
    found: list[Tensor] = []
    threads = [threading.Thread(target=lambda: found.append(run(unet))) for _ in range(4)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert len(found) == 4
    for result in found:
        torch.testing.assert_close(result, expected, rtol=1e-5, atol=1e-5)


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize("shift_rows", [None, 1, 2])
@pytest.mark.parametrize("kernel", [1, 3])
def test_a_convolution_adds_what_it_is_given(
    kernel: int, shift_rows: int | None, dtype: torch.dtype
) -> None:
    torch.manual_seed(0)
    layer = Conv2d(24, 40, kernel, padding=kernel // 2).to(dtype).eval()
    x, plus = torch.randn(2, 24, 6, 5).to(dtype), torch.randn(2, 40, 6, 5).to(dtype)
    shift = None if shift_rows is None else torch.randn(shift_rows, 40).to(dtype)
    with torch.no_grad():
        found = layer(x, shift=shift, plus=plus)
        with plain():
            expected = layer(x) + plus + (0 if shift is None else shift[:, :, None, None])
    tolerance = 1e-5 if dtype == torch.float32 else 0.06
    torch.testing.assert_close(found, expected, rtol=0, atol=tolerance)


@pytest.mark.parametrize("size", [(12, 10), (11, 9)])
def test_a_convolution_behind_an_enlargement_equals_both_in_turn(size: tuple[int, int]) -> None:
    torch.manual_seed(0)
    layer = Upsample(128).eval()
    x = torch.randn(2, 128, 6, 5)
    with torch.no_grad():
        found = layer(x, size)
        with plain():
            expected = layer(x, size)
        torch.testing.assert_close(found, expected, rtol=1e-5, atol=1e-5)
        layer.conv.weight.mul_(2)
        assert not torch.allclose(layer(x, size), found, atol=1e-2)


def test_pages_of_a_file_are_given_back_and_come_again(tmp_path: Path) -> None:
    from safetensors import safe_open
    from safetensors.torch import save_file

    values = torch.randn(1 << 20)
    save_file({"a": values, "b": values + 1}, tmp_path / "a.safetensors")
    with safe_open(tmp_path / "a.safetensors", framework="pt") as file:
        a, b = file.get_tensor("a"), file.get_tensor("b")
    assert torch.equal(a, values)
    release_pages(a)
    assert torch.equal(a, values) and torch.equal(b, values + 1)
    own = values.clone()
    release_pages(own)  # memory of another kind is left alone
    assert torch.equal(own, values)


def test_a_decoder_packs_too_and_decodes_the_same() -> None:
    torch.manual_seed(0)
    vae = AutoencoderKL(
        block_out_channels=(32, 64),
        down_block_types=("DownEncoderBlock2D",) * 2,
        up_block_types=("UpDecoderBlock2D",) * 2,
        norm_num_groups=8,
    ).eval()
    z = torch.randn(1, 4, 9, 7)
    with torch.no_grad():
        found = vae.decode(z).sample
        with plain():
            expected = vae.decode(z).sample
    torch.testing.assert_close(found, expected, rtol=1e-5, atol=1e-5)
