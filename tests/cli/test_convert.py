"""`fewstep convert`: diffengine's form, the plain form, and LoRA files."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file
from tiny_runs import full_run, lora_file, lora_run, random_lora, unet_of

from fewstep import UNet2DConditionModel

Run = Callable[..., tuple[int, str, str]]


@pytest.fixture
def trained(sd_folder: Path, tmp_path: Path) -> Path:
    return full_run(tmp_path / "run", sd_folder)[0]


def test_diffengines_form_writes_the_unet(run: Run, trained: Path) -> None:
    checkpoint = trained / "checkpoint.safetensors"
    given = ("convert", "lcm_sd15", checkpoint, "out", "--save-keys", "unet")
    assert run(*given) == (0, "out/unet\n", "")
    unet = UNet2DConditionModel.from_pretrained("out", subfolder="unet")
    stored = load_file(checkpoint)
    assert torch.equal(unet.conv_in.weight, stored["average/unet.conv_in.weight"])


def test_a_run_alone_will_do_with_the_last_weights_and_in_half(run: Run, trained: Path) -> None:
    assert run("convert", trained, "out", "--half", "--weights", "online")[0] == 0
    unet = UNet2DConditionModel.from_pretrained("out", subfolder="unet", variant="fp16")
    assert not any(parameter.any() for parameter in unet.parameters())


def test_a_lora_run_gives_its_files(run: Run, sd_folder: Path, tmp_path: Path) -> None:
    lora = lora_run(tmp_path / "style", sd_folder, random_lora(unet_of(sd_folder)))
    assert run("convert", lora, "out")[1].split() == [
        "out/pytorch_lora_weights.safetensors",
        "out/tiny_kohya.safetensors",
    ]
    assert run("convert", lora, "k", "--format", "kohya")[1] == "k/tiny_kohya.safetensors\n"


def test_a_loras_file_changes_its_form_and_back(run: Run, sd_folder: Path, tmp_path: Path) -> None:
    first = lora_file(tmp_path / "a.safetensors", sd_folder, 1)
    code, out, error = run(
        *("convert", first, "k.safetensors", "--format", "kohya", "--model", sd_folder)
    )
    assert (code, out, error) == (0, "k.safetensors\n", "")
    run(
        *("convert", "k.safetensors", "d.safetensors"),
        *("--format", "diffusers"),
        *("--model", sd_folder),
    )
    before, after = load_file(first), load_file("d.safetensors")
    assert before.keys() == after.keys()
    assert all(torch.equal(before[key], after[key]) for key in before)


@pytest.mark.parametrize(
    ("arguments", "words"),
    [
        ("RUN", "got 1 places; give INPUT OUTPUT, or RECIPE INPUT OUTPUT"),
        ("a b c d", "got 4 places"),
        ("lcm_sd15 RUN out --save-keys unet text_encoder", "--save-keys text_encoder: this run"),
        ("lcm_sd16 RUN out", "did you mean 'lcm_sd15'?"),
        ("lcm_sd15 epoch_50.pth out --save-keys unet", "(diffengine: `diffengine convert`)"),
        ("nothing out.safetensors --format kohya", "there is no local folder 'nothing'"),
        ("LORA out.safetensors", "is a LoRA; give --format kohya or --format diffusers"),
        ("LORA out --format kohya", "out: a LoRA is one file; give a name in .safetensors"),
        ("LORA LORA --format kohya", "exists; give another name"),
        ("LORA out.safetensors --format kohya", "does not say which model it is for"),
        ("LORA out.safetensors --format kohya --half", "--half: has a meaning for runs only"),
        ("LORA out.safetensors --format kohya --push a/b", "HF_HUB_OFFLINE is set"),
        ("RUN out --model SD", "has a meaning for LoRA files only"),
    ],
)
def test_what_cannot_be_converted_is_refused_in_a_line(
    arguments: str,
    words: str,
    run: Run,
    trained: Path,
    sd_folder: Path,
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    monkeypatch.setattr("huggingface_hub.constants.HF_HUB_OFFLINE", True)
    lora = lora_file(trained.parent / "lora.safetensors", sd_folder, 1)
    places = {"RUN": trained, "LORA": lora, "SD": sd_folder}
    code, out, error = run("convert", *(places.get(word, word) for word in arguments.split()))
    assert (code, out) == (2, "")
    assert words in error
    assert error.count("\n") == 1
    assert list(Path().iterdir()) == []


def test_the_commands_have_help_with_examples(run: Run) -> None:
    for command in ("convert", "merge"):
        code, out, _ = run(command, "--help")
        assert code == 0
        assert f"  fewstep {command}" in out.partition("Examples:")[2]
