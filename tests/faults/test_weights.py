"""Case 3: tensors that are not a model's are refused, and the model stays as it was."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from bad_files import WEIGHTS, copied
from conftest import UNET
from safetensors.torch import load_file, save, save_file
from torch import Tensor

import fewstep
from fewstep import CheckpointError, DiffusionPipeline, StableDiffusionPipeline

Tensors = dict[str, Tensor]
LAYER = "unet.down_blocks.1.attentions.0.transformer_blocks.0.attn2.to_k"  # W -> 16
DOWN, UP = f"{LAYER}.lora_A.weight", f"{LAYER}.lora_B.weight"
SD15, SDXL = 768, 2048  # the channels W of their texts
NAN, INF = float("nan"), float("inf")


def lora(width: int = SD15, rank: int = 2) -> Tensors:
    random = torch.Generator().manual_seed(0)
    down, up = (torch.randn(*shape, generator=random) for shape in ((rank, width), (16, rank)))
    return {DOWN: down, UP: up}


def of_type(dtype: torch.dtype) -> Callable[[], Tensors]:
    return lambda: {name: value.to(dtype) for name, value in lora().items()}


@pytest.fixture(scope="module")
def pipe(sd_folder: Path) -> Any:
    """A tiny model that reads as many channels of text as Stable Diffusion 1.5."""
    torch.manual_seed(0)
    unet = fewstep.UNet2DConditionModel(**UNET | {"cross_attention_dim": SD15})
    pipe = StableDiffusionPipeline.from_pretrained(
        sd_folder, unet=unet, text_encoder=None, tokenizer=None
    )
    pipe.set_progress_bar_config(disable=True)
    return pipe


def draw(pipe: Any) -> np.ndarray:
    text = torch.randn(1, 16, SD15, generator=torch.Generator().manual_seed(1))
    (picture,) = pipe(
        prompt_embeds=text,
        guidance_scale=1.0,
        num_inference_steps=1,
        height=32,
        width=32,
        generator=torch.Generator().manual_seed(3),
    ).images
    return np.asarray(picture)


BAD: dict[str, tuple[Callable[[], Tensors], str]] = {
    "names that are attributes": (
        lambda: {"a.__class__.__base__.x": torch.zeros(1)},
        r"a\.__class__\.__base__\.x fits no module",
    ),
    "such names beside good ones": (
        lambda: (
            lora() | {f"unet.__class__.__base__.lora_{c}.weight": torch.ones(1, 1) for c in "AB"}
        ),
        r"__class__\.__base__\.lora_A\.weight fits no module",
    ),
    "a wrong shape": (lambda: lora() | {UP: torch.zeros(5, 2)}, r"\(5, 768\), not \(16, 768\)"),
    "no rank": (lambda: lora() | {DOWN: torch.zeros(())}, "attn2.to_k"),
    "NaN": (lambda: lora() | {UP: lora()[UP] * NAN}, "its up holds numbers that are not finite"),
    "one infinity": (
        lambda: lora() | {DOWN: lora()[DOWN].index_fill(1, torch.tensor(7), INF)},
        "its down holds numbers that are not finite",
    ),
    "a NaN for alpha": (lambda: lora() | {f"{LAYER}.alpha": torch.tensor(NAN)}, "alpha is nan"),
    "integers": (of_type(torch.int32), "torch.int32, which no network computes in"),
    "truth values": (of_type(torch.bool), "torch.bool, which"),
    "complex numbers": (of_type(torch.complex64), "torch.complex64, which"),
    "SDXL's": (
        lambda: lora(SDXL),
        r"for SDXL \(2048 text channels\); the model is SD 1\.x \(768 text channels\)",
    ),
}


@pytest.mark.parametrize("fault", BAD)
@pytest.mark.filterwarnings("ignore:Casting complex values:UserWarning")
def test_a_bad_lora_is_refused_and_the_next_picture_is_the_same(
    fault: str, pipe: Any, tmp_path: Path
) -> None:
    """Case 3: names, shapes, numbers and types that are not a LoRA's, and another family's."""
    make, reason = BAD[fault]
    before, state = draw(pipe), {n: v.clone() for n, v in pipe.unet.state_dict().items()}
    save_file(make(), tmp_path / "bad.safetensors")
    with pytest.raises(CheckpointError, match=reason):
        pipe.load_lora_weights(tmp_path / "bad.safetensors")
    assert pipe.get_list_adapters() == {} and pipe.get_active_adapters() == []
    assert all(torch.equal(value, state[name]) for name, value in pipe.unet.state_dict().items())
    assert (draw(pipe) == before).all()


def test_a_good_lora_of_these_tests_changes_the_picture(pipe: Any, tmp_path: Path) -> None:
    """Case 3, the negative control."""
    before = draw(pipe)
    save_file(lora(), tmp_path / "good.safetensors")
    pipe.load_lora_weights(tmp_path / "good.safetensors")
    assert (draw(pipe) != before).any()
    pipe.unload_lora_weights()
    assert (draw(pipe) == before).all()


@pytest.mark.parametrize("config", ["[" * 10**6, '{"lora_alpha": "much"}', '{"alpha_pattern": 3}'])
def test_a_loras_settings_that_are_none_are_refused(config: str, pipe: Any, tmp_path: Path) -> None:
    """Case 3: what a file says beside its tensors."""
    save_file(lora(), tmp_path / "bad.safetensors", {"lora_adapter_metadata": config})
    with pytest.raises(CheckpointError, match=r"bad\.safetensors"):
        pipe.load_lora_weights(tmp_path / "bad.safetensors")
    assert pipe.get_list_adapters() == {}


def test_what_lies_beside_a_bad_lora_stays_active(pipe: Any, tmp_path: Path) -> None:
    """Case 3: a refusal changes nothing of what was loaded before."""
    pipe.load_lora_weights(lora(), adapter_name="good")
    before = draw(pipe)
    with pytest.raises(CheckpointError):
        pipe.load_lora_weights(lora(SDXL), adapter_name="bad")
    assert pipe.get_active_adapters() == ["good"]
    assert (draw(pipe) == before).all()
    pipe.unload_lora_weights()


# ── whole models ──

NETWORKS: dict[str, tuple[Callable[[Tensor], Tensor], str]] = {
    "a wrong shape": (lambda w: w[:3], r"conv_in\.weight has shape \(3, 4, 3, 3\)"),
    "integers": (lambda w: w.int(), r"conv_in\.weight holds torch\.int32"),
    "complex numbers": (lambda w: w.to(torch.complex64), r"holds torch\.complex64"),
}


@pytest.mark.parametrize("fault", NETWORKS)
def test_a_network_of_other_tensors_is_refused_with_the_first_of_them(
    fault: str, sd_folder: Path, tmp_path: Path
) -> None:
    """Case 3: wrong shapes and types in a model's own weights."""
    change, reason = NETWORKS[fault]
    weights = load_file(sd_folder / WEIGHTS["unet"])
    name = "conv_in.weight"
    content = save(weights | {name: change(weights[name]).contiguous()}, {"format": "pt"})
    folder = copied(sd_folder, tmp_path / "model", unet=content)
    with pytest.raises(CheckpointError, match=reason):
        DiffusionPipeline.from_pretrained(folder)


def test_names_that_are_attributes_are_surplus(sd_folder: Path, tmp_path: Path) -> None:
    """Case 3: `a.__class__.__base__.x` in a model."""
    weights = load_file(sd_folder / WEIGHTS["unet"])
    weights["a.__class__.__base__.x"] = torch.zeros(1)
    folder = copied(sd_folder, tmp_path / "model", unet=save(weights))
    with pytest.raises(CheckpointError, match=r"1 \(a\.__class__\.__base__\.x\) surplus"):
        DiffusionPipeline.from_pretrained(folder)


@pytest.mark.parametrize("number", [NAN, INF])
def test_weights_that_are_not_finite_never_become_a_picture(
    number: float, sd_folder: Path, tmp_path: Path
) -> None:
    """Case 3: NaN and Inf are found where the picture is made, not shown as black."""
    weights = load_file(sd_folder / WEIGHTS["unet"])
    weights["conv_out.bias"] = torch.full_like(weights["conv_out.bias"], number)
    folder = copied(sd_folder, tmp_path / "model", unet=save(weights))
    pipe = DiffusionPipeline.from_pretrained(folder)
    pipe.set_progress_bar_config(disable=True)
    with pytest.raises(CheckpointError, match=r"not finite: weights.* damaged"):
        pipe("a cat", num_inference_steps=1, height=32, width=32)
