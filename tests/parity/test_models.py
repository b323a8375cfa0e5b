"""Our networks against diffusers', loaded from what diffusers wrote: equal keys and outputs."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import torch
from conftest import LCM_UNET, LCM_VAE, UNET, VAE
from torch import Tensor

from fewstep import AutoencoderKL, CheckpointError, UNet2DConditionModel
from fewstep.models.layers import Context

diffusers = pytest.importorskip("diffusers")

SDXL: dict[str, Any] = UNET | {
    "block_out_channels": (8, 16, 16),
    "layers_per_block": 2,
    "down_block_types": ("DownBlock2D", "CrossAttnDownBlock2D", "CrossAttnDownBlock2D"),
    "up_block_types": ("CrossAttnUpBlock2D", "CrossAttnUpBlock2D", "UpBlock2D"),
    "attention_head_dim": (1, 2, 4),
    "transformer_layers_per_block": (1, 2, 3),
    "use_linear_projection": True,
    "upcast_attention": None,
    "addition_embed_type": "text_time",
    "addition_time_embed_dim": 8,
    "projection_class_embeddings_input_dim": 80,
}
UNETS: dict[str, dict[str, Any]] = {
    "sd1": UNET
    | {
        "block_out_channels": (8, 16, 16),
        "layers_per_block": 2,
        "down_block_types": ("CrossAttnDownBlock2D", "CrossAttnDownBlock2D", "DownBlock2D"),
        "up_block_types": ("UpBlock2D", "CrossAttnUpBlock2D", "CrossAttnUpBlock2D"),
    },
    "lcm": LCM_UNET,
    "inpainting, 9 channels": UNET | {"in_channels": 9},
    "sd2": UNET
    | {"use_linear_projection": True, "attention_head_dim": (1, 2), "upcast_attention": True},
    "text in the time embedding": LCM_UNET
    | {"addition_embed_type": "text", "addition_embed_type_num_heads": 4},
    "sdxl": SDXL,
    "sdxl lcm": SDXL | {"time_cond_proj_dim": 32},
    "ssd-1b": SDXL
    | {
        "mid_block_type": "UNetMidBlock2D",
        "transformer_layers_per_block": (0, (2, 2), (1, 1)),
        "reverse_transformer_layers_per_block": ((1, 1, 2), (2, 1, 1), 1),
    },
}


def inputs_of(config: dict[str, Any], height: int, width: int) -> dict[str, Any]:
    draw = torch.Generator().manual_seed(1)
    inputs: dict[str, Any] = {
        "sample": torch.randn(2, config["in_channels"], height, width, generator=draw),
        "timestep": torch.tensor([999, 259]),
        "encoder_hidden_states": torch.randn(2, 7, config["cross_attention_dim"], generator=draw),
    }
    if dim := config.get("time_cond_proj_dim"):
        inputs["timestep_cond"] = torch.randn(2, dim, generator=draw)
    if config.get("addition_embed_type") == "text_time":
        pooled = (
            config["projection_class_embeddings_input_dim"] - 6 * config["addition_time_embed_dim"]
        )
        inputs["added_cond_kwargs"] = {
            "text_embeds": torch.randn(2, pooled, generator=draw),
            "time_ids": torch.tensor([[64.0, 48, 0, 0, 64, 48], [32, 32, 8, 4, 64, 64]]),
        }
    return inputs


def written(kind: Any, config: dict[str, Any], folder: Path) -> Any:
    """A random network of diffusers, saved to `folder`."""
    torch.manual_seed(0)
    network = kind(**config).eval()
    network.save_pretrained(folder)
    return network


@pytest.fixture(scope="module", params=UNETS)
def unets(request: pytest.FixtureRequest, tmp_path_factory: pytest.TempPathFactory) -> Any:
    folder = tmp_path_factory.mktemp("unet")
    config = UNETS[request.param]
    theirs = written(diffusers.UNet2DConditionModel, config, folder)
    return config, theirs, UNet2DConditionModel.from_pretrained(folder)


@torch.no_grad()
@pytest.mark.parametrize(("height", "width"), [(8, 8), (9, 13), (12, 7)])
def test_unet_gives_what_diffusers_gives(unets: Any, height: int, width: int) -> None:
    config, theirs, ours = unets
    inputs = inputs_of(config, height, width)
    (expected,) = theirs(**inputs, return_dict=False)
    torch.testing.assert_close(ours(**inputs).sample, expected, rtol=0, atol=1e-5)


@torch.no_grad()
def test_every_input_of_the_unet_counts(unets: Any) -> None:
    config, _, ours = unets
    inputs = inputs_of(config, 8, 8)
    before = ours(**inputs).sample

    def changed(value: Any) -> Any:
        if isinstance(value, dict):
            return {key: changed(v) for key, v in value.items()}
        return value - 1

    for name, value in inputs.items():
        after = ours(**inputs | {name: changed(value)}).sample
        assert (after - before).abs().max() > 1e-4, name


@torch.no_grad()
def test_unet_state_dicts_have_the_same_keys_and_values(unets: Any) -> None:
    _, theirs, ours = unets
    expected = theirs.state_dict()
    assert ours.state_dict().keys() == expected.keys()
    assert all(torch.equal(value, expected[key]) for key, value in ours.state_dict().items())


@torch.no_grad()
def test_unet_freeu_gives_what_diffusers_gives(tmp_path: Path) -> None:
    theirs = written(diffusers.UNet2DConditionModel, UNETS["sd1"], tmp_path)
    ours = UNet2DConditionModel.from_pretrained(tmp_path)
    inputs = inputs_of(UNETS["sd1"], 9, 8)
    plain = ours(**inputs).sample
    theirs.enable_freeu(s1=0.9, s2=0.2, b1=1.5, b2=1.6)
    ours.enable_freeu(s1=0.9, s2=0.2, b1=1.5, b2=1.6)
    freed = ours(**inputs).sample
    torch.testing.assert_close(freed, theirs(**inputs).sample, rtol=0, atol=1e-5)
    assert (freed - plain).abs().max() > 1e-3
    ours.disable_freeu()
    torch.testing.assert_close(ours(**inputs).sample, plain, rtol=0, atol=0)


@torch.no_grad()
def test_control_residuals_give_what_diffusers_gives(tmp_path: Path) -> None:
    theirs = written(diffusers.UNet2DConditionModel, UNETS["sd1"], tmp_path)
    ours = UNet2DConditionModel.from_pretrained(tmp_path)
    inputs = inputs_of(UNETS["sd1"], 8, 8)
    with torch.no_grad():
        text = inputs["encoder_hidden_states"]
        time = ours.time(inputs["timestep"], inputs["sample"], text)
        deepest, skips = ours.encode(ours.conv_in(inputs["sample"]), time, Context(text))
    draw = torch.Generator().manual_seed(2)

    def like(x: Tensor) -> Tensor:
        return torch.randn(x.shape, generator=draw)

    inputs["down_block_additional_residuals"] = [like(skip) for skip in skips]
    inputs["mid_block_additional_residual"] = like(deepest)
    torch.testing.assert_close(ours(**inputs).sample, theirs(**inputs).sample, rtol=1e-5, atol=1e-5)


def test_a_missing_or_surplus_weight_is_an_error(tmp_path: Path) -> None:
    from safetensors.torch import load_file, save_file

    written(diffusers.UNet2DConditionModel, UNET, tmp_path)
    file = tmp_path / "diffusion_pytorch_model.safetensors"
    weights = load_file(file)
    save_file({k: v for k, v in weights.items() if k != "conv_in.bias"}, file)
    with pytest.raises(CheckpointError, match=r"conv_in\.bias"):
        UNet2DConditionModel.from_pretrained(tmp_path)
    save_file(weights | {"more": torch.zeros(1)}, file)
    with pytest.raises(CheckpointError, match="more"):
        UNet2DConditionModel.from_pretrained(tmp_path)


@pytest.fixture(scope="module", params=["f8", "f4, 8 channels"])
def vaes(request: pytest.FixtureRequest, tmp_path_factory: pytest.TempPathFactory) -> Any:
    folder = tmp_path_factory.mktemp("vae")
    config = VAE if request.param == "f8" else LCM_VAE
    return written(diffusers.AutoencoderKL, config, folder), AutoencoderKL.from_pretrained(folder)


@torch.no_grad()
@pytest.mark.parametrize(("height", "width"), [(32, 32), (40, 24)])
def test_vae_encodes_and_decodes_as_diffusers_does(vaes: Any, height: int, width: int) -> None:
    theirs, ours = vaes
    draw = torch.Generator().manual_seed(1)
    pictures = torch.rand(2, 3, height, width, generator=draw) * 2 - 1
    expected, posterior = theirs.encode(pictures).latent_dist, ours.encode(pictures).latent_dist
    for name in ("mean", "logvar", "std", "var"):
        torch.testing.assert_close(
            getattr(posterior, name), getattr(expected, name), rtol=0, atol=1e-5
        )
    z = posterior.sample(torch.Generator().manual_seed(3))
    torch.testing.assert_close(
        z, expected.sample(torch.Generator().manual_seed(3)), rtol=0, atol=1e-5
    )
    assert z.shape == (
        2,
        ours.config.latent_channels,
        height // ours.downscale,
        width // ours.downscale,
    )
    torch.testing.assert_close(ours.decode(z).sample, theirs.decode(z).sample, rtol=0, atol=1e-5)


@torch.no_grad()
def test_vae_slices_and_tiles_as_diffusers_does(vaes: Any) -> None:
    theirs, ours = vaes
    draw = torch.Generator().manual_seed(1)
    pictures = torch.rand(2, 3, 80, 72, generator=draw) * 2 - 1
    z = torch.randn(2, ours.config.latent_channels, 13, 11, generator=draw)
    whole, mean = ours.decode(z).sample, ours.encode(pictures).latent_dist.mean
    for vae in (theirs, ours):
        vae.enable_slicing()
    torch.testing.assert_close(ours.decode(z).sample, whole, rtol=0, atol=1e-5)
    torch.testing.assert_close(ours.encode(pictures).latent_dist.mean, mean, rtol=0, atol=1e-5)
    theirs.enable_tiling()
    ours.enable_tiling(exact=False)
    tiled = ours.decode(z).sample
    torch.testing.assert_close(tiled, theirs.decode(z).sample, rtol=0, atol=1e-5)
    torch.testing.assert_close(
        ours.encode(pictures).latent_dist.mean,
        theirs.encode(pictures).latent_dist.mean,
        rtol=0,
        atol=1e-5,
    )
    assert (tiled - whole).abs().max() > 1e-5, "tiling did nothing"
    for vae in (theirs, ours):
        vae.disable_slicing()
        vae.disable_tiling()
    torch.testing.assert_close(ours.decode(z).sample, whole, rtol=0, atol=0)


def test_an_old_vae_with_other_attention_names_loads(tmp_path: Path) -> None:
    from safetensors.torch import load_file, save_file

    theirs = written(diffusers.AutoencoderKL, VAE, tmp_path)
    file = tmp_path / "diffusion_pytorch_model.safetensors"
    old = {"to_q": "query", "to_k": "key", "to_v": "value", "to_out.0": "proj_attn"}

    def rename(key: str) -> str:
        for new, name in old.items():
            key = key.replace(f".{new}.", f".{name}.")
        return key

    renamed = {rename(key): value for key, value in load_file(file).items()}
    assert any(".query." in key for key in renamed)
    save_file(renamed, file)
    ours = AutoencoderKL.from_pretrained(tmp_path)
    z = torch.randn(1, 4, 6, 6, generator=torch.Generator().manual_seed(1))
    with torch.no_grad():
        torch.testing.assert_close(
            ours.decode(z).sample, theirs.decode(z).sample, rtol=0, atol=1e-5
        )
