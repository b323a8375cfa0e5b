"""Models of random weights that both libraries load, and what a work's operations are."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import torch

import fewstep
from fewstep.bench import checkpoints, limits
from fewstep.bench.checkpoints import addition, checkpoint, numbers_of
from fewstep.bench.inputs import unet_inputs
from fewstep.bench.sides import fewstep as fewstep_side
from fewstep.bench.work import Setting, Work
from fewstep.checkpoints.known import FAMILIES, Family
from fewstep.errors import RequestError

# diffusers' word for the dtype is an old one, which its earlier versions need.
pytestmark = pytest.mark.filterwarnings("ignore:.*torch_dtype:FutureWarning")

UNET = {
    "sample_size": 8,
    "block_out_channels": (32, 64),
    "down_block_types": ("DownBlock2D", "CrossAttnDownBlock2D"),
    "up_block_types": ("CrossAttnUpBlock2D", "UpBlock2D"),
    "layers_per_block": 1,
    "cross_attention_dim": 32,
    "attention_head_dim": 4,
}
VAE = {
    "block_out_channels": (32, 32),
    "down_block_types": ("DownEncoderBlock2D",) * 2,
    "up_block_types": ("UpDecoderBlock2D",) * 2,
    "layers_per_block": 1,
}
TEXT = {
    "hidden_size": 32,
    "intermediate_size": 64,
    "num_hidden_layers": 2,
    "num_attention_heads": 2,
    "vocab_size": 4096,
    "max_position_embeddings": 77,
    "projection_dim": 32,
}
XL = {
    "addition_embed_type": "text_time",
    "addition_time_embed_dim": 8,
    "projection_class_embeddings_input_dim": 32 + 6 * 8,
    "cross_attention_dim": 64,
}


@pytest.fixture
def tiny(monkeypatch: pytest.MonkeyPatch) -> None:
    """The families of full size, made small."""
    configs: dict[str, Any] = {"unet": UNET, "vae": VAE, "text_encoder": TEXT}
    configs["scheduler"] = FAMILIES["sd1"].configs["scheduler"]
    wide = configs | {"unet": UNET | XL, "text_encoder_2": TEXT}
    families = {"sd1": Family("x", configs), "sdxl": Family("x", wide)}
    monkeypatch.setattr(checkpoints, "FAMILIES", families)


def setting(work: Work, cache: Path) -> Setting:
    return Setting.from_dict(limits.prepared(vars(work), str(cache))["setting"])


@pytest.mark.usefixtures("tiny")
@pytest.mark.parametrize("model", ["sd15", "sdxl"])
def test_both_libraries_draw_the_same_finite_picture(model: str, tmp_path: Path) -> None:
    import diffusers

    work = Work(model, size=(16, 16), steps=2, dtype="bfloat16")
    folder = checkpoint(work, tmp_path)
    pictures = []
    for library in (fewstep, diffusers):
        pipe = library.DiffusionPipeline.from_pretrained(folder, torch_dtype=torch.float32)
        pipe.set_progress_bar_config(disable=True)
        generator = torch.Generator().manual_seed(0)
        how = {"width": 16, "height": 16, "num_inference_steps": 2, "output_type": "pt"}
        pictures.append(pipe("a red apple", generator=generator, **how).images)
    assert torch.isfinite(pictures[0]).all() and pictures[0].std() > 0.05
    assert torch.allclose(*pictures, atol=1e-4)
    assert fewstep_side(setting(work, tmp_path)).output(0).shape == (1, 16, 16, 3)


@pytest.mark.usefixtures("tiny")
def test_files_are_the_same_each_time_and_kept(tmp_path: Path) -> None:
    first, again = (checkpoint(Work("sd15"), tmp_path / name) for name in ("a", "b"))
    name = "unet/diffusion_pytorch_model.safetensors"
    assert (first / name).read_bytes() == (again / name).read_bytes()
    changed = (first / name).stat().st_mtime_ns
    assert checkpoint(Work("sd15"), tmp_path / "a") == first
    assert (first / name).stat().st_mtime_ns == changed


@pytest.mark.usefixtures("tiny")
def test_bfloat16_files_hold_the_rounded_numbers(tmp_path: Path) -> None:
    from safetensors.torch import load_file

    name = "unet/diffusion_pytorch_model.safetensors"
    full, half = (
        load_file(checkpoint(Work("sd15", dtype=dtype), tmp_path) / name)
        for dtype in ("float32", "bfloat16")
    )
    assert full and all(torch.equal(full[key].bfloat16(), half[key]) for key in full)


@pytest.mark.usefixtures("tiny")
def test_an_interrupted_writing_leaves_nothing(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    def interrupted(*_: Any) -> Any:
        raise KeyboardInterrupt

    monkeypatch.setattr(checkpoints, "text_encoder", interrupted)
    with pytest.raises(KeyboardInterrupt):
        checkpoint(Work("sd15"), tmp_path)
    assert list(tmp_path.iterdir()) == []


@pytest.mark.usefixtures("tiny")
@pytest.mark.parametrize("kind", ["disk", "memory"])
def test_too_little_room_is_told_before_anything_is_written(
    kind: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    from collections import namedtuple

    usage = namedtuple("usage", "free")
    free = {"disk": 10**12, "memory": 10**12, kind: 10**5}
    monkeypatch.setattr(checkpoints.shutil, "disk_usage", lambda path: usage(free["disk"]))
    monkeypatch.setattr(checkpoints, "available_memory", lambda: free["memory"])
    with pytest.raises(RequestError, match=f"model sd15: needs .* GB of {kind}"):
        checkpoint(Work("sd15"), tmp_path)


def test_a_model_that_is_neither_is_refused(tmp_path: Path) -> None:
    with pytest.raises(RequestError, match="model 'sd3': is neither of embedded, sd15"):
        checkpoint(Work("sd3"), tmp_path)


def test_sizes_must_fit(tmp_path: Path) -> None:
    with pytest.raises(RequestError, match="size 66x64: must be a multiple of 4"):
        limits.prepared(vars(Work(size=(66, 64))), str(tmp_path))
    sized = limits.with_size(Work(), fewstep.EMBEDDED)
    assert sized.size == (64, 64)


@pytest.mark.parametrize("task", ["controlnet", "lora", "image-to-image"])
def test_other_tasks_are_the_same_on_both_libraries(task: str, tmp_path: Path) -> None:
    import numpy as np

    from fewstep.bench.sides import diffusers

    wanted = setting(Work(task=task, size=(32, 32), steps=1), tmp_path)
    ours, theirs = (side(wanted).output(3) for side in (fewstep_side, diffusers))
    assert np.abs(ours - theirs).max() < 1e-3
    if task != "image-to-image":
        plain = setting(Work(size=(32, 32), steps=1), tmp_path)
        assert np.abs(fewstep_side(plain).output(3) - ours).max() > 1e-2
        assert addition(wanted.work, fewstep.EMBEDDED, tmp_path) is not None


def test_inputs_are_the_same_numbers_in_both_precisions() -> None:
    work = Work(size=(64, 64), dtype="bfloat16")
    half, full = (
        unet_inputs(Setting(work, str(fewstep.EMBEDDED), None, dtype, ""))
        for dtype in ("bfloat16", "float32")
    )
    assert half["sample"].dtype is torch.bfloat16 and full["sample"].dtype is torch.float32
    assert torch.equal(half["sample"].float(), full["sample"])
    assert half["timestep_cond"].shape == (1, 256)


def test_the_numbers_of_a_tensor_depend_on_its_name_alone() -> None:
    shape = torch.Size((64, 64, 3, 3))
    assert torch.equal(numbers_of("a", shape), numbers_of("a", shape))
    assert not torch.equal(numbers_of("a", shape), numbers_of("b", shape))
    assert numbers_of("a", shape).std().item() == pytest.approx((64 * 9) ** -0.5, rel=0.02)


# ── operations ──


def full_size(part: str, tmp_path: Path, **changes: Any) -> Setting:
    """A setting of SD 1.5's configs without weights."""
    from fewstep.checkpoints.config import write_json

    configs = FAMILIES["sd1"].configs
    for name in ("unet", "vae"):
        write_json(dict(configs[name]), tmp_path / name / "config.json")
    write_json(dict(configs["text_encoder"]), tmp_path / "text_encoder" / "config.json")
    write_json({"model_max_length": 77}, tmp_path / "tokenizer" / "tokenizer_config.json")
    work = Work(str(tmp_path), part=part, **{"size": (512, 512), **changes})
    return Setting(work, str(tmp_path), None, "float32", "")


def test_operations_are_those_that_others_count(tmp_path: Path) -> None:
    # T-GATE's table: 16.938 T multiplications and additions for 50 steps, without attention's.
    unet = limits.operations(full_size("unet", tmp_path))["total"]
    assert unet == pytest.approx(803e9, rel=0.005)
    assert limits.operations(full_size("vae", tmp_path))["total"] == pytest.approx(2515e9, rel=0.01)
    assert limits.text_operations(full_size("vae", tmp_path)) == pytest.approx(13.3e9, rel=0.05)


def test_a_picture_is_the_sum_of_its_parts(tmp_path: Path) -> None:
    found = limits.operations(full_size("picture", tmp_path, size=(128, 128), steps=3, batch=2))
    one = limits.operations(full_size("unet", tmp_path, size=(128, 128)))["total"]
    # Guidance by two network calls: this is no LCM.
    assert found["unet"] == pytest.approx(2 * 2 * 3 * one)
    assert found["total"] == sum(v for k, v in found.items() if k != "total")


def test_pictures_of_pictures_take_a_part_of_the_steps() -> None:
    work = Work(task="image-to-image", steps=5)
    assert limits.network_calls(work, distilled=True) == 5
    assert limits.network_calls(work, distilled=False) == 3


def test_ceilings_are_rates(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(limits, "PATIENCE", 0.0)
    monkeypatch.setattr(limits, "PRODUCTS", {"cpu": ((64, 64, 64),)})
    monkeypatch.setattr(limits, "CONVOLUTIONS", {"cpu": ((1, 16, 8),)})
    monkeypatch.setattr(limits, "COPIED", {"cpu": 2**20})
    found = limits.ceilings("float32", "cpu", 0)
    assert all(found[name] > 1e6 for name in ("product", "convolution", "copy"))
    assert found["gpu"] is None and found["threads"] == torch.get_num_threads()
