"""Models of full size in diffusers' layout, with random weights that are the same each time.

They take as long as real ones and can be had without a network. Weights are normal with variance
1 / (numbers that are summed), so that what flows through keeps its size in every dtype. A tensor's
numbers are drawn by a generator that is seeded with its name, in float32, and then rounded.
"""

from __future__ import annotations

import hashlib
import os
import shutil
import uuid
import zlib
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import torch
from safetensors.torch import save_file
from torch import nn

from .. import EMBEDDED as EMBEDDED_FOLDER
from ..checkpoints.config import read_json
from ..checkpoints.known import FAMILIES, LCM_SCHEDULER
from ..errors import RequestError
from ..models.base import Model
from ..models.controlnet import ControlNetModel
from ..models.unet import UNet2DConditionModel
from ..models.vae import AutoencoderKL
from ..pipelines.loading import no_progress_bar
from .machine import available_memory
from .work import EMBEDDED, RANDOM, Work

FAMILY = {"sd15": "sd1", "sdxl": "sdxl", "ssd1b": "ssd-1b"}
GUIDANCE = {"time_cond_proj_dim": 256}  # a guidance-distilled LCM: one network call a step
TOKENS = 77
CONTROL_CHANNELS = (16, 32, 96, 256)
RANK = 8  # of the LoRA
ADAPTED = ("to_q", "to_k", "to_v", "to_out.0")
ROOM = 1.1  # bytes needed, over those of the weights
UNET_FILE = Path("unet") / "config.json"


def checkpoint(work: Work, cache: Path) -> Path:
    """The folder of a work's model; one of full size is written to `cache` if it is not there."""
    if work.model == EMBEDDED:
        return EMBEDDED_FOLDER
    if work.model not in RANDOM:
        folder = Path(work.model).absolute()
        if not (folder / UNET_FILE).is_file():
            raise RequestError(
                f"model {work.model!r}: is neither of {', '.join((EMBEDDED, *RANDOM))} nor a "
                "folder with unet/config.json; give one of them"
            )
        return folder
    folder = cache / f"{work.model}-{work.dtype}"
    if not folder.exists():
        with finished(folder) as beside:
            write(work.model, getattr(torch, work.dtype), beside)
    return folder


def addition(work: Work, folder: Path, cache: Path) -> Path | None:
    """What a task needs beside the model: a ControlNet's folder or a LoRA's file, made for it."""
    if work.task not in ("controlnet", "lora"):
        return None
    config = read_json(folder / UNET_FILE)
    known = hashlib.sha256((folder / UNET_FILE).read_bytes()).hexdigest()[:10]
    place = cache / f"{work.task}-{known}-{work.dtype}"
    if not place.exists():
        with finished(place) as beside:
            if work.task == "lora":
                write_lora(config, getattr(torch, work.dtype), beside)
            else:
                vae = read_json(folder / "vae" / "config.json")
                write_controlnet(config, vae, getattr(torch, work.dtype), beside)
    return place


@contextmanager
def finished(folder: Path) -> Iterator[Path]:
    """A new folder beside `folder`, renamed to it if the block ends well and removed if not."""
    folder.parent.mkdir(parents=True, exist_ok=True)
    beside = folder.with_name(f".{folder.name}.{uuid.uuid4().hex}.partial")
    beside.mkdir()
    try:
        yield beside
        if not folder.exists():  # another process may have been quicker
            os.rename(beside, folder)
    finally:
        shutil.rmtree(beside, ignore_errors=True)


# ── what is written ──


def write(name: str, dtype: torch.dtype, folder: Path) -> None:
    """A guidance-distilled LCM in a family's size, the text encoders at CLIP's."""
    from .. import LatentConsistencyModelPipeline, LCMScheduler, StableDiffusionXLPipeline

    configs = FAMILIES[FAMILY[name]].configs
    noise = {k: v for k, v in FAMILIES["sd1"].configs["scheduler"].items() if k[0] != "_"}
    noise |= {k: v for k, v in LCM_SCHEDULER.items() if k[0] != "_"}
    texts = {key: config for key, config in configs.items() if key.startswith("text_encoder")}
    with torch.device("meta"):
        unet = UNet2DConditionModel(**{**configs["unet"], **GUIDANCE})
        # Without `force_upcast`, as the VAE that was repaired for half precision.
        vae = AutoencoderKL(**{**configs["vae"], "force_upcast": False})
    numbers = unet.num_parameters() + vae.num_parameters() + sum(map(text_numbers, texts.values()))
    check_room(name, numbers * dtype.itemsize, folder)
    parts: dict[str, Any] = {
        "unet": filled(unet, dtype),
        "vae": filled(vae, dtype),
        "scheduler": LCMScheduler(**{k: v for k, v in noise.items() if k != "skip_prk_steps"}),
        "tokenizer": tokenizer(),
        "text_encoder": text_encoder("text_encoder", texts["text_encoder"], dtype),
    }
    if "text_encoder_2" in texts:
        parts["text_encoder_2"] = text_encoder("text_encoder_2", texts["text_encoder_2"], dtype)
        StableDiffusionXLPipeline(**parts, tokenizer_2=tokenizer()).save_pretrained(folder)
    else:
        pipe = LatentConsistencyModelPipeline(**parts, requires_safety_checker=False)
        pipe.save_pretrained(folder)


def filled(network: Model, dtype: torch.dtype) -> Any:
    """A network that was built on the meta device, with its random numbers."""
    network = network.to(dtype).to_empty(device="cpu").eval().requires_grad_(False)
    for name, parameter in network.named_parameters():
        parameter.copy_(numbers_of(name, parameter.shape))
    return network


def numbers_of(name: str, shape: torch.Size) -> torch.Tensor:
    """The float32 numbers of a tensor: ones for a norm's scale, small ones for a bias."""
    generator = torch.Generator().manual_seed(zlib.crc32(name.encode()))
    if len(shape) < 2:
        drawn = 0.05 * torch.randn(shape, generator=generator)
        return drawn if name.endswith("bias") else 1 + drawn
    return torch.randn(shape, generator=generator) * (shape[0] / shape.numel()) ** 0.5


def text_numbers(config: Mapping[str, Any]) -> int:
    """About how many parameters a CLIP text encoder has."""
    width, deep = config["hidden_size"], config["num_hidden_layers"]
    layer = 4 * width**2 + 2 * width * config["intermediate_size"]
    return int(config["vocab_size"] * width + deep * layer)


def text_encoder(name: str, config: Mapping[str, Any], dtype: torch.dtype) -> nn.Module:
    """A CLIP text encoder with transformers' own random numbers, and the end of our tokenizer."""
    import transformers

    ends = {"bos_token_id": 4094, "eos_token_id": 4095, "pad_token_id": 4095}
    made = transformers.CLIPTextConfig(**{**config, **ends})
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(zlib.crc32(name.encode()))
        if name == "text_encoder_2":
            network: nn.Module = transformers.CLIPTextModelWithProjection(made)
        else:
            network = transformers.CLIPTextModel(made)
    return network.to(dtype).eval()


def tokenizer() -> Any:
    """The embedded model's tokenizer, padding to CLIP's length."""
    from transformers import CLIPTokenizer

    return CLIPTokenizer.from_pretrained(
        str(EMBEDDED_FOLDER / "tokenizer"), local_files_only=True, model_max_length=TOKENS
    )


def write_lora(unet: Mapping[str, Any], dtype: torch.dtype, folder: Path) -> None:
    """A LoRA on the attention of a UNet, by peft's names."""
    with torch.device("meta"):
        network = UNet2DConditionModel.from_config(unet)
    tensors = {}
    for name, layer in network.named_modules():
        if name.endswith(ADAPTED) and isinstance(layer, nn.Linear):
            shapes = {"A": (RANK, layer.in_features), "B": (layer.out_features, RANK)}
            for side, shape in shapes.items():
                key = f"unet.{name}.lora_{side}.weight"
                tensors[key] = (0.1 * numbers_of(key, torch.Size(shape))).to(dtype)
    save_file(tensors, folder / "pytorch_lora_weights.safetensors", {"format": "pt"})


def write_controlnet(
    unet: Mapping[str, Any], vae: Mapping[str, Any], dtype: torch.dtype, folder: Path
) -> None:
    """A ControlNet that fits a UNet, and reads pictures at the VAE's scale."""
    known = ControlNetModel.config_class.from_dict({})
    config = {k: v for k, v in unet.items() if k in known and k[0] != "_"}
    if config.get("addition_embed_type") != "text_time":
        config.pop("addition_embed_type", None)
    config |= {"conditioning_embedding_out_channels": CONTROL_CHANNELS[: levels(vae)]}
    with torch.device("meta"):
        network = ControlNetModel(**config)
    check_room("the ControlNet", network.num_parameters() * dtype.itemsize, folder)
    with no_progress_bar():
        filled(network, dtype).save_pretrained(folder)


def levels(vae: Mapping[str, Any]) -> int:
    """How many resolutions an autoencoder has; a latent is 2^(levels - 1) pixels wide."""
    return len(vae["block_out_channels"])


# ── whether it fits ──


def check_room(name: str, weights: float, folder: Path) -> None:
    """Raises RequestError unless disk and memory can hold `weights` bytes more."""
    needed = ROOM * weights
    free = {"disk": shutil.disk_usage(folder).free, "memory": available_memory()}
    for kind, there in free.items():
        if there is not None and there < needed:
            raise RequestError(
                f"model {name}: needs {needed / 1e9:.1f} GB of {kind}, and {there / 1e9:.1f} GB "
                "are free; free some, give another --cache, or a dtype of 16 bits"
            )
