"""Motion modules: what they do to frames, how they get into a UNet and out of it again."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest
import torch
from conftest import LCM_UNET, TEXT_CHANNELS, UNET
from torch import Tensor

from fewstep import MotionAdapter, RequestError, UNet2DConditionModel, UNetMotionModel
from fewstep.errors import UnsupportedConfig
from fewstep.models import motion
from fewstep.models.lora import Adapter, adapters_of
from fewstep.models.motion import MotionModule
from fewstep.models.motion_unet import UNetMotionConfig

ADAPTER: dict[str, Any] = {
    "block_out_channels": (8, 16),
    "motion_layers_per_block": 1,
    "motion_norm_num_groups": 2,
    "motion_num_attention_heads": 2,
    "motion_max_seq_length": 6,
}


def randn(*shape: int, seed: int = 1) -> Tensor:
    return torch.randn(*shape, generator=torch.Generator().manual_seed(seed))


@pytest.fixture
def unet() -> UNet2DConditionModel:
    torch.manual_seed(0)
    return UNet2DConditionModel(**UNET).eval()


@pytest.fixture
def adapter() -> MotionAdapter:
    torch.manual_seed(1)
    return MotionAdapter(**ADAPTER).eval()


VIDEO, TEXT = (2, 4, 5, 8, 8), (2, 7, TEXT_CHANNELS)


@torch.no_grad()
def call(network: Any, video: Tensor | None = None, text: Tensor | None = None, **more: Any) -> Any:
    video = randn(*VIDEO) if video is None else video
    text = randn(*TEXT, seed=2) if text is None else text
    return network(video, torch.tensor([999, 259]), text, **more).sample


@torch.no_grad()
def test_modules_that_add_nothing_leave_the_unet_of_each_frame(
    unet: UNet2DConditionModel, adapter: MotionAdapter
) -> None:
    for module in adapter.modules():
        if isinstance(module, MotionModule):
            module.proj_out.weight.zero_()
            module.proj_out.bias.zero_()
    video = randn(*VIDEO)
    moved = call(UNetMotionModel.from_unet2d(unet, adapter), video)
    for frame in range(video.shape[2]):
        torch.testing.assert_close(
            moved[:, :, frame], call(unet, video[:, :, frame]), rtol=0, atol=1e-5
        )


@torch.no_grad()
def test_frames_see_each_other_and_know_their_places_but_not_other_videos(
    unet: UNet2DConditionModel, adapter: MotionAdapter
) -> None:
    network = UNetMotionModel.from_unet2d(unet, adapter)
    video = randn(*VIDEO)
    before = call(network, video)
    changed = video.clone()
    changed[0, :, 4] += 1
    after = call(network, changed)
    assert (after - before)[0, :, 0].abs().max() > 1e-4
    torch.testing.assert_close(after[1], before[1], rtol=0, atol=1e-5)
    backwards = call(network, video.flip(2)).flip(2)
    assert (backwards - before).abs().max() > 1e-4


@torch.no_grad()
def test_text_may_be_given_per_video_or_per_frame(
    unet: UNet2DConditionModel, adapter: MotionAdapter
) -> None:
    network = UNetMotionModel.from_unet2d(unet, adapter)
    text = randn(*TEXT, seed=2)
    whole = call(network, text=text)
    per_frame = text[:, None].expand(-1, 5, -1, -1)
    torch.testing.assert_close(call(network, text=per_frame), whole, rtol=0, atol=0)
    rows = text.repeat_interleave(5, dim=0)
    torch.testing.assert_close(call(network, text=rows), whole, rtol=0, atol=0)
    varied = per_frame + torch.arange(5)[None, :, None, None]
    assert (call(network, text=varied) - whole).abs().max() > 1e-4


@torch.no_grad()
def test_many_pixels_are_taken_in_parts(monkeypatch: pytest.MonkeyPatch) -> None:
    module = MotionModule(8, heads=2, layers=2, groups=2, length=6)
    x = randn(10, 8, 3, 7)
    whole = module(x, 5)
    monkeypatch.setattr(motion, "MAX_ROWS", 4)
    torch.testing.assert_close(module(x, 5), whole, rtol=0, atol=1e-6)


def test_conversion_shares_memory_and_changes_nothing(
    unet: UNet2DConditionModel, adapter: MotionAdapter
) -> None:
    keys, video = set(unet.state_dict()), randn(2, 4, 8, 8)
    before = call(unet, video)
    network = UNetMotionModel.from_unet2d(unet, adapter)
    assert not network.training
    assert set(network.state_dict()) == keys | set(adapter.state_dict())
    assert network.conv_in.weight.data_ptr() == unet.conv_in.weight.data_ptr()
    name = "mid_block.motion_modules.0.proj_in.weight"
    own, given = (n.get_parameter(name) for n in (network, adapter))
    assert own.data_ptr() == given.data_ptr() and own.requires_grad
    assert set(unet.state_dict()) == keys
    torch.testing.assert_close(call(unet, video), before, rtol=0, atol=0)


def test_conversion_takes_dtype_and_guidance_input_of_the_unet(adapter: MotionAdapter) -> None:
    unet = UNet2DConditionModel(**LCM_UNET).to(torch.float64)
    network = UNetMotionModel.from_unet2d(unet, adapter)
    assert {value.dtype for value in network.state_dict().values()} == {torch.float64}
    assert network.config.time_cond_proj_dim == LCM_UNET["time_cond_proj_dim"]
    inputs = [randn(2, 8, 5, 8, 8).double(), randn(*TEXT, seed=2).double()]
    one, other = (
        call(network, *inputs, timestep_cond=randn(2, 32, seed=seed).double()) for seed in (3, 4)
    )
    assert (one - other).abs().max() > 1e-4


def test_new_modules_come_where_no_adapter_is_given(unet: UNet2DConditionModel) -> None:
    network = UNetMotionModel.from_unet2d(unet)
    assert torch.equal(network.conv_in.weight, unet.conv_in.weight)
    assert call(network).isfinite().all()
    fresh = UNetMotionModel.from_unet2d(unet, load_weights=False)
    assert not torch.equal(fresh.conv_in.weight, unet.conv_in.weight)


def test_facts_that_the_layout_has_no_key_for_survive(tmp_path: Path) -> None:
    changes = {"addition_embed_type": "text", "addition_embed_type_num_heads": 4}
    unet = UNet2DConditionModel(**UNET | changes | {"upcast_attention": True})
    network = UNetMotionModel.from_unet2d(unet, MotionAdapter(**ADAPTER)).eval()
    network.save_pretrained(tmp_path)
    stored = json.loads((tmp_path / "config.json").read_text())
    assert stored["upcast_attention"] is True and stored["addition_embed_type_num_heads"] == 4
    assert "freq_shift" not in stored and "mid_block_type" not in stored
    assert stored["_class_name"] == "UNetMotionModel"
    loaded = UNetMotionModel.from_pretrained(tmp_path)
    torch.testing.assert_close(call(loaded), call(network), rtol=0, atol=0)


@pytest.mark.parametrize("length", [3, 32])
def test_the_number_of_frames_is_read_from_the_weights(
    unet: UNet2DConditionModel, adapter: MotionAdapter, tmp_path: Path, length: int
) -> None:
    UNetMotionModel.from_unet2d(unet, adapter).save_pretrained(tmp_path / "unet")
    adapter.save_pretrained(tmp_path / "adapter")
    for kind, name in ((MotionAdapter, "adapter"), (UNetMotionModel, "unet")):
        file = tmp_path / name / "config.json"
        wrong = json.loads(file.read_text()) | {"motion_max_seq_length": length}
        file.write_text(json.dumps(wrong))
        assert kind.from_pretrained(tmp_path / name).config.motion_max_seq_length == 6
        with pytest.warns(UserWarning, match="did you mean 'variant'"):
            kind.from_pretrained(tmp_path, subfolder=name, varient="fp16")


def test_motion_modules_are_exchanged_and_saved(
    unet: UNet2DConditionModel, adapter: MotionAdapter, tmp_path: Path
) -> None:
    first = MotionAdapter(**ADAPTER)
    kept = {key: value.clone() for key, value in first.state_dict().items()}
    network = UNetMotionModel.from_unet2d(unet, first)
    network.load_motion_modules(adapter)
    assert all(torch.equal(value, kept[key]) for key, value in first.state_dict().items())
    expected = call(UNetMotionModel.from_unet2d(unet, adapter))
    torch.testing.assert_close(call(network), expected, rtol=0, atol=0)
    network.save_motion_modules(tmp_path)
    saved = MotionAdapter.from_pretrained(tmp_path).state_dict()
    assert saved.keys() == adapter.state_dict().keys()
    assert all(torch.equal(value, saved[key]) for key, value in adapter.state_dict().items())


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"block_out_channels": (8, 8)}, "does not fit the UNet: its levels"),
        ({"motion_layers_per_block": 2}, "does not fit the UNet: its levels"),
        ({"motion_norm_num_groups": 4}, "its motion_norm_num_groups is 4, the UNet's 2"),
    ],
)
def test_adapters_of_other_unets_are_refused(
    unet: UNet2DConditionModel, changes: dict[str, Any], message: str
) -> None:
    with pytest.raises(RequestError, match=message):
        UNetMotionModel.from_unet2d(unet, MotionAdapter(**ADAPTER | changes))


def test_what_cannot_be_served_says_so(unet: UNet2DConditionModel, adapter: MotionAdapter) -> None:
    network = UNetMotionModel.from_unet2d(unet, adapter)
    with pytest.raises(RequestError, match="sample has 7 frames, but these motion modules know 6"):
        call(network, randn(2, 4, 7, 8, 8))
    with pytest.raises(RequestError, match="sample must be a video"):
        call(network, randn(2, 4, 8, 8))
    with pytest.raises(RequestError, match="holds 3 texts for 2 videos of 5 frames"):
        call(network, text=randn(3, 7, TEXT_CHANNELS))
    adapters_of(unet).weights["style"] = 1.0
    adapters_of(unet).loaded["style"] = Adapter({})
    with pytest.raises(RequestError, match="unet has the LoRAs style; call unload_lora_weights"):
        UNetMotionModel.from_unet2d(unet, adapter)
    for changes, message in (
        ({"conv_in_channels": 9}, "conv_in_channels=9 is not implemented"),
        ({"motion_num_attention_heads": (2, 2, 2)}, "must be a number or a list of 2 numbers"),
        ({"motion_transformer_layers_per_block": ((1,), 1)}, "must be a number or a list of 2"),
    ):
        with pytest.raises(UnsupportedConfig, match=message):
            MotionAdapter(**ADAPTER | changes)
    with pytest.raises(UnsupportedConfig, match="needs a mid block with attention"):
        UNetMotionConfig(mid_block_type="UNetMidBlock2D")
    with pytest.raises(UnsupportedConfig, match="transformer_layers_per_mid_block=2"):
        UNetMotionConfig(transformer_layers_per_mid_block=2)
