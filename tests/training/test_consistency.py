"""The phase that makes consistency models, on tiny random pipelines and synthetic latents."""

from __future__ import annotations

import json
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from original_layout import whole
from safetensors.torch import save_file

from fewstep import DDIMScheduler, DiffusionPipeline
from fewstep.checkpoints.known import FAMILIES
from fewstep.checkpoints.locate import Source
from fewstep.errors import RequestError
from fewstep.pipelines.single_file import read_family
from fewstep.training import train
from fewstep.training.batch import Batch, Condition
from fewstep.training.config import ConsistencyPhase, Recipe, parse_recipe
from fewstep.training.data import Counts
from fewstep.training.draws import Draws
from fewstep.training.lora_layers import adapters, adapters_off, attach
from fewstep.training.networks import check_prediction_type, load_base, student_of
from fewstep.training.phases import consistency
from fewstep.training.phases.consistency import Consistency

CPU = torch.device("cpu")
LORA = {"rank": 4, "alpha": 4.0}


class Synthetic:
    """Twelve random latents and texts, of which two are held out."""

    def __init__(self, recipe: Recipe, pipe: Any) -> None:
        generator = torch.Generator().manual_seed(1)
        channels, width = pipe.unet.config.in_channels, pipe.text_encoder.config.hidden_size
        self.z = torch.randn(12, channels, 8, 8, generator=generator)
        self.text = torch.randn(12, 16, width, generator=generator)
        self.empty = Condition(torch.zeros(1, 16, width))
        self.held_out = np.array([10, 11])
        self.counts = Counts(12, {})

    def __len__(self) -> int:
        return 12

    def rows(self, step: int, batch: int) -> np.ndarray:
        return (np.arange(batch) + step * batch) % 10

    def batch(self, rows: np.ndarray, draws: Draws) -> Batch:
        return Batch(self.z[rows], Condition(self.text[rows]))


@pytest.fixture(autouse=True)
def synthetic(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(consistency, "open_set", Synthetic)


def recipe(
    base: Path, folder: Path, /, run: dict[str, Any] | None = None, **settings: Any
) -> Recipe:
    settings = {"guidance_dim": 16, "w_min": 1.0, "w_max": 8.0} | settings
    if "lora" in settings:
        settings |= {"guidance_dim": 0, "target": "stopgrad"}
    sheet = {"prompts": ["a cat", "a red dog"], "steps": [1, 2], "teacher_steps": 2}
    return parse_recipe(
        {
            "phase": "consistency",
            "folder": str(folder),
            "seed": 3,
            "data": {"source": "folder", "path": "", "resolution": 64},
            "optimizer": {"lr": 1e-3, "warmup": 1},
            "run": {"steps": 3, "batch": 4, "precision": "fp32", "device": "cpu", "sheet_steps": 0}
            | (run or {}),
            "consistency": {"base": str(base), "sheet": sheet} | settings,
        },
        "test",
    )


METHODS: dict[str, dict[str, Any]] = {
    "LCD": {},
    "LCD, second order": {"solver": "dpm_solver_pp_2s", "distance": "cauchy"},
    "LCD, fixed guidance, squared, no copy": {
        "w_min": 7.5,
        "w_max": 7.5,
        "guidance_dim": 0,
        "distance": "squared",
        "target": "stopgrad",
    },
    "LCM-LoRA": {"lora": LORA},
    "PCM-LoRA": {
        "lora": LORA,
        "endpoint": "phases",
        "phases": 4,
        "grid_steps": 40,
        "solver_guidance": False,
    },
    "TCD-LoRA": {"lora": LORA, "endpoint": "sampled"},
    "a LoRA of a style": {"lora": LORA, "method": "denoising"},
    "a grid that becomes finer": {"first_grid_steps": 10, "grid_steps": 40},
}


@pytest.mark.parametrize("method", METHODS)
def test_every_method_trains_and_its_result_draws(
    method: str, sd_folder: Path, tmp_path: Path
) -> None:
    run = {"sheet_steps": 3, "precision": "bf16" if "LoRA" in method else "fp32"}
    folder = train(recipe(sd_folder, tmp_path, run, **METHODS[method]))
    assert (folder / "sheet.png").exists()
    figures = [json.loads(line) for line in (folder / "log.jsonl").read_text().splitlines()]
    assert {"held_out_loss", "drift_1", "drift_2"} <= figures[-1].keys()
    if "lora" in METHODS[method]:
        pipe = DiffusionPipeline.from_pretrained(sd_folder)
        before = pipe.unet.conv_in.weight.clone()
        pipe.load_lora_weights(folder / "lora")
        assert torch.equal(pipe.unet.conv_in.weight, before)
    else:
        pipe = DiffusionPipeline.from_pretrained(folder / "pipeline")
    pipe.set_progress_bar_config(disable=True)
    assert pipe("a cat", num_inference_steps=2, guidance_scale=1.0).images[0].size == (64, 64)


def test_a_base_may_be_a_single_file_in_half_precision(
    sd_folder: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setitem(FAMILIES, "tiny", read_family(Source(str(sd_folder))))
    tensors = whole(DiffusionPipeline.from_pretrained(sd_folder))
    file = tmp_path / "base.safetensors"
    save_file({name: tensor.half() for name, tensor in tensors.items()}, file)
    pipe = load_base(recipe(file, tmp_path).from_base, "")
    assert {p.dtype for part in pipe.modules for p in part.parameters()} == {torch.float32}
    with pytest.raises(RequestError, match="variant='fp16' cannot go with"):
        train(recipe(file, tmp_path, variant="fp16"))


@pytest.mark.parametrize("settings", [{}, {"lora": LORA}])
def test_fine_tuning_starts_from_a_consistency_model(
    settings: dict[str, Any], lcm_folder: Path, tmp_path: Path
) -> None:
    settings |= {"method": "fine_tuning"}
    if "lora" not in settings:
        settings |= {"guidance_dim": 32}
    made = recipe(lcm_folder, tmp_path, {"sheet_steps": 3}, **settings)
    made = replace(made, data=replace(made.data, resolution=32))
    folder = train(made)
    assert (folder / "sheet.png").exists()


def test_the_student_starts_as_the_teacher_for_every_guidance(sd_folder: Path) -> None:
    pipe = DiffusionPipeline.from_pretrained(sd_folder)
    student = student_of(pipe.unet, 16).eval()
    z, text = torch.randn(2, 4, 8, 8), torch.randn(2, 5, 32)
    t = torch.tensor([19, 999])
    expected = pipe.unet(z, t, text).sample
    for w in (torch.zeros(2, 16), torch.randn(2, 16)):
        assert torch.equal(student(z, t, text, timestep_cond=w).sample, expected)


def test_a_lora_changes_nothing_at_the_start_and_nothing_when_it_is_off(sd_folder: Path) -> None:
    unet = DiffusionPipeline.from_pretrained(sd_folder).unet
    keys = set(unet.state_dict())
    inputs = torch.randn(1, 4, 8, 8), torch.tensor(500), torch.randn(1, 5, 32)
    before = unet(*inputs).sample
    attach(unet, ["to_q", "conv1", "proj_in"], rank=2, alpha=1.0, seed=0)
    assert torch.equal(unet(*inputs).sample, before)
    with torch.no_grad():
        for module in unet.modules():
            if hasattr(module, "lora_up"):
                module.lora_up.weight.normal_()
    assert not torch.allclose(unet(*inputs).sample, before)
    with adapters_off(unet):
        assert torch.equal(unet(*inputs).sample, before)
    assert keys <= set(unet.state_dict())
    trained = {name for name, p in unet.named_parameters() if p.requires_grad}
    assert trained and all(".lora_" in name for name in trained)
    assert {name.rpartition(".lora_")[0] for name in trained} == set(adapters(unet))


def test_a_target_that_names_no_layer_lists_the_layers(sd_folder: Path) -> None:
    unet = DiffusionPipeline.from_pretrained(sd_folder).unet
    with pytest.raises(RequestError, match=r"'to_w'.*to_k, to_out, to_q"):
        attach(unet, ["to_q", "to_w"], rank=2, alpha=1.0, seed=0)


def test_the_loss_of_a_batch_is_the_mean_of_the_losses_of_its_parts(
    sd_folder: Path, tmp_path: Path
) -> None:
    phase = Consistency(recipe(sd_folder, tmp_path), CPU)
    whole = phase.loss(2, range(4))
    parts = [phase.loss(2, part) for part in (range(2), range(2, 4))]
    assert torch.stack(parts).mean().item() == pytest.approx(whole.item(), rel=1e-5)


@pytest.mark.parametrize("option", ["gradient_checkpointing", "accumulate"])
def test_saving_memory_does_not_change_the_weights(
    option: str, sd_folder: Path, tmp_path: Path
) -> None:
    weights = []
    for value in (False, True) if option == "gradient_checkpointing" else (1, 2):
        made = recipe(sd_folder, tmp_path / str(value), {option: value}, lora=LORA)
        folder = train(made)
        weights.append(read_up(folder))
    # Adam makes whole steps of the rounding of gradients near zero, so single weights may differ.
    assert (weights[0] - weights[1]).abs().mean() < 1e-6
    assert weights[0].abs().mean() > 1e-4


def read_up(folder: Path) -> torch.Tensor:
    from fewstep.training.state import read_weights

    return torch.cat([w.flatten() for n, w in sorted(read_weights(folder).items()) if "_up" in n])


def test_a_killed_and_resumed_distillation_equals_an_uninterrupted_one(
    sd_folder: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    from fewstep.training.report import LossLog

    monkeypatch.setattr(LossLog, "EVERY", 1)
    whole = train(recipe(sd_folder, tmp_path / "whole", {"checkpoint_minutes": 0.0}))
    loss = Consistency.loss

    def killed(self: Consistency, step: int, part: range) -> torch.Tensor:
        if step == 2:
            raise KeyboardInterrupt
        return loss(self, step, part)

    monkeypatch.setattr(Consistency, "loss", killed)
    with pytest.raises(KeyboardInterrupt):
        train(recipe(sd_folder, tmp_path / "parts", {"checkpoint_minutes": 0.0}))
    monkeypatch.setattr(Consistency, "loss", loss)
    parts = train(recipe(sd_folder, tmp_path / "parts", {"checkpoint_minutes": 0.0}))
    file = "checkpoint.safetensors"
    assert (parts / file).read_bytes() == (whole / file).read_bytes()


@pytest.mark.parametrize(
    ("settings", "message"),
    [
        ({"lora": LORA, "target": "ema"}, "target=stopgrad"),
        ({"w_min": 9.0}, r"w_min=9.0 must not be above w_max=8.0"),
        ({"method": "fine_tuning", "solver_guidance": False}, "no teacher"),
        ({"endpoint": "phases", "phases": 60}, r"must lie in \[1, 50\]"),
        ({"endpoint": "phases", "phases": 4}, "must divide grid_steps=50"),
        ({"first_grid_steps": 60}, "finer, not coarser"),
        (
            {"lora": LORA, "method": "denoising", "solver": "dpm_solver_2"},
            "reads none of them",
        ),
        ({"target_decay": 1.0}, r"must lie in \[0, 1\)"),
        ({"distance_c": 0.0}, "above 0"),
    ],
)
def test_settings_that_contradict_each_other_are_refused(
    settings: dict[str, Any], message: str, sd_folder: Path, tmp_path: Path
) -> None:
    made = recipe(sd_folder, tmp_path, **settings)
    if settings.get("target") == "ema":
        assert isinstance(made.settings, ConsistencyPhase)
        made = replace(made, settings=replace(made.settings, target="ema"))
    with pytest.raises(RequestError, match=message):
        train(made)
    assert not (tmp_path / "consistency").exists()


class Trained(torch.nn.Module):
    """A UNet that puts out what a trained one of a prediction type would, but for some noise."""

    dtype = torch.float32
    device = torch.device("cpu")

    def __init__(self, schedule: Any, kind: str, batch: Batch) -> None:
        super().__init__()
        self.schedule, self.kind, self.batch = schedule, kind, batch
        self.config = type("Config", (), {"time_cond_proj_dim": None})()

    def forward(self, z: torch.Tensor, t: torch.Tensor, **_: Any) -> Any:
        alpha, sigma = self.schedule.alpha_sigma(t, z)
        noise = (z - alpha * self.batch.z) / sigma
        output = noise if self.kind == "epsilon" else alpha * noise - sigma * self.batch.z
        return type("Result", (), {"sample": output + 0.3 * torch.randn_like(output)})()


@pytest.mark.parametrize("kind", ["epsilon", "v_prediction"])
def test_a_teacher_declared_with_another_prediction_type_is_refused(
    kind: str, sd_folder: Path
) -> None:
    torch.manual_seed(0)
    pipe = DiffusionPipeline.from_pretrained(sd_folder)
    batch = Batch(torch.randn(4, 4, 8, 8), Condition(torch.randn(4, 5, 32)))
    declared = pipe.scheduler.noise_schedule.prediction_type
    assert declared == "epsilon"
    network = Trained(pipe.scheduler.noise_schedule, kind, batch)
    scheduler = DDIMScheduler.from_config(pipe.scheduler.config)
    stand_in: Any = type("Pipe", (), {"unet": network, "scheduler": scheduler})()
    if kind == declared:
        check_prediction_type(stand_in, batch)
    else:
        with pytest.raises(RequestError, match="prediction_type='v_prediction'"):
            check_prediction_type(stand_in, batch)


@pytest.mark.parametrize("settings", [{}, {"lora": LORA}])
def test_frozen_weights_of_half_the_size_change_nothing(
    settings: dict[str, Any], sd_folder: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    losses = []
    for stores in (consistency.store_as, lambda network, dtype: None):
        monkeypatch.setattr(consistency, "store_as", stores)
        phase = Consistency(recipe(sd_folder, tmp_path, {"precision": "bf16"}, **settings), CPU)
        with torch.autocast("cpu", torch.bfloat16):
            losses.append(phase.loss(0, range(4)))
    assert torch.equal(*losses)


@pytest.mark.parametrize(
    ("run", "settings", "message"),
    [
        ({}, {"w_max": 9.0}, r"consistency.w_max was 8.0, is 9.0; give another folder"),
        ({"steps": 2}, {}, r"run.steps=2, but the run in .* has done 3 steps"),
    ],
)
def test_a_folder_with_a_run_of_another_recipe_is_refused(
    run: dict[str, Any],
    settings: dict[str, Any],
    message: str,
    sd_folder: Path,
    tmp_path: Path,
) -> None:
    folder = train(recipe(sd_folder, tmp_path))
    written = (folder / "recipe.json").read_text()
    with pytest.raises(RequestError, match=message):
        train(recipe(sd_folder, tmp_path, run, **settings))
    assert (folder / "recipe.json").read_text() == written
    train(recipe(sd_folder, tmp_path, {"steps": 4, "checkpoint_minutes": 1.0}))
