"""A run's checkpoint becomes files that diffusers and fewstep load."""

from __future__ import annotations

import json
from dataclasses import asdict
from pathlib import Path
from typing import Any

import pytest
import torch
from tiny_runs import (
    full_run,
    lora_run,
    merged_by_hand,
    output,
    random_lora,
    recipe,
    unet_of,
    write_xl,
)

import fewstep
from fewstep.errors import CheckpointError, RequestError
from fewstep.training.convert import convert_run, is_run

diffusers = pytest.importorskip("diffusers")
pytest.importorskip("peft")
pytestmark = pytest.mark.filterwarnings("ignore")  # the oracle's are not ours to heed


@pytest.fixture(scope="module")
def xl_folder(tokenizer: Any, text_encoder: Any, tmp_path_factory: pytest.TempPathFactory) -> Path:
    return write_xl(tmp_path_factory.mktemp("xl") / "sdxl", tokenizer, text_encoder)


@pytest.fixture(params=["sd", "xl"])
def model(request: pytest.FixtureRequest, sd_folder: Path, xl_folder: Path) -> Path:
    return sd_folder if request.param == "sd" else xl_folder


def test_a_run_becomes_a_folder_that_diffusers_reads(sd_folder: Path, tmp_path: Path) -> None:
    run, unet = full_run(tmp_path / "run", sd_folder)
    assert convert_run(run, tmp_path / "out", half=True) == [tmp_path / "out" / "unet"]
    theirs = diffusers.UNet2DConditionModel.from_pretrained(tmp_path / "out", subfolder="unet")
    state = theirs.state_dict()
    assert all(torch.equal(value, state[name]) for name, value in unet.state_dict().items())
    half = diffusers.UNet2DConditionModel.from_pretrained(tmp_path / "out/unet", variant="fp16")
    assert torch.equal(half.conv_in.weight, unet.conv_in.weight.half().float())
    convert_run(run / "checkpoint.safetensors", tmp_path / "last", weights="online")
    assert all(not value.any() for value in unet_of(tmp_path / "last").state_dict().values())


def test_a_run_without_its_config_takes_the_bases(sd_folder: Path, tmp_path: Path) -> None:
    run, _ = full_run(tmp_path / "run", sd_folder)
    (run / "unet_config.json").unlink()
    convert_run(run, tmp_path / "out")
    assert unet_of(tmp_path / "out").config["time_cond_proj_dim"] == 16
    other = recipe(sd_folder, guidance_dim=8)
    (run / "recipe.json").write_text(json.dumps(asdict(other), default=dict))
    with pytest.raises(CheckpointError, match=r"1 tensors differ.*cond_proj.*the recipe belong"):
        convert_run(run, tmp_path / "no")
    gone = json.dumps(asdict(recipe(tmp_path / "gone")), default=dict)
    (run / "recipe.json").write_text(gone)
    with pytest.raises(
        CheckpointError, match=r"no unet_config.json, and the base's cannot be read"
    ):
        convert_run(run, tmp_path / "no")
    (run / "recipe.json").unlink()
    with pytest.raises(CheckpointError, match=r"no unet_config.json, which tells"):
        convert_run(run, tmp_path / "no")


def test_a_lora_run_becomes_lora_files(model: Path, tmp_path: Path) -> None:
    unet = unet_of(model)
    lora = random_lora(unet)
    run = lora_run(tmp_path / "run", model, lora)
    files = convert_run(run, tmp_path / "out")
    assert [file.name for file in files] == [
        "pytorch_lora_weights.safetensors",
        "tiny_kohya.safetensors",
    ]
    expected = merged_by_hand(model, lora)
    for file in files:
        pipe = fewstep.DiffusionPipeline.from_pretrained(model)
        pipe.load_lora_weights(file)
        torch.testing.assert_close(output(pipe.unet), expected, rtol=0, atol=1e-5)
    assert convert_run(run, tmp_path / "k", forms=["kohya"]) == [
        tmp_path / "k/tiny_kohya.safetensors"
    ]
    (run / "recipe.json").unlink()
    with pytest.raises(RequestError, match=r"whose rank and alpha stand in recipe.json"):
        convert_run(run, tmp_path / "no")
    with pytest.raises(RequestError, match=r"whose rank and alpha stand in recipe.json"):
        convert_run(run, tmp_path / "no", config="lcm_sd15")  # is of no LoRA


def test_what_is_no_run_is_refused_with_the_remedy(sd_folder: Path, tmp_path: Path) -> None:
    with pytest.raises(CheckpointError, match=r"epoch_50.pth is not .*`diffengine convert`"):
        convert_run(tmp_path / "epoch_50.pth", tmp_path / "out")
    full_run(tmp_path / "runs" / "consistency", sd_folder)
    with pytest.raises(CheckpointError, match=r"has no checkpoint.*runs in it: consistency"):
        convert_run(tmp_path / "runs", tmp_path / "out")
    with pytest.raises(RequestError, match=r"--save-keys vae: this run trained unet alone"):
        convert_run(tmp_path / "runs/consistency", tmp_path / "out", networks=["unet", "vae"])
    assert not (tmp_path / "out").exists()
    assert is_run(str(tmp_path / "runs/consistency/checkpoint.safetensors"))
