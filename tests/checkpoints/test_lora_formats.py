"""Names in LoRA files, and which file is meant."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest
import torch
from conftest import UNET
from safetensors.torch import save_file

from fewstep import CheckpointError, UNet2DConditionModel
from fewstep.checkpoints.locate import Source
from fewstep.checkpoints.lora_formats import (
    CONFIG_KEY,
    find_lora,
    is_whole,
    names_of_modules,
    parse_lora,
    read_lora,
    refuse_other_family,
    split_key,
)
from fewstep.models.lora import targets

BLOCK = "down_blocks.1.attentions.0.transformer_blocks.0"
# SDXL's blocks: three levels, two layers each, no attention at the first.
XL: dict[str, Any] = UNET | {
    "block_out_channels": (8, 8, 8),
    "layers_per_block": 2,
    "down_block_types": ("DownBlock2D", "CrossAttnDownBlock2D", "CrossAttnDownBlock2D"),
    "up_block_types": ("CrossAttnUpBlock2D", "CrossAttnUpBlock2D", "UpBlock2D"),
    "use_linear_projection": True,
    "addition_embed_type": "text_time",
    "addition_time_embed_dim": 8,
    "projection_class_embeddings_input_dim": 80,
}
RESNET = "up_blocks.2.resnets.1"
QUERY = "text_model_encoder_layers_0_self_attn_q_proj"
TEXT = ("encoder.layers.0.self_attn.q_proj", "encoder.layers.0.self_attn.out_proj")


@pytest.fixture(scope="module")
def names() -> dict[str, dict[str, str]]:
    with torch.device("meta"):
        unet = UNet2DConditionModel(**XL)
    inner = [f"text_model.{name}" for name in TEXT]
    return {
        "unet": names_of_modules(targets(unet), unet.config),
        "text_encoder": names_of_modules(TEXT),
        "text_encoder_2": names_of_modules([*inner, "text_projection"]),
    }


@pytest.mark.parametrize(
    ("key", "network", "module", "part"),
    [
        (f"unet.{BLOCK}.attn1.to_q.lora_A.weight", "unet", f"{BLOCK}.attn1.to_q", "down"),
        (f"unet.{BLOCK}.attn1.to_q.lora_B.default.weight", "unet", f"{BLOCK}.attn1.to_q", "up"),
        (f"{BLOCK}.attn1.to_q.lora_A.weight", "unet", f"{BLOCK}.attn1.to_q", "down"),
        (
            f"base_model.model.{BLOCK}.attn1.to_q.lora_magnitude_vector",
            "unet",
            f"{BLOCK}.attn1.to_q",
            "dora_scale",
        ),
        (f"unet.{BLOCK}.attn1.to_out.0.lora.up.weight", "unet", f"{BLOCK}.attn1.to_out.0", "up"),
        (f"unet.{BLOCK}.attn1.to_out.0.lora.alpha", "unet", f"{BLOCK}.attn1.to_out.0", "alpha"),
        (
            f"unet.{BLOCK}.attn2.processor.to_out_lora.down.weight",
            "unet",
            f"{BLOCK}.attn2.to_out.0",
            "down",
        ),
        (f"{BLOCK}.attn2.processor.to_k_lora.up.weight", "unet", f"{BLOCK}.attn2.to_k", "up"),
        (
            "lora_unet_down_blocks_1_attentions_0_transformer_blocks_0_ff_net_0_proj.alpha",
            "unet",
            f"{BLOCK}.ff.net.0.proj",
            "alpha",
        ),
        (
            "lora_unet_input_blocks_4_1_transformer_blocks_0_attn1_to_q.lora_down.weight",
            "unet",
            f"{BLOCK}.attn1.to_q",
            "down",
        ),
        *(
            (f"lora_unet_{name}", "unet", module, part)
            for name, module, part in (
                ("input_blocks_3_0_op.hada_w1_a", "down_blocks.0.downsamplers.0.conv", "hada_w1_a"),
                ("input_blocks_0_0.lokr_w1", "conv_in", "lokr_w1"),
                ("middle_block_1_proj_in.lora_mid.weight", "mid_block.attentions.0.proj_in", "mid"),
                ("middle_block_2_in_layers_2.diff", "mid_block.resnets.1.conv1", "diff"),
                ("output_blocks_2_2_conv.diff_b", "up_blocks.0.upsamplers.0.conv", "diff_b"),
                ("output_blocks_7_0_emb_layers_1.alpha", f"{RESNET}.time_emb_proj", "alpha"),
                ("time_embed_0.dora_scale", "time_embedding.linear_1", "dora_scale"),
                ("label_emb_0_2.lora_up.weight", "add_embedding.linear_2", "up"),
                ("out_2.lora_up.weight", "conv_out", "up"),
            )
        ),
        (
            "diffusion_model.input_blocks.4.1.proj_in.lora_B.weight",
            "unet",
            "down_blocks.1.attentions.0.proj_in",
            "up",
        ),
        (f"lora_te_{QUERY}.alpha", "text_encoder", TEXT[0], "alpha"),
        (f"lora_te1_{QUERY}.alpha", "text_encoder", TEXT[0], "alpha"),
        ("lora_te2_text_projection.lora_up.weight", "text_encoder_2", "text_projection", "up"),
        (
            "text_encoder_2.text_model.encoder.layers.0.self_attn.q_proj.lora_linear_layer.up.weight",
            "text_encoder_2",
            f"text_model.{TEXT[0]}",
            "up",
        ),
        (
            "text_encoder.text_model.encoder.layers.0.self_attn.to_out_lora.up.weight",
            "text_encoder",
            TEXT[1],
            "up",
        ),
    ],
)
def test_a_name_of_any_dialect_finds_its_module(
    names: dict[str, dict[str, str]], key: str, network: str, module: str, part: str
) -> None:
    said = split_key(key)
    assert said is not None
    assert said.part == part
    assert said.network in (network, None)
    assert names[network][said.module] == module


def test_animatediffs_own_names_are_the_motion_modules() -> None:
    start = "down_blocks.0.motion_modules.0"
    said = split_key(
        f"{start}.temporal_transformer.transformer_blocks.0.attention_blocks.1.processor"
        ".to_q_lora.down.weight"
    )
    module = f"{start}.transformer_blocks.0.attn2.to_q"
    assert said is not None
    assert names_of_modules([module])[said.module] == module


@pytest.mark.parametrize(
    "key", ["unet.conv_in.weight", "bundle_emb.x", "lora_unet_conv_in.oft_diag"]
)
def test_what_is_no_part_of_a_lora_is_surplus(names: dict[str, dict[str, str]], key: str) -> None:
    assert parse_lora({key: torch.zeros(1)}, {}, names) == ({}, [key])


@pytest.mark.parametrize(
    ("parts", "whole"),
    [
        (("down", "up"), True),
        (("down", "up", "mid", "alpha", "dora_scale", "diff_b"), True),
        (("diff",), True),
        (("diff_b", "alpha"), True),
        (("hada_w1_a", "hada_w1_b", "hada_w2_a", "hada_w2_b"), True),
        (("lokr_w1", "lokr_w2_a", "lokr_w2_b"), True),
        (("lokr_w1", "lokr_w2_a"), False),
        (("down",), False),
        (("alpha",), False),
        (("dora_scale",), False),
        (("down", "up", "diff"), False),
    ],
)
def test_half_a_change_is_surplus(parts: tuple[str, ...], whole: bool) -> None:
    assert is_whole(parts) is whole


def test_an_alpha_is_the_tensors_then_the_patterns_then_the_configs(
    names: dict[str, dict[str, str]],
) -> None:
    tensors = {}
    for layer in ("to_q", "to_k", "to_v"):
        for part, shape in (("A", (2, 8)), ("B", (8, 2))):
            tensors[f"unet.{BLOCK}.attn1.{layer}.lora_{part}.weight"] = torch.ones(shape)
    tensors[f"unet.{BLOCK}.attn1.to_q.alpha"] = torch.tensor(1.0)
    config = {
        "unet.lora_alpha": 3,
        "unet.alpha_pattern": {"attn1.to_k": 2},
        "unet.use_rslora": True,
    }
    changes, surplus = parse_lora(tensors, config, names)
    found = {module.rpartition(".")[2]: change for module, change in changes["unet"].items()}
    assert {name: change.alpha for name, change in found.items()} == {
        "to_q": 1.0,
        "to_k": 2,
        "to_v": 3,
    }
    assert found["to_q"].rooted
    assert surplus == []


def test_the_config_is_read_from_the_file_or_from_beside_it(tmp_path: Path) -> None:
    inside = {"unet.lora_alpha": 3}
    save_file(
        {"unet.x.lora_A.weight": torch.ones(1)},
        tmp_path / "a.safetensors",
        {CONFIG_KEY: json.dumps(inside)},
    )
    assert read_lora(tmp_path / "a.safetensors")[1] == inside
    save_file({"base_model.model.x.lora_A.weight": torch.ones(1)}, tmp_path / "b.safetensors")
    (tmp_path / "adapter_config.json").write_text('{"lora_alpha": 5}')
    assert read_lora(tmp_path / "b.safetensors")[1] == {"lora_alpha": 5}
    save_file({"lora_unet_x.lora_up.weight": torch.ones(1)}, tmp_path / "c.safetensors")
    assert read_lora(tmp_path / "c.safetensors")[1] == {}


def to_k(channels: int, prefix: str = "lora_unet_x_attn2_to_k.lora_down.weight") -> dict[str, Any]:
    return {prefix: torch.zeros(2, channels)}


@pytest.mark.parametrize(
    ("tensors", "channels", "message"),
    [
        (to_k(2048), 768, r"this LoRA is for SDXL \(2048 .*\); the model is SD 1\.x \(768"),
        (to_k(768), 2048, r"this LoRA is for SD 1\.x .*; the model is SDXL"),
        (to_k(1024, "unet.x.attn2.to_k.lora_A.weight"), 768, "for SD 2.x .*; the model is SD 1.x"),
        (to_k(768, "unet.x.attn2.processor.to_k_lora.down.weight"), 32, "the model is another"),
        ({"transformer.single_transformer_blocks.0.x.lora_A.weight": torch.zeros(1)}, 768, "FLUX"),
        ({"lora_unet_joint_blocks_0_x.lora_down.weight": torch.zeros(1)}, 768, "SD 3"),
        ({"lora_controlnet": torch.zeros(1)}, 768, "control-LoRA"),
        ({"lora_te2_x.lora_up.weight": torch.zeros(1)}, 768, "SDXL"),
        (
            {"unet.down_blocks.0.motion_modules.0.x.lora_A.weight": torch.zeros(1)},
            768,
            "AnimateDiff",
        ),
    ],
)
def test_a_file_for_another_family_is_refused_by_name(
    tensors: dict[str, Any], channels: int, message: str
) -> None:
    with pytest.raises(CheckpointError, match=message):
        refuse_other_family(tensors, {"unet": ["x"]}, {"cross_attention_dim": channels})


def test_a_file_of_the_same_family_passes() -> None:
    for given in (768, (768, 768)):
        refuse_other_family(to_k(768), {"unet": ["x"]}, {"cross_attention_dim": given})


def found(folder: Path, weight_name: str | None = None) -> str:
    return find_lora(Source(str(folder)), weight_name).name


def test_without_a_weight_name_the_usual_one_or_the_only_candidate_is_taken(tmp_path: Path) -> None:
    (tmp_path / "optimizer.safetensors").touch()
    (tmp_path / "style.safetensors").touch()
    assert found(tmp_path) == "style.safetensors"
    (tmp_path / "other.safetensors").touch()
    with pytest.raises(
        CheckpointError, match=r"other\.safetensors, style\.safetensors.*weight_name"
    ):
        found(tmp_path)
    assert found(tmp_path, "other.safetensors") == "other.safetensors"
    assert found(tmp_path / "other.safetensors") == "other.safetensors"
    (tmp_path / "pytorch_lora_weights.safetensors").touch()
    assert found(tmp_path) == "pytorch_lora_weights.safetensors"


def test_pickled_and_missing_files_are_refused(tmp_path: Path) -> None:
    with pytest.raises(CheckpointError, match="no safetensors file; there is: nothing"):
        found(tmp_path)
    (tmp_path / "style.bin").touch()
    for name in (None, "style.bin"):
        with pytest.raises(CheckpointError, match="convert them to safetensors"):
            found(tmp_path, name)
    with pytest.raises(CheckpointError, match="convert them to safetensors"):
        found(tmp_path / "style.bin")
    with pytest.raises(CheckpointError, match="there is no file"):
        found(tmp_path / "absent.safetensors")
