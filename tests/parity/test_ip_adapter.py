"""IP-Adapters against diffusers', on tiny random models and adapter files made here.

Final latents agree to 1e-4 in float32.
"""

from __future__ import annotations

from collections.abc import Callable
from functools import cache
from pathlib import Path
from typing import Any

import numpy as np
import PIL.Image
import pytest
import torch
from conftest import LCM_UNET, LCM_VAE, NOISE, TEXT_CHANNELS, UNET, VAE
from safetensors.torch import save_file
from torch import Tensor

import fewstep

diffusers = pytest.importorskip("diffusers")
pytestmark = pytest.mark.filterwarnings("ignore")

XL_UNET = UNET | {
    "transformer_layers_per_block": (1, 2),
    "addition_embed_type": "text_time",
    "addition_time_embed_dim": 8,
    "projection_class_embeddings_input_dim": 80,
    "cross_attention_dim": 2 * TEXT_CHANNELS,
}
MODELS = {
    "sd": ("StableDiffusion", UNET, VAE, "DDIMScheduler"),
    "lcm": ("LatentConsistencyModel", LCM_UNET, LCM_VAE, "LCMScheduler"),
    "xl": ("StableDiffusionXL", XL_UNET, VAE, "DDIMScheduler"),
}
SEEN, POOLED = 32, 24  # channels of the vision encoder's tokens, and of its result


def seeded(seed: int) -> torch.Generator:
    return torch.Generator().manual_seed(seed)


def picture(seed: int = 5) -> PIL.Image.Image:
    coarse = np.random.default_rng(seed).integers(0, 256, (4, 6, 3), dtype=np.uint8)
    return PIL.Image.fromarray(coarse).resize((48, 40), PIL.Image.Resampling.BICUBIC)


class Random:
    """Tensors of an adapter, strong enough to be seen."""

    def __init__(self, seed: int) -> None:
        self.generator = seeded(seed)

    def __call__(self, *shape: int) -> Tensor:
        return torch.randn(*shape, generator=self.generator) / shape[-1] ** 0.5


def projection(kind: str, dim: int, random: Random) -> dict[str, Tensor]:
    """The image_proj of a file: base, full (face) or plus."""
    norm = {"weight": 1 + 0.1 * random(dim), "bias": random(dim)}
    if kind == "base":
        state = {"proj.weight": random(4 * dim, POOLED), "proj.bias": random(4 * dim)}
        return state | {f"norm.{k}": v for k, v in norm.items()}
    if kind == "full":
        state = {"proj.0.weight": random(SEEN, SEEN), "proj.0.bias": random(SEEN)}
        state |= {"proj.2.weight": random(dim, SEEN), "proj.2.bias": random(dim)}
        return state | {f"proj.3.{k}": v for k, v in norm.items()}
    channels, inner = 16, 128
    state = {
        "latents": random(1, 5, channels),
        "proj_in.weight": random(channels, SEEN),
        "proj_in.bias": random(channels),
        "proj_out.weight": random(dim, channels),
        "proj_out.bias": random(dim),
    } | {f"norm_out.{k}": v for k, v in norm.items()}
    for depth in range(4):
        at = f"layers.{depth}."
        for name in ("0.norm1", "0.norm2", "1.0"):
            state[f"{at}{name}.weight"] = 1 + 0.1 * random(channels)
            state[f"{at}{name}.bias"] = random(channels)
        state[f"{at}0.to_q.weight"] = random(inner, channels)
        state[f"{at}0.to_kv.weight"] = random(2 * inner, channels)
        state[f"{at}0.to_out.weight"] = random(channels, inner)
        state[f"{at}1.1.weight"] = random(4 * channels, channels)
        state[f"{at}1.3.weight"] = random(channels, 4 * channels)
    return state


def adapter(kind: str, unet: Any, seed: int) -> dict[str, Tensor]:
    """A file's tensors for diffusers' `unet`, whose processors give the order of the layers."""
    random = Random(seed)
    dim = unet.config.cross_attention_dim
    state = {f"image_proj.{k}": v for k, v in projection(kind, dim, random).items()}
    for number, name in enumerate(unet.attn_processors):
        if name.endswith("attn2.processor"):
            channels = unet.get_submodule(name.removesuffix(".processor")).to_q.out_features
            for letter in "kv":
                key = f"ip_adapter.{number}.to_{letter}_ip.weight"
                state[key] = 2 * random(channels, dim)
    return state


@pytest.fixture(scope="session")
def folders(
    tokenizer: Any, text_encoder: Any, tmp_path_factory: pytest.TempPathFactory
) -> dict[str, Path]:
    """Checkpoints by family, each with adapters and an image encoder in `models`."""
    from transformers import (
        CLIPTextConfig,
        CLIPTextModelWithProjection,
        CLIPVisionConfig,
        CLIPVisionModelWithProjection,
    )

    torch.manual_seed(3)
    stored = text_encoder.config.to_dict() | {"projection_dim": 32}
    second = CLIPTextModelWithProjection(CLIPTextConfig.from_dict(stored)).eval()
    vision = CLIPVisionModelWithProjection(
        CLIPVisionConfig(
            hidden_size=SEEN,
            projection_dim=POOLED,
            intermediate_size=37,
            num_hidden_layers=3,
            num_attention_heads=4,
            image_size=32,
            patch_size=8,
        )
    ).eval()
    found = {}
    for family, (stem, unet, vae, scheduler) in MODELS.items():
        torch.manual_seed(0)
        parts: dict[str, Any] = {
            "vae": diffusers.AutoencoderKL(**vae),
            "text_encoder": text_encoder,
            "tokenizer": tokenizer,
            "unet": diffusers.UNet2DConditionModel(**unet),
            "scheduler": getattr(diffusers, scheduler)(**NOISE),
        }
        if family == "xl":
            parts |= {"text_encoder_2": second, "tokenizer_2": tokenizer}
        else:
            parts |= {"safety_checker": None, "feature_extractor": None}
            parts["requires_safety_checker"] = False
        folder = found[family] = tmp_path_factory.mktemp("ip")
        getattr(diffusers, stem + "Pipeline")(**parts).save_pretrained(folder)
        vision.save_pretrained(folder / "models" / "image_encoder")
        for seed, kind in enumerate(("base", "full", "plus")):
            file = folder / "models" / f"{kind}.safetensors"
            save_file(adapter(kind, parts["unet"], 10 + seed), file)
    return found


Pair = Callable[..., tuple[Any, Any]]


@pytest.fixture(scope="session")
def pair(folders: dict[str, Path]) -> Pair:
    """(diffusers' pipeline, ours) of a family, with these kinds of adapters at scale 1."""

    @cache
    def plain(family: str, task: str) -> tuple[Any, Any]:
        pipes = []
        for library in (diffusers, fewstep):
            pipe = getattr(library, MODELS[family][0] + task).from_pretrained(folders[family])
            pipe.set_progress_bar_config(disable=True)
            pipes.append(pipe)
        return pipes[0], pipes[1]

    def load(family: str, *kinds: str, task: str = "Pipeline") -> tuple[Any, Any]:
        pipes = plain(family, task)
        for pipe in pipes:
            names = [f"{kind}.safetensors" for kind in kinds]
            pipe.load_ip_adapter(folders[family], subfolder="models", weight_name=names)
        return pipes

    return load


def latents(pipe: Any, **arguments: Any) -> Tensor:
    asked = {"prompt": "a red cat", "num_inference_steps": 2, "generator": seeded(0)}
    found: Tensor = pipe(**(asked | arguments), output_type="latent").images
    return found


def assert_same(pipes: tuple[Any, Any], **arguments: Any) -> Tensor:
    """Both agree, and the picture prompt matters; returns our latents."""
    theirs, ours = (latents(pipe, **arguments) for pipe in pipes)
    torch.testing.assert_close(ours, theirs, rtol=0, atol=1e-4)
    return ours


@pytest.mark.parametrize("guidance_scale", [1.0, 3.0])
@pytest.mark.parametrize("kind", ["base", "full", "plus"])
@pytest.mark.parametrize("family", ["sd", "xl", "lcm"])
def test_every_kind_equals_diffusers(
    pair: Pair, family: str, kind: str, guidance_scale: float
) -> None:
    pipes = pair(family, kind)
    found = assert_same(pipes, guidance_scale=guidance_scale, ip_adapter_image=picture())
    other = latents(pipes[1], guidance_scale=guidance_scale, ip_adapter_image=picture(8))
    plain = latents(pipes[1], guidance_scale=guidance_scale)
    assert (found - other).abs().max() > 1e-3 and (found - plain).abs().max() > 1e-3


@pytest.mark.parametrize("family", ["sd", "xl"])
def test_several_adapters_pictures_and_rows_equal_diffusers(pair: Pair, family: str) -> None:
    pipes = pair(family, "plus", "base")
    for pipe in pipes:
        pipe.set_ip_adapter_scale([0.7, 0.4])
    images = [picture(1), [picture(2), picture(3)]]
    found = assert_same(pipes, ip_adapter_image=images, num_images_per_prompt=2)
    pipes[1].set_ip_adapter_scale([0.4, 0.7])
    swapped = latents(pipes[1], ip_adapter_image=images, num_images_per_prompt=2)
    assert (found - swapped).abs().max() > 1e-3


SCALES: list[Any] = [
    0.0,
    0.35,
    {"down": 0.6, "mid": 1.3, "up": {"block_0": [0.0, 1.0]}},
    {"up": {"block_0": [1.0, 0.0]}},
    {"down": {"block_1": [0.5]}},
]


@pytest.mark.parametrize("scale", SCALES)
def test_scales_equal_diffusers(pair: Pair, scale: Any) -> None:
    pipes = pair("sd", "base")
    for pipe in pipes:
        pipe.set_ip_adapter_scale(scale)
    found = assert_same(pipes, ip_adapter_image=picture())
    pipes[1].set_ip_adapter_scale(1.0)
    assert (found - latents(pipes[1], ip_adapter_image=picture())).abs().max() > 1e-3


@pytest.mark.parametrize("guidance_scale", [1.0, 3.0])
@pytest.mark.parametrize("kind", ["base", "plus"])
def test_prepared_embeddings_equal_diffusers(pair: Pair, kind: str, guidance_scale: float) -> None:
    theirs, ours = pair("sd", kind)
    guided = guidance_scale > 1
    expected = theirs.prepare_ip_adapter_image_embeds([picture()], None, "cpu", 1, guided)
    embeds = ours.prepare_ip_adapter_image_embeds([picture()], None, "cpu", 1, guided)
    torch.testing.assert_close(embeds, expected, rtol=0, atol=1e-5)
    how = {"guidance_scale": guidance_scale}
    found = assert_same((theirs, ours), ip_adapter_image_embeds=embeds, **how)
    assert torch.equal(found, latents(ours, ip_adapter_image=picture(), **how))


def test_picture_to_picture_equals_diffusers(pair: Pair) -> None:
    pipes = pair("sd", "plus", task="Img2ImgPipeline")
    assert_same(pipes, image=picture(2).resize((64, 64)), strength=1.0, ip_adapter_image=picture(1))


def test_unloading_gives_back_the_pipeline_as_it_was(pair: Pair, folders: dict[str, Path]) -> None:
    _, ours = pair("sd", "base")
    before = latents(ours)
    ours.unload_ip_adapter()
    assert torch.equal(before, latents(ours))
    assert ours.image_encoder is None
    fresh = fewstep.StableDiffusionPipeline.from_pretrained(folders["sd"])
    fresh.set_progress_bar_config(disable=True)
    assert torch.equal(before, latents(fresh))


def test_a_saved_pipeline_keeps_its_image_encoder_and_diffusers_reads_it(
    pair: Pair, tmp_path: Path, folders: dict[str, Path]
) -> None:
    _, ours = pair("xl", "base")
    expected = latents(ours, ip_adapter_image=picture())
    ours.save_pretrained(tmp_path)
    assert "ip_adapter" not in str(sorted(ours.unet.state_dict()))
    for library in (fewstep, diffusers):
        back = library.StableDiffusionXLPipeline.from_pretrained(tmp_path)
        back.set_progress_bar_config(disable=True)
        assert back.image_encoder is not None and back.feature_extractor is not None
        back.load_ip_adapter(folders["xl"], subfolder="models", weight_name="base.safetensors")
        found = latents(back, ip_adapter_image=picture())
        torch.testing.assert_close(found, expected, rtol=0, atol=1e-4)
    ours.unload_ip_adapter()


def test_each_prompt_sees_the_picture(pair: Pair) -> None:
    _, ours = pair("sd", "base")
    both = latents(
        ours,
        prompt=["a red cat", "a dog"],
        generator=[seeded(1), seeded(2)],
        ip_adapter_image=picture(),
    )
    for row, prompt in enumerate(("a red cat", "a dog")):
        alone = latents(ours, prompt=prompt, generator=seeded(row + 1), ip_adapter_image=picture())
        torch.testing.assert_close(both[row : row + 1], alone, rtol=1e-5, atol=1e-5)
