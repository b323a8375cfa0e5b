"""AnimateDiff against diffusers: networks, files and whole pipelines on tiny random weights."""

from __future__ import annotations

import copy
import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from conftest import LCM_UNET, LCM_VAE, NOISE, TEXT_CHANNELS, UNET, VAE
from torch import Tensor

import fewstep
from fewstep import MotionAdapter, UNet2DConditionModel, UNetMotionModel

diffusers = pytest.importorskip("diffusers")

# The oracle's own warnings are not ours to heed.
pytestmark = pytest.mark.filterwarnings("ignore")

ADAPTER: dict[str, Any] = {
    "block_out_channels": (8, 16),
    "motion_layers_per_block": 1,
    "motion_norm_num_groups": 2,
    "motion_num_attention_heads": 2,
    "motion_max_seq_length": 6,
}
SD1: dict[str, Any] = UNET | {
    "block_out_channels": (8, 16, 16),
    "layers_per_block": 2,
    "down_block_types": ("CrossAttnDownBlock2D", "CrossAttnDownBlock2D", "DownBlock2D"),
    "up_block_types": ("UpBlock2D", "CrossAttnUpBlock2D", "CrossAttnUpBlock2D"),
}
SD1_ADAPTER = ADAPTER | {"block_out_channels": (8, 16, 16), "motion_layers_per_block": 2}
# (the UNet's config, the adapter's)
NETWORKS: dict[str, tuple[dict[str, Any], dict[str, Any]]] = {
    "sd1": (SD1, SD1_ADAPTER),
    "no module in the middle": (UNET, ADAPTER | {"use_motion_mid_block": False}),
    "guidance-distilled": (LCM_UNET, ADAPTER),
    "lists, linear projections": (
        SD1 | {"use_linear_projection": True, "layers_per_block": (2, 1, 2)},
        SD1_ADAPTER
        | {
            "motion_layers_per_block": (2, 1, 2),
            "motion_num_attention_heads": (1, 2, 4),
            "motion_transformer_layers_per_block": (1, 2, 1),
            "motion_transformer_layers_per_mid_block": 2,
        },
    ),
    "sdxl": (
        UNET
        | {
            "transformer_layers_per_block": (1, 2),
            "addition_embed_type": "text_time",
            "addition_time_embed_dim": 8,
            "projection_class_embeddings_input_dim": 80,
        },
        ADAPTER,
    ),
}


def seeded(*seeds: int) -> Any:
    """A generator, or a list of them."""
    generators = [torch.Generator().manual_seed(seed) for seed in seeds]
    return generators[0] if len(generators) == 1 else generators


def randn(*shape: int, seed: int = 7) -> Tensor:
    return torch.randn(*shape, generator=seeded(seed))


@pytest.fixture(scope="module", params=NETWORKS)
def networks(request: pytest.FixtureRequest, tmp_path_factory: pytest.TempPathFactory) -> Any:
    """(name, folder, diffusers' UNet): the folder holds diffusers' unet2d, adapter and unet."""
    folder = tmp_path_factory.mktemp("motion")
    unet_config, adapter_config = NETWORKS[request.param]
    torch.manual_seed(0)
    unet = diffusers.UNet2DConditionModel(**unet_config)
    adapter = diffusers.MotionAdapter(**adapter_config)
    motion = diffusers.UNetMotionModel.from_unet2d(unet, adapter).eval()
    for name, network in (("unet2d", unet), ("adapter", adapter), ("unet", motion)):
        network.save_pretrained(folder / name)
    return request.param, folder, motion


def assert_equal_outputs(theirs: Any, ours: Any, frames: int, height: int, width: int) -> Tensor:
    """Both networks give one output for two videos; returns ours."""
    config = theirs.config
    inputs: dict[str, Any] = {
        "sample": randn(2, config.in_channels, frames, height, width),
        "timestep": torch.tensor([999, 259]),
    }
    if config.time_cond_proj_dim:
        inputs["timestep_cond"] = randn(2, config.time_cond_proj_dim)
    if config.addition_embed_type:
        ids = torch.tensor([[64.0, 48, 0, 0, 64, 48], [32, 32, 8, 4, 64, 64]])
        inputs["added_cond_kwargs"] = {"text_embeds": randn(2, 32), "time_ids": ids}
    text = randn(2, 7, TEXT_CHANNELS, seed=8)
    rows = text.repeat_interleave(frames, dim=0)
    with torch.no_grad():
        expected = theirs(**inputs, encoder_hidden_states=rows).sample
        output = ours(**inputs, encoder_hidden_states=text).sample
    torch.testing.assert_close(output, expected, rtol=0, atol=1e-5)
    return output


@pytest.mark.parametrize(("frames", "height", "width"), [(5, 8, 8), (6, 9, 7), (1, 8, 8)])
def test_unet_gives_what_diffusers_gives(
    networks: Any, frames: int, height: int, width: int
) -> None:
    _, folder, theirs = networks
    ours = UNetMotionModel.from_pretrained(folder / "unet")
    assert_equal_outputs(theirs, ours, frames, height, width)


def test_a_converted_unet_gives_what_diffusers_gives(networks: Any) -> None:
    name, folder, theirs = networks
    unet = UNet2DConditionModel.from_pretrained(folder / "unet2d")
    adapter = MotionAdapter.from_pretrained(folder / "adapter")
    ours = UNetMotionModel.from_unet2d(unet, adapter)
    assert ours.state_dict().keys() == theirs.state_dict().keys()
    if name == "sdxl":  # diffusers loses these weights on the way
        theirs = copy.deepcopy(theirs)
        theirs.add_embedding.load_state_dict(unet.add_embedding.state_dict())
    output = assert_equal_outputs(theirs, ours, 5, 8, 8)
    one = ours.get_parameter("up_blocks.0.motion_modules.1.proj_out.bias")
    with torch.no_grad():
        one += 0.1
    with pytest.raises(AssertionError):
        torch.testing.assert_close(assert_equal_outputs(ours, ours, 5, 8, 8), output)


def test_diffusers_loads_what_we_save(networks: Any, tmp_path: Path) -> None:
    _, folder, _ = networks
    ours = UNetMotionModel.from_pretrained(folder / "unet")
    ours.save_pretrained(tmp_path / "unet")
    ours.save_motion_modules(tmp_path / "adapter")
    back, report = diffusers.UNetMotionModel.from_pretrained(
        tmp_path / "unet", output_loading_info=True
    )
    assert not any(report.values()), report
    assert_equal_outputs(back, ours, 4, 8, 8)
    stored, expected = (
        json.loads((place / "unet" / "config.json").read_text()) for place in (tmp_path, folder)
    )
    assert {k: v for k, v in stored.items() if k[0] != "_"} == {
        k: v for k, v in expected.items() if k[0] != "_"
    }
    adapter, report = diffusers.MotionAdapter.from_pretrained(
        tmp_path / "adapter", output_loading_info=True
    )
    assert not any(report.values()), report
    state = ours.state_dict()
    assert all(torch.equal(value, state[key]) for key, value in adapter.state_dict().items())


def test_freeu_gives_what_diffusers_gives(tmp_path: Path) -> None:
    torch.manual_seed(0)
    theirs = diffusers.UNetMotionModel.from_unet2d(diffusers.UNet2DConditionModel(**UNET)).eval()
    theirs.save_pretrained(tmp_path)
    ours = UNetMotionModel.from_pretrained(tmp_path)
    for network in (theirs, ours):
        network.enable_freeu(s1=0.9, s2=0.2, b1=1.5, b2=1.6)
    assert_equal_outputs(theirs, ours, 3, 8, 8)


@pytest.fixture(scope="module")
def folder(tokenizer: Any, text_encoder: Any, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """AnimateDiff as diffusers saves it."""
    torch.manual_seed(0)
    pipe = diffusers.AnimateDiffPipeline(
        vae=diffusers.AutoencoderKL(**VAE),
        text_encoder=text_encoder,
        tokenizer=tokenizer,
        unet=diffusers.UNet2DConditionModel(**UNET),
        motion_adapter=diffusers.MotionAdapter(**ADAPTER),
        scheduler=diffusers.DDIMScheduler(**NOISE),
    )
    path = tmp_path_factory.mktemp("animatediff")
    pipe.save_pretrained(path)
    return path


def quiet(pipe: Any) -> Any:
    pipe.set_progress_bar_config(disable=True)
    return pipe


@pytest.fixture(scope="module")
def pipes(folder: Path) -> Any:
    """(diffusers' pipeline, ours)."""
    theirs = quiet(diffusers.AnimateDiffPipeline.from_pretrained(folder))
    if not hasattr(theirs.text_encoder, "text_model"):  # transformers 5 has none
        object.__setattr__(theirs.text_encoder, "text_model", theirs.text_encoder)
    ours = quiet(fewstep.DiffusionPipeline.from_pretrained(folder))
    assert isinstance(ours, fewstep.AnimateDiffPipeline)
    return theirs, ours


def lcm(pipes: Any) -> Any:
    """Both pipelines with LCM sampling."""
    found = []
    for library, pipe in zip((diffusers, fewstep), pipes, strict=True):
        found.append(copy.copy(pipe))
        found[-1].scheduler = library.LCMScheduler.from_config(pipe.scheduler.config)
    return found


Arguments = Callable[[], dict[str, Any]]
# (whether LCM sampling, what differs from the base)
RUNS: dict[str, tuple[bool, Arguments]] = {
    "ddim": (False, lambda: {}),
    "ddim, no guidance": (False, lambda: {"guidance_scale": 1.0}),
    "ddim, eta": (False, lambda: {"eta": 0.7}),
    "ddim, odd size, clip_skip": (False, lambda: {"height": 72, "width": 40, "clip_skip": 1}),
    "ddim, embeds": (
        False,
        lambda: {
            "prompt": None,
            "prompt_embeds": randn(1, 16, TEXT_CHANNELS),
            "negative_prompt_embeds": -randn(1, 16, TEXT_CHANNELS),
        },
    ),
    "lcm, no guidance": (True, lambda: {"guidance_scale": 1}),
    "lcm, guidance, negative prompt": (
        True,
        lambda: {"guidance_scale": 1.8, "negative_prompt": "a dog"},
    ),
    "lcm, prompts and generators": (
        True,
        lambda: {"prompt": ["a cat", "a red dog"], "generator": seeded(3, 4)},
    ),
    "lcm, latents": (True, lambda: {"latents": randn(1, 4, 5, 8, 8)}),
}


def base() -> dict[str, Any]:
    return {
        "prompt": "a red cat",
        "num_frames": 5,
        "num_inference_steps": 3,
        "generator": seeded(0),
        "output_type": "latent",
    }


@pytest.mark.parametrize("case", RUNS)
def test_the_pipeline_equals_diffusers(pipes: Any, case: str) -> None:
    sampled_as_lcm, changes = RUNS[case]
    theirs, ours = lcm(pipes) if sampled_as_lcm else pipes
    expected = theirs(**base() | changes()).frames
    latents = ours(**base() | changes()).frames
    torch.testing.assert_close(latents, expected, rtol=1e-5, atol=1e-4)
    assert latents.std() > 0.1


def test_frames_come_out_as_in_diffusers(pipes: Any) -> None:
    theirs, ours = lcm(pipes)
    arguments = {"prompt": ["a cat", "a dog"], "num_inference_steps": 1, "decode_chunk_size": 3}
    for kind in ("np", "pt", "pil"):
        expected, frames = (
            pipe(**base() | arguments | {"output_type": kind})[0] for pipe in (theirs, ours)
        )
        if kind == "pil":
            assert [len(video) for video in frames] == [5, 5]
            expected, frames = (np.stack([np.stack(v) for v in f]) for f in (expected, frames))
            assert np.abs(expected.astype(int) - frames.astype(int)).max() <= 1
        else:
            assert type(frames) is type(expected)
            expected, frames = torch.as_tensor(expected), torch.as_tensor(frames)
            torch.testing.assert_close(frames, expected, rtol=0, atol=1e-4)


def test_a_guidance_distilled_unet_is_told_the_guidance(
    tokenizer: Any, text_encoder: Any, tmp_path: Path
) -> None:
    torch.manual_seed(0)
    theirs = diffusers.UNetMotionModel.from_unet2d(
        diffusers.UNet2DConditionModel(**LCM_UNET), diffusers.MotionAdapter(**ADAPTER)
    )
    theirs.save_pretrained(tmp_path)
    ours = quiet(
        fewstep.AnimateDiffPipeline(
            vae=fewstep.AutoencoderKL(**LCM_VAE),
            text_encoder=text_encoder,
            tokenizer=tokenizer,
            unet=UNetMotionModel.from_pretrained(tmp_path),
            motion_adapter=None,
            scheduler=fewstep.LCMScheduler(**NOISE),
        )
    )
    latents = ours(**base(), guidance_scale=4.0).frames
    scheduler = diffusers.LCMScheduler(**NOISE)
    scheduler.set_timesteps(3)
    draws = seeded(0)
    z = torch.randn(1, 8, 5, 8, 8, generator=draws)
    embedding = diffusers.LatentConsistencyModelPipeline.get_guidance_scale_embedding
    w = embedding(None, torch.tensor([3.0]), LCM_UNET["time_cond_proj_dim"])
    text, _ = ours.encode_prompt("a red cat", do_classifier_free_guidance=False)
    with torch.no_grad():
        for t in scheduler.timesteps:
            rows = text.repeat_interleave(5, dim=0)
            output = theirs(z, t, encoder_hidden_states=rows, timestep_cond=w).sample
            z = scheduler.step(output, t, z, generator=draws, return_dict=False)[0]
    torch.testing.assert_close(latents, z, rtol=0, atol=1e-4)
    other = ours(**base(), guidance_scale=4.5).frames
    assert (other - latents).abs().max() > 1e-3


def test_diffusers_loads_the_pipeline_that_we_save(pipes: Any, tmp_path: Path) -> None:
    _, ours = pipes
    ours.save_pretrained(tmp_path)
    theirs = quiet(diffusers.DiffusionPipeline.from_pretrained(tmp_path))
    assert type(theirs).__name__ == "AnimateDiffPipeline"
    expected = theirs(**base()).frames
    torch.testing.assert_close(ours(**base()).frames, expected, rtol=0, atol=1e-4)
