"""ControlNets and T2I-Adapters as networks, against diffusers': keys, outputs, files."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import torch
from conftest import UNET
from torch import Tensor, nn

from fewstep import CheckpointError, RequestError, UNet2DConditionModel, UnsupportedConfig
from fewstep.models.controlnet import ControlNetModel, MultiControlNetModel
from fewstep.models.t2i_adapter import MultiAdapter, T2IAdapter

diffusers = pytest.importorskip("diffusers")
pytestmark = pytest.mark.filterwarnings("ignore")

SD = UNET | {
    "block_out_channels": (8, 16, 16),
    "layers_per_block": 2,
    "down_block_types": ("CrossAttnDownBlock2D", "CrossAttnDownBlock2D", "DownBlock2D"),
    "up_block_types": ("UpBlock2D", "CrossAttnUpBlock2D", "CrossAttnUpBlock2D"),
}
XL = SD | {
    "down_block_types": ("DownBlock2D", "CrossAttnDownBlock2D", "CrossAttnDownBlock2D"),
    "up_block_types": ("CrossAttnUpBlock2D", "CrossAttnUpBlock2D", "UpBlock2D"),
    "attention_head_dim": (1, 2, 4),
    "transformer_layers_per_block": (1, 2, 2),
    "use_linear_projection": True,
    "addition_embed_type": "text_time",
    "addition_time_embed_dim": 8,
    "projection_class_embeddings_input_dim": 80,
}
HINT = {"conditioning_embedding_out_channels": (4, 6, 6, 8)}
NOT_OF_A_CONTROLNET = ("sample_size", "out_channels", "up_block_types")


def controlnet_config(unet: dict[str, Any], **more: Any) -> dict[str, Any]:
    return {k: v for k, v in unet.items() if k not in NOT_OF_A_CONTROLNET} | HINT | more


CONTROLNETS: dict[str, dict[str, Any]] = {
    "sd": controlnet_config(SD),
    "xl": controlnet_config(XL),
    "bgr": controlnet_config(SD, controlnet_conditioning_channel_order="bgr"),
    "pooled": controlnet_config(SD, global_pool_conditions=True),
    "xl, small": controlnet_config(
        XL,
        down_block_types=("DownBlock2D",) * 3,
        mid_block_type="UNetMidBlock2D",
        transformer_layers_per_block=1,
    ),
}
ADAPTERS: dict[str, dict[str, Any]] = {
    "full": {"adapter_type": "full_adapter", "channels": (8, 16, 16), "num_res_blocks": 2},
    "light": {"adapter_type": "light_adapter", "channels": (8, 16), "num_res_blocks": 2},
    "xl": {
        "adapter_type": "full_adapter_xl",
        "channels": (8, 16, 16, 16),
        "downscale_factor": 16,
        "num_res_blocks": 1,
    },
}


def close(a: Tensor, b: Tensor) -> None:
    """Equal to 1e-5 of the largest value: sums of many terms round by their own size."""
    torch.testing.assert_close(a, b, rtol=0, atol=1e-5 * max(1.0, float(b.abs().max())))


def differ(a: Tensor, b: Tensor) -> bool:
    return float((a - b).abs().max()) > 1e-3


def trained(network: Any, seed: int = 0) -> Any:
    """The network with random weights everywhere: a fresh ControlNet gives zeros."""
    torch.manual_seed(seed)
    for parameter in network.parameters():
        nn.init.normal_(parameter, std=0.2)
    return network.eval()


def draw(*shape: int, seed: int = 1) -> Tensor:
    return torch.randn(*shape, generator=torch.Generator().manual_seed(seed))


def inputs_of(config: dict[str, Any], height: int = 8, width: int = 8) -> dict[str, Any]:
    inputs: dict[str, Any] = {
        "sample": draw(2, 4, height, width),
        "timestep": torch.tensor([999, 259]),
        "encoder_hidden_states": draw(2, 7, 32),
    }
    if config.get("addition_embed_type"):
        inputs["added_cond_kwargs"] = {
            "text_embeds": draw(2, 32),
            "time_ids": torch.tensor([[64.0, 48, 0, 0, 64, 48], [32, 32, 8, 4, 64, 64]]),
        }
    return inputs


@pytest.fixture(scope="module", params=CONTROLNETS)
def controlnets(request: pytest.FixtureRequest, tmp_path_factory: pytest.TempPathFactory) -> Any:
    folder = tmp_path_factory.mktemp("controlnet")
    config = CONTROLNETS[request.param]
    theirs = trained(diffusers.ControlNetModel(**config))
    theirs.save_pretrained(folder)
    return config, theirs, ControlNetModel.from_pretrained(folder)


@torch.no_grad()
@pytest.mark.parametrize("guess_mode", [False, True])
def test_controlnet_gives_what_diffusers_gives(controlnets: Any, guess_mode: bool) -> None:
    config, theirs, ours = controlnets
    inputs = inputs_of(config, 8, 6)
    inputs |= {"controlnet_cond": draw(2, 3, 64, 48, seed=2).abs(), "conditioning_scale": 0.7}
    inputs["guess_mode"] = guess_mode
    down, mid = theirs(**inputs, return_dict=False)
    found = ours(**inputs)
    assert len(found.down_block_res_samples) == len(down)
    for a, b in zip(found.down_block_res_samples, down, strict=True):
        close(a, b)
    close(found.mid_block_res_sample, mid)
    assert mid.abs().max() > 1e-3
    half = ours(**inputs | {"conditioning_scale": 0.35})
    close(half.mid_block_res_sample * 2, mid)


@torch.no_grad()
def test_every_input_of_the_controlnet_counts(controlnets: Any) -> None:
    config, _, ours = controlnets
    inputs = inputs_of(config) | {"controlnet_cond": draw(2, 3, 64, 64, seed=2)}
    before = ours(**inputs)

    def changed(value: Any) -> Any:
        if isinstance(value, dict):
            return {key: changed(v) for key, v in value.items()}
        return value.flip(1) if value.ndim == 4 else value - 1

    for name, value in inputs.items():
        after = ours(**inputs | {name: changed(value)})
        pairs = zip(after.down_block_res_samples, before.down_block_res_samples, strict=True)
        moved = any(float((a - b).abs().max()) > 1e-4 for a, b in pairs)
        reads_text = any("CrossAttn" in kind for kind in config["down_block_types"])
        assert moved or (name == "encoder_hidden_states" and not reads_text), name


def test_controlnet_files_are_read_by_diffusers(controlnets: Any, tmp_path: Path) -> None:
    _, theirs, ours = controlnets
    ours.save_pretrained(tmp_path)
    back = diffusers.ControlNetModel.from_pretrained(tmp_path)
    expected = theirs.state_dict()
    assert back.state_dict().keys() == expected.keys() == ours.state_dict().keys()
    assert all(torch.equal(value, expected[name]) for name, value in back.state_dict().items())
    for key in ("controlnet_conditioning_channel_order", "global_pool_conditions"):
        assert back.config[key] == theirs.config[key]


def test_a_controlnet_refuses_what_it_does_not_know() -> None:
    with pytest.raises(UnsupportedConfig, match="num_control_type"):
        ControlNetModel(**CONTROLNETS["sd"], num_control_type=6)
    with pytest.raises(UnsupportedConfig, match="channel_order='grb'"):
        ControlNetModel(**CONTROLNETS["sd"] | {"controlnet_conditioning_channel_order": "grb"})
    with pytest.raises(UnsupportedConfig, match="mid_block_type"):
        ControlNetModel(**CONTROLNETS["sd"] | {"mid_block_type": None})


@torch.no_grad()
@pytest.mark.parametrize("distilled", [False, True])
def test_a_controlnet_of_a_unet_starts_from_its_weights_and_steers_nothing(distilled: bool) -> None:
    extra = {"time_cond_proj_dim": 32} if distilled else {}
    unet = trained(UNet2DConditionModel(**XL | extra))
    net = ControlNetModel.from_unet(unet, conditioning_embedding_out_channels=(4, 8))
    theirs = diffusers.ControlNetModel.from_unet(
        diffusers.UNet2DConditionModel(**XL), conditioning_embedding_out_channels=(4, 8)
    )
    assert net.state_dict().keys() == theirs.state_dict().keys()
    own, weights = net.state_dict(), unet.state_dict()
    copied = [name for name in own if name in weights]
    assert all(torch.equal(own[name], weights[name]) for name in copied)
    assert {name.split(".")[0] for name in set(own) - set(copied)} == {
        "controlnet_cond_embedding",
        "controlnet_down_blocks",
        "controlnet_mid_block",
    }
    found = net(**inputs_of(XL), controlnet_cond=draw(2, 3, 16, 16))
    assert not any(x.any() for x in (*found.down_block_res_samples, found.mid_block_res_sample))
    fresh = ControlNetModel.from_unet(unet, load_weights_from_unet=False)
    assert differ(fresh.conv_in.weight, unet.conv_in.weight)


def test_a_controlnet_of_a_unet_that_no_config_can_tell_of_is_refused() -> None:
    with pytest.raises(UnsupportedConfig, match="time_embedding_dim=24"):
        ControlNetModel.from_unet(UNet2DConditionModel(**SD, time_embedding_dim=24))
    uneven = SD | {"layers_per_block": (1, 2, 2)}
    with pytest.raises(UnsupportedConfig, match="layers_per_block"):
        ControlNetModel.from_unet(UNet2DConditionModel(**uneven))


@torch.no_grad()
def test_several_controlnets_add_up_and_keep_their_folders(tmp_path: Path) -> None:
    config = CONTROLNETS["sd"]
    nets = [trained(ControlNetModel(**config), seed) for seed in range(3)]
    MultiControlNetModel(nets).save_pretrained(tmp_path / "controlnet")
    assert sorted(f.name for f in tmp_path.iterdir()) == [
        "controlnet",
        "controlnet_1",
        "controlnet_2",
    ]
    theirs = diffusers.MultiControlNetModel.from_pretrained(str(tmp_path / "controlnet"))
    pictures = [draw(2, 3, 64, 64, seed=seed) for seed in range(3)]
    ways = [
        MultiControlNetModel.from_pretrained(tmp_path / "controlnet"),
        MultiControlNetModel.from_pretrained(tmp_path, subfolder="controlnet"),
    ]
    arguments = inputs_of(config) | {"return_dict": False}
    arguments |= {"controlnet_cond": pictures, "conditioning_scale": [0.5, 1.0, 0.2]}
    down, mid = theirs(**arguments)
    for ours in ways:
        found, middle = ours(**arguments)
        close(middle, mid)
        for a, b in zip(found, down, strict=True):
            close(a, b)
    with pytest.raises(CheckpointError, match="controlnet_2"):
        MultiControlNetModel(nets[:2]).save_pretrained(tmp_path / "controlnet")


def test_several_networks_refuse_what_is_none() -> None:
    with pytest.raises(RequestError, match="ControlNetModel, got nothing"):
        MultiControlNetModel([])
    with pytest.raises(CheckpointError, match="owner/name"):
        MultiControlNetModel.from_pretrained("owner/name")
    adapter, larger = (T2IAdapter(**ADAPTERS["full"], downscale_factor=f) for f in (8, 16))
    with pytest.raises(RequestError, match="two adapters"):
        MultiAdapter([adapter])
    with pytest.raises(RequestError, match="scale down alike"):
        MultiAdapter([adapter, larger])
    with pytest.raises(RequestError, match="list of T2IAdapter, got Linear"):
        MultiAdapter([nn.Linear(1, 1)])  # type: ignore[list-item]


@pytest.fixture(scope="module", params=ADAPTERS)
def adapters(request: pytest.FixtureRequest, tmp_path_factory: pytest.TempPathFactory) -> Any:
    folder = tmp_path_factory.mktemp("adapter")
    theirs = trained(diffusers.T2IAdapter(**ADAPTERS[request.param]))
    theirs.save_pretrained(folder)
    return request.param, theirs, T2IAdapter.from_pretrained(folder)


@torch.no_grad()
def test_adapter_gives_what_diffusers_gives(adapters: Any, tmp_path: Path) -> None:
    _, theirs, ours = adapters
    picture = draw(2, 3, 80, 48)
    for a, b in zip(ours(picture), theirs(picture), strict=True):
        close(a, b)
    for name in ("downscale_factor", "total_downscale_factor"):
        assert getattr(ours, name) == getattr(theirs, name)
    ours.save_pretrained(tmp_path)
    back = diffusers.T2IAdapter.from_pretrained(tmp_path)
    assert back.state_dict().keys() == ours.state_dict().keys()
    close(back(picture)[-1], theirs(picture)[-1])


@torch.no_grad()
@pytest.mark.parametrize("size", [(8, 8), (10, 6)])
def test_unet_takes_features_as_diffusers_does(adapters: Any, size: tuple[int, int]) -> None:
    name, _, adapter = adapters
    config = XL if name == "xl" else SD
    theirs = trained(diffusers.UNet2DConditionModel(**config))
    ours = UNet2DConditionModel(**config)
    ours.load_state_dict(theirs.state_dict())
    features = adapter(draw(2, 3, 8 * size[0], 8 * size[1], seed=4))
    assert len(features) == (4 if name == "xl" else 3)
    inputs = inputs_of(config, *size)

    def run(unet: Any, given: list[Tensor] | None) -> Tensor:
        # diffusers adds in place, and takes features off the list.
        copies = None if given is None else [f.clone() for f in given]
        inputs["down_intrablock_additional_residuals"] = copies
        return unet(**inputs, return_dict=False)[0]

    found = run(ours, features)
    torch.testing.assert_close(found, run(theirs, features), rtol=1e-4, atol=1e-5)
    for place in range(len(features)):  # every feature counts, the one behind the middle too
        fewer = [f * 0 if i == place else f for i, f in enumerate(features)]
        assert differ(run(ours, fewer), found), place
    assert differ(run(ours, None), found)


@torch.no_grad()
def test_unet_adds_a_controlnet_as_diffusers_does(controlnets: Any) -> None:
    config, net, _ = controlnets
    layout = XL if "addition_embed_type" in config else SD
    theirs = trained(diffusers.UNet2DConditionModel(**layout))
    ours = UNet2DConditionModel(**layout)
    ours.load_state_dict(theirs.state_dict())
    inputs = inputs_of(layout)
    down, mid = net(**inputs, controlnet_cond=draw(2, 3, 64, 64), return_dict=False)
    plain = ours(**inputs).sample
    inputs |= {"down_block_additional_residuals": down, "mid_block_additional_residual": mid}
    found = ours(**inputs).sample
    torch.testing.assert_close(found, theirs(**inputs).sample, rtol=1e-4, atol=1e-5)
    assert differ(found, plain)


@torch.no_grad()
def test_several_adapters_add_up_and_keep_their_folders(tmp_path: Path) -> None:
    pair = [trained(T2IAdapter(**ADAPTERS["full"]), seed) for seed in range(2)]
    MultiAdapter(pair).save_pretrained(tmp_path / "adapter")
    theirs = diffusers.MultiAdapter.from_pretrained(str(tmp_path / "adapter"))
    ours = MultiAdapter.from_pretrained(tmp_path / "adapter", torch_dtype=torch.float32)
    pictures = [draw(1, 3, 32, 32, seed=seed) for seed in range(2)]
    for weights in (None, [0.3, 1.2]):
        expected = theirs(pictures, weights)
        for a, b in zip(ours(pictures, weights), expected, strict=True):
            close(a, b)
    assert ours.total_downscale_factor == 32 and ours.downscale_factor == 8
