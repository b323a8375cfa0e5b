"""What training gives is loaded by diffusers and by fewstep, and does the same in both."""

from __future__ import annotations

import json
import re
from pathlib import Path
from typing import Any, ClassVar

import pytest
import torch
from conftest import UNET
from safetensors.torch import load_file
from tiny_runs import (
    LORA,
    XL,
    draw,
    merged_by_hand,
    output,
    pipelines,
    random_lora,
    recipe,
    student,
    unet_of,
    write_xl,
)
from torch import Tensor

import fewstep
from fewstep.checkpoints.lora_formats import Change
from fewstep.checkpoints.lora_writing import Form, kohya_name, write_lora_file
from fewstep.errors import CheckpointError, RequestError
from fewstep.training.convert import convert_lora
from fewstep.training.export import (
    GUIDANCE_KEY,
    finish_full,
    finish_lora,
    push,
    require_token,
    write_lora,
)

diffusers = pytest.importorskip("diffusers")
pytest.importorskip("peft")
pytestmark = pytest.mark.filterwarnings("ignore")  # the oracle's are not ours to heed


@pytest.fixture(scope="module")
def xl_folder(tokenizer: Any, text_encoder: Any, tmp_path_factory: pytest.TempPathFactory) -> Path:
    return write_xl(tmp_path_factory.mktemp("xl") / "sdxl", tokenizer, text_encoder)


@pytest.fixture(params=["sd", "xl"])
def model(request: pytest.FixtureRequest, sd_folder: Path, xl_folder: Path) -> Path:
    return sd_folder if request.param == "sd" else xl_folder


# ── LoRA files ──


def test_a_lora_in_either_form_is_the_formula_in_both_libraries(
    model: Path, tmp_path: Path
) -> None:
    unet = unet_of(model)
    lora, plain = random_lora(unet), output(unet_of(model))
    files = write_lora(
        lora, LORA["alpha"], tmp_path, unet_config=unet.config, name="mine", half=True
    )
    assert [file.name for file in files] == [
        "pytorch_lora_weights.safetensors",
        "pytorch_lora_weights.fp16.safetensors",
        "mine_kohya.safetensors",
    ]
    expected = merged_by_hand(model, lora)
    assert (expected - plain).abs().max() > 1e-2
    for file, tolerance in zip(files, (1e-5, 5e-3, 5e-3), strict=True):
        for pipe in pipelines(model):
            pipe.load_lora_weights(tmp_path, weight_name=file.name)
            torch.testing.assert_close(output(pipe.unet), expected, rtol=0, atol=tolerance)
    for pipe in pipelines(model):  # the folder alone means the first
        pipe.load_lora_weights(tmp_path)
        torch.testing.assert_close(output(pipe.unet), expected, rtol=0, atol=1e-5)


def test_kohyas_form_goes_to_diffusers_and_back_unchanged(model: Path, tmp_path: Path) -> None:
    unet = unet_of(model)
    (first,) = write_lora(
        random_lora(unet), 2.0, tmp_path, unet_config=unet.config, forms=["kohya"]
    )
    there = convert_lora(str(first), tmp_path / "a.safetensors", "diffusers", model=str(model))
    back = convert_lora(str(there), tmp_path / "b.safetensors", "kohya", model=str(model))
    ours, theirs = load_file(first), load_file(back)
    assert ours.keys() == theirs.keys()
    assert all(torch.equal(ours[key], theirs[key]) for key in ours)
    assert ("lora_unet_input_blocks_4_1_proj_in.alpha" in ours) == (model.name == "sdxl")


def mixed(alphas: tuple[float | None, ...]) -> dict[str, dict[str, Change]]:
    """Changes of a UNet and a text encoder, of several ranks, with these alphas."""
    generator = torch.Generator().manual_seed(2)
    block = "down_blocks.1.attentions.0.transformer_blocks.0"
    layer = "text_model.encoder.layers.1.self_attn"
    shapes = {  # outputs, rank, inputs
        f"{block}.attn1.to_q": (16, 2, 16),
        f"{block}.attn2.to_k": (16, 5, 32),
        f"{block}.attn2.to_v": (16, 2, 32),
        f"{layer}.q_proj": (32, 3, 32),
        f"{layer}.out_proj": (32, 4, 32),
    }
    found: dict[str, dict[str, Change]] = {"unet": {}, "text_encoder": {}}
    for alpha, (name, (outputs, rank, inputs)) in zip(alphas, shapes.items(), strict=True):
        down = torch.randn(rank, inputs, generator=generator)
        up = torch.randn(outputs, rank, generator=generator)
        network = "text_encoder" if name.startswith("text_model") else "unet"
        found[network][name] = Change({"down": down, "up": up}, alpha)
    return found


def test_every_rank_and_alpha_arrives_and_those_of_the_text_encoder(
    sd_folder: Path, tmp_path: Path
) -> None:
    def pictures(changes: dict[str, dict[str, Change]], form: Form) -> list[Tensor]:
        config = unet_of(sd_folder).config
        file = write_lora_file(tmp_path / f"{form}.safetensors", changes, form, config)
        found = pipelines(sd_folder)
        for pipe in found:
            pipe.load_lora_weights(tmp_path, weight_name=file.name)
        return [draw(pipe) for pipe in found]

    changes = mixed((1.0, None, 0.25, 1.5, 3.0))
    theirs, ours = pictures(changes, "diffusers")
    torch.testing.assert_close(ours, theirs, rtol=0, atol=1e-4)
    # diffusers loses Kohya's alphas where they differ among the modules; we do not.
    torch.testing.assert_close(pictures(changes, "kohya")[1], ours, rtol=0, atol=1e-4)
    same = mixed((1.5,) * 5)
    first, *others = pictures(same, "diffusers") + pictures(same, "kohya")
    for other in others:
        torch.testing.assert_close(other, first, rtol=0, atol=1e-4)
    assert (first - ours).abs().max() > 1e-2


def test_rooted_scales_survive_and_what_a_form_cannot_hold_is_refused(tmp_path: Path) -> None:
    module = "mid_block.attentions.0.proj_in"
    parts = {"down": torch.ones(4, 8, 1, 1), "up": torch.ones(8, 4, 1, 1)}
    file = tmp_path / "a.safetensors"
    write_lora_file(file, {"unet": {module: Change(parts, 3.0, rooted=True)}}, "kohya", UNET)
    assert load_file(file)["lora_unet_mid_block_attentions_0_proj_in.alpha"] == 6.0
    other = {"unet": {module: Change({"diff": torch.ones(8, 8, 1, 1)})}}
    with pytest.raises(RequestError, match=r"no plain LoRA \(diff\).*keep Kohya's, or merge it"):
        write_lora_file(tmp_path / "b.safetensors", other, "diffusers", UNET)
    write_lora_file(tmp_path / "b.safetensors", other, "kohya", UNET)
    whole = {
        "unet": {module: Change({"lokr_w1": torch.ones(1), "lokr_w2": torch.ones(1)}, 1.0, rank=4)}
    }
    with pytest.raises(RequestError, match="PEFT's LoKr"):
        write_lora_file(tmp_path / "c.safetensors", whole, "kohya", UNET)
    assert not (tmp_path / "c.safetensors").exists()


def test_names_of_text_encoders_tell_the_family() -> None:
    assert kohya_name("text_encoder", "text_model.a", UNET) == "lora_te_text_model_a"
    assert kohya_name("text_encoder", "text_model.a", XL) == "lora_te1_text_model_a"
    assert kohya_name("text_encoder_2", "text_projection", XL) == "lora_te2_text_projection"


def test_a_finished_lora_has_files_and_a_card_that_runs(
    sd_folder: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    given = recipe(sd_folder, lora=LORA, w_min=7.5, w_max=7.5, target="stopgrad")
    unet = unet_of(sd_folder)
    folder = finish_lora(random_lora(unet), dict(unet.config), tmp_path / "lora", given)
    assert {file.name for file in folder.iterdir()} == {
        "README.md",
        "pytorch_lora_weights.fp16.safetensors",
        "pytorch_lora_weights.safetensors",
        "tiny_kohya.safetensors",
    }
    text = (folder / "README.md").read_text()
    assert "omega = guidance_scale - 1 was 7.5 in training, fixed" in text
    monkeypatch.chdir(tmp_path)
    run_sample(text)


def run_sample(text: str) -> None:
    (block,) = re.findall(r"```python\n(.*?)```", text, re.DOTALL)
    call = block.replace("pipe(", "pipe.set_progress_bar_config(disable=True)\nimage = pipe(", 1)
    exec(compile(call.replace("image = pipe.set", "pipe.set"), "card", "exec"), {})
    assert Path("picture.png").is_file()


# ── whole models ──

KINDS = {
    "zero": ("LatentConsistencyModelPipeline", "LCMScheduler"),
    "sampled": ("StableDiffusionPipeline", "TCDScheduler"),
    "phases": ("StableDiffusionPipeline", "DDIMScheduler"),
}


@pytest.mark.parametrize("endpoint", KINDS)
def test_a_finished_model_draws_the_same_in_both_libraries(
    endpoint: str, sd_folder: Path, tmp_path: Path
) -> None:
    given = recipe(sd_folder, endpoint=endpoint, grid_steps=40)
    base = fewstep.DiffusionPipeline.from_pretrained(sd_folder)
    unet = student(sd_folder, time_cond_proj_dim=16)
    folder = finish_full(unet, base, tmp_path / "model", given, counts={"kept": 12})
    theirs, ours = pipelines(folder)
    assert (type(ours).__name__, type(ours.scheduler).__name__) == KINDS[endpoint]
    assert type(theirs).__name__ == type(ours).__name__
    torch.testing.assert_close(draw(ours), draw(theirs), rtol=0, atol=1e-4)
    assert (draw(ours) - draw(ours, guidance_scale=5.0)).abs().max() > 1e-4  # it is an input
    if endpoint == "phases":
        assert ours.scheduler.config["timestep_spacing"] == "trailing"
    else:
        assert theirs.scheduler.config["original_inference_steps"] == 40
    stored = json.loads((folder / "unet" / "config.json").read_text())
    assert stored[GUIDANCE_KEY] == {
        "omega": "guidance_scale - 1",
        "low": 3.0,
        "high": 15.0,
        "input": True,
        "scale": given.settings.sheet.guidance_scale,
    }


def test_a_finished_sdxl_draws_the_same_and_has_a_float16_variant(
    xl_folder: Path, tmp_path: Path
) -> None:
    base = fewstep.DiffusionPipeline.from_pretrained(xl_folder)
    unet = student(xl_folder, time_cond_proj_dim=16)
    folder = finish_full(unet, base, tmp_path / "model", recipe(xl_folder))
    theirs, ours = pipelines(folder)
    torch.testing.assert_close(draw(ours), draw(theirs), rtol=0, atol=1e-4)
    half = diffusers.DiffusionPipeline.from_pretrained(folder, variant="fp16")
    for name in ("unet", "vae", "text_encoder", "text_encoder_2"):
        states = getattr(ours, name).state_dict(), getattr(half, name).state_dict()
        assert states[0].keys() == states[1].keys()
        assert all(torch.equal(states[0][key].half().float(), states[1][key]) for key in states[0])


def test_a_model_without_a_guidance_input_says_that_guidance_is_in_it(
    sd_folder: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    base = fewstep.DiffusionPipeline.from_pretrained(sd_folder)
    given = recipe(sd_folder, guidance_dim=0, output={"half": False})
    folder = finish_full(student(sd_folder), base, tmp_path / "model", given, figures="| a |")
    text = (folder / "README.md").read_text()
    assert "**Guidance** is in the weights" in text
    assert text.endswith("## Figures\n\n| a |\n")
    assert not list(folder.rglob("*fp16*"))
    monkeypatch.chdir(tmp_path)
    run_sample(text)


def test_a_runs_own_folder_is_not_overwritten(sd_folder: Path, tmp_path: Path) -> None:
    base = fewstep.DiffusionPipeline.from_pretrained(sd_folder)
    (tmp_path / "checkpoint.safetensors").touch()
    with pytest.raises(RequestError, match="holds a run, which would be lost"):
        finish_full(student(sd_folder), base, tmp_path, recipe(sd_folder))


# ── the hub ──


class Hub:
    """What a hub's client is asked."""

    asked: ClassVar[list[Any]] = []

    def __init__(self, token: str | None = None) -> None:
        pass

    def create_repo(self, repository: str, **arguments: Any) -> str:
        self.asked.append((repository, arguments))
        return f"https://hub/{repository}"

    def upload_folder(self, *, repo_id: str, folder_path: Path, **arguments: Any) -> None:
        if not (folder_path / "README.md").exists():
            raise OSError("413 Too large\nmore lines")
        self.asked.append((repo_id, folder_path))


def test_pushing_makes_the_repository_and_uploads(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("huggingface_hub.HfApi", Hub)
    monkeypatch.setattr("huggingface_hub.constants.HF_HUB_OFFLINE", False)
    (tmp_path / "README.md").touch()
    Hub.asked.clear()
    assert push(tmp_path, "me/model", private=True, token="t") == "https://hub/me/model"
    assert Hub.asked == [("me/model", {"private": True, "exist_ok": True}), ("me/model", tmp_path)]
    (tmp_path / "README.md").unlink()
    with pytest.raises(CheckpointError, match=r"could not be pushed to 'me/model': 413 Too large$"):
        push(tmp_path, "me/model", token="t")
    with pytest.raises(RequestError, match="is not there"):
        push(tmp_path / "none", "me/model", token="t")


def test_without_a_token_pushing_is_refused_before_any_work(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    monkeypatch.setattr("huggingface_hub.constants.HF_HUB_OFFLINE", False)
    monkeypatch.setattr("huggingface_hub.get_token", lambda: None)
    with pytest.raises(RequestError, match=r"'me/model': no token is stored; log in with `hf auth"):
        require_token("me/model")
    with pytest.raises(RequestError, match="is not the name of a hub repository"):
        require_token("a/b/c", "t")
    monkeypatch.setattr("huggingface_hub.constants.HF_HUB_OFFLINE", True)
    with pytest.raises(RequestError, match="HF_HUB_OFFLINE is set"):
        require_token("me/model", "t")
