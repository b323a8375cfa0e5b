"""Tiny random models: whole pipelines in milliseconds, without a network."""

from __future__ import annotations

import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch

TEXT_CHANNELS = 32

# Stable Diffusion's layout: guidance by two network calls, or none; 8 pixels per latent.
UNET: dict[str, Any] = {
    "sample_size": 8,
    "in_channels": 4,
    "out_channels": 4,
    "block_out_channels": (8, 16),
    "layers_per_block": 1,
    "down_block_types": ("DownBlock2D", "CrossAttnDownBlock2D"),
    "up_block_types": ("CrossAttnUpBlock2D", "UpBlock2D"),
    "cross_attention_dim": TEXT_CHANNELS,
    "attention_head_dim": 2,
    "norm_num_groups": 2,
}
VAE: dict[str, Any] = {
    "block_out_channels": (4, 4, 8, 8),
    "down_block_types": ("DownEncoderBlock2D",) * 4,
    "up_block_types": ("UpDecoderBlock2D",) * 4,
    "latent_channels": 4,
    "norm_num_groups": 2,
    "sample_size": 32,
}
# A guidance-distilled LCM, on a VAE of other numbers: 8 channels, 4 pixels per latent.
LCM_UNET = UNET | {"in_channels": 8, "out_channels": 8, "time_cond_proj_dim": 32}
LCM_VAE = VAE | {
    "block_out_channels": (4, 8, 8),
    "down_block_types": ("DownEncoderBlock2D",) * 3,
    "up_block_types": ("UpDecoderBlock2D",) * 3,
    "latent_channels": 8,
    "scaling_factor": 0.7,
}
NOISE = {
    "beta_start": 0.00085,
    "beta_end": 0.012,
    "beta_schedule": "scaled_linear",
    "steps_offset": 1,
    "set_alpha_to_one": False,
    "clip_sample": False,
}


def write_tokenizer(folder: Path, length: int = 16) -> Path:
    """The files of a CLIP tokenizer that knows letters and a few words, `length` tokens at most."""
    letters = [chr(c) for c in range(33, 127)]
    merges = ["a t</w>", "c at</w>", "d o", "do g</w>", "r e", "re d</w>"]
    words = letters + [letter + "</w>" for letter in letters]
    words += ["".join(merge.split()) for merge in merges]
    words += ["<|startoftext|>", "<|endoftext|>"]
    folder.mkdir(parents=True)
    (folder / "vocab.json").write_text(json.dumps({word: i for i, word in enumerate(words)}))
    (folder / "merges.txt").write_text("#version: 0.2\n" + "\n".join(merges) + "\n")
    special = {
        "bos_token": "<|startoftext|>",
        "eos_token": "<|endoftext|>",
        "unk_token": "<|endoftext|>",
        "pad_token": "<|endoftext|>",
    }
    config = {"tokenizer_class": "CLIPTokenizer", "model_max_length": length, **special}
    (folder / "tokenizer_config.json").write_text(json.dumps(config))
    (folder / "special_tokens_map.json").write_text(json.dumps(special))
    return folder


@pytest.fixture(scope="session")
def tokenizer(tmp_path_factory: pytest.TempPathFactory) -> Any:
    from transformers import CLIPTokenizer

    return CLIPTokenizer.from_pretrained(
        write_tokenizer(tmp_path_factory.mktemp("t") / "tokenizer")
    )


@pytest.fixture(scope="session")
def text_encoder(tokenizer: Any) -> Any:
    from transformers import CLIPTextConfig, CLIPTextModel

    torch.manual_seed(0)
    config = CLIPTextConfig(
        hidden_size=TEXT_CHANNELS,
        intermediate_size=37,
        num_hidden_layers=3,
        num_attention_heads=4,
        vocab_size=len(tokenizer),
        max_position_embeddings=16,
        bos_token_id=tokenizer.bos_token_id,
        eos_token_id=tokenizer.eos_token_id,
        pad_token_id=tokenizer.pad_token_id,
    )
    return CLIPTextModel(config).eval()


@pytest.fixture(scope="session")
def lcm_folder(tokenizer: Any, text_encoder: Any, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A guidance-distilled LCM on disk; its own pictures are 32 x 32."""
    from fewstep import (
        AutoencoderKL,
        LatentConsistencyModelPipeline,
        LCMScheduler,
        UNet2DConditionModel,
    )

    torch.manual_seed(1)
    pipe = LatentConsistencyModelPipeline(
        vae=AutoencoderKL(**LCM_VAE),
        text_encoder=text_encoder,
        tokenizer=tokenizer,
        unet=UNet2DConditionModel(**LCM_UNET),
        scheduler=LCMScheduler(**NOISE),
        requires_safety_checker=False,
    )
    folder = tmp_path_factory.mktemp("models") / "lcm"
    pipe.save_pretrained(folder)
    return folder


@pytest.fixture(scope="session")
def sd_folder(tokenizer: Any, text_encoder: Any, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A model with classifier-free guidance on disk; its own pictures are 64 x 64."""
    from fewstep import (
        AutoencoderKL,
        DDIMScheduler,
        StableDiffusionPipeline,
        UNet2DConditionModel,
    )

    torch.manual_seed(2)
    pipe = StableDiffusionPipeline(
        vae=AutoencoderKL(**VAE),
        text_encoder=text_encoder,
        tokenizer=tokenizer,
        unet=UNet2DConditionModel(**UNET),
        scheduler=DDIMScheduler(**NOISE),
        requires_safety_checker=False,
    )
    folder = tmp_path_factory.mktemp("models") / "stable-diffusion"
    pipe.save_pretrained(folder)
    return folder


@pytest.fixture
def run(
    capsys: pytest.CaptureFixture[str], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> Callable[..., tuple[int, str, str]]:
    """Runs the command line in an empty folder: (exit code, stdout, stderr)."""
    from fewstep.cli import main

    (tmp_path / "here").mkdir()
    monkeypatch.chdir(tmp_path / "here")

    def call(*arguments: object) -> tuple[int, str, str]:
        code = main([str(argument) for argument in arguments])
        captured = capsys.readouterr()
        return code, captured.out, captured.err

    return call
