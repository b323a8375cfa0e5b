"""What a run could not do, or would pass over in silence, is refused before any work."""

from __future__ import annotations

from pathlib import Path

import pytest
import torch

from fewstep import StableDiffusionPipeline, StableDiffusionXLPipeline
from fewstep.errors import RequestError
from fewstep.training import load_recipe, ray_cluster, train
from fewstep.training.checks import checks_of
from fewstep.training.dry_run import dry_run
from fewstep.training.phases.adapter import check_base
from fewstep.training.run import device_of
from fewstep.training.tokenizer import train_tokenizer

CPU = torch.device("cpu")


@pytest.mark.parametrize(
    ("override", "message"),
    [
        ("run.steps=0", "run.steps=0 must be at least 1"),
        ("run.ema=1.5", r"run.ema=1.5 is a share; it must lie in \[0, 1\]"),
        ("run.sheet_steps=-1", "run.sheet_steps=-1 must be at least 0"),
        ("optimizer.lr=-1e-3", "optimizer.lr=-0.001 must be at least 0"),
        ("optimizer.lr=nan", "optimizer.lr=nan must be"),
        ("optimizer.clip=0", r"optimizer.clip=0.0 must be above 0 \(inf: no limit\)"),
        ("optimizer.betas=[0.9]", "betas must hold 2 values"),
        ("data.scenes=0", "data.scenes=0 must be at least 1"),
        ("data.held_out=-1", "data.held_out=-1 must be at least 0"),
    ],
)
def test_a_number_that_means_nothing_is_refused_as_the_recipe_is_read(
    override: str, message: str
) -> None:
    with pytest.raises(RequestError, match=message):
        load_recipe("emoji64_lcd", [override])


def test_a_gradient_may_be_left_as_it_is() -> None:
    assert load_recipe("emoji64_lcd", ["optimizer.clip=inf"]).optimizer.clip == float("inf")


@pytest.mark.parametrize(
    ("name", "override", "message"),
    [
        ("emoji64_3_teacher", "run.compile=true", "run.compile is not read by the phase 'te"),
        ("emoji64_edges", "run.gradient_checkpointing=true", "not read by the phase 'adapter'"),
        ("emoji64_edges", "data.held_out=0", "data.held_out=0, but the sheets show held-out"),
        ("emoji64_edges", "adapter.sheet.prompts=[]", r"adapter.sheet.prompts is empty; give some"),
        ("emoji64_edges", "adapter.sheet.guidance_scale=4.0", "set teacher_guidance_scale in its"),
        ("emoji64_lcd", "consistency.sheet.prompts=[]", "run.sheet_steps=0"),
        ("emoji64_lcd", "consistency.sheet.steps=[4, 60]", "consistency.sheet.steps: .*60"),
        ("emoji64_lcd", "consistency.sheet.steps=[0]", "consistency.sheet.steps: "),
        ("emoji64_lcd", "consistency.sheet.teacher_steps=5000", "consistency.sheet.teacher_steps"),
        ("emoji64_lcm_lora", "consistency.lora.rank=0", "consistency.lora: rank=0 must be at"),
        ("emoji64_lcm_lora", "consistency.lora.targets=[]", "targets must name a layer"),
        ("emoji64_lcd", "consistency.vae=x/y", "vae='x/y' cannot go with base='embedded-teacher'"),
        ("emoji64_lcd", "run.device=gpu", "run.device='gpu' is no device; use auto, cpu, cuda"),
    ],
)
def test_what_a_phase_cannot_do_is_refused_before_anything_is_read_or_written(
    name: str, override: str, message: str, tmp_path: Path
) -> None:
    with pytest.raises(RequestError, match=message):
        train(load_recipe(name, ["run.device=cpu", override]), output=tmp_path)
    assert not list(tmp_path.iterdir())


@pytest.mark.parametrize("entry", ["data.split=test", "data.image_key=png"])
def test_what_a_source_does_not_read_is_refused(entry: str) -> None:
    with pytest.raises(RequestError, match="is not read by the source 'folder'; leave it out"):
        load_recipe("lcm_sd15", [entry])


@pytest.mark.parametrize("name", ["emoji64_lcd", "emoji64_edges"])
def test_without_sheets_nothing_is_asked_of_them(name: str) -> None:
    sheet = f"{load_recipe(name).phase}.sheet.prompts=[]"
    for check in checks_of(load_recipe(name, [sheet, "run.sheet_steps=0"]), CPU, 1):
        check()


def test_a_folder_that_is_a_file_is_refused(tmp_path: Path) -> None:
    (tmp_path / "run").write_text("")
    with pytest.raises(RequestError, match=r"cannot be written: .*run is a file; give another"):
        train(load_recipe("emoji64_lcd", ["run.device=cpu"]), output=tmp_path / "run")


@pytest.mark.skipif(torch.cuda.is_available(), reason="there is a GPU")
def test_a_gpu_that_is_not_there_is_named(tmp_path: Path) -> None:
    assert device_of("cuda:1") == torch.device("cuda:1")  # the machine that asks may have none
    with pytest.raises(RequestError, match=r"run\.device='cuda:1' is not on this machine"):
        train(load_recipe("emoji64_lcd", ["run.device=cuda:1"]), output=tmp_path)
    with pytest.raises(RequestError, match=r"which has 0 GPUs; set run\.device=auto"):
        dry_run("emoji64_lcd", ["run.device=cuda"], tmp_path)


def test_an_adapter_is_for_a_stable_diffusion() -> None:
    check_base(object.__new__(StableDiffusionPipeline))
    with pytest.raises(RequestError, match=r"adapter\.base is a StableDiffusionXLPipeline"):
        check_base(object.__new__(StableDiffusionXLPipeline))


def test_a_cluster_encodes_only_for_phases_that_work_on_encoded_data() -> None:
    with pytest.raises(RequestError, match="phase='text' encodes nothing beforehand"):
        ray_cluster.encode_on_ray(load_recipe("emoji64_2_text"), 1)


def test_a_tokenizer_of_which_a_kill_left_half_is_trained_again(tmp_path: Path) -> None:
    captions = ["a red apple", "a blue car"] * 4
    whole = train_tokenizer(captions, 600, 16, tmp_path / "whole")
    half = tmp_path / "half"
    half.mkdir()
    for name in ("vocab.json", "merges.txt"):
        (half / name).write_bytes((tmp_path / "whole" / name).read_bytes())
    again = train_tokenizer(captions, 600, 16, half)
    assert again.model_max_length == whole.model_max_length == 16
    assert again(captions).input_ids == whole(captions).input_ids
