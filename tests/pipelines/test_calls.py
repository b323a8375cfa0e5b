"""What the public pipelines answer to good and bad arguments."""

from __future__ import annotations

import inspect
import json
import math
import warnings
from pathlib import Path
from typing import Any

import numpy as np
import PIL.Image
import pytest
import torch
from conftest import NOISE, UNET

import fewstep
from fewstep import (
    DDIMScheduler,
    LatentConsistencyModelImg2ImgPipeline,
    LatentConsistencyModelPipeline,
    LCMScheduler,
    RequestError,
    StableDiffusionImg2ImgPipeline,
    StableDiffusionPipeline,
)
from fewstep.pipelines.request import Request
from fewstep.schedulers import HeunDiscreteScheduler

PICTURE = PIL.Image.new("RGB", (32, 32), "teal")


@pytest.fixture(scope="module")
def lcm(lcm_folder: Path) -> LatentConsistencyModelPipeline:
    return quiet(LatentConsistencyModelPipeline.from_pretrained(lcm_folder))


@pytest.fixture(scope="module")
def sd(sd_folder: Path) -> StableDiffusionPipeline:
    return quiet(StableDiffusionPipeline.from_pretrained(sd_folder))


@pytest.fixture(scope="module")
def lcm_from_image(lcm: Any) -> LatentConsistencyModelImg2ImgPipeline:
    return quiet(LatentConsistencyModelImg2ImgPipeline.from_pipe(lcm))


@pytest.fixture(scope="module")
def sd_from_image(sd: Any) -> StableDiffusionImg2ImgPipeline:
    return quiet(StableDiffusionImg2ImgPipeline.from_pipe(sd))


def quiet(pipe: Any) -> Any:
    pipe.set_progress_bar_config(disable=True)
    return pipe


def seeded(*seeds: int) -> Any:
    generators = [torch.Generator().manual_seed(seed) for seed in seeds]
    return generators[0] if len(generators) == 1 else generators


# ── results ──


def test_a_picture_of_a_batch_is_what_it_is_alone(lcm: Any, sd: Any) -> None:
    for pipe in (lcm, sd):
        prompts = ["a cat", "a red dog", "a cat"]
        arguments = {"num_inference_steps": 4, "output_type": "pt"}
        together = pipe(prompts, generator=seeded(1, 2, 3), **arguments).images
        for index, prompt in enumerate(prompts):
            alone = pipe(prompt, generator=seeded(index + 1), **arguments).images
            torch.testing.assert_close(together[index : index + 1], alone, rtol=0, atol=1e-5)
        assert (together[0] - together[2]).abs().max() > 1e-2


def test_a_picture_from_a_picture_in_a_batch_is_what_it_is_alone(
    lcm_from_image: Any, sd_from_image: Any
) -> None:
    images = [PICTURE, PIL.Image.new("RGB", (32, 32), "red")]
    for pipe in (lcm_from_image, sd_from_image):
        arguments = {"num_inference_steps": 4, "strength": 0.5, "output_type": "pt"}
        together = pipe(
            ["a cat", "a dog"],
            images,
            num_images_per_prompt=2,
            generator=seeded(1, 2, 3, 4),
            **arguments,
        ).images
        assert len(together) == 4
        for index in range(4):
            alone = pipe(
                ["a cat", "a dog"][index // 2],
                images[index // 2],
                generator=seeded(index + 1),
                **arguments,
            ).images
            torch.testing.assert_close(together[index : index + 1], alone, rtol=0, atol=1e-5)


def test_numbers_of_numpy_are_numbers(lcm: Any) -> None:
    arguments: dict[str, Any] = {
        "num_inference_steps": np.int64(2),
        "guidance_scale": np.float32(7.5),
        "width": np.int32(36),
    }
    (picture,) = lcm("a cat", **arguments).images
    assert picture.size == (36, 32)
    assert json.loads(picture.info["fewstep"])["guidance_scale"] == 7.5


def test_calls_leave_no_state_behind(lcm: Any) -> None:
    arguments = {"output_type": "pt", "num_inference_steps": 2}
    first = lcm("a cat", generator=seeded(0), **arguments).images
    lcm("a dog", generator=seeded(1), num_inference_steps=8, guidance_scale=3.0)
    assert torch.equal(lcm("a cat", generator=seeded(0), **arguments).images, first)


def test_output_types_and_return_dict(lcm: Any) -> None:
    def call(**arguments: Any) -> Any:
        return lcm("a cat", generator=seeded(0), num_inference_steps=1, **arguments)

    result = call()
    assert result.images is result["images"] is result[0]
    assert result.nsfw_content_detected is None
    (picture,) = result.images
    assert picture.size == (32, 32)
    assert call(output_type="np").images.shape == (1, 32, 32, 3)
    assert call(output_type="pt").images.shape == (1, 3, 32, 32)
    assert call(output_type="latent").images.shape == (1, 8, 8, 8)
    images, flags = call(return_dict=False)
    assert flags is None
    assert np.array_equal(np.asarray(images[0]), np.asarray(picture))


def test_the_size_is_that_of_the_request_or_of_the_model(lcm: Any, sd: Any) -> None:
    assert lcm("a cat", num_inference_steps=1, width=36).images[0].size == (36, 32)
    assert sd("a cat", num_inference_steps=1, height=48).images[0].size == (64, 48)


def test_latents_start_the_run(lcm: Any) -> None:
    latents = torch.randn(1, 8, 8, 8, generator=seeded(3))
    arguments: dict[str, Any] = {"num_inference_steps": 1, "output_type": "pt"}
    given = lcm("a cat", latents=latents, **arguments).images
    drawn = lcm("a cat", generator=seeded(3), **arguments).images
    assert torch.equal(given, drawn)


def test_prompt_embeds_stand_for_the_prompt(sd: Any) -> None:
    positive, negative = sd.encode_prompt("a cat", negative_prompt="red")
    arguments: dict[str, Any] = {"num_inference_steps": 2, "output_type": "pt"}
    expected = sd("a cat", negative_prompt="red", generator=seeded(0), **arguments).images
    embedded = sd(
        prompt_embeds=positive,
        negative_prompt_embeds=negative,
        generator=seeded(0),
        **arguments,
    ).images
    assert torch.equal(embedded, expected)


def test_one_negative_prompt_serves_all_prompts(sd: Any) -> None:
    arguments: dict[str, Any] = {"num_inference_steps": 2, "output_type": "pt"}
    one = sd(["a cat", "a dog"], negative_prompt="red", generator=seeded(0), **arguments).images
    both = sd(
        ["a cat", "a dog"], negative_prompt=["red", "red"], generator=seeded(0), **arguments
    ).images
    torch.testing.assert_close(one, both, rtol=0, atol=1e-5)


def test_latents_are_normalised_by_the_statistics_of_the_vae(sd: Any) -> None:
    mean, std = (1.0, -2.0, 0.5, 3.0), (0.5, 2.0, 1.0, 4.0)
    vae = fewstep.AutoencoderKL.from_config(sd.vae.config, latents_mean=mean, latents_std=std)
    vae.load_state_dict(sd.vae.state_dict())
    pipe = quiet(StableDiffusionPipeline.from_pipe(sd, vae=vae))
    z = torch.randn(2, 4, 8, 8, generator=seeded(0))
    torch.testing.assert_close(pipe.unscaled(pipe.scaled(z)), z)
    one = torch.ones(1, 4, 1, 1) * torch.tensor(mean).reshape(1, 4, 1, 1)
    assert pipe.scaled(one).abs().max() == 0
    arguments: dict[str, Any] = {"num_inference_steps": 2, "output_type": "pt"}
    before = sd("a cat", generator=seeded(0), **arguments).images
    after = pipe("a cat", generator=seeded(0), **arguments).images
    assert (before - after).abs().max() > 1e-2


def test_the_older_name_of_original_inference_steps_counts(lcm: Any) -> None:
    arguments: dict[str, Any] = {"num_inference_steps": 3, "output_type": "pt"}
    old = lcm("a cat", lcm_origin_steps=20, generator=seeded(0), **arguments).images
    new = lcm("a cat", original_inference_steps=20, generator=seeded(0), **arguments).images
    assert torch.equal(old, new)
    plain = lcm("a cat", generator=seeded(0), **arguments).images
    assert (new - plain).abs().max() > 1e-4
    with pytest.raises(RequestError, match="are one argument"):
        lcm("a cat", lcm_origin_steps=20, original_inference_steps=20)


def test_every_picture_says_how_it_was_made(lcm_folder: Path, lcm_from_image: Any) -> None:
    result = lcm_from_image(
        ["a cat", "a dog"],
        PICTURE,
        num_inference_steps=3,
        strength=0.5,
        guidance_scale=5,
        generator=seeded(1, 2),
    )
    records = [json.loads(picture.info["fewstep"]) for picture in result.images]
    assert [record["prompt"] for record in records] == ["a cat", "a dog"]
    assert [record["seed"] for record in records] == [1, 2]
    assert [record["index"] for record in records] == [0, 1]
    expected = {
        "pipeline": "LatentConsistencyModelImg2ImgPipeline",
        "model": str(lcm_folder),
        "steps": 3,
        "timesteps": [499, 339, 179],
        "strength": 0.5,
        "guidance_scale": 5,
        "width": 32,
        "height": 32,
        "batch": 2,
        "scheduler": "LCMScheduler",
        "dtype": "float32",
        "versions": {"fewstep": fewstep.__version__, "torch": torch.__version__},
    }
    assert expected.items() <= records[0].items()
    shared = lcm_from_image("a cat", PICTURE, generator=seeded(7), num_images_per_prompt=2).images
    assert [json.loads(p.info["fewstep"])["seed"] for p in shared] == [7, 7]
    assert [json.loads(p.info["fewstep"])["prompt"] for p in shared] == ["a cat", "a cat"]
    (unseeded,) = lcm_from_image("a cat", PICTURE).images
    assert json.loads(unseeded.info["fewstep"])["seed"] is None


# ── callbacks ──


def test_a_callback_may_stop_the_run(lcm: Any) -> None:
    seen = []

    def stop(pipe: Any, index: int, t: torch.Tensor, tensors: dict[str, Any]) -> dict[str, Any]:
        seen.append((index, int(t), sorted(tensors)))
        pipe._interrupt = index == 1
        return tensors

    arguments: dict[str, Any] = {
        "callback_on_step_end": stop,
        "callback_on_step_end_tensor_inputs": ["latents", "denoised"],
    }
    lcm("a cat", generator=seeded(0), **arguments)
    names = ["denoised", "latents"]
    assert seen == [(0, 999, names), (1, 759, names)]
    assert lcm.interrupt and lcm.num_timesteps == 4 and lcm.guidance_scale == 8.5
    lcm("a cat", generator=seeded(0))
    assert not lcm.interrupt, "the next call starts anew"


def test_a_callback_that_returns_nothing_changes_nothing(lcm: Any) -> None:
    arguments: dict[str, Any] = {"num_inference_steps": 2, "output_type": "pt"}
    plain = lcm("a cat", generator=seeded(0), **arguments).images
    watched = lcm(
        "a cat", generator=seeded(0), callback_on_step_end=lambda *_: None, **arguments
    ).images
    assert torch.equal(plain, watched)


def test_what_a_callback_returns_is_checked(sd: Any) -> None:
    def call(returned: dict[str, Any]) -> None:
        sd("a cat", num_inference_steps=2, callback_on_step_end=lambda *_: returned)

    with pytest.raises(RequestError, match="returned 'noise'"):
        call({"noise": torch.zeros(1)})
    with pytest.raises(RequestError, match="prompt_embeds of 3 rows; it must have 1, or 2"):
        call({"prompt_embeds": torch.zeros(3, 16, 32)})


def test_a_callback_may_change_the_negative_prompt_and_the_scale(sd: Any) -> None:
    arguments: dict[str, Any] = {"num_inference_steps": 3, "output_type": "latent"}
    plain = sd("a cat", generator=seeded(0), **arguments).images

    def negative(pipe: Any, *_: Any) -> dict[str, Any]:
        return {"negative_prompt_embeds": torch.ones(1, 16, 32)}

    def scale(pipe: Any, *_: Any) -> None:
        pipe._guidance_scale = 2.0

    for callback in (negative, scale):
        changed = sd(
            "a cat", generator=seeded(0), callback_on_step_end=callback, **arguments
        ).images
        assert (changed - plain).abs().max() > 1e-3


# ── bad arguments ──

BAD: list[tuple[dict[str, Any], str]] = [
    ({"prompt": None}, "prompt is missing"),
    ({"prompt": 7}, "prompt must be a string or a list of strings, got 7"),
    ({"prompt": []}, "prompt must be a string or a list"),
    ({"prompt": ["a", None]}, "prompt must be a string or a list"),
    ({"prompt_embeds": torch.zeros(1, 16, 32)}, "prompt and prompt_embeds were both given"),
    ({"num_inference_steps": 0}, "num_inference_steps must be a positive integer, got 0"),
    ({"num_inference_steps": 2.5}, "num_inference_steps must be a positive integer, got 2.5"),
    ({"num_inference_steps": 1001}, "num_inference_steps must lie in"),
    ({"num_images_per_prompt": 0}, "num_images_per_prompt must be a positive integer"),
    ({"generator": 3}, "generator must be a torch.Generator"),
    ({"generator": [seeded(1)] * 2}, "generator holds 2 generators, but 1 pictures"),
    ({"output_type": "png"}, "output_type must be one of"),
    ({"guidance_scale": "7"}, "guidance_scale must be a finite number, got '7'"),
    ({"guidance_scale": float("nan")}, "guidance_scale must be a finite number, got nan"),
    ({"prompt": None, "prompt_embeds": 3.0}, "prompt_embeds must be a tensor"),
    ({"callback_on_step_end": 3}, "callback_on_step_end must be a function"),
    ({"timesteps": [1, 2]}, "timesteps must be strictly descending"),
    ({"clip_skip": 3}, r"clip_skip must lie in \[0, 2\]"),
    ({"ip_adapter_image": PICTURE}, "ip_adapter_image needs an IP-Adapter"),
    ({"ip_adapter_image_embeds": []}, "ip_adapter_image_embeds needs an IP-Adapter"),
    ({"cross_attention_kwargs": {"gligen": {}}}, "cross_attention_kwargs=.* is not supported"),
    (
        {"callback_on_step_end_tensor_inputs": ["mask"]},
        "callback_on_step_end_tensor_inputs must be among .* got 'mask'",
    ),
]
BAD_SD: list[tuple[dict[str, Any], str]] = [
    ({"negative_prompt": 7}, "negative_prompt must be a string"),
    ({"negative_prompt": ["a", "b"]}, "negative_prompt holds 2 texts, but there are 1 prompts"),
    (
        {"negative_prompt": "a", "negative_prompt_embeds": torch.zeros(1, 16, 32)},
        "negative_prompt and negative_prompt_embeds were both given",
    ),
    (
        {"negative_prompt_embeds": torch.zeros(1, 15, 32)},
        r"negative_prompt_embeds must have the shape of prompt_embeds, \(1, 16, 32\)",
    ),
    ({"sigmas": [1.0]}, r"sigmas=\[1.0\] is not supported: give timesteps"),
    ({"eta": 1.5}, r"eta must be in \[0, 1\], got 1.5"),
]
BAD_TEXT: list[tuple[dict[str, Any], str]] = [
    ({"height": 0}, "height must be a positive integer, got 0"),
    ({"width": 30}, "width must be a multiple of .*, got 30; use "),
    ({"latents": torch.zeros(1, 4, 2, 2)}, "latents must have shape .* got .1, 4, 2, 2."),
    ({"latents": [0.0]}, "latents must be a tensor, got list"),
]
BAD_IMAGE: list[tuple[dict[str, Any], str]] = [
    ({"image": None}, "image is missing"),
    ({"image": "a.png"}, "image must be a PIL picture"),
    ({"image": [PICTURE] * 2}, "image holds 2 pictures, but there are 1 prompts"),
    ({"strength": 0}, r"strength must be in \(0, 1\], got 0"),
    ({"strength": 1.5}, r"strength must be in \(0, 1\], got 1.5"),
    ({"strength": "half"}, r"strength must be in \(0, 1\], got 'half'"),
]


def ids(value: Any) -> str | None:
    return "-".join(value) if isinstance(value, dict) else ""


@pytest.mark.parametrize(("arguments", "message"), BAD + BAD_TEXT, ids=ids)
def test_bad_arguments_of_lcm_text_to_image(lcm: Any, arguments: Any, message: str) -> None:
    with pytest.raises(RequestError, match=message):
        lcm(**{"prompt": "a cat", **arguments})


@pytest.mark.parametrize(("arguments", "message"), BAD + BAD_SD + BAD_TEXT, ids=ids)
def test_bad_arguments_of_text_to_image(sd: Any, arguments: Any, message: str) -> None:
    with pytest.raises(RequestError, match=message):
        sd(**{"prompt": "a cat", **arguments})


@pytest.mark.parametrize(("arguments", "message"), BAD + BAD_IMAGE, ids=ids)
def test_bad_arguments_of_lcm_image_to_image(
    lcm_from_image: Any, arguments: Any, message: str
) -> None:
    with pytest.raises(RequestError, match=message):
        lcm_from_image(**{"prompt": "a cat", "image": PICTURE, **arguments})


@pytest.mark.parametrize(("arguments", "message"), BAD + BAD_SD + BAD_IMAGE, ids=ids)
def test_bad_arguments_of_image_to_image(sd_from_image: Any, arguments: Any, message: str) -> None:
    with pytest.raises(RequestError, match=message):
        sd_from_image(**{"prompt": "a cat", "image": PICTURE, **arguments})


def test_a_strength_that_leaves_no_step_names_the_least(
    sd_from_image: Any, lcm_from_image: Any
) -> None:
    with pytest.raises(RequestError, match=r"strength=0.2 leaves no step .* use strength >= 0.25"):
        sd_from_image("a cat", PICTURE, strength=0.2, num_inference_steps=4)
    assert sd_from_image("a cat", PICTURE, strength=0.25, num_inference_steps=4).images
    with pytest.raises(RequestError, match=r"strength=0.05 leaves 2 of 50 .* strength >= 0.08"):
        lcm_from_image("a cat", PICTURE, strength=0.05, num_inference_steps=4)
    assert lcm_from_image("a cat", PICTURE, strength=0.08, num_inference_steps=4).images


@pytest.mark.parametrize("steps", range(1, 101))
def test_the_least_strength_that_is_named_leaves_a_step(steps: int) -> None:
    assert int(steps * (math.ceil(100 / steps) / 100)) >= 1


def test_embeds_of_another_text_encoder_are_refused(sd: Any) -> None:
    with pytest.raises(RequestError, match="prompt_embeds must have 32 channels"):
        sd(prompt_embeds=torch.zeros(1, 16, 8))
    with pytest.raises(RequestError, match="prompt_embeds must be a tensor"):
        sd(prompt_embeds=torch.zeros(16, 32))


def test_checks_come_before_any_work(sd: Any, monkeypatch: pytest.MonkeyPatch) -> None:
    def work(*_: Any, **__: Any) -> None:
        raise AssertionError("worked")

    monkeypatch.setattr(sd, "text_encoder", work)
    for arguments, message in [*BAD, *BAD_TEXT]:
        if "clip_skip" not in arguments:  # its range is said by the encoder that is replaced
            with pytest.raises(RequestError, match=message):
                sd(**{"prompt": "a cat", **arguments})


@pytest.mark.parametrize(
    ("given", "meant"),
    [
        ("guidance", "guidance_scale"),
        ("num_steps", "num_inference_steps"),
        ("seed", "generator=torch.Generator"),
        ("callback", "callback_on_step_end"),
        ("promt", "prompt"),
    ],
)
def test_an_unknown_argument_names_the_nearest(lcm: Any, given: str, meant: str) -> None:
    message = (
        f"LatentConsistencyModelPipeline got an unknown argument '{given}'; did you mean {meant}"
    )
    with pytest.raises(TypeError, match=message):
        lcm(**{"prompt": "a cat", given: 1})
    with pytest.raises(TypeError, match=r"unknown argument 'zzz' .known: prompt, height"):
        lcm("a cat", zzz=1)


def test_an_lcm_pipeline_needs_an_lcm(sd: Any, lcm: Any) -> None:
    plain = quiet(LatentConsistencyModelPipeline.from_pipe(sd))
    with pytest.raises(RequestError, match="needs a guidance-distilled UNet"):
        plain("a cat")
    other = quiet(LatentConsistencyModelPipeline.from_pipe(lcm, scheduler=DDIMScheduler(**NOISE)))
    with pytest.raises(RequestError, match="scheduler must be an LCMScheduler, got DDIMScheduler"):
        other("a cat")


def test_eta_is_for_ddim(sd: Any) -> None:
    pipe = quiet(StableDiffusionPipeline.from_pipe(sd, scheduler=LCMScheduler()))
    with pytest.raises(RequestError, match=r"eta=0.5 is an argument of the DDIMScheduler"):
        pipe("a cat", num_inference_steps=4, guidance_scale=1, eta=0.5)


def test_a_scheduler_that_cannot_sample_says_what_can(sd: Any) -> None:
    pipe = quiet(StableDiffusionPipeline.from_pipe(sd, scheduler=HeunDiscreteScheduler()))
    with pytest.raises(RequestError, match="HeunDiscreteScheduler is not implemented for sampling"):
        pipe("a cat")
    pipe.scheduler = object()
    with pytest.raises(RequestError, match="scheduler must be one of fewstep's, got builtins"):
        pipe("a cat")


def test_an_inpainting_network_is_refused(sd: Any) -> None:
    unet = fewstep.UNet2DConditionModel(**UNET | {"in_channels": 9})
    pipe = quiet(StableDiffusionPipeline.from_pipe(sd, unet=unet))
    with pytest.raises(RequestError, match="in_channels=9"):
        pipe("a cat")


# ── warnings ──


def test_a_negative_prompt_without_effect_is_warned_of(sd: Any, lcm: Any) -> None:
    with pytest.warns(UserWarning, match="negative_prompt has no effect: guidance is") as caught:
        lcm("a cat", negative_prompt="red", num_inference_steps=1)
    assert caught[0].filename == __file__, "it points at the caller"
    with pytest.warns(UserWarning, match="negative_prompt has no effect: guidance_scale=1"):
        sd("a cat", negative_prompt="red", guidance_scale=1, num_inference_steps=1)
    sd("a cat", negative_prompt="red", num_inference_steps=1)


def test_text_that_is_cut_off_is_quoted(lcm: Any) -> None:
    with pytest.warns(UserWarning, match="16 tokens .* cut off: 'dog cat'"):
        lcm("a cat " * 7 + "dog cat", num_inference_steps=1)
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        lcm("a cat " * 7, num_inference_steps=1)


# ── the signature ──


@pytest.mark.parametrize(
    "pipeline",
    [
        StableDiffusionPipeline,
        StableDiffusionImg2ImgPipeline,
        LatentConsistencyModelPipeline,
        LatentConsistencyModelImg2ImgPipeline,
    ],
)
def test_every_argument_is_typed_explained_and_served(pipeline: Any) -> None:
    parameters = inspect.signature(pipeline.__call__).parameters
    text = inspect.getdoc(pipeline.__call__) or ""
    for name, parameter in list(parameters.items())[1:]:
        assert f"    {name}: " in text
        assert parameter.annotation is not parameter.empty
        # `image` goes into the start of the job, an older name into the newer one.
        fields = {*Request.__dataclass_fields__, "image", "lcm_origin_steps"}
        assert name in fields


def test_signatures_have_the_order_and_defaults_of_diffusers() -> None:
    diffusers = pytest.importorskip("diffusers")
    for name in (
        "StableDiffusionPipeline",
        "StableDiffusionImg2ImgPipeline",
        "LatentConsistencyModelPipeline",
        "LatentConsistencyModelImg2ImgPipeline",
    ):
        ours, theirs = (
            inspect.signature(getattr(library, name).__call__).parameters
            for library in (fewstep, diffusers)
        )
        expected = {
            key: p.default for key, p in theirs.items() if p.kind is p.POSITIONAL_OR_KEYWORD
        }
        have = {key: p.default for key, p in ours.items() if p.kind is p.POSITIONAL_OR_KEYWORD}
        assert list(have) == list(expected), name
        key = "callback_on_step_end_tensor_inputs"
        assert list(have.pop(key)) == list(expected.pop(key))
        assert have == expected, name
