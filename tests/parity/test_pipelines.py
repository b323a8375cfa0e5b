"""Whole pipelines against diffusers', on tiny random checkpoints that diffusers wrote.

Final latents agree to 1e-4, pictures to one level in 255.
"""

from __future__ import annotations

import copy
from collections.abc import Callable
from functools import cache
from pathlib import Path
from typing import Any

import numpy as np
import PIL.Image
import pytest
import torch
from conftest import LCM_UNET, LCM_VAE, NOISE, TEXT_CHANNELS, UNET, VAE
from torch import Tensor

import fewstep

diffusers = pytest.importorskip("diffusers")

# The oracle's own warnings are not ours to heed.
pytestmark = pytest.mark.filterwarnings("ignore")


def seeded(*seeds: int) -> Any:
    """A generator, or a list of them."""
    generators = [torch.Generator().manual_seed(seed) for seed in seeds]
    return generators[0] if len(generators) == 1 else generators


def randn(*shape: int) -> Tensor:
    return torch.randn(*shape, generator=seeded(7))


def picture(width: int = 48, height: int = 32, seed: int = 5) -> PIL.Image.Image:
    coarse = np.random.default_rng(seed).integers(0, 256, (4, 6, 3), dtype=np.uint8)
    return PIL.Image.fromarray(coarse).resize((width, height), PIL.Image.Resampling.BICUBIC)


@pytest.fixture(scope="session")
def folders(
    tokenizer: Any, text_encoder: Any, tmp_path_factory: pytest.TempPathFactory
) -> dict[str, Path]:
    """Checkpoints by family: a plain Stable Diffusion with DDIM, and a guidance-distilled LCM."""
    found = {}
    for name, pipeline, unet, vae, scheduler in (
        ("sd", "StableDiffusionPipeline", UNET, VAE, "DDIMScheduler"),
        ("lcm", "LatentConsistencyModelPipeline", LCM_UNET, LCM_VAE, "LCMScheduler"),
    ):
        torch.manual_seed(0)
        found[name] = tmp_path_factory.mktemp(name)
        pipe = getattr(diffusers, pipeline)(
            vae=diffusers.AutoencoderKL(**vae),
            text_encoder=text_encoder,
            tokenizer=tokenizer,
            unet=diffusers.UNet2DConditionModel(**unet),
            scheduler=getattr(diffusers, scheduler)(**NOISE),
            safety_checker=None,
            feature_extractor=None,
            requires_safety_checker=False,
        )
        pipe.save_pretrained(found[name])
    return found


Pair = Callable[..., tuple[Any, Any]]


@pytest.fixture(scope="session")
def pair(folders: dict[str, Path]) -> Pair:
    """(diffusers' pipeline, ours) of a class from a checkpoint, on request with LCM sampling."""

    @cache
    def load(family: str, name: str, lcm_scheduler: bool) -> tuple[Any, Any]:
        pipes = []
        for library in (diffusers, fewstep):
            pipe = getattr(library, name).from_pretrained(folders[family])
            pipe.set_progress_bar_config(disable=True)
            if lcm_scheduler:
                pipe.scheduler = library.LCMScheduler.from_config(pipe.scheduler.config)
            if not hasattr(pipe.text_encoder, "text_model"):
                # diffusers looks for clip_skip's norm where transformers 5 has none any more.
                object.__setattr__(pipe.text_encoder, "text_model", pipe.text_encoder)
            pipes.append(pipe)
        return pipes[0], pipes[1]

    def copies(family: str, name: str, lcm_scheduler: bool = False) -> tuple[Any, Any]:
        theirs, ours = load(family, name, lcm_scheduler)
        return copy.copy(theirs), copy.copy(ours)  # so that a test may replace the scheduler

    return copies


def largest_difference(a: Tensor, b: Tensor) -> float:
    return float((a - b).abs().max())


def assert_same(theirs: Any, ours: Any, arguments: Callable[[], dict[str, Any]]) -> Tensor:
    """Both pipelines agree on latents and pictures; returns our latents."""
    expected = theirs(**arguments(), output_type="latent").images
    latents = ours(**arguments(), output_type="latent").images
    torch.testing.assert_close(latents, expected, rtol=0, atol=1e-4)
    for a, b in zip(ours(**arguments()).images, theirs(**arguments()).images, strict=True):
        assert a.size == b.size
        difference = np.abs(np.asarray(a, dtype=int) - np.asarray(b, dtype=int)).max()
        assert difference <= 1
    assert latents.std() > 0.1
    return latents


EMBEDS = (2, 16, TEXT_CHANNELS)
TEXT_TO_IMAGE: dict[str, tuple[str, str, bool, Callable[[], dict[str, Any]]]] = {
    # The LCM pipeline: guidance is an input of the network.
    "lcm, defaults": ("lcm", "lcm", False, lambda: {}),
    "lcm, 1 step": ("lcm", "lcm", False, lambda: {"num_inference_steps": 1}),
    "lcm, 8 steps": ("lcm", "lcm", False, lambda: {"num_inference_steps": 8}),
    "lcm, another grid": ("lcm", "lcm", False, lambda: {"original_inference_steps": 30}),
    "lcm, timesteps": ("lcm", "lcm", False, lambda: {"timesteps": [999, 699, 199]}),
    "lcm, guidance 1": ("lcm", "lcm", False, lambda: {"guidance_scale": 1}),
    "lcm, other size": ("lcm", "lcm", False, lambda: {"height": 40, "width": 56}),
    "lcm, clip_skip": ("lcm", "lcm", False, lambda: {"clip_skip": 1}),
    "lcm, 2 prompts": ("lcm", "lcm", False, lambda: {"prompt": ["a cat", "a red dog"]}),
    "lcm, 2 prompts x 2": (
        "lcm",
        "lcm",
        False,
        lambda: {"prompt": ["a cat", "a red dog"], "num_images_per_prompt": 2},
    ),
    "lcm, list of generators": (
        "lcm",
        "lcm",
        False,
        lambda: {"num_images_per_prompt": 2, "generator": seeded(3, 4)},
    ),
    "lcm, latents": ("lcm", "lcm", False, lambda: {"latents": randn(1, 8, 8, 8)}),
    "lcm, prompt_embeds": (
        "lcm",
        "lcm",
        False,
        lambda: {"prompt": None, "prompt_embeds": randn(*EMBEDS), "num_images_per_prompt": 2},
    ),
    # A guidance-distilled UNet in the Stable Diffusion pipeline.
    "embedded, sd": ("lcm", "sd", False, lambda: {"num_inference_steps": 4}),
    # LCM sampling of a plain Stable Diffusion, as with an LCM-LoRA: guidance doubles the batch.
    "lcm on sd, no guidance": ("sd", "sd", True, lambda: {"guidance_scale": 1.0}),
    "lcm on sd, guidance": ("sd", "sd", True, lambda: {"guidance_scale": 1.8}),
    "lcm on sd, timesteps": (
        "sd",
        "sd",
        True,
        lambda: {"guidance_scale": 1.8, "timesteps": [999, 759, 259]},
    ),
    # DDIM with guidance.
    "ddim": ("sd", "sd", False, lambda: {"num_inference_steps": 7}),
    "ddim, eta": ("sd", "sd", False, lambda: {"num_inference_steps": 5, "eta": 0.7}),
    "ddim, negative prompt": ("sd", "sd", False, lambda: {"negative_prompt": "a dog"}),
    "ddim, guidance_rescale": ("sd", "sd", False, lambda: {"guidance_rescale": 0.7}),
    "ddim, odd size": ("sd", "sd", False, lambda: {"height": 72, "width": 40}),
    "ddim, batch": (
        "sd",
        "sd",
        False,
        lambda: {
            "prompt": ["a cat", "a red dog"],
            "negative_prompt": ["red", ""],
            "num_images_per_prompt": 2,
            "generator": seeded(1, 2, 3, 4),
        },
    ),
    "ddim, clip_skip": ("sd", "sd", False, lambda: {"clip_skip": 2}),
    "ddim, embeds": (
        "sd",
        "sd",
        False,
        lambda: {
            "prompt": None,
            "prompt_embeds": randn(*EMBEDS),
            "negative_prompt_embeds": -randn(*EMBEDS),
        },
    ),
}
CLASSES = {"sd": "StableDiffusionPipeline", "lcm": "LatentConsistencyModelPipeline"}
IMG2IMG = {
    "sd": "StableDiffusionImg2ImgPipeline",
    "lcm": "LatentConsistencyModelImg2ImgPipeline",
}


def defaults(task: str, lcm_scheduler: bool) -> dict[str, Any]:
    steps = 4 if task == "lcm" or lcm_scheduler else 5
    return {"prompt": "a red cat", "generator": seeded(0), "num_inference_steps": steps}


@pytest.mark.parametrize("case", TEXT_TO_IMAGE)
def test_text_to_image_equals_diffusers(pair: Pair, case: str) -> None:
    family, task, lcm_scheduler, changes = TEXT_TO_IMAGE[case]
    theirs, ours = pair(family, CLASSES[task], lcm_scheduler)
    assert_same(theirs, ours, lambda: defaults(task, lcm_scheduler) | changes())


IMAGE_TO_IMAGE: dict[str, tuple[str, str, bool, Callable[[], dict[str, Any]]]] = {
    **{
        f"lcm, strength {strength}": (
            "lcm",
            "lcm",
            False,
            lambda strength=strength: {"strength": strength},
        )
        for strength in (0.2, 0.29, 0.5, 0.8, 1.0)
    },
    "lcm, timesteps": (
        "lcm",
        "lcm",
        False,
        lambda: {"timesteps": [999, 799, 599, 399, 199], "strength": 0.6},
    ),
    "lcm, another grid": ("lcm", "lcm", False, lambda: {"original_inference_steps": 25}),
    "lcm, latents": ("lcm", "lcm", False, lambda: {"latents": randn(1, 8, 8, 12)}),
    "lcm, generators": (
        "lcm",
        "lcm",
        False,
        lambda: {"num_images_per_prompt": 2, "generator": seeded(3, 4)},
    ),
    "lcm, pictures": (
        "lcm",
        "lcm",
        False,
        lambda: {"prompt": ["a cat", "a dog"], "image": [picture(), picture(seed=6)]},
    ),
    "lcm, size to floor": ("lcm", "lcm", False, lambda: {"image": picture(51, 38)}),
    **{
        f"ddim, strength {strength}": (
            "sd",
            "sd",
            False,
            lambda strength=strength: {"strength": strength},
        )
        for strength in (0.2, 0.5, 0.8, 1.0)
    },
    "ddim, eta": ("sd", "sd", False, lambda: {"eta": 0.5}),
    "ddim, batch": (
        "sd",
        "sd",
        False,
        lambda: {
            "prompt": ["a cat", "a dog"],
            "negative_prompt": ["red", "blue"],
            "num_images_per_prompt": 2,
            "generator": seeded(1, 2, 3, 4),
        },
    ),
    "ddim, latents as image": ("sd", "sd", False, lambda: {"image": randn(1, 4, 6, 7)}),
    **{
        f"lcm on sd, strength {strength}": (
            "sd",
            "sd",
            True,
            lambda strength=strength: {"strength": strength, "guidance_scale": 1.5},
        )
        for strength in (0.25, 0.5, 0.6, 0.75, 1.0)
    },
    "embedded, sd": ("lcm", "sd", False, lambda: {"strength": 0.5}),
    "numpy": (
        "sd",
        "sd",
        False,
        lambda: {"image": np.asarray(picture(), dtype=np.float32)[None] / 255},
    ),
    "tensor": ("sd", "sd", False, lambda: {"image": randn(1, 3, 32, 40).tanh()}),
}


@pytest.mark.parametrize("case", IMAGE_TO_IMAGE)
def test_image_to_image_equals_diffusers(pair: Pair, case: str) -> None:
    family, task, lcm_scheduler, changes = IMAGE_TO_IMAGE[case]
    theirs, ours = pair(family, IMG2IMG[task], lcm_scheduler)
    base = defaults(task, lcm_scheduler)
    steps = 4 if family == "lcm" else base["num_inference_steps"]
    assert_same(
        theirs,
        ours,
        lambda: (
            defaults(task, lcm_scheduler)
            | {"image": picture(), "num_inference_steps": steps}
            | changes()
        ),
    )


@pytest.mark.parametrize("prediction_type", ["v_prediction", "sample"])
@pytest.mark.parametrize("lcm_scheduler", [False, True])
def test_other_prediction_types_equal_diffusers(
    pair: Pair, prediction_type: str, lcm_scheduler: bool
) -> None:
    theirs, ours = pair("sd", CLASSES["sd"], lcm_scheduler)
    for pipe in (theirs, ours):
        pipe.scheduler = type(pipe.scheduler).from_config(
            pipe.scheduler.config, prediction_type=prediction_type
        )
    assert_same(theirs, ours, lambda: defaults("sd", lcm_scheduler))


def test_freeu_slicing_and_tiling_equal_diffusers(pair: Pair) -> None:
    theirs, ours = pair("sd", CLASSES["sd"])

    def arguments() -> dict[str, Any]:
        return defaults("sd", False) | {"num_images_per_prompt": 2, "height": 64, "width": 72}

    plain = assert_same(theirs, ours, arguments)
    for pipe in (theirs, ours):
        pipe.enable_freeu(s1=0.9, s2=0.2, b1=1.5, b2=1.6)
    freed = assert_same(theirs, ours, arguments)
    assert largest_difference(plain, freed) > 1e-3, "FreeU did nothing"
    whole = ours(**arguments(), output_type="pt").images
    theirs.vae.enable_slicing()
    theirs.vae.enable_tiling()
    ours.enable_vae_slicing()
    ours.vae.enable_tiling(exact=False)
    assert_same(theirs, ours, arguments)
    assert largest_difference(whole, ours(**arguments(), output_type="pt").images) > 1e-4
    ours.enable_vae_tiling()
    assert largest_difference(whole, ours(**arguments(), output_type="pt").images) < 1e-5
    theirs.vae.disable_slicing()
    theirs.vae.disable_tiling()
    ours.disable_vae_slicing()
    ours.disable_vae_tiling()
    assert largest_difference(whole, ours(**arguments(), output_type="pt").images) == 0
    theirs.disable_freeu()
    ours.disable_freeu()
    again = ours(**arguments(), output_type="latent").images
    assert largest_difference(again, plain) == 0


@pytest.mark.parametrize(
    ("family", "task", "lcm_scheduler", "changes"),
    [
        ("lcm", CLASSES["lcm"], False, {"guidance_scale": 8.4}),
        ("lcm", CLASSES["lcm"], False, {"num_inference_steps": 3}),
        ("lcm", CLASSES["lcm"], False, {"prompt": "a red dog"}),
        ("lcm", CLASSES["lcm"], False, {"generator": seeded(1)}),
        ("sd", CLASSES["sd"], True, {"guidance_scale": 7.4}),
        ("sd", CLASSES["sd"], False, {"guidance_rescale": 0.1}),
        ("sd", CLASSES["sd"], False, {"negative_prompt": "a dog"}),
        ("sd", CLASSES["sd"], False, {"clip_skip": 1}),
        ("sd", CLASSES["sd"], False, {"eta": 0.1}),
        ("lcm", IMG2IMG["lcm"], False, {"strength": 0.7, "image": picture()}),
        ("sd", IMG2IMG["sd"], False, {"strength": 0.6, "image": picture()}),
        ("sd", IMG2IMG["sd"], False, {"image": picture(seed=6)}),
    ],
)
def test_a_changed_argument_changes_the_result(
    pair: Pair, family: str, task: str, lcm_scheduler: bool, changes: dict[str, Any]
) -> None:
    _, ours = pair(family, task, lcm_scheduler)

    def arguments() -> dict[str, Any]:
        base = defaults("lcm" if family == "lcm" else "sd", lcm_scheduler)
        return base | ({"image": picture()} if "image" in changes else {})

    before = ours(**arguments(), output_type="latent").images
    after = ours(**arguments() | changes, output_type="latent").images
    # Ten times what parity allows.
    assert largest_difference(before, after) > 1e-3


def test_callbacks_see_and_change_what_they_do_in_diffusers(pair: Pair) -> None:
    theirs, ours = pair("sd", CLASSES["sd"])
    seen: dict[Any, list[Any]] = {theirs: [], ours: []}

    def callback(pipe: Any, index: int, t: Any, tensors: dict[str, Tensor]) -> dict[str, Tensor]:
        shapes = {name: value.shape for name, value in tensors.items() if name != names[2]}
        seen[pipe].append((index, int(t), shapes, pipe.num_timesteps, pipe.guidance_scale))
        if index == 2:  # guidance off for the rest
            pipe._guidance_scale = 0.0
            tensors["prompt_embeds"] = tensors["prompt_embeds"].chunk(2)[-1]
        tensors["latents"] = tensors["latents"] * 1.01
        return tensors

    names = ["latents", "prompt_embeds", "negative_prompt_embeds"]

    def arguments() -> dict[str, Any]:
        return defaults("sd", False) | {
            "callback_on_step_end": callback,
            "callback_on_step_end_tensor_inputs": names,
        }

    expected = theirs(**arguments(), output_type="latent").images
    latents = ours(**arguments(), output_type="latent").images
    torch.testing.assert_close(latents, expected, rtol=0, atol=1e-4)
    assert seen[ours] == seen[theirs]
    plain = ours(**defaults("sd", False), output_type="latent").images
    assert largest_difference(plain, latents) > 1e-2


def test_callbacks_of_diffusers_lcm_pipeline(pair: Pair) -> None:
    theirs, ours = pair("lcm", CLASSES["lcm"])

    def callback(pipe: Any, index: int, t: Any, tensors: dict[str, Tensor]) -> dict[str, Tensor]:
        return {
            "latents": tensors["latents"] * 1.01 if index < 3 else tensors["latents"],
            "denoised": tensors["denoised"] * 0.9,
            "w_embedding": tensors["w_embedding"] * 0.5,
            "prompt_embeds": tensors["prompt_embeds"] + 0.1,
        }

    names = ["latents", "denoised", "w_embedding", "prompt_embeds"]

    def arguments() -> dict[str, Any]:
        return defaults("lcm", False) | {
            "callback_on_step_end": callback,
            "callback_on_step_end_tensor_inputs": names,
        }

    assert_same(theirs, ours, arguments)


def test_callback_objects_of_diffusers_work(pair: Pair) -> None:
    from diffusers.callbacks import SDCFGCutoffCallback

    theirs, ours = pair("sd", CLASSES["sd"])

    def arguments() -> dict[str, Any]:
        return defaults("sd", False) | {
            "callback_on_step_end": SDCFGCutoffCallback(cutoff_step_ratio=0.4)
        }

    latents = assert_same(theirs, ours, arguments)
    plain = ours(**defaults("sd", False), output_type="latent").images
    assert largest_difference(plain, latents) > 1e-3


@pytest.mark.parametrize(("family", "task"), [("lcm", CLASSES["lcm"]), ("sd", CLASSES["sd"])])
def test_what_we_save_diffusers_loads_and_the_way_back(
    pair: Pair, family: str, task: str, tmp_path: Path
) -> None:
    _, ours = pair(family, task)
    arguments = defaults(family, False)
    expected = ours(**arguments, output_type="latent").images
    ours.save_pretrained(tmp_path / "ours")
    theirs = diffusers.DiffusionPipeline.from_pretrained(tmp_path / "ours")
    assert type(theirs).__name__ == task
    theirs.set_progress_bar_config(disable=True)
    latents = theirs(**defaults(family, False), output_type="latent").images
    torch.testing.assert_close(latents, expected, rtol=0, atol=1e-4)
    theirs.save_pretrained(tmp_path / "theirs")
    back = fewstep.DiffusionPipeline.from_pretrained(tmp_path / "theirs")
    assert type(back).__name__ == task
    back.set_progress_bar_config(disable=True)
    latents = back(**defaults(family, False), output_type="latent").images
    torch.testing.assert_close(latents, expected, rtol=0, atol=0)


def test_saved_configs_equal_those_of_diffusers(
    pair: Pair, folders: dict[str, Path], tmp_path: Path
) -> None:
    import json

    _, ours = pair("lcm", CLASSES["lcm"])
    ours.save_pretrained(tmp_path)
    for name in ("model_index.json", "unet/config.json", "vae/config.json"):
        wrote, expected = (
            json.loads((folder / name).read_text()) for folder in (tmp_path, folders["lcm"])
        )
        for content in (wrote, expected):
            content.pop("_diffusers_version")
            content.pop("_name_or_path", None)
        assert wrote == expected, name


def test_outdated_scheduler_settings_are_replaced_as_in_diffusers(
    folders: dict[str, Path],
) -> None:
    pipes = []
    for library in (diffusers, fewstep):
        outdated = library.DDIMScheduler(**NOISE | {"clip_sample": True, "steps_offset": 0})
        pipe = library.StableDiffusionPipeline.from_pretrained(folders["sd"], scheduler=outdated)
        pipe.set_progress_bar_config(disable=True)
        assert not pipe.scheduler.config.clip_sample
        assert pipe.scheduler.config.steps_offset == 1
        pipes.append(pipe)
    assert_same(*pipes, lambda: defaults("sd", False))


@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16])
def test_half_precision_draws_what_diffusers_draws(
    folders: dict[str, Path], dtype: torch.dtype
) -> None:
    results = []
    for library in (diffusers, fewstep):
        pipe = library.LatentConsistencyModelPipeline.from_pretrained(
            folders["lcm"], torch_dtype=dtype
        )
        pipe.set_progress_bar_config(disable=True)
        latents = pipe(**defaults("lcm", False), output_type="latent").images
        assert latents.dtype == dtype
        results.append(latents.float())
    expected, latents = results
    # The rounding of some ten layers; other random numbers would give a difference near 1.
    scale = {torch.float16: 2e-2, torch.bfloat16: 1.5e-1}[dtype]
    assert (latents - expected).std() / expected.std() < scale
