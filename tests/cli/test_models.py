"""`fewstep models`: what lies in the hub's cache."""

from __future__ import annotations

import json
import shutil
from collections.abc import Callable
from pathlib import Path
from typing import Any

import huggingface_hub.constants
import pytest
import torch
from safetensors.torch import save_file

import fewstep

Run = Callable[..., tuple[int, str, str]]


@pytest.fixture
def cache(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """An empty cache of the hub."""
    folder = tmp_path / "hub"
    folder.mkdir()
    monkeypatch.setattr(huggingface_hub.constants, "HF_HUB_CACHE", str(folder))
    return folder


def repository(cache: Path, name: str, commit: str = "0" * 40) -> Path:
    """A new snapshot in the cache."""
    root = cache / f"models--{name.replace('/', '--')}"
    (root / "refs").mkdir(parents=True)
    (root / "refs" / "main").write_text(commit)
    (snapshot := root / "snapshots" / commit).mkdir(parents=True)
    return snapshot


def listed(run: Run) -> dict[str, Any]:
    code, out, error = run("models", "--json")
    assert (code, error) == (0, "")
    told = json.loads(out)
    assert told["embedded"]["name"] == "fewstep-emoji"
    return {model["name"]: model for model in told["cached"]}


def test_the_embedded_model_tells_what_it_can_do(run: Run, cache: Path) -> None:
    code, out, _ = run("models")
    assert code == 0
    assert out.startswith("fewstep-emoji  pipeline")
    assert "text-to-image, image-to-image, inpainting" in out
    own = json.loads(run("models", "--json")[1])
    assert own["cached"] == []
    assert own["embedded"]["size"] == "64x64"
    assert Path(own["embedded"]["folder"]) == fewstep.EMBEDDED


def test_without_a_cache_there_is_the_embedded_model(run: Run, cache: Path) -> None:
    cache.rmdir()
    assert listed(run) == {}


def test_pipelines_are_listed_with_what_they_can_do(
    run: Run, cache: Path, lcm_folder: Path, sd_folder: Path
) -> None:
    shutil.copytree(lcm_folder, repository(cache, "owner/lcm"), dirs_exist_ok=True)
    shutil.copytree(sd_folder, repository(cache, "owner/sd"), dirs_exist_ok=True)
    found = listed(run)
    assert list(found) == ["owner/lcm", "owner/sd"]
    assert found["owner/lcm"]["kind"] == "pipeline"
    assert found["owner/lcm"]["family"] == "LCM"
    assert found["owner/sd"]["tasks"] == ["text-to-image", "image-to-image", "inpainting"]
    assert found["owner/sd"]["megabytes"] > 0
    assert "owner/sd" in run("models")[1]


def test_what_cannot_be_used_says_why(run: Run, cache: Path) -> None:
    flux = repository(cache, "owner/flux")
    (flux / "model_index.json").write_text('{"_class_name": "FluxPipeline"}')
    old = repository(cache, "owner/old")
    (old / "unet").mkdir()
    (old / "model_index.json").write_text('{"_class_name": "StableDiffusionPipeline"}')
    (old / "unet" / "config.json").write_text('{"cross_attention_dim": 768}')
    (old / "unet" / "diffusion_pytorch_model.bin").write_bytes(b"")
    torn = repository(cache, "owner/torn")
    (torn / "model_index.json").write_text("{")
    found = listed(run)
    assert found["owner/flux"]["note"] == "FluxPipeline is not implemented"
    assert found["owner/old"]["note"] == "pickled weights only"
    assert found["owner/old"]["family"] == "SD 1.x"
    assert found["owner/torn"]["kind"] == "unreadable"
    assert run("models")[0] == 0


def test_loras_and_controls_are_listed_by_family(run: Run, cache: Path) -> None:
    prefix = "lora_unet_down_blocks_1_attentions_0_transformer_blocks_0_attn2_to_k"
    for name, channels in (("sd", 768), ("xl", 2048)):
        tensors = {
            f"{prefix}.lora_down.weight": torch.zeros(2, channels),
            f"{prefix}.lora_up.weight": torch.zeros(8, 2),
        }
        save_file(tensors, repository(cache, f"owner/lora-{name}") / "lora.safetensors")
    control = repository(cache, "owner/control")
    config = {"_class_name": "ControlNetModel", "cross_attention_dim": 2048}
    (control / "config.json").write_text(json.dumps(config))
    (repository(cache, "owner/bert") / "config.json").write_text('{"model_type": "bert"}')
    found = {name: (model["kind"], model["family"]) for name, model in listed(run).items()}
    assert found == {
        "owner/control": ("ControlNet", "SDXL"),
        "owner/lora-sd": ("LoRA", "SD 1.x"),
        "owner/lora-xl": ("LoRA", "SDXL"),
    }
