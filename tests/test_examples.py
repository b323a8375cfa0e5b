"""Every script under examples/ runs as it is and writes its picture."""

from __future__ import annotations

import runpy
import sys
from pathlib import Path

import PIL.Image
import pytest
from original_layout import whole
from safetensors.torch import save_file

import fewstep

EXAMPLES = sorted((Path(__file__).parents[1] / "examples").glob("*.py"))
STRIPS = {"previews": 4, "lora": 3, "t2i_adapter": 3}  # pictures side by side


@pytest.mark.parametrize("script", EXAMPLES, ids=lambda path: path.stem)
def test_the_example_draws(
    script: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, sd_folder: Path
) -> None:
    monkeypatch.chdir(tmp_path)
    given = []
    if script.stem == "single_file":
        save_file(whole(fewstep.DiffusionPipeline.from_pretrained(sd_folder)), "model.safetensors")
        given = ["model.safetensors", str(sd_folder)]
    monkeypatch.setattr(sys, "argv", [str(script), *given])
    runpy.run_path(str(script), run_name="__main__")
    (written,) = tmp_path.glob(f"{script.stem}.*")
    with PIL.Image.open(written) as picture:
        assert picture.size == (64 * STRIPS.get(script.stem, 1), 64)
        assert len(picture.convert("RGB").getcolors(256 * 64) or ()) > 10
