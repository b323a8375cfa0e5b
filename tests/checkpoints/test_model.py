"""Networks from and to folders: `from_pretrained` and `save_pretrained` of `models.base`."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest
import torch
from conftest import UNET
from torch import nn

from fewstep import CheckpointError, RequestError, UNet2DConditionModel, UnsupportedConfig


@pytest.fixture(scope="module")
def unet() -> UNet2DConditionModel:
    torch.manual_seed(0)
    return UNet2DConditionModel(**UNET)


@pytest.fixture
def folder(unet: UNet2DConditionModel, tmp_path: Path) -> Path:
    unet.save_pretrained(tmp_path / "unet")
    return tmp_path / "unet"


def load(path: Path, **arguments: Any) -> UNet2DConditionModel:
    return UNet2DConditionModel.from_pretrained(path, **arguments)


def assert_same(a: nn.Module, b: nn.Module) -> None:
    left, right = a.state_dict(), b.state_dict()
    assert left.keys() == right.keys()
    assert all(torch.equal(left[key], right[key]) for key in left)


def test_what_is_saved_loads_as_it_was(unet: UNet2DConditionModel, folder: Path) -> None:
    assert sorted(p.name for p in folder.iterdir()) == [
        "config.json",
        "diffusion_pytorch_model.safetensors",
    ]
    loaded = load(folder)
    assert_same(unet, loaded)
    assert not loaded.training and loaded.config == unet.config
    assert json.loads((folder / "config.json").read_text())["_class_name"] == "UNet2DConditionModel"
    assert_same(unet, load(folder.parent, subfolder="unet", low_cpu_mem_usage=True))


def test_variants_and_shards_load(unet: UNet2DConditionModel, tmp_path: Path) -> None:
    unet.save_pretrained(tmp_path, variant="fp16", max_shard_size="20KB")
    assert len(list(tmp_path.glob("*.safetensors"))) > 1
    assert_same(unet, load(tmp_path, variant="fp16"))
    with pytest.raises(CheckpointError, match="choose variant="):
        load(tmp_path)


def test_the_dtype_is_float32_unless_asked_for(unet: UNet2DConditionModel, tmp_path: Path) -> None:
    UNet2DConditionModel.from_config(unet.config).half().save_pretrained(tmp_path)
    assert load(tmp_path).dtype == torch.float32
    assert load(tmp_path, dtype="auto").dtype == torch.float16
    assert load(tmp_path, torch_dtype=torch.bfloat16).dtype == torch.bfloat16
    assert load(tmp_path, dtype="float64").dtype == torch.float64
    for wrong in ("int8", torch.int64, "half precision", 16):
        with pytest.raises(RequestError, match="dtype must be"):
            load(tmp_path, dtype=wrong)
    with pytest.raises(RequestError, match="one argument"):
        load(tmp_path, dtype=torch.float32, torch_dtype=torch.float32)


def test_a_misspelt_argument_warns_and_goes_on(folder: Path) -> None:
    with pytest.warns(UserWarning, match="unknown argument 'varient'; did you mean 'variant'") as w:
        load(folder, varient="fp16")
    assert w[0].filename == __file__
    with pytest.raises(TypeError, match="unknown argument 'sampel_size'; the nearest"):
        load(folder, sampel_size=3)


def test_other_keywords_replace_config_entries(folder: Path) -> None:
    assert load(folder, sample_size=99).config.sample_size == 99
    with pytest.raises(UnsupportedConfig, match="class_embed_type='timestep'"):
        load(folder, class_embed_type="timestep")
    with pytest.raises(CheckpointError, match=r"attn2.to_k.weight has shape"):
        load(folder, cross_attention_dim=64)


@pytest.mark.parametrize(
    "arguments",
    [
        {"use_safetensors": False},
        {"proxies": {"https": "x"}},
        {"device_map": "auto"},
        {"max_memory": {0: "1GB"}},
        {"offload_folder": "x"},
        {"offload_state_dict": True},
        {"quantization_config": object()},
        {"ignore_mismatched_sizes": True},
        {"output_loading_info": True},
        {"disable_mmap": True},
    ],
)
def test_arguments_that_cannot_be_served_are_refused(
    folder: Path, arguments: dict[str, Any]
) -> None:
    (name,) = arguments
    with pytest.raises(RequestError, match=f"{name}="):
        load(folder, **arguments)


def test_saving_refuses_what_it_cannot_do(unet: UNet2DConditionModel, tmp_path: Path) -> None:
    for arguments in (
        {"safe_serialization": False},
        {"push_to_hub": True},
        {"save_function": torch.save},
    ):
        (name,) = arguments
        with pytest.raises(RequestError, match=f"{name}="):
            unet.save_pretrained(tmp_path, **arguments)
    unet.save_pretrained(tmp_path, is_main_process=False)
    assert not list(tmp_path.iterdir())


def test_pickled_weights_are_refused_with_a_remedy(folder: Path) -> None:
    weights = folder / "diffusion_pytorch_model.safetensors"
    weights.rename(folder / "diffusion_pytorch_model.bin")
    with pytest.raises(CheckpointError, match="refused; convert them to safetensors"):
        load(folder)


def test_from_config_takes_overrides(unet: UNet2DConditionModel) -> None:
    other = UNet2DConditionModel.from_config(unet.config, time_cond_proj_dim=16)
    assert other.config.time_cond_proj_dim == 16
    assert other.config.block_out_channels == unet.config.block_out_channels


def test_a_network_knows_its_size_dtype_and_device(unet: UNet2DConditionModel) -> None:
    assert unet.dtype == torch.float32 and unet.device == torch.device("cpu")
    assert unet.num_parameters() == sum(p.numel() for p in unet.parameters())
    unet.conv_in.requires_grad_(False)
    frozen = sum(p.numel() for p in unet.conv_in.parameters())
    assert unet.num_parameters(only_trainable=True) == unet.num_parameters() - frozen
    unet.conv_in.requires_grad_(True)
