"""What is approximated: named, recorded, refused where it cannot be done, off unless asked."""

from __future__ import annotations

import json
import shutil
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from conftest import LCM_UNET

from fewstep import (
    AutoencoderTiny,
    LatentConsistencyModelPipeline,
    RequestError,
    UNet2DConditionModel,
)
from fewstep.kernels import build
from fewstep.pipelines import approximations

int8_only = pytest.mark.skipif(not build.has("avx512_vnni"), reason="a CPU without avx512_vnni")


def tiny_vae(latent_channels: int = 8) -> AutoencoderTiny:
    torch.manual_seed(5)
    return AutoencoderTiny(
        latent_channels=latent_channels,
        encoder_block_out_channels=(4,) * 3,
        decoder_block_out_channels=(4,) * 3,
        num_encoder_blocks=(1,) * 3,
        num_decoder_blocks=(1,) * 3,
    ).eval()


@pytest.fixture(scope="module")
def folder(lcm_folder: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """An LCM with layers that are large enough to be quantised."""
    torch.manual_seed(4)
    unet = UNet2DConditionModel(**LCM_UNET | {"block_out_channels": (32, 64)})
    made = tmp_path_factory.mktemp("models") / "wide"
    LatentConsistencyModelPipeline.from_pretrained(lcm_folder, unet=unet).save_pretrained(made)
    return made


@pytest.fixture
def pipe(folder: Path) -> Any:
    loaded = LatentConsistencyModelPipeline.from_pretrained(folder)
    loaded.set_progress_bar_config(disable=True)
    return loaded


def draw(pipe: Any) -> Any:
    made = torch.Generator().manual_seed(7)
    return pipe("a cat", num_inference_steps=2, generator=made).images[0]


def recorded(picture: Any) -> list[str]:
    return json.loads(picture.info["fewstep"])["approximations"]


def fast(pipe: Any, capsys: pytest.CaptureFixture[str], **given: Any) -> str:
    """What enabling it prints, which it returns as well."""
    choices = pipe.enable_fast(**given)
    captured = capsys.readouterr()
    assert captured.out == ""
    lines = [line for line in captured.err.splitlines() if "without effect" not in line]
    assert lines == [f"fast: {choice}" for choice in choices]
    return captured.err


@pytest.fixture
def large(monkeypatch: pytest.MonkeyPatch) -> None:
    """Models of 32 channels pass for large ones, on a CPU that has everything."""
    monkeypatch.setattr(approximations, "WIDE", 32)
    monkeypatch.setattr(approximations, "bfloat16_refusal", lambda device: None)


def test_nothing_is_approximated_unless_asked(pipe: Any) -> None:
    assert pipe.approximations == []
    assert recorded(draw(pipe)) == []


@pytest.mark.parametrize("kind", [pytest.param("int8", marks=int8_only), "int8-weights"])
def test_a_quantised_picture_says_so_and_is_near(pipe: Any, kind: str) -> None:
    exact = np.asarray(draw(pipe), dtype=float)
    pipe.quantize(kind)
    assert pipe.approximations == [kind]
    picture = draw(pipe)
    assert recorded(picture) == [kind]
    off = np.abs(np.asarray(picture, dtype=float) - exact)
    assert 0 < off.mean() < 8


def test_sixteen_bits_and_a_tiny_vae_are_named_however_they_came(folder: Path) -> None:
    pipe = LatentConsistencyModelPipeline.from_pretrained(
        folder, torch_dtype=torch.bfloat16, vae=tiny_vae().to(torch.bfloat16)
    )
    assert pipe.approximations == ["bfloat16", "tiny-vae"]


def test_what_needs_the_weights_comes_before(pipe: Any, tmp_path: Path) -> None:
    pipe.quantize("int8-weights")
    with pytest.raises(RequestError, match="load LoRAs, move it or save it before quantize"):
        pipe.save_pretrained(tmp_path / "saved")
    assert not (tmp_path / "saved/model_index.json").exists()
    pipe.to(torch.bfloat16)
    assert pipe.approximations == ["bfloat16", "int8-weights"]


@pytest.mark.parametrize(
    ("kind", "said"),
    [("int2", "is unknown; give one of int8, int8-weights, fp8"), ("fp8", "got cpu; take int8")],
)
def test_a_refused_quantisation_changes_nothing(pipe: Any, kind: str, said: str) -> None:
    with pytest.raises(RequestError, match=said):
        pipe.quantize(kind)
    assert pipe.approximations == []


# ── the preset ──


def test_fast_says_that_it_has_no_effect_on_a_small_model(
    pipe: Any, capsys: pytest.CaptureFixture[str]
) -> None:
    exact = draw(pipe)
    told = fast(pipe, capsys)
    assert told.startswith("fast: without effect on this machine with this model\n")
    for name in ("bfloat16", "int8"):
        assert f"fast: {name}: left out, this model is too small to gain by it (32 " in told
    assert "fast: tiny-vae: left out, none was given and there is no folder vae_tiny" in told
    assert pipe.approximations == []
    assert (np.asarray(draw(pipe)) == np.asarray(exact)).all()


@int8_only
def test_fast_turns_on_what_gains_and_the_record_says_so(
    pipe: Any, capsys: pytest.CaptureFixture[str], large: None
) -> None:
    told = fast(pipe, capsys, vae=tiny_vae())
    assert pipe.approximations == ["bfloat16", "int8", "tiny-vae"]
    assert told.count(": on, ") == 3
    assert recorded(draw(pipe)) == ["bfloat16", "int8", "tiny-vae"]
    assert pipe.vae.dtype == torch.bfloat16
    again = fast(pipe, capsys)
    assert again.count("as it was") == 3


def test_fast_leaves_out_what_this_cpu_cannot_do(
    pipe: Any, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(approximations, "WIDE", 32)
    monkeypatch.setattr(build, "has", lambda flag: False)
    told = fast(pipe, capsys)
    assert "bfloat16: left out, this CPU has no avx512_bf16" in told
    assert "int8: left out, needs a CPU with avx512_vnni" in told
    assert pipe.approximations == []


def test_fast_takes_the_tiny_vae_beside_the_model(
    folder: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    beside = shutil.copytree(folder, tmp_path / "model")
    tiny_vae().save_pretrained(beside / "vae_tiny")
    pipe = LatentConsistencyModelPipeline.from_pretrained(beside)
    assert pipe.approximations == []
    told = fast(pipe, capsys)
    assert f"tiny-vae: on, from {beside / 'vae_tiny'}" in told
    assert pipe.approximations == ["tiny-vae"]


def test_fast_refuses_another_models_tiny_vae_and_changes_nothing(pipe: Any, large: None) -> None:
    with pytest.raises(RequestError, match="vae has latent_channels=4"):
        pipe.enable_fast(vae=tiny_vae(4))
    with pytest.raises(RequestError, match="vae must be a fewstep AutoencoderTiny, got"):
        pipe.enable_fast(vae=pipe.vae)
    assert pipe.approximations == []
