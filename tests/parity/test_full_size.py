"""Networks of full size on random weights, once each, against diffusers."""

from __future__ import annotations

from typing import Any

import numpy as np
import pytest
import torch
from torch import Tensor, nn

import fewstep
from fewstep.checkpoints.known import FAMILIES

diffusers = pytest.importorskip("diffusers")

pytestmark = [pytest.mark.full_size, pytest.mark.filterwarnings("ignore")]

UNET: dict[str, Any] = {  # SimianLuo/LCM_Dreamshaper_v7
    "sample_size": 96,
    "cross_attention_dim": 768,
    "time_cond_proj_dim": 256,
}
VAE: dict[str, Any] = {
    "block_out_channels": (128, 256, 512, 512),
    "down_block_types": ("DownEncoderBlock2D",) * 4,
    "up_block_types": ("UpDecoderBlock2D",) * 4,
    "layers_per_block": 2,
    "sample_size": 512,
}
TEXT_ENCODER: dict[str, Any] = {  # CLIP ViT-L/14
    "hidden_size": 768,
    "intermediate_size": 3072,
    "num_hidden_layers": 12,
    "num_attention_heads": 12,
    "max_position_embeddings": 77,
}


@pytest.fixture(scope="module")
def pool() -> Tensor:
    """Random numbers that all weights are cut from, so that 4 GB of weights take 180 MB."""
    return torch.randn(45_000_000, generator=torch.Generator().manual_seed(0)) * 0.02


def random_weights(module: nn.Module, pool: Tensor) -> dict[str, Tensor]:
    """Weights of a module on the meta device: matrices from `pool`, norms 1, biases 0."""
    weights, offset = {}, 0
    for name, value in module.state_dict().items():
        if value.ndim < 2:
            weights[name] = torch.full(value.shape, float(name.endswith("weight")))
            continue
        if offset + value.numel() > len(pool):
            offset = offset % 9973 + 1  # another cut each time
        weights[name] = pool[offset : offset + value.numel()].view(value.shape)
        offset += value.numel()
    return weights


def twins(name: str, config: dict[str, Any], pool: Tensor) -> tuple[Any, Any]:
    """(diffusers' network, ours) on the same weights."""
    with torch.device("meta"):
        networks = [getattr(library, name)(**config).eval() for library in (diffusers, fewstep)]
    weights = random_weights(networks[0], pool)
    for network in networks:
        network.load_state_dict(weights, strict=True, assign=True)
    return networks[0], networks[1]


@torch.no_grad()
def test_a_full_size_lcm_equals_diffusers(tokenizer: Any, pool: Tensor) -> None:
    from transformers import CLIPTextConfig, CLIPTextModel

    unets, vaes = (
        twins(name, config, pool)
        for name, config in (("UNet2DConditionModel", UNET), ("AutoencoderKL", VAE))
    )
    assert sum(p.numel() for p in unets[1].parameters()) == 859_520_964 + 320 * 256

    draw = torch.Generator().manual_seed(1)
    z, text = torch.randn(1, 4, 32, 32, generator=draw), torch.randn(1, 77, 768, generator=draw)
    w = torch.randn(1, 256, generator=draw)
    expected, output = (unet(z, 759, text, timestep_cond=w).sample for unet in unets)
    assert output.std() > 0.01
    torch.testing.assert_close(output, expected, rtol=0, atol=2e-5 * float(expected.abs().max()))

    config = CLIPTextConfig(**TEXT_ENCODER)
    with torch.device("meta"):
        text_encoder = CLIPTextModel(config).eval()
    text_encoder.load_state_dict(random_weights(text_encoder, pool), assign=True)
    for name, buffer in text_encoder.named_buffers():
        *path, last = name.split(".")
        owner = text_encoder.get_submodule(".".join(path))
        setattr(owner, last, torch.arange(buffer.numel()).reshape(buffer.shape))  # position ids
    pictures = []
    for library, unet, vae in zip((diffusers, fewstep), unets, vaes, strict=True):
        pipe = library.LatentConsistencyModelPipeline(
            vae=vae,
            text_encoder=text_encoder,
            tokenizer=tokenizer,
            unet=unet,
            scheduler=library.LCMScheduler(),
            safety_checker=None,
            feature_extractor=None,
            requires_safety_checker=False,
        )
        pipe.set_progress_bar_config(disable=True)
        (picture,) = pipe(
            "a red cat",
            height=128,
            width=128,
            num_inference_steps=1,
            generator=torch.Generator().manual_seed(2),
        ).images
        pictures.append(np.asarray(picture, dtype=int))
    assert pictures[1].shape == (128, 128, 3)
    assert pictures[1].std() > 1
    assert np.abs(pictures[0] - pictures[1]).max() <= 1


def inputs_of(config: Any, frames: int = 0) -> dict[str, Any]:
    """Small latents, and whatever else a network of `config` is told."""
    draw = torch.Generator().manual_seed(1)
    shape = (1, 4, frames, 8, 8) if frames else (1, 4, 8, 8)
    width = config["cross_attention_dim"]
    inputs: dict[str, Any] = {
        "sample": torch.randn(shape, generator=draw),
        "timestep": torch.tensor([759]),
        "encoder_hidden_states": torch.randn(1, 77, width, generator=draw),
    }
    if frames:
        inputs["encoder_hidden_states"] = inputs["encoder_hidden_states"].repeat(frames, 1, 1)
    if config.get("addition_embed_type"):
        inputs["added_cond_kwargs"] = {
            "text_embeds": torch.randn(1, 1280, generator=draw),
            "time_ids": torch.tensor([[1024.0, 1024.0, 0.0, 0.0, 1024.0, 1024.0]]),
        }
    return inputs


def assert_equal_outputs(theirs: Any, ours: Any, inputs: dict[str, Any]) -> None:
    expected = theirs(**inputs, return_dict=False)
    output = ours(**inputs, return_dict=False)
    for a, b in zip(flat(output), flat(expected), strict=True):
        assert a.std() > 1e-6
        torch.testing.assert_close(a, b, rtol=0, atol=2e-5 * float(b.abs().max()))


def flat(outputs: Any) -> list[Tensor]:
    if isinstance(outputs, Tensor):
        return [outputs]
    return [tensor for output in outputs for tensor in flat(output)]


@torch.no_grad()
@pytest.mark.parametrize(
    ("family", "parameters"), [("sdxl", 2_567_463_684), ("ssd-1b", None), ("sdxl-refiner", None)]
)
def test_full_size_unets_equal_diffusers(family: str, parameters: int | None, pool: Tensor) -> None:
    config = dict(FAMILIES[family].configs["unet"])
    theirs, ours = twins("UNet2DConditionModel", config, pool)
    assert parameters in (None, sum(p.numel() for p in ours.parameters()))
    inputs = inputs_of(config)
    if family == "sdxl-refiner":
        inputs["added_cond_kwargs"]["time_ids"] = torch.tensor([[1024.0, 1024.0, 0.0, 0.0, 6.0]])
    assert_equal_outputs(theirs, ours, inputs)


@torch.no_grad()
def test_a_full_size_controlnet_equals_diffusers(pool: Tensor) -> None:
    config = {"cross_attention_dim": 768}
    theirs, ours = twins("ControlNetModel", config, pool)
    inputs = inputs_of(config) | {"controlnet_cond": torch.rand(1, 3, 64, 64)}
    assert_equal_outputs(theirs, ours, inputs)


@torch.no_grad()
def test_the_full_size_xl_adapter_equals_diffusers(pool: Tensor) -> None:
    config = {
        "channels": [320, 640, 1280, 1280],
        "num_res_blocks": 2,
        "downscale_factor": 16,
        "adapter_type": "full_adapter_xl",
    }
    theirs, ours = twins("T2IAdapter", config, pool)
    picture = torch.rand(1, 3, 64, 96)
    for a, b in zip(ours(picture), theirs(picture), strict=True):
        torch.testing.assert_close(a, b, rtol=0, atol=2e-5 * float(b.abs().max()))


@torch.no_grad()
def test_a_full_size_motion_unet_equals_diffusers(pool: Tensor) -> None:
    config = {"cross_attention_dim": 768, "motion_max_seq_length": 24}
    theirs, ours = twins("UNetMotionModel", config, pool)
    assert_equal_outputs(theirs, ours, inputs_of(config, frames=3))
