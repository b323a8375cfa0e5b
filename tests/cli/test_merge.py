"""`fewstep merge`: LoRAs into one file, or into a model."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path

import pytest
import torch
from tiny_runs import lora_file, output

import fewstep

Run = Callable[..., tuple[int, str, str]]


@pytest.fixture
def loras(sd_folder: Path, tmp_path: Path) -> list[Path]:
    return [
        lora_file(tmp_path / f"{name}.safetensors", sd_folder, i) for i, name in enumerate("ab")
    ]


def test_weights_and_files_become_one(run: Run, loras: list[Path], sd_folder: Path) -> None:
    a, b = loras
    code, out, error = run(
        *("merge", f"{a}:0.8", b, "--output", "both.safetensors", "--model", sd_folder)
    )
    assert (code, error) == (0, "")
    assert out == "both.safetensors\nrank 6; relative error 0.0e+00, in the worst layer 0.0e+00\n"
    into = ("--model", sd_folder, "--output", "model", "--scheduler", "lcm", "--half")
    assert run("merge", f"{a}:0.8", f"{b}:1.0", *into) == (0, "model\n", "")
    merged = fewstep.DiffusionPipeline.from_pretrained("model")
    other = fewstep.DiffusionPipeline.from_pretrained(sd_folder)
    other.load_lora_weights("both.safetensors")
    torch.testing.assert_close(output(merged.unet), output(other.unet), rtol=0, atol=1e-5)
    assert isinstance(merged.scheduler, fewstep.LCMScheduler)
    assert Path("model/unet/diffusion_pytorch_model.fp16.safetensors").exists()


def test_a_smaller_rank_tells_its_error(run: Run, loras: list[Path], sd_folder: Path) -> None:
    given = ("--rank", 2, "--output", "c.safetensors", "--model", sd_folder, "--format", "kohya")
    code, out, _ = run("merge", *loras, *given)
    assert code == 0
    assert out.splitlines()[1].startswith("rank 2; relative error ")
    assert "0.0e+00" not in out


@pytest.mark.parametrize(
    ("arguments", "words"),
    [
        ("A B", "Missing option '--output'"),
        ("A B --output model", "is no .safetensors file; give one, or --model to merge into"),
        ("A:nan --output c.safetensors", "must be NAME or NAME:WEIGHT"),
        ("A B --output A", "exists; give another name"),
        ("A B --output c.safetensors", "does not say which model it is for"),
        (
            "A B --output c.safetensors --scheduler lcm",
            "--scheduler lcm: has a meaning for a model",
        ),
        ("A B --output m --model SD --rank 2", "--rank 2: has a meaning for a LoRA's file only"),
        ("A none --output c.safetensors --model SD", "there is no local folder 'none'"),
        ("A B --output c.safetensors --rank 0", "--rank"),
    ],
)
def test_what_cannot_be_merged_is_refused_in_a_line(
    arguments: str, words: str, run: Run, loras: list[Path], sd_folder: Path
) -> None:
    places = {"A": loras[0], "B": loras[1], "SD": sd_folder, "A:nan": f"{loras[0]}:nan"}
    code, out, error = run("merge", *(places.get(word, word) for word in arguments.split()))
    assert (code, out) == (2, "")
    assert words in error
    assert error.count("\n") == 1
    assert list(Path().iterdir()) == []
