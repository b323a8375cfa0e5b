"""Every script under examples/ runs as it is and writes its picture."""

from __future__ import annotations

import runpy
from pathlib import Path

import PIL.Image
import pytest

EXAMPLES = sorted((Path(__file__).parents[1] / "examples").glob("*.py"))


@pytest.mark.parametrize("script", EXAMPLES, ids=lambda path: path.stem)
def test_the_example_draws(script: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(tmp_path)
    runpy.run_path(str(script), run_name="__main__")
    (written,) = tmp_path.glob(f"{script.stem}.*")
    with PIL.Image.open(written) as picture:
        assert picture.size == (64, 64)
        assert len(picture.convert("RGB").getcolors(64 * 64) or ()) > 10
