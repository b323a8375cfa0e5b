"""Tiny models, LoRAs and runs, for the tests of what comes out of training."""

from __future__ import annotations

import json
from collections.abc import Mapping
from dataclasses import asdict
from pathlib import Path
from typing import Any

import torch
from conftest import NOISE, TEXT_CHANNELS, UNET, VAE
from safetensors.torch import save_file
from torch import Tensor

import fewstep
from fewstep.checkpoints.lora_formats import Change
from fewstep.checkpoints.lora_writing import Form, write_lora_file
from fewstep.models.lora import weight_delta
from fewstep.training.config import Recipe, parse_recipe
from fewstep.training.lora_layers import adapters, attach

LORA = {"rank": 3, "alpha": 2.0}
TARGETS = (
    "to_q",
    "to_out.0",
    "proj_in",
    "ff.net.0.proj",
    "conv1",
    "conv_shortcut",
    "time_emb_proj",
)
# SDXL's blocks: three levels of two layers, no attention at the first.
XL: dict[str, Any] = UNET | {
    "block_out_channels": (8, 8, 16),
    "layers_per_block": 2,
    "down_block_types": ("DownBlock2D", "CrossAttnDownBlock2D", "CrossAttnDownBlock2D"),
    "up_block_types": ("CrossAttnUpBlock2D", "CrossAttnUpBlock2D", "UpBlock2D"),
    "use_linear_projection": True,
    "addition_embed_type": "text_time",
    "addition_time_embed_dim": 8,
    "projection_class_embeddings_input_dim": 8 * 6 + 32,
    "cross_attention_dim": 2 * TEXT_CHANNELS,
}


def write_xl(folder: Path, tokenizer: Any, text_encoder: Any) -> Path:
    """A tiny SDXL on disk."""
    from transformers import CLIPTextConfig, CLIPTextModelWithProjection

    torch.manual_seed(4)
    stored = text_encoder.config.to_dict() | {"projection_dim": 32}
    pipe = fewstep.StableDiffusionXLPipeline(
        vae=fewstep.AutoencoderKL(**VAE),
        text_encoder=text_encoder,
        text_encoder_2=CLIPTextModelWithProjection(CLIPTextConfig.from_dict(stored)).eval(),
        tokenizer=tokenizer,
        tokenizer_2=tokenizer,
        unet=fewstep.UNet2DConditionModel(**XL),
        scheduler=fewstep.EulerDiscreteScheduler(**{k: NOISE[k] for k in list(NOISE)[:3]}),
    )
    pipe.save_pretrained(folder)
    return folder


def recipe(base: Path | str, /, **settings: Any) -> Recipe:
    sheet = {"prompts": ["a cat"], "guidance_scale": 3.0}
    return parse_recipe(
        {
            "phase": "consistency",
            "folder": "runs/tiny",
            "seed": 0,
            "data": {"source": "folder", "path": "pictures", "resolution": 64},
            "optimizer": {"lr": 1e-3},
            "run": {"steps": 7, "batch": 4},
            "consistency": {"base": str(base), "sheet": sheet, "guidance_dim": 16} | settings,
        },
        "test",
    )


def random_lora(unet: Any, seed: int = 0) -> dict[str, tuple[Tensor, Tensor]]:
    """Adapters as the trained layers have them, and no zeros among them."""
    targets = [t for t in TARGETS if any(n.endswith(t) for n, _ in unet.named_modules())]
    attach(unet, targets, LORA["rank"], LORA["alpha"], seed)
    generator = torch.Generator().manual_seed(seed)
    return {
        name: (down, torch.randn(up.shape, generator=generator) * 0.3)
        for name, (down, up) in adapters(unet).items()
    }


def unet_of(folder: Path) -> Any:
    return fewstep.UNet2DConditionModel.from_pretrained(folder, subfolder="unet")


def inputs(unet: Any) -> dict[str, Any]:
    generator = torch.Generator().manual_seed(7)
    width = unet.config["cross_attention_dim"]
    found = {
        "sample": torch.randn(2, 4, 8, 8, generator=generator),
        "timestep": torch.tensor([9, 700]),
        "encoder_hidden_states": torch.randn(2, 16, width, generator=generator),
    }
    if unet.config["addition_embed_type"] == "text_time":
        texts = torch.randn(2, 32, generator=generator)
        found["added_cond_kwargs"] = {"text_embeds": texts, "time_ids": torch.ones(2, 6)}
    return found


@torch.no_grad()
def output(unet: Any) -> Tensor:
    return unet(**inputs(unet)).sample


def merged_by_hand(folder: Path, lora: dict[str, tuple[Tensor, Tensor]]) -> Tensor:
    """The network's output with W + alpha / rank up @ down."""
    unet = unet_of(folder)
    for name, (down, up) in lora.items():
        layer = unet.get_submodule(name)
        change = Change({"down": down, "up": up}, LORA["alpha"])
        layer.weight.data = layer.weight.data + weight_delta(change, layer.weight.data)
    return output(unet)


def pipelines(folder: Path) -> list[Any]:
    """The same model in both libraries."""
    import diffusers

    return [library.DiffusionPipeline.from_pretrained(folder) for library in (diffusers, fewstep)]


def draw(pipe: Any, **arguments: Any) -> Tensor:
    pipe.set_progress_bar_config(disable=True)
    given = {"num_inference_steps": 2, "guidance_scale": 3.0, "height": 32, "width": 32}
    generator = torch.Generator().manual_seed(5)
    result = pipe("a cat", **given | arguments, generator=generator, output_type="latent")
    return result.images


def student(folder: Path, **config: Any) -> Any:
    torch.manual_seed(8)
    return fewstep.UNet2DConditionModel.from_config(unet_of(folder).config, **config)


def write_run(folder: Path, given: Recipe, averaged: dict[str, Tensor], **files: Any) -> Path:
    """A run's folder: its averaged tensors, the last ones (all zeros), moments, recipe, config."""
    tensors = {f"average/{name}": value.contiguous() for name, value in averaged.items()}
    tensors |= {f"parameter/{name}": torch.zeros_like(value) for name, value in averaged.items()}
    tensors |= {f"optimizer/exp_avg/{name}": torch.ones(1) for name in averaged}
    folder.mkdir(parents=True)
    save_file(tensors, folder / "checkpoint.safetensors", {"step": "7"})
    (folder / "recipe.json").write_text(json.dumps(asdict(given), default=dict))
    for name, content in files.items():
        (folder / f"{name}.json").write_text(json.dumps(content))
    return folder


def full_run(folder: Path, base: Path, **settings: Any) -> tuple[Path, Any]:
    unet = student(base, time_cond_proj_dim=16)
    averaged = {f"unet.{name}": value for name, value in unet.state_dict().items()}
    config = unet.config.to_dict("UNet2DConditionModel")
    return write_run(folder, recipe(base, **settings), averaged, unet_config=config), unet


def lora_file(path: Path, folder: Path, seed: int, form: Form = "diffusers") -> Path:
    unet = unet_of(folder)
    changes = {
        module: Change({"down": down, "up": up}, LORA["alpha"])
        for module, (down, up) in random_lora(unet, seed).items()
    }
    return write_lora_file(path, {"unet": changes}, form, unet.config)


def lora_run(folder: Path, base: Path, lora: Mapping[str, tuple[Tensor, Tensor]]) -> Path:
    """A run that has trained these (down, up) by module."""
    averaged = {
        f"unet.{name}.{end}.weight": value
        for name, pair in lora.items()
        for end, value in zip(("lora_down", "lora_up"), pair, strict=True)
    }
    given = recipe(base, lora=LORA, guidance_dim=0, target="stopgrad")
    return write_run(folder, given, averaged)
