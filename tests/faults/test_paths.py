"""Case 5 on the command line: names reach no file but the one that is meant."""

from __future__ import annotations

import os
from collections.abc import Callable
from pathlib import Path

import PIL.Image
import pytest
import torch
from bad_files import floats, safetensors
from safetensors.torch import save_file

import fewstep
from fewstep import CheckpointError

Run = Callable[..., tuple[int, str, str]]
NAMES = {
    "above": "../../etc/passwd",
    "absolute": "/etc/passwd",
    "backslashes": "..\\..\\x",
    "a drive": "C:\\x",
    "escaped": "%2e%2e%2f",
    "NUL": "a\0b",
    "a device of Windows": "CON",
    "4096 characters": "x" * 4096,
    "markup": "<img src=x onerror=y>",
    "above a repository": "owner/repo/../../etc/x.safetensors",
}


@pytest.fixture(autouse=True)
def offline(monkeypatch: pytest.MonkeyPatch) -> None:
    import huggingface_hub.constants

    monkeypatch.setattr(huggingface_hub.constants, "HF_HUB_OFFLINE", True)


@pytest.mark.parametrize("name", NAMES)
@pytest.mark.parametrize("option", ["--lora", "--model", "--vae", "--controlnet", "--image"])
def test_a_name_that_is_no_model_ends_in_one_line_with_nothing_of_a_file(
    name: str, option: str, run: Run, tmp_path: Path
) -> None:
    """Case 5: names of models, LoRAs and pictures."""
    PIL.Image.new("RGB", (8, 8)).save(tmp_path / "photo.png")
    beside = ["--control-image", tmp_path / "photo.png"] if option == "--controlnet" else []
    code, out, error = run("generate", "a", option, NAMES[name], *beside)
    assert (code, out, error.count("\n")) == (2, "", 1)
    assert "root:" not in error  # of /etc/passwd
    assert os.listdir() == []


@pytest.mark.parametrize("name", ["4096 characters", "NUL"])
@pytest.mark.parametrize("suffix", ["", ".png"])
def test_an_output_that_no_file_can_have_ends_in_one_line(
    name: str, suffix: str, run: Run, lcm_folder: Path
) -> None:
    """Case 5: output names of 4096 characters and with NUL."""
    code, out, error = run("generate", "a", "-m", lcm_folder, "--out", NAMES[name] + suffix)
    assert (code, out, error.count("\n")) == (2, "", 1)
    assert len(error) < 500
    assert os.listdir() == []


@pytest.mark.parametrize(
    "name", ["..\\..\\x.png", "C:\\x.png", "%2e%2e%2f.png", "CON.png", "<img src=x onerror=y>.png"]
)
def test_an_odd_output_is_a_file_of_that_very_name_here(
    name: str, run: Run, lcm_folder: Path, tmp_path: Path
) -> None:
    """Case 5: what is a path or markup elsewhere is a name here, and nothing is unescaped."""
    before = set(tmp_path.parent.iterdir())
    code, out, _ = run("generate", "a", "-m", lcm_folder, "--out", name)
    assert (code, out) == (0, f"{name}\n")
    assert os.listdir() == [name]
    assert set(tmp_path.parent.iterdir()) == before


def test_an_output_that_is_a_link_leaves_what_it_leads_to(
    run: Run, lcm_folder: Path, tmp_path: Path
) -> None:
    """Case 5: a symlink out of the folder."""
    target = tmp_path / "secret"
    target.write_text("before")
    os.symlink(target, "link.png")
    assert run("generate", "a", "-m", lcm_folder, "--out", "link.png")[0] == 2
    assert run("generate", "a", "-m", lcm_folder, "--out", "link.png", "--force")[0] == 0
    assert target.read_text() == "before"
    assert Path("link.png").is_file() and not Path("link.png").is_symlink()
    os.symlink(tmp_path / "absent", "dangling.png")
    run("generate", "a", "-m", lcm_folder, "--out", "dangling.png")
    assert not (tmp_path / "absent").exists()


@pytest.mark.parametrize("name", ["../secret.safetensors", "/etc/passwd", "..\\secret", "a\0b"])
def test_the_name_of_a_weight_stays_in_its_folder(name: str, tmp_path: Path) -> None:
    """Case 5: `weight_name` of a LoRA, whose file is there, one folder above."""
    (tmp_path / "loras").mkdir()
    content = safetensors({"x": floats(0, 4)}, bytes(4))
    for place in (tmp_path / "secret.safetensors", tmp_path / "loras" / "style.safetensors"):
        place.write_bytes(content)
    pipe = fewstep.DiffusionPipeline.from_pretrained(
        fewstep.EMBEDDED, text_encoder=None, tokenizer=None
    )
    with pytest.raises(CheckpointError, match="no file"):
        pipe.load_lora_weights(tmp_path / "loras", weight_name=name)


def test_markup_in_a_loras_name_stays_text(run: Run, sd_folder: Path) -> None:
    """Case 5: such a name is recorded and drawn again as it is."""
    layer = "unet.down_blocks.1.attentions.0.transformer_blocks.0.attn2.to_k"
    name = "<img src=x onerror=y>.safetensors"
    random = torch.Generator().manual_seed(0)
    parts = {"A": (2, 32), "B": (16, 2)}
    save_file(
        {f"{layer}.lora_{p}.weight": torch.randn(s, generator=random) for p, s in parts.items()},
        name,
    )
    common = ("-m", sd_folder, "-s", 1, "--size", 32)
    assert run("generate", "a", *common, "--lora", name, "--out", "a.png")[0] == 0
    assert run("repro", "a.png") == (0, "identical: a.png\n", "")
