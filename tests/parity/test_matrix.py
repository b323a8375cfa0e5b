"""The differential matrix: families x tasks x arguments against diffusers, on tiny random models.

Final latents agree to 1e-4 in float32, pictures to one level in 255.
"""

from __future__ import annotations

import functools
import inspect
import itertools
from collections.abc import Callable
from functools import cache
from pathlib import Path
from typing import Any

import numpy as np
import PIL.Image
import pytest
import torch
from conftest import NOISE, TEXT_CHANNELS, UNET, VAE
from torch import Tensor

import fewstep
from fewstep.pipelines.catalog import CATALOG

diffusers = pytest.importorskip("diffusers")
pytestmark = pytest.mark.filterwarnings("ignore")

XL_UNET = UNET | {
    "sample_size": 8,
    "block_out_channels": (8, 16, 16),
    "down_block_types": ("DownBlock2D", "CrossAttnDownBlock2D", "CrossAttnDownBlock2D"),
    "up_block_types": ("CrossAttnUpBlock2D", "CrossAttnUpBlock2D", "UpBlock2D"),
    "attention_head_dim": (1, 2, 2),
    "transformer_layers_per_block": (1, 1, 2),
    "use_linear_projection": True,
    "addition_embed_type": "text_time",
    "addition_time_embed_dim": 8,
    "projection_class_embeddings_input_dim": 80,  # 6 x 8 + 32
    "cross_attention_dim": 2 * TEXT_CHANNELS,
}
SSD_UNET = XL_UNET | {
    "mid_block_type": "UNetMidBlock2D",
    "transformer_layers_per_block": (0, (1,), (2,)),
    "reverse_transformer_layers_per_block": ((2, 3), (2, 1), 1),
}
NINE = {"in_channels": 9}
EMBEDDED = {"time_cond_proj_dim": 32}
SD1_UNET = UNET | {
    "block_out_channels": (8, 16, 16),
    "down_block_types": ("CrossAttnDownBlock2D", "CrossAttnDownBlock2D", "DownBlock2D"),
    "up_block_types": ("UpBlock2D", "CrossAttnUpBlock2D", "CrossAttnUpBlock2D"),
}
# Family -> (class stem, UNet, VAE, scheduler).
MODELS: dict[str, tuple[str, dict[str, Any], dict[str, Any], str]] = {
    "sd": ("StableDiffusion", UNET, VAE, "DDIMScheduler"),
    "sd lcm": ("StableDiffusion", UNET | EMBEDDED, VAE, "LCMScheduler"),
    "sd inpainting": ("StableDiffusion", UNET | NINE, VAE, "LCMScheduler"),
    "xl": ("StableDiffusionXL", XL_UNET, VAE, "DDIMScheduler"),
    "xl lcm": ("StableDiffusionXL", XL_UNET | EMBEDDED, VAE, "LCMScheduler"),
    "xl on lcm": ("StableDiffusionXL", XL_UNET, VAE, "LCMScheduler"),
    "xl inpainting": ("StableDiffusionXL", XL_UNET | NINE, VAE, "LCMScheduler"),
    "ssd-1b": ("StableDiffusionXL", SSD_UNET, VAE, "LCMScheduler"),
    "sd1": ("StableDiffusion", SD1_UNET, VAE, "LCMScheduler"),
    "sd1 lcm": ("StableDiffusion", SD1_UNET | EMBEDDED, VAE, "LCMScheduler"),
}
# What stands beside the UNet: (suffix of the class, keyword, class, config of each).
HINT = {"conditioning_embedding_out_channels": (4, 8, 8, 8)}
SKIPPED = ("sample_size", "out_channels", "up_block_types", "time_cond_proj_dim")


def encoder_of(unet: dict[str, Any]) -> dict[str, Any]:
    return {k: v for k, v in unet.items() if k not in SKIPPED} | HINT


BESIDE: dict[str, tuple[str, str, str, list[dict[str, Any]]]] = {
    "control": ("ControlNet", "controlnet", "ControlNetModel", [{}]),
    "two controls": ("ControlNet", "controlnet", "ControlNetModel", [{}, {}]),
    "adapter": (
        "Adapter",
        "adapter",
        "T2IAdapter",
        [{"channels": [8, 16, 16], "num_res_blocks": 1, "downscale_factor": 8}],
    ),
    "light adapter": (
        "Adapter",
        "adapter",
        "T2IAdapter",
        [
            {
                "channels": [8, 16],
                "num_res_blocks": 1,
                "downscale_factor": 8,
                "adapter_type": "light_adapter",
            }
        ],
    ),
    "xl adapter": (
        "Adapter",
        "adapter",
        "T2IAdapter",
        [
            {
                "channels": [8, 16, 16, 16],
                "num_res_blocks": 1,
                "downscale_factor": 16,
                "adapter_type": "full_adapter_xl",
            }
        ],
    ),
}
BESIDE["two adapters"] = (*BESIDE["adapter"][:3], BESIDE["adapter"][3] * 2)
SUFFIX = {"text": "Pipeline", "image": "Img2ImgPipeline", "inpaint": "InpaintPipeline"}


def seeded(*seeds: int) -> Any:
    generators = [torch.Generator().manual_seed(seed) for seed in seeds]
    return generators[0] if len(generators) == 1 else generators


def randn(*shape: int) -> Tensor:
    return torch.randn(*shape, generator=seeded(7))


def picture(width: int = 48, height: int = 32, seed: int = 5) -> PIL.Image.Image:
    coarse = np.random.default_rng(seed).integers(0, 256, (4, 6, 3), dtype=np.uint8)
    return PIL.Image.fromarray(coarse).resize((width, height), PIL.Image.Resampling.BICUBIC)


def mask(width: int = 48, height: int = 32) -> PIL.Image.Image:
    white = np.zeros((height, width), dtype=np.uint8)
    white[height // 4 : height * 3 // 4, width // 3 :] = 255
    return PIL.Image.fromarray(white)


@pytest.fixture(scope="session")
def folders(
    tokenizer: Any, text_encoder: Any, tmp_path_factory: pytest.TempPathFactory
) -> dict[str, Path]:
    from transformers import CLIPTextConfig, CLIPTextModelWithProjection

    torch.manual_seed(3)
    stored = text_encoder.config.to_dict() | {"projection_dim": 32, "hidden_act": "gelu"}
    second = CLIPTextModelWithProjection(CLIPTextConfig.from_dict(stored)).eval()
    found = {}
    for family, (stem, unet, vae, scheduler) in MODELS.items():
        torch.manual_seed(0)
        parts: dict[str, Any] = {
            "vae": diffusers.AutoencoderKL(**vae, force_upcast=True),
            "text_encoder": text_encoder,
            "tokenizer": tokenizer,
            "unet": diffusers.UNet2DConditionModel(**unet),
            "scheduler": getattr(diffusers, scheduler)(**NOISE),
        }
        if stem == "StableDiffusionXL":
            parts |= {"text_encoder_2": second, "tokenizer_2": tokenizer}
        else:
            parts |= {"safety_checker": None, "feature_extractor": None}
            parts["requires_safety_checker"] = False
        found[family] = tmp_path_factory.mktemp("matrix")
        getattr(diffusers, stem + "Pipeline")(**parts).save_pretrained(found[family])
    return found


@pytest.fixture(scope="session")
def beside(tmp_path_factory: pytest.TempPathFactory) -> Callable[..., dict[str, Path]]:
    """Folders of the networks beside the UNet of a family."""

    @cache
    def write(family: str, kind: str) -> list[Path]:
        _, _, name, configs = BESIDE[kind]
        found = []
        for seed, config in enumerate(configs):
            torch.manual_seed(10 + seed)
            if name == "ControlNetModel":
                config = encoder_of(MODELS[family][1])
            network = getattr(diffusers, name)(**config)
            for parameter in network.parameters():  # zero convolutions would hide everything
                if not parameter.any():
                    torch.nn.init.normal_(parameter, std=0.1)
            found.append(tmp_path_factory.mktemp("beside"))
            network.save_pretrained(found[-1])
        return found

    return write


@pytest.fixture(scope="session")
def pair(folders: dict[str, Path], beside: Any) -> Callable[..., tuple[Any, Any]]:
    """(diffusers' pipeline, ours) of a family and a task, with something beside the UNet."""

    @cache
    def load(family: str, task: str, kind: str = "") -> tuple[Any, Any]:
        name = MODELS[family][0] + (BESIDE[kind][0] if kind else "") + SUFFIX[task]
        pipes = []
        for library in (diffusers, fewstep):
            parts: dict[str, Any] = {}
            if kind:
                _, keyword, network, _ = BESIDE[kind]
                loader = getattr(library, network)
                each = [loader.from_pretrained(folder) for folder in beside(family, kind)]
                parts[keyword] = each[0] if len(each) == 1 else each
            pipe = getattr(library, name).from_pretrained(folders[family], **parts)
            pipe.set_progress_bar_config(disable=True)
            if not hasattr(pipe.text_encoder, "text_model"):
                object.__setattr__(pipe.text_encoder, "text_model", pipe.text_encoder)
            pipes.append(pipe)
        return pipes[0], pipes[1]

    return load


Arguments = Callable[[], dict[str, Any]]

COMMON: dict[str, Arguments] = {
    "defaults": lambda: {},
    "no guidance": lambda: {"guidance_scale": 1},
    "guidance 1.8": lambda: {"guidance_scale": 1.8},
    "negative prompt": lambda: {"guidance_scale": 3.0, "negative_prompt": "a dog"},
    "prompts x 2": lambda: {
        "prompt": ["a cat", "a red dog"],
        "guidance_scale": 2.0,
        "num_images_per_prompt": 2,
    },
}
NEGATIVE_CROP: dict[str, Arguments] = {
    "negative crop": lambda: {
        "crops_coords_top_left": (3, 5),
        "negative_original_size": (20, 30),
        "negative_target_size": (50, 60),
        "negative_crops_coords_top_left": (1, 2),
    }
}
GENERATORS: dict[str, Arguments] = {
    "generators": lambda: {"num_images_per_prompt": 3, "generator": seeded(1, 2, 3)},
}
SIZED: dict[str, Arguments] = {"72 x 40": lambda: {"height": 72, "width": 40}}
XL: dict[str, Arguments] = {
    "prompt_2": lambda: {
        "prompt_2": "a dog",
        "negative_prompt": "red",
        "negative_prompt_2": "blue",
    },
    "sizes": lambda: {
        "original_size": (100, 80),
        "crops_coords_top_left": (3, 5),
        "target_size": (64, 96),
    },
    "negative sizes": lambda: {
        "original_size": (100, 80),
        "negative_original_size": (20, 30),
        "negative_target_size": (50, 60),
    },
    "guidance_rescale": lambda: {"guidance_rescale": 0.6, "guidance_scale": 4.0},
    "clip_skip": lambda: {"clip_skip": 1},
    "denoising_end": lambda: {"denoising_end": 0.6, "num_inference_steps": 5},
    "embeds": lambda: {
        "prompt": None,
        "prompt_embeds": randn(1, 16, 64),
        "negative_prompt_embeds": -randn(1, 16, 64),
        "pooled_prompt_embeds": randn(1, 32),
        "negative_pooled_prompt_embeds": -randn(1, 32),
    },
}
# diffusers ends an inpainting run that stops early on clean latents outside the mask.
XL_BOTH = {name: made for name, made in XL.items() if name != "denoising_end"}
STRENGTHS: dict[str, Arguments] = {
    f"strength {s}": (lambda s=s: {"strength": s}) for s in (0.3, 0.5, 1.0)
}
XL_IMAGE: dict[str, Arguments] = {
    "denoising_start": lambda: {
        "image": randn(1, 4, 4, 6),
        "denoising_start": 0.4,
        "num_inference_steps": 6,
    },
    "start and end": lambda: {
        "image": randn(1, 4, 4, 6),
        "denoising_start": 0.3,
        "denoising_end": 0.8,
        "num_inference_steps": 8,
    },
}
INPAINT: dict[str, Arguments] = {
    "pictures": lambda: {
        "prompt": ["a cat", "a dog"],
        "image": [picture(), picture(seed=6)],
        "mask_image": [mask(), mask()],
        "generator": seeded(1, 2),
    },
    "another size": lambda: {"height": 40, "width": 56},
}


def cases() -> list[tuple[str, str, str, Arguments]]:
    tables: list[tuple[str, str, dict[str, Arguments]]] = [
        ("sd lcm", "text", SIZED),
        ("xl", "text", NEGATIVE_CROP),
        ("xl", "text", COMMON | GENERATORS | SIZED | XL),
        ("xl lcm", "text", COMMON | SIZED),
        ("xl on lcm", "text", COMMON | XL),
        ("ssd-1b", "text", COMMON | SIZED),
        ("xl", "image", COMMON | GENERATORS | XL | STRENGTHS | XL_IMAGE),
        ("xl lcm", "image", COMMON | STRENGTHS),
        ("ssd-1b", "image", STRENGTHS),
        ("sd", "inpaint", COMMON | STRENGTHS | INPAINT),
        ("sd lcm", "inpaint", STRENGTHS | INPAINT),
        ("sd inpainting", "inpaint", COMMON | STRENGTHS | INPAINT),
        ("xl", "inpaint", COMMON | XL_BOTH | STRENGTHS | INPAINT),
        ("xl lcm", "inpaint", STRENGTHS | INPAINT),
        ("xl inpainting", "inpaint", COMMON | STRENGTHS | INPAINT),
        ("ssd-1b", "inpaint", STRENGTHS),
    ]
    return [(f, t, name, made) for f, t, table in tables for name, made in table.items()]


CASES = {f"{family}, {task}: {name}": (family, task, made) for family, task, name, made in cases()}


def arguments_of(family: str, task: str, changes: Arguments) -> dict[str, Any]:
    base: dict[str, Any] = {
        "prompt": "a red cat",
        "generator": seeded(0),
        "num_inference_steps": 4,
        "guidance_scale": 4.0,
    }
    if task == "text":
        base |= {"height": 32, "width": 48}
    else:
        base |= {"image": picture(), "strength": 0.6}
    if task == "inpaint":
        base |= {"mask_image": mask(), "height": 32, "width": 48}
    return base | changes()


@pytest.mark.parametrize("case", CASES)
def test_latents_and_pictures_equal_diffusers(pair: Any, case: str) -> None:
    family, task, changes = CASES[case]
    theirs, ours = pair(family, task)
    expected = theirs(**arguments_of(family, task, changes), output_type="latent").images
    latents = ours(**arguments_of(family, task, changes), output_type="latent").images
    torch.testing.assert_close(latents, expected, rtol=0, atol=1e-4)
    assert latents.std() > 0.1
    with torch.no_grad():
        scale = theirs.vae.config.scaling_factor
        decoded = theirs.vae.decode(expected / scale, return_dict=False)[0]
    shown = (decoded / 2 + 0.5).clamp(0, 1)
    mine = ours(**arguments_of(family, task, changes), output_type="pt").images
    assert (mine - shown).abs().max() <= 1 / 255


STEERED: dict[str, Arguments] = {
    "defaults": lambda: {},
    "no guidance": lambda: {"guidance_scale": 1.0},
    "prompts x 2": COMMON["prompts x 2"],
}
CONTROL: dict[str, Arguments] = {
    "scale": lambda: {"controlnet_conditioning_scale": 0.4},
    "window": lambda: {"control_guidance_start": 0.25, "control_guidance_end": 0.75},
    "guess": lambda: {"guess_mode": True},
    "guess without guidance": lambda: {"guess_mode": True, "guidance_scale": 1.0},
}
TWO: dict[str, Arguments] = {
    "scales": lambda: {"controlnet_conditioning_scale": [0.4, 1.3]},
    "windows": lambda: {"control_guidance_start": [0.0, 0.5], "control_guidance_end": [0.5, 1.0]},
}
ADAPTER: dict[str, Arguments] = {"scale": lambda: {"adapter_conditioning_scale": 0.4}}
FACTOR: dict[str, Arguments] = {"factor": lambda: {"adapter_conditioning_factor": 0.5}}
PAIRS: dict[str, Arguments] = {"scales": lambda: {"adapter_conditioning_scale": [0.4, 1.3]}}


def steered_cases() -> list[tuple[str, str, str, str, Arguments]]:
    tables: list[tuple[str, str, str, dict[str, Arguments]]] = [
        ("sd1", "control", "text", STEERED | CONTROL),
        ("sd1 lcm", "control", "text", STEERED | CONTROL),
        ("sd1", "control", "image", STEERED | CONTROL | STRENGTHS),
        ("sd1", "control", "inpaint", STEERED | CONTROL | STRENGTHS),
        ("sd1", "two controls", "text", STEERED | TWO),
        ("xl", "control", "text", STEERED | CONTROL | XL),
        ("xl lcm", "control", "text", STEERED | CONTROL),
        ("xl", "control", "image", STEERED | CONTROL | STRENGTHS),
        ("xl", "control", "inpaint", STEERED | CONTROL | STRENGTHS),
        ("xl", "two controls", "text", TWO),
        ("sd1", "adapter", "text", STEERED | ADAPTER),
        ("sd1 lcm", "adapter", "text", STEERED | ADAPTER),
        ("sd1", "light adapter", "text", STEERED | ADAPTER),
        ("sd1", "two adapters", "text", PAIRS),
        ("xl", "xl adapter", "text", STEERED | ADAPTER | FACTOR | XL),
        ("xl lcm", "xl adapter", "text", STEERED | ADAPTER | FACTOR),
    ]
    return [(f, k, t, name, made) for f, k, t, table in tables for name, made in table.items()]


STEERED_CASES = {
    f"{family}, {kind}, {task}: {name}": (family, kind, task, made)
    for family, kind, task, name, made in steered_cases()
    if not (kind == "control" and name in ("denoising_end", "guidance_rescale"))
}


def steered_arguments(family: str, kind: str, task: str, changes: Arguments) -> dict[str, Any]:
    arguments = arguments_of(family, task, changes)
    width = 64 if kind == "light adapter" else 48  # whose features need multiples of 32
    hints: Any = [picture(width, seed=8), picture(width, seed=9)][: len(BESIDE[kind][3])]
    if "adapter" in kind:
        arguments |= {"height": 32, "width": width}
    hints = hints[0] if len(hints) == 1 else hints
    arguments["image" if task == "text" else "control_image"] = hints
    if isinstance(arguments["prompt"], list):
        name = "image" if task == "text" else "control_image"
        arguments[name] = [hints] * 2
    return arguments


@pytest.mark.parametrize("case", STEERED_CASES)
def test_steered_latents_equal_diffusers(pair: Any, case: str) -> None:
    family, kind, task, changes = STEERED_CASES[case]
    theirs, ours = pair(family, task, kind)
    made = functools.partial(steered_arguments, family, kind, task, changes)
    expected = theirs(**made(), output_type="latent").images
    latents = ours(**made(), output_type="latent").images
    torch.testing.assert_close(latents, expected, rtol=0, atol=1e-4)


@pytest.mark.parametrize(
    ("family", "kind", "task"),
    [
        ("sd", "", "inpaint"),
        ("xl", "", "text"),
        ("xl", "", "image"),
        ("xl", "", "inpaint"),
        ("sd1", "control", "text"),
        ("xl", "control", "text"),
        ("xl", "control", "image"),
        ("sd1", "adapter", "text"),
        ("xl", "xl adapter", "text"),
    ],
)
def test_without_return_dict_the_tuple_is_diffusers(
    pair: Any, family: str, kind: str, task: str
) -> None:
    for output_type in ("np", "latent"):
        theirs, ours = (
            pipe(
                **steered_arguments(family, kind, task, dict)
                if kind
                else arguments_of(family, task, dict),
                output_type=output_type,
                return_dict=False,
            )
            for pipe in pair(family, task, kind)
        )
        assert type(ours) is tuple
        assert len(ours) == len(theirs)
        assert ours[0].shape == theirs[0].shape
        assert ours[1:] == theirs[1:]


@pytest.mark.parametrize(
    ("family", "kind", "change"),
    [
        ("sd1", "control", {"controlnet_conditioning_scale": 0.0}),
        ("sd1", "control", {"control_guidance_end": 0.5}),
        ("xl", "control", {"guess_mode": True}),
        ("sd1", "adapter", {"adapter_conditioning_scale": 0.0}),
        ("xl", "xl adapter", {"adapter_conditioning_factor": 0.5}),
    ],
)
def test_each_steering_argument_changes_the_result(
    pair: Any, family: str, kind: str, change: dict[str, Any]
) -> None:
    _, ours = pair(family, "text", kind)
    plain = ours(**steered_arguments(family, kind, "text", dict), output_type="latent").images
    arguments = steered_arguments(family, kind, "text", lambda: change)
    assert (plain - ours(**arguments, output_type="latent").images).abs().max() > 1e-3


def test_every_call_takes_diffusers_arguments_in_diffusers_order() -> None:
    for ours in {c for tasks in CATALOG.values() for c in tasks.values()}:
        if not hasattr(diffusers, ours.__name__):
            continue
        mine = inspect.signature(ours.__call__).parameters
        theirs = inspect.signature(getattr(diffusers, ours.__name__).__call__).parameters
        wanted = {n: p for n, p in theirs.items() if p.kind is p.POSITIONAL_OR_KEYWORD}
        outdated = {"callback", "callback_steps"}
        names = [n for n in wanted if n not in outdated]
        positional = [n for n, p in mine.items() if p.kind is p.POSITIONAL_OR_KEYWORD]
        assert positional[: len(names)] == names, ours.__name__
        for name in names:
            default = mine[name].default
            theirs_default = wanted[name].default
            if isinstance(theirs_default, list):
                theirs_default = tuple(theirs_default)
            assert name == "self" or default == theirs_default, (ours.__name__, name)


@pytest.mark.parametrize(
    ("family", "task", "change"),
    [
        ("xl", "text", {"original_size": (200, 10)}),
        ("xl", "text", {"crops_coords_top_left": (90, 90)}),
        ("xl", "text", {"negative_prompt": "dog"}),
        ("xl", "text", {"prompt_2": "dog"}),
        ("sd", "inpaint", {"strength": 0.9}),
        ("sd inpainting", "inpaint", {"mask_image": mask().transpose(0)}),
    ],
)
def test_each_argument_changes_the_result(
    pair: Any, family: str, task: str, change: dict[str, Any]
) -> None:
    _, ours = pair(family, task)
    plain = ours(**arguments_of(family, task, dict), output_type="latent").images
    changed = ours(**arguments_of(family, task, lambda: change), output_type="latent").images
    assert (plain - changed).abs().max() > 1e-3


@pytest.mark.parametrize(("family", "task"), list(itertools.product(("xl", "xl lcm"), SUFFIX)))
def test_a_picture_of_a_batch_is_the_one_that_its_seed_gives_alone(
    pair: Any, family: str, task: str
) -> None:
    _, ours = pair(family, task)

    def draw(**changes: Any) -> Tensor:
        return ours(**arguments_of(family, task, lambda: changes), output_type="latent").images

    together = draw(num_images_per_prompt=3, generator=seeded(5, 6, 7))
    for row, seed in enumerate((5, 6, 7)):
        torch.testing.assert_close(together[row : row + 1], draw(generator=seeded(seed)))
