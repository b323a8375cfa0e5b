"""Pipelines from folders: what is loaded, replaced, refused, saved."""

from __future__ import annotations

import json
import shutil
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file, save_file

import fewstep
from fewstep import (
    AutoPipelineForImage2Image,
    AutoPipelineForText2Image,
    CheckpointError,
    DiffusionPipeline,
    LatentConsistencyModelImg2ImgPipeline,
    LatentConsistencyModelPipeline,
    LCMScheduler,
    RequestError,
    StableDiffusionImg2ImgPipeline,
    StableDiffusionPipeline,
    UnsupportedConfig,
)

WEIGHTS = {
    "unet": "diffusion_pytorch_model",
    "vae": "diffusion_pytorch_model",
    "text_encoder": "model",
}


@pytest.fixture
def folder(lcm_folder: Path, tmp_path: Path) -> Path:
    """A copy of the LCM that a test may change."""
    return Path(shutil.copytree(lcm_folder, tmp_path / "lcm"))


def change_index(folder: Path, **changes: Any) -> None:
    file = folder / "model_index.json"
    file.write_text(json.dumps(json.loads(file.read_text()) | changes))


def equal_weights(a: Any, b: Any) -> bool:
    ours, theirs = a.state_dict(), b.state_dict()
    return ours.keys() == theirs.keys() and all(torch.equal(v, theirs[k]) for k, v in ours.items())


def test_the_base_class_finds_the_class_and_a_class_stays_itself(lcm_folder: Path) -> None:
    assert type(DiffusionPipeline.from_pretrained(lcm_folder)) is LatentConsistencyModelPipeline
    pipe = StableDiffusionPipeline.from_pretrained(str(lcm_folder))
    assert type(pipe) is StableDiffusionPipeline
    assert pipe.name_or_path == str(lcm_folder)
    assert not any(module.training for module in pipe.modules)


def test_auto_pipelines_choose_by_task(lcm_folder: Path, sd_folder: Path) -> None:
    classes = {
        (AutoPipelineForText2Image, lcm_folder): LatentConsistencyModelPipeline,
        (AutoPipelineForImage2Image, lcm_folder): LatentConsistencyModelImg2ImgPipeline,
        (AutoPipelineForText2Image, sd_folder): StableDiffusionPipeline,
        (AutoPipelineForImage2Image, sd_folder): StableDiffusionImg2ImgPipeline,
    }
    for (auto, folder), expected in classes.items():
        pipe = auto.from_pretrained(folder)
        assert type(pipe) is expected
        there_and_back = AutoPipelineForText2Image.from_pipe(
            AutoPipelineForImage2Image.from_pipe(pipe)
        )
        assert there_and_back.unet is pipe.unet
    with pytest.raises(OSError, match=r"use AutoPipelineForText2Image\.from_pretrained"):
        AutoPipelineForText2Image()


def test_components_are_replaced_and_left_out(lcm_folder: Path) -> None:
    plain = DiffusionPipeline.from_pretrained(lcm_folder)
    scheduler = LCMScheduler(original_inference_steps=20)
    pipe = DiffusionPipeline.from_pretrained(
        lcm_folder, unet=plain.unet, scheduler=scheduler, text_encoder=None, tokenizer=None
    )
    assert pipe.unet is plain.unet and pipe.scheduler is scheduler
    assert pipe.vae is not plain.vae and equal_weights(pipe.vae, plain.vae)
    assert set(pipe.components) == {
        "vae",
        "text_encoder",
        "tokenizer",
        "unet",
        "scheduler",
        "safety_checker",
        "feature_extractor",
        "image_encoder",
    }
    with pytest.raises(RequestError, match=r"prompt cannot be read: .* give prompt_embeds"):
        pipe("a cat")
    pipe.scheduler = other = LCMScheduler()
    assert pipe.components["scheduler"] is other


def test_a_pipeline_survives_saving(lcm_folder: Path, tmp_path: Path) -> None:
    pipe = DiffusionPipeline.from_pretrained(lcm_folder)
    pipe.save_pretrained(tmp_path / "plain")
    pipe.save_pretrained(tmp_path / "variant", variant="fp16", max_shard_size="20KB")
    for name, variant in (("plain", None), ("variant", "fp16")):
        back = DiffusionPipeline.from_pretrained(tmp_path / name, variant=variant)
        for part in WEIGHTS:
            assert equal_weights(getattr(back, part), getattr(pipe, part))
        assert dict(back.scheduler.config) == dict(pipe.scheduler.config)
        assert back.tokenizer("a red cat").input_ids == pipe.tokenizer("a red cat").input_ids
        assert back.requires_safety_checker == pipe.requires_safety_checker
    assert (tmp_path / "variant/unet/diffusion_pytorch_model.safetensors.index.fp16.json").exists()
    with pytest.raises(RequestError, match="safe_serialization=False"):
        pipe.save_pretrained(tmp_path, safe_serialization=False)


@pytest.mark.parametrize("name", ["dtype", "torch_dtype"])
def test_networks_take_the_dtype_asked_for(lcm_folder: Path, name: str) -> None:
    pipe = DiffusionPipeline.from_pretrained(lcm_folder, **{name: torch.bfloat16})
    assert {module.dtype for module in pipe.modules} == {torch.bfloat16}
    assert {m.dtype for m in DiffusionPipeline.from_pretrained(lcm_folder).modules} == {
        torch.float32
    }
    with pytest.raises(RequestError, match="one argument"):
        DiffusionPipeline.from_pretrained(
            lcm_folder, dtype=torch.float16, torch_dtype=torch.float16
        )


def test_half_weights_are_float32_unless_asked_otherwise(folder: Path) -> None:
    DiffusionPipeline.from_pretrained(folder, dtype=torch.float16).save_pretrained(folder)
    dtypes = {
        asked: {m.dtype for m in DiffusionPipeline.from_pretrained(folder, dtype=asked).modules}
        for asked in (None, "auto", torch.float16)
    }
    assert dtypes == {
        None: {torch.float32},
        "auto": {torch.float16},
        torch.float16: {torch.float16},
    }


def test_a_component_without_the_variant_falls_back(folder: Path) -> None:
    for part in ("unet", "text_encoder"):
        stem = folder / part / WEIGHTS[part]
        weights = load_file(f"{stem}.safetensors")
        doubled = {key: 2 * value for key, value in weights.items()}
        save_file(doubled, f"{stem}.fp16.safetensors", metadata={"format": "pt"})
    with pytest.warns(UserWarning, match="vae has no weights of variant='fp16'"):
        pipe = DiffusionPipeline.from_pretrained(folder, variant="fp16")
    plain = DiffusionPipeline.from_pretrained(folder)
    assert torch.equal(pipe.unet.conv_in.bias, 2 * plain.unet.conv_in.bias)
    name = "final_layer_norm.weight"
    (key,) = (key for key in pipe.text_encoder.state_dict() if key.endswith(name))
    doubled = 2 * plain.text_encoder.state_dict()[key]
    assert torch.equal(pipe.text_encoder.state_dict()[key], doubled)
    assert equal_weights(pipe.vae, plain.vae)
    with pytest.raises(CheckpointError, match="no weights of variant='bf16' in any component"):
        DiffusionPipeline.from_pretrained(folder, variant="bf16")


@pytest.mark.parametrize("part", WEIGHTS)
def test_pickled_weights_are_refused(folder: Path, part: str) -> None:
    stem = folder / part / WEIGHTS[part]
    stem.with_suffix(".safetensors").rename(stem.with_suffix(".bin"))
    with pytest.raises(CheckpointError, match=r"pickled weights run code .* convert them"):
        DiffusionPipeline.from_pretrained(folder)


@pytest.mark.parametrize("part", WEIGHTS)
def test_missing_weights_are_an_error_not_random_numbers(folder: Path, part: str) -> None:
    file = folder / part / f"{WEIGHTS[part]}.safetensors"
    weights = load_file(file)
    gone = sorted(weights)[0]
    del weights[gone]
    save_file(weights, file, metadata={"format": "pt"})
    with pytest.raises(CheckpointError, match="missing"):
        DiffusionPipeline.from_pretrained(folder)


def test_a_text_encoder_in_the_older_layout_loads(folder: Path) -> None:
    expected = DiffusionPipeline.from_pretrained(folder).text_encoder
    file = folder / "text_encoder/model.safetensors"
    weights = {k.removeprefix("text_model."): v for k, v in load_file(file).items()}
    older = {f"text_model.{key}": value for key, value in weights.items()}
    older["text_model.embeddings.position_ids"] = torch.arange(16)[None]
    save_file(older, file, metadata={"format": "pt"})
    assert equal_weights(DiffusionPipeline.from_pretrained(folder).text_encoder, expected)


@pytest.mark.parametrize("file", ["model_index.json", "scheduler/scheduler_config.json"])
def test_a_missing_file_is_named(folder: Path, file: str) -> None:
    (folder / file).unlink()
    with pytest.raises(CheckpointError, match=file.split("/")[-1]):
        DiffusionPipeline.from_pretrained(folder)


def test_a_missing_component_is_named(folder: Path) -> None:
    index = json.loads((folder / "model_index.json").read_text())
    del index["vae"]
    (folder / "model_index.json").write_text(json.dumps(index))
    with pytest.raises(RequestError, match="has no vae; pass vae= to from_pretrained"):
        DiffusionPipeline.from_pretrained(folder)


def test_a_foreign_safety_checker_is_refused(folder: Path) -> None:
    with pytest.raises(RequestError, match="safety_checker must be fewstep's"):
        DiffusionPipeline.from_pretrained(folder, safety_checker=torch.nn.Linear(1, 1))


def test_what_is_not_implemented_is_named(folder: Path) -> None:
    change_index(folder, vae=["diffusers", "ConsistencyDecoderVAE"])
    with pytest.raises(UnsupportedConfig, match="the component vae is a ConsistencyDecoderVAE"):
        DiffusionPipeline.from_pretrained(folder)
    change_index(folder, _class_name="FluxPipeline")
    with pytest.raises(UnsupportedConfig, match=r"FluxPipeline .* \(supported: Stable"):
        DiffusionPipeline.from_pretrained(folder)
    change_index(folder, text_encoder_2=["transformers", "CLIPTextModelWithProjection"])
    with pytest.raises(UnsupportedConfig, match="no use for its text_encoder_2"):
        StableDiffusionPipeline.from_pretrained(folder)
    change_index(folder, _class_name=None)
    with pytest.raises(CheckpointError, match="names no _class_name"):
        DiffusionPipeline.from_pretrained(folder)


def test_unknown_keywords(lcm_folder: Path) -> None:
    with pytest.warns(UserWarning, match="'varient'; did you mean 'variant'. It is ignored"):
        DiffusionPipeline.from_pretrained(lcm_folder, varient="fp16")
    with pytest.raises(TypeError, match="unknown argument 'textencoder'; did you mean 'text_enc"):
        DiffusionPipeline.from_pretrained(lcm_folder, textencoder=None)
    with pytest.raises(TypeError, match=r"unknown argument 'zzz' .components: vae"):
        DiffusionPipeline.from_pretrained(lcm_folder, zzz=1)
    with pytest.raises(RequestError, match="custom_pipeline='x' is not supported: code"):
        DiffusionPipeline.from_pretrained(lcm_folder, custom_pipeline="x")
    with pytest.raises(RequestError, match="use_safetensors=False"):
        DiffusionPipeline.from_pretrained(lcm_folder, use_safetensors=False)
    DiffusionPipeline.from_pretrained(lcm_folder, device_map=None, use_safetensors=True)


def test_networks_of_other_libraries_are_refused(lcm_folder: Path) -> None:
    with pytest.raises(RequestError, match="unet must be a fewstep UNet2DConditionModel, got"):
        DiffusionPipeline.from_pretrained(lcm_folder, unet=torch.nn.Linear(1, 1))
    with pytest.raises(RequestError, match="scheduler must be a fewstep Scheduler, got builtins"):
        DiffusionPipeline.from_pretrained(lcm_folder, scheduler="LCMScheduler")


def test_pipelines_share_components(lcm_folder: Path) -> None:
    pipe = DiffusionPipeline.from_pretrained(lcm_folder)
    other = LatentConsistencyModelImg2ImgPipeline.from_pipe(pipe, scheduler=LCMScheduler())
    assert other.unet is pipe.unet and other.scheduler is not pipe.scheduler
    assert other.name_or_path == pipe.name_or_path
    with pytest.raises(TypeError, match="unknown argument 'unets'; did you mean 'unet'"):
        LatentConsistencyModelImg2ImgPipeline.from_pipe(pipe, unets=None)
    with pytest.raises(TypeError, match="unknown argument 'torch_dtype'"):
        LatentConsistencyModelImg2ImgPipeline.from_pipe(pipe, torch_dtype=torch.float16)


def test_to_moves_all_networks(lcm_folder: Path) -> None:
    pipe = DiffusionPipeline.from_pretrained(lcm_folder)
    assert pipe.to("cpu") is pipe
    pipe.to(dtype=torch.bfloat16)
    assert {m.dtype for m in pipe.modules} == {torch.bfloat16}
    pipe.to(torch_device="cpu", torch_dtype=torch.float64)
    assert {m.dtype for m in pipe.modules} == {torch.float64}
    pipe.to(torch.device("cpu"), torch.float32)
    assert pipe.dtype == torch.float32 and pipe.device == torch.device("cpu")
    with pytest.raises(TypeError, match="devise"):
        pipe.to(devise="cpu")
    with pytest.raises(RequestError, match="more than one device"):
        pipe.to("cpu", torch_device="cpu")
    with pytest.raises(RequestError, match="needs a device or a dtype"):
        pipe.to()


def test_the_progress_bar_is_configured(
    lcm_folder: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    pipe = DiffusionPipeline.from_pretrained(lcm_folder)
    capsys.readouterr()
    pipe("a cat")
    assert "4/4" in capsys.readouterr().err
    pipe.set_progress_bar_config(disable=True)
    pipe("a cat")
    assert capsys.readouterr().err == ""


def test_the_embedded_model_is_a_checkpoint_like_any_other() -> None:
    pipe = DiffusionPipeline.from_pretrained(fewstep.EMBEDDED)
    assert type(pipe) is LatentConsistencyModelPipeline
    pipe.set_progress_bar_config(disable=True)
    (picture,) = pipe("a red apple", num_inference_steps=1).images
    assert picture.size[0] == pipe.unet.config.sample_size * pipe.vae_scale_factor
