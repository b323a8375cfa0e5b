"""The picture of every step, and stopping at any step, for every public pipeline."""

from __future__ import annotations

import inspect
from collections.abc import Callable
from functools import cache
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import numpy as np
import PIL.Image
import pytest
import torch
from conftest import LCM_UNET, NOISE, TEXT_CHANNELS, UNET, VAE

import fewstep
from fewstep import AutoencoderKL, AutoencoderTiny, RequestError
from fewstep.pipelines.catalog import CATALOG
from fewstep.pipelines.xl import StableDiffusionXL
from fewstep.utils import PreviewCallback

EVERY = {kind.__name__: kind for tasks in CATALOG.values() for kind in tasks.values()}
# Attention first, which T2I-Adapters of Stable Diffusion are for.
ADAPTED = UNET | {
    "down_block_types": ("CrossAttnDownBlock2D", "DownBlock2D"),
    "up_block_types": ("UpBlock2D", "CrossAttnUpBlock2D"),
}
XL = ADAPTED | {
    "addition_embed_type": "text_time",
    "addition_time_embed_dim": 8,
    "projection_class_embeddings_input_dim": 80,
    "cross_attention_dim": 2 * TEXT_CHANNELS,
}
STEPS = 3
Build = Callable[[str], Any]


def tiny(latent_channels: int = 4, levels: int = 4) -> AutoencoderTiny:
    torch.manual_seed(5)
    return AutoencoderTiny(
        latent_channels=latent_channels,
        encoder_block_out_channels=(4,) * levels,
        decoder_block_out_channels=(4,) * levels,
        num_encoder_blocks=(1,) * levels,
        num_decoder_blocks=(1,) * levels,
    ).eval()


@pytest.fixture(scope="module")
def build(tokenizer: Any, text_encoder: Any, lcm_folder: Path) -> Build:
    """A tiny pipeline of a public class."""
    from transformers import CLIPTextConfig, CLIPTextModelWithProjection

    torch.manual_seed(0)
    stored = text_encoder.config.to_dict() | {"projection_dim": 32}
    second = CLIPTextModelWithProjection(CLIPTextConfig.from_dict(stored)).eval()
    vae = AutoencoderKL(**VAE)
    common = {"vae": vae, "text_encoder": text_encoder, "tokenizer": tokenizer}
    adapter = {"channels": (8, 16), "num_res_blocks": 1, "downscale_factor": 8}
    motion = {
        "block_out_channels": (8, 16),
        "motion_layers_per_block": 1,
        "motion_norm_num_groups": 2,
        "motion_num_attention_heads": 2,
    }

    def parts(kind: type[Any]) -> dict[str, Any]:
        is_xl = issubclass(kind, StableDiffusionXL)
        unet = fewstep.UNet2DConditionModel(**(XL if is_xl else ADAPTED))
        found = {**common, "unet": unet, "scheduler": fewstep.LCMScheduler(**NOISE)}
        if is_xl:
            found |= {"text_encoder_2": second, "tokenizer_2": tokenizer}
        if "ControlNet" in kind.__name__:
            hint = (4, 4, 4, 4)
            found["controlnet"] = fewstep.ControlNetModel.from_unet(
                unet, conditioning_embedding_out_channels=hint
            )
        if "Adapter" in kind.__name__:
            found["adapter"] = fewstep.T2IAdapter(**adapter, adapter_type="full_adapter")
        if "Animate" in kind.__name__:
            found["motion_adapter"] = fewstep.MotionAdapter(**motion)
        return found

    @cache
    def make(name: str) -> Any:
        torch.manual_seed(1)
        kind: Any = EVERY[name]
        is_lcm = name.startswith("Latent")
        pipe = kind.from_pretrained(lcm_folder) if is_lcm else kind(**parts(kind))
        pipe.set_progress_bar_config(disable=True)
        return pipe

    return make


def picture(seed: int) -> PIL.Image.Image:
    noise = np.random.default_rng(seed).integers(0, 256, (32, 32, 3), dtype=np.uint8)
    return PIL.Image.fromarray(noise)


def call(pipe: Any, **changes: Any) -> Any:
    """What a pipeline draws in three steps, from all pictures that it takes; latents by default."""
    arguments: dict[str, Any] = {
        "prompt": "a cat",
        "num_inference_steps": STEPS,
        "guidance_scale": 2.0,
        "generator": torch.Generator().manual_seed(0),
        "output_type": "latent",
        "height": 32,
        "width": 32,
        "image": picture(0),
        "mask_image": picture(1).convert("L"),
        "control_image": picture(2),
        "strength": 1.0,
        "num_frames": 2,
    }
    taken = inspect.signature(type(pipe).__call__).parameters
    output = pipe(**{name: value for name, value in arguments.items() if name in taken} | changes)
    return output[0]


@pytest.mark.parametrize("name", EVERY)
def test_a_callback_may_stop_every_task(name: str, build: Build) -> None:
    pipe = build(name)
    seen: list[torch.Tensor] = []

    def stop(pipe: Any, index: int, t: Any, tensors: dict[str, Any]) -> dict[str, Any]:
        seen.append(tensors["denoised"])
        pipe._interrupt = index == 1
        return {}

    watched: dict[str, Any] = {
        "callback_on_step_end": stop,
        "callback_on_step_end_tensor_inputs": ["denoised"],
    }
    stopped = call(pipe, **watched)
    assert len(seen) == 2 and pipe.interrupt
    assert torch.equal(stopped, seen[-1]), "what was predicted there is the result"
    whole = call(pipe)
    assert not pipe.interrupt
    assert (whole - stopped).abs().max() > 1e-3


@pytest.mark.parametrize("name", EVERY)
def test_every_task_shows_each_step_and_draws_the_same(name: str, build: Build) -> None:
    pipe = build(name)
    vae = tiny(8, 3) if name.startswith("Latent") else tiny()
    shown: dict[int, list[PIL.Image.Image]] = {}
    watched = call(pipe, callback_on_step_end=PreviewCallback(shown.__setitem__, vae=vae))
    assert torch.equal(watched, call(pipe))
    assert list(shown) == [0, 1, 2]
    assert [[p.size for p in pictures] for pictures in shown.values()] == [[(32, 32)]] * STEPS
    assert pipe.vae is not vae


def pixels(pictures: list[PIL.Image.Image]) -> np.ndarray:
    return np.stack([np.asarray(p, dtype=int) for p in pictures])


def test_the_last_preview_of_an_lcm_is_the_picture(build: Build) -> None:
    shown: dict[int, list[PIL.Image.Image]] = {}
    pictures = call(
        build("LatentConsistencyModelPipeline"),
        prompt=["a cat", "a dog"],
        output_type="pil",
        callback_on_step_end=PreviewCallback(shown.__setitem__),
    )
    assert (pixels(shown[2]) == pixels(pictures)).all()
    assert (pixels(shown[0]) != pixels(pictures)).any()
    assert (pixels(shown[2][:1]) != pixels(shown[2][1:])).any()


def test_another_autoencoder_decodes_in_its_own_units(build: Build) -> None:
    pipe = build("StableDiffusionPipeline")
    torch.manual_seed(6)
    vae = AutoencoderKL(**VAE, scaling_factor=0.7)
    shown: dict[int, list[PIL.Image.Image]] = {}
    z = call(pipe, callback_on_step_end=PreviewCallback(shown.__setitem__, vae=vae))
    with torch.no_grad():
        (decoded,) = vae.decode(z / 0.7, return_dict=False)
        (wrong,) = vae.decode(z / pipe.vae.config.scaling_factor, return_dict=False)
    for tensor, same in ((decoded, True), (wrong, False)):
        expected = pixels(fewstep.utils.pt_to_pil(tensor))
        assert (np.abs(pixels(shown[2]) - expected).max() <= 1) == same


def test_a_smaller_autoencoder_gives_smaller_previews(build: Build) -> None:
    shown: dict[int, list[PIL.Image.Image]] = {}
    pipe = build("StableDiffusionPipeline")
    call(pipe, callback_on_step_end=PreviewCallback(shown.__setitem__, vae=tiny(4, 2)))
    assert shown[0][0].size == (8, 8)


def test_of_videos_the_first_frames_are_shown_or_all(build: Build) -> None:
    first: dict[int, list[PIL.Image.Image]] = {}
    every: dict[int, list[PIL.Image.Image]] = {}
    pipe = build("AnimateDiffPipeline")
    for shown, all_frames in ((first, False), (every, True)):
        callback = PreviewCallback(shown.__setitem__, every_frame=all_frames)
        videos = call(
            pipe, num_videos_per_prompt=2, output_type="pil", callback_on_step_end=callback
        )
    frames = [frame for video in videos for frame in video]
    assert len(frames) == 4
    assert np.abs(pixels(every[2]) - pixels(frames)).max() <= 1
    assert np.abs(pixels(first[2]) - pixels([frames[0], frames[2]])).max() <= 1


def test_what_the_safety_checker_flags_is_black_on_the_way_too(
    build: Build, monkeypatch: pytest.MonkeyPatch
) -> None:
    pipe = build("StableDiffusionPipeline")
    monkeypatch.setattr(pipe, "safety_checker", lambda pixel_values: [True])
    seen = SimpleNamespace(pixel_values=None)
    monkeypatch.setattr(pipe, "feature_extractor", lambda pictures, return_tensors: seen)
    shown: dict[int, list[PIL.Image.Image]] = {}
    with pytest.warns(UserWarning, match="flagged 1 of 1 pictures"):
        call(pipe, callback_on_step_end=PreviewCallback(shown.__setitem__))
    assert not any(pixels(pictures).any() for pictures in shown.values())


def test_bad_arguments_are_named(build: Build) -> None:
    with pytest.raises(RequestError, match=r"on_pictures must be a function of .* got 'a folder'"):
        PreviewCallback("a folder")  # type: ignore[arg-type]
    with pytest.raises(
        RequestError, match=r"vae must be a fewstep AutoencoderTiny or .* got builtins.str"
    ):
        PreviewCallback(print, vae="madebyollin/taesd")  # type: ignore[arg-type]
    callback = PreviewCallback(print, vae=tiny(4))
    channels = LCM_UNET["out_channels"]
    with pytest.raises(RequestError, match=f"latent_channels=4, and this .* have {channels}; give"):
        call(build("LatentConsistencyModelPipeline"), callback_on_step_end=callback)
