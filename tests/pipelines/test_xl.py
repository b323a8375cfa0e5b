"""SDXL's own rules: pairs of embeddings, sizes, scores, and a VAE that half precision overflows."""

from __future__ import annotations

from typing import Any

import numpy as np
import PIL.Image
import pytest
import torch
from conftest import NOISE, TEXT_CHANNELS, UNET, VAE

from fewstep import (
    AutoencoderKL,
    AutoPipelineForImage2Image,
    LCMScheduler,
    StableDiffusionXLImg2ImgPipeline,
    StableDiffusionXLPipeline,
    UNet2DConditionModel,
)
from fewstep.errors import RequestError

PICTURE = PIL.Image.fromarray(
    np.random.default_rng(0).integers(0, 256, (32, 48, 3), dtype=np.uint8)
)


def built(text_encoder: Any, tokenizer: Any, numbers: int = 6, **options: Any) -> Any:
    """A tiny SDXL that is told so many `numbers` of sizes."""
    from transformers import CLIPTextConfig, CLIPTextModelWithProjection

    torch.manual_seed(0)
    stored = text_encoder.config.to_dict() | {"projection_dim": 32}
    second = CLIPTextModelWithProjection(CLIPTextConfig.from_dict(stored)).eval()
    unet = UNET | {
        "addition_embed_type": "text_time",
        "addition_time_embed_dim": 8,
        "projection_class_embeddings_input_dim": 8 * numbers + 32,
        "cross_attention_dim": 2 * TEXT_CHANNELS,
    }
    pipe = StableDiffusionXLPipeline(
        vae=AutoencoderKL(**VAE, force_upcast=True),
        text_encoder=text_encoder,
        text_encoder_2=second,
        tokenizer=tokenizer,
        tokenizer_2=tokenizer,
        unet=UNet2DConditionModel(**unet),
        scheduler=LCMScheduler(**NOISE),
        **options,
    )
    pipe.set_progress_bar_config(disable=True)
    return pipe


@pytest.fixture(scope="module")
def pipe(text_encoder: Any, tokenizer: Any) -> Any:
    return built(text_encoder, tokenizer)


def draw(pipe: Any, **changes: Any) -> Any:
    arguments: dict[str, Any] = {
        "prompt": "a cat",
        "num_inference_steps": 2,
        "guidance_scale": 2.0,
        "generator": torch.Generator().manual_seed(0),
        "output_type": "latent",
    }
    return pipe(**(arguments | changes)).images


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        (
            {"prompt": None, "prompt_embeds": torch.zeros(1, 16, 64)},
            "prompt_embeds and pooled_prompt_embeds belong together",
        ),
        (
            {"negative_prompt_embeds": torch.zeros(1, 16, 64)},
            "negative_prompt_embeds and negative_pooled_prompt_embeds belong together",
        ),
        ({"negative_original_size": (8, 8)}, "work together; give both sizes"),
        ({"clip_skip": 2}, r"clip_skip must lie in \[0, 1\]"),
        ({"denoising_end": 1.5}, r"denoising_end must be in \(0, 1\)"),
        ({"prompt_2": ["a", "b"]}, "prompt_2 holds 2 texts, but there are 1 prompts"),
    ],
)
def test_bad_arguments_are_named(pipe: Any, changes: dict[str, Any], message: str) -> None:
    with pytest.raises(RequestError, match=message):
        draw(pipe, **changes)


def test_an_invisible_mark_is_refused(text_encoder: Any, tokenizer: Any) -> None:
    with pytest.raises(RequestError, match="add_watermarker=True is not supported"):
        built(text_encoder, tokenizer, add_watermarker=True)


def test_a_unet_of_other_sizes_is_refused(text_encoder: Any, tokenizer: Any) -> None:
    with pytest.raises(RequestError, match="unet takes 72 channels of sizes"):
        draw(built(text_encoder, tokenizer, numbers=5))


def test_a_refiner_is_told_a_score_and_no_other_model_is(
    pipe: Any, text_encoder: Any, tokenizer: Any
) -> None:
    refiner = StableDiffusionXLImg2ImgPipeline.from_pipe(
        built(text_encoder, tokenizer, numbers=5), requires_aesthetics_score=True
    )
    refiner.set_progress_bar_config(disable=True)
    plain = draw(refiner, image=PICTURE, strength=0.6)
    scored = draw(refiner, image=PICTURE, strength=0.6, aesthetic_score=1.0)
    assert (plain - scored).abs().max() > 1e-4
    other = AutoPipelineForImage2Image.from_pipe(pipe)
    other.set_progress_bar_config(disable=True)
    with pytest.warns(UserWarning, match="aesthetic_score has no effect"):
        draw(other, image=PICTURE, strength=0.6, aesthetic_score=1.0)


def test_without_return_dict_there_are_the_pictures_alone(pipe: Any) -> None:
    answer = pipe("a cat", num_inference_steps=1, output_type="latent", return_dict=False)
    assert type(answer) is tuple
    assert [latents.shape for latents in answer] == [(1, 4, 8, 8)]


def test_a_second_negative_prompt_without_guidance_is_said(pipe: Any) -> None:
    with pytest.warns(UserWarning, match="negative_prompt_2 has no effect"):
        draw(pipe, guidance_scale=1.0, negative_prompt_2="a dog")


def test_a_vae_that_overflows_in_half_precision_decodes_in_float32(
    text_encoder: Any, tokenizer: Any
) -> None:
    pipe = built(text_encoder, tokenizer)
    latents = draw(pipe)
    wanted = pipe.decode(latents, "pt")
    pipe.vae.half()
    seen = []
    pipe.vae.decoder.register_forward_pre_hook(lambda module, args: seen.append(args[0].dtype))
    decoded = pipe.decode(latents, "pt")
    assert seen == [torch.float32] and pipe.vae.dtype == torch.float16
    torch.testing.assert_close(decoded, wanted, rtol=0, atol=0.01)
