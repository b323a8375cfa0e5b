"""What a run will take, found out before it begins; and the dry run."""

from __future__ import annotations

import json
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from PIL import Image
from torch.nn.attention import SDPBackend, sdpa_kernel

from fewstep.checkpoints.known import FAMILIES
from fewstep.errors import RequestError
from fewstep.training import capacity, checks
from fewstep.training.bases import Base, base_of, check_family
from fewstep.training.capacity import (
    check_memory,
    duration,
    memory_explained,
    memory_of,
    network_rate,
)
from fewstep.training.config import ConsistencyPhase, Recipe, parse_recipe
from fewstep.training.dry_run import dry_run
from fewstep.training.estimates import (
    GIB,
    Estimate,
    clip_size,
    estimate,
    latent_side,
    networks_of,
    size_of,
    unet_of,
)
from fewstep.training.rehearsal import rehearse
from fewstep.training.traces import Trace, as_on_device, call

CPU = torch.device("cpu")
LORA = {"lora": {"rank": 2}, "guidance_dim": 0, "target": "stopgrad"}
FULL: dict[str, Any] = {}


def recipe(
    base: object, folder: Path, /, run: dict[str, Any] | None = None, **settings: Any
) -> Recipe:
    sheet = {"prompts": ["a cat"], "steps": [1], "teacher_steps": 1}
    return parse_recipe(
        {
            "phase": "consistency",
            "folder": str(folder / "run"),
            "seed": 3,
            "data": {
                "source": "folder",
                "path": str(folder / "pictures"),
                "resolution": 64,
                "cache": str(folder / "cache"),
            },
            "optimizer": {"lr": 1e-3, "warmup": 1},
            "run": {"steps": 2, "batch": 4, "precision": "fp32", "device": "cpu", "sheet_steps": 0}
            | (run or {}),
            "consistency": {"base": str(base), "guidance_dim": 16, "sheet": sheet} | settings,
        },
        "test",
    )


def settings_of(made: Recipe) -> ConsistencyPhase:
    assert isinstance(made.settings, ConsistencyPhase)
    return made.settings


@pytest.fixture
def foretold(sd_folder: Path, tmp_path: Path) -> Callable[..., Estimate]:
    """The estimate of the tiny model with some settings of run and method."""

    def make(settings: dict[str, Any], devices: int = 1, /, **run: Any) -> Estimate:
        made = recipe(sd_folder, tmp_path, run, **settings)
        return estimate(made, base_of(settings_of(made), ""), "cpu", devices)

    return make


# ── counting ──


@pytest.mark.parametrize(
    ("family", "millions"), [("sd1", 859.520964), ("sdxl", 2567.463684), ("ssd-1b", 1330.923204)]
)
def test_the_published_networks_have_their_published_sizes(family: str, millions: float) -> None:
    assert size_of(unet_of(Base(FAMILIES[family].configs)).parameters()) / 1e6 == pytest.approx(
        millions, rel=1e-3
    )


def test_a_text_model_is_counted_from_its_config(text_encoder: Any) -> None:
    assert clip_size(text_encoder.config.to_dict()) == size_of(text_encoder.parameters())


@pytest.mark.parametrize(
    ("settings", "passes"),
    [
        (FULL, 6),  # student there and back 3, teacher 2, target 1
        ({"solver_guidance": False}, 5),
        ({"solver": "dpm_solver_2"}, 8),
        ({"method": "fine_tuning"}, 4),
    ],
)
def test_a_step_takes_as_many_passes_as_its_method(
    settings: dict[str, Any], passes: int, foretold: Callable[..., Estimate], sd_folder: Path
) -> None:
    made = recipe(sd_folder, sd_folder)
    unet = unet_of(base_of(settings_of(made), ""))
    with Trace() as trace, torch.no_grad():
        call(unet, 1, 8, 16)
    assert foretold(settings).operations / 4 / trace.operations == pytest.approx(passes, rel=0.06)


def test_the_meta_device_counts_what_real_numbers_take(sd_folder: Path, tmp_path: Path) -> None:
    made = recipe(sd_folder, tmp_path)
    _, student = networks_of(made, base_of(settings_of(made), ""))
    counted = []
    for device in ("meta", "cpu"):
        network = student.to_empty(device=device)
        for parameter in network.parameters():
            parameter.grad = None
        with sdpa_kernel([SDPBackend.MATH]), Trace() as trace:
            torch.autograd.backward(call(network, 2, 8, 16).square().mean())
        counted.append((trace.operations, trace.peak / 2**20))
    assert counted[0][0] == counted[1][0]
    assert counted[0][1] == pytest.approx(counted[1][1], rel=0.1)


def test_a_trace_forgets_what_is_freed_and_never_counts_what_was_there() -> None:
    x = torch.empty(1000, device="meta")
    with Trace() as trace:
        y = x.view(10, 100).t() + 1
        assert trace.alive == 4000
        del y
        assert trace.alive == 0
        _ = (x + 1) * 2
    assert trace.peak == 8000


def test_half_precision_on_a_gpu_stores_half_activations_and_fuses_attention(
    sd_folder: Path, tmp_path: Path
) -> None:
    made = recipe(sd_folder, tmp_path)
    peaks = {}
    for device, precision in (("cpu", "fp32"), ("cuda", "fp32"), ("cuda", "bf16")):
        _, student = networks_of(made, base_of(settings_of(made), ""))
        as_on_device(student, device, precision)
        with Trace() as trace:
            kept = call(student, 64, 8, 16)
        peaks[device, precision] = trace.alive
        del kept
    assert peaks["cuda", "fp32"] < peaks["cpu", "fp32"]
    assert peaks["cuda", "bf16"] < peaks["cuda", "fp32"]


def test_every_saving_saves_what_it_says(foretold: Callable[..., Estimate]) -> None:
    plain = foretold(FULL)
    parts = plain.memory
    assert parts["gradients"] == parts["student"] == parts["average"] == parts["moments"] / 2
    smaller = foretold({"target": "stopgrad"}, gradient_checkpointing=True)
    assert smaller.memory["activations"] < parts["activations"]
    assert "target" not in smaller.memory
    smaller = foretold({"method": "fine_tuning"}, accumulate=4)
    assert smaller.memory["activations"] < parts["activations"]
    assert "teacher" not in smaller.memory
    lora = foretold(LORA)
    assert lora.trained < 0.5 * plain.trained
    assert lora.operations < plain.operations
    shared = foretold(FULL, 4, shard=True)
    assert shared.memory["moments"] == parts["moments"] / 4
    half = foretold(FULL, 4, precision="bf16").memory
    assert half["moments"] == parts["moments"]
    assert half["teacher"] < 0.6 * parts["teacher"]


def test_a_size_that_is_no_whole_number_of_latents_is_refused(
    sd_folder: Path, tmp_path: Path
) -> None:
    made = recipe(sd_folder, tmp_path)
    odd = replace(made, data=replace(made.data, resolution=60))
    with pytest.raises(RequestError, match=r"data.resolution=60 must be a multiple of 8"):
        latent_side(odd, base_of(settings_of(made), ""))


# ── the device ──


def few(total: float, activations: float) -> Estimate:
    memory = {"student": (total - activations) * GIB, "activations": activations * GIB}
    return Estimate(memory, 1e12, 10, 10)


def test_weights_that_do_not_fit_are_refused_with_what_would_make_them_smaller(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(capacity, "memory_of", lambda device: (20.0 * GIB, 24.0 * GIB))
    made = recipe("x/y", tmp_path)
    with pytest.raises(RequestError) as refused:
        check_memory(made, few(46, 10), CPU)
    for part in (
        "about 46 GiB",
        "has 24 GiB",
        "consistency.target=stopgrad",
        "a LoRA",
        "run.shard",
    ):
        assert part in str(refused.value)
    with pytest.warns(UserWarning, match=r"run.gradient_checkpointing=true.*run.accumulate=2"):
        check_memory(made, few(22, 10), CPU)
    check_memory(made, few(15, 10), CPU)  # fits: not a word


def test_a_lack_of_memory_names_what_saves_some(tmp_path: Path) -> None:
    made = recipe("x/y", tmp_path, {"gradient_checkpointing": True})
    for error in (torch.cuda.OutOfMemoryError("x"), RuntimeError("can't allocate memory")):
        with pytest.raises(RequestError) as told, memory_explained(made, CPU):
            raise error
        assert "run.accumulate=2" in str(told.value)
        assert "gradient_checkpointing" not in str(told.value)
        assert "checkpoint stays" in str(told.value)
    with pytest.raises(RuntimeError, match="else"), memory_explained(made, CPU):
        raise RuntimeError("something else")


def test_free_memory_and_speed_are_measured() -> None:
    held = memory_of(CPU)
    assert held is None or 0 < held[0] <= held[1]
    assert network_rate(CPU, recipe("x/y", Path(".")).run) > 1e8


@pytest.mark.parametrize(
    ("seconds", "words"),
    [(2, "2.0 to 6.0 s"), (7200, "2.0 to 6.0 h"), (1e8, "1,157 to 3,472 days")],
)
def test_times_are_told_in_one_unit(seconds: float, words: str) -> None:
    assert duration(seconds * 1e9, 1e9, 1) == words


# ── the base ──


def test_a_base_that_is_not_here_is_told_and_taken_from_its_known_configs(tmp_path: Path) -> None:
    base = base_of(settings_of(recipe("segmind/SSD-1B", tmp_path)), "")
    assert base.is_xl and "not on this machine" in base.note
    guess = base_of(settings_of(recipe("someone/my-sdxl-model", tmp_path)), "")
    assert guess.is_xl and "guessed: sdxl" in guess.note


@pytest.mark.parametrize("base", ["runs/no-such/pipeline", "model.safetensors", "/nowhere"])
def test_a_folder_or_file_that_is_not_there_is_refused(base: str, tmp_path: Path) -> None:
    with pytest.raises(RequestError, match="is not there; give a folder"):
        base_of(settings_of(recipe(base, tmp_path)), "")


def test_parts_of_two_families_are_refused() -> None:
    sd, xl = FAMILIES["sd1"].configs, FAMILIES["sdxl"].configs
    for family in FAMILIES.values():
        check_family(Base(family.configs))
    with pytest.raises(RequestError, match=r"reads text of 2048 channels.*encoders give 768"):
        check_family(Base({**sd, "unet": xl["unet"]}))
    bare = {name: config for name, config in xl.items() if not name.startswith("text")}
    with pytest.raises(RequestError, match="no text_encoder_2"):
        check_family(Base(bare))


# ── the dry run ──


@pytest.fixture
def pictures(tmp_path: Path) -> Path:
    folder = tmp_path / "pictures"
    folder.mkdir()
    lines = []
    for index in range(5):
        pixels = np.random.default_rng(index).integers(0, 256, (64, 72, 3), dtype=np.uint8)
        Image.fromarray(pixels).save(folder / f"{index}.png")
        lines.append(json.dumps({"file_name": f"{index}.png", "text": f"thing {index}"}))
    (folder / "metadata.jsonl").write_text("\n".join(lines))
    return folder


def test_a_dry_run_tells_counts_memory_and_time_and_writes_nothing_to_the_run(
    sd_folder: Path, tmp_path: Path, pictures: Path
) -> None:
    found = dry_run(recipe(sd_folder, tmp_path, {"precision": "bf16", "sheet_steps": 5}, **LORA))
    found.check()
    told = "\n".join(found.told)
    for part in ("kept 5 of 5", "LoRA of rank 2", "GiB", "TFLOP a sample", "they work"):
        assert part in told
    assert not (tmp_path / "run").exists()


def test_a_dry_run_names_all_that_is_wrong_at_once(sd_folder: Path, tmp_path: Path) -> None:
    run = {"batch": 5, "accumulate": 2, "trackers": ["none"]}
    found = dry_run(recipe(sd_folder, tmp_path, run, w_min=20.0))
    with pytest.raises(RequestError, match="4 things are wrong") as wrong:
        found.check()
    for part in ("run.batch=5", "run.trackers", "w_min=20.0", "pictures"):
        assert part in str(wrong.value)


def test_a_dry_run_meets_what_only_running_shows(
    sd_folder: Path, tmp_path: Path, pictures: Path
) -> None:
    lora = LORA | {"lora": {"rank": 2, "targets": ["to_w"]}}
    (problem,) = dry_run(recipe(sd_folder, tmp_path, **lora)).problems
    assert "'to_w'" in problem


@pytest.mark.parametrize("family", ["ssd-1b"])
def test_a_family_has_a_tiny_model_that_trains(family: str, tmp_path: Path) -> None:
    base = Base(FAMILIES[family].configs)
    made = recipe("x/y", tmp_path, {"accumulate": 2, "sheet_steps": 1}, **LORA)
    rehearse(made, base, CPU)
    assert list(tmp_path.iterdir()) == []


def test_small_networks_are_trained_without_an_estimate_and_large_ones_with_one(
    sd_folder: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    made = recipe(sd_folder, tmp_path)
    assert checks.foresee(made, CPU, 1) is None
    monkeypatch.setattr(checks, "SMALL", 0)
    seen = checks.foresee(made, CPU, 1)
    assert seen is not None and seen.trained > 0
