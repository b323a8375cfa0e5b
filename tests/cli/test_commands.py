"""The commands beside generate and repro: thin, so what they hand on and how they refuse."""

from __future__ import annotations

import json
from collections.abc import Callable
from pathlib import Path

import numpy as np
import PIL.Image
import pytest

from fewstep.cli.info import model_facts
from fewstep.training import recipe_names

Run = Callable[..., tuple[int, str, str]]


@pytest.mark.parametrize(
    "command",
    ["data emoji", "train", "recipes", "package", "evaluate", "info", "run", "canny", "models"],
)
def test_every_command_has_help_with_examples(command: str, run: Run) -> None:
    code, out, _ = run(*command.split(), "--help")
    assert code == 0
    assert f"Usage: fewstep {command}" in out
    assert f"  fewstep {command}" in out.partition("Examples:")[2]


@pytest.mark.parametrize(
    ("command", "words"),
    [
        ("recipes nothing", "recipe 'nothing' is neither a shipped recipe nor a file"),
        ("train nothing", "recipe 'nothing' is neither a shipped recipe nor a file"),
        ("train RECIPE run.stepz=3", "unknown key 'stepz'; did you mean 'steps'?"),
        ("train RECIPE run.steps", "'run.steps' must have the form key=value"),
        ("data", "Missing command (see fewstep data --help)"),
        ("data emoji", "Missing option '--output'"),
        ("data emoji --output x --styles oil", "styles=['oil'] (have: 3d"),
        ("package x y", "run='x' has no finished LCM"),
        ("package x y --figures no.md", "--figures no.md: cannot be read"),
        ("canny no.png", "FILE no.png: no such file; give a PNG, JPEG or WebP file"),
        ("canny no.png --low -1", "--low"),
        ("models extra", "unexpected extra argument"),
    ],
)
def test_bad_input_ends_in_one_line(command: str, words: str, run: Run, sd_folder: Path) -> None:
    places = {"RECIPE": recipe_names()[0], "SD": str(sd_folder)}
    code, out, error = run(*(places.get(word, word) for word in command.split()))
    assert (code, out) == (2, "")
    assert error.startswith("error: ")
    assert error.count("\n") == 1
    assert words in error
    assert list(Path().iterdir()) == []


def test_canny_draws_edges(run: Run, tmp_path: Path) -> None:
    photo = PIL.Image.new("RGB", (40, 30))
    photo.paste("white", (10, 10, 30, 20))
    photo.save(tmp_path / "photo.png")
    for name in ("photo-edges.png", "photo-edges-2.png"):
        assert run("canny", tmp_path / "photo.png") == (0, f"{name}\n", "")
    assert (
        run("canny", tmp_path / "photo.png", "--low", 5000, "--high", 5000, "-o", "no.png")[0] == 0
    )
    white = [np.asarray(PIL.Image.open(name)).mean() for name in ("photo-edges.png", "no.png")]
    assert white[0] > white[1] == 0
    assert run("canny", tmp_path / "photo.png", "-o", "no.png")[0] == 2
    assert run("canny", tmp_path / "photo.png", "-o", "no.png", "--force")[0] == 0


def test_info_tells_versions_devices_and_the_model(run: Run) -> None:
    code, out, _ = run("info", "--json")
    told = json.loads(out)
    assert code == 0
    assert {"fewstep", "torch", "transformers", "python"} <= set(told["versions"])
    assert told["devices"][-1].startswith("cpu (")
    assert told["model"]["name"] == "fewstep-emoji"
    assert run("info")[1].startswith(f"fewstep      {told['versions']['fewstep']}\n")


def test_the_models_figures_are_the_tables_of_its_card(tmp_path: Path) -> None:
    (tmp_path / "README.md").write_text("# A\n\n| a | b |\n|---|---|\n| 1 | 2 |\n\nwords\n")
    (tmp_path / "weights").write_bytes(bytes(1_500_000))
    facts = model_facts(tmp_path)
    assert facts["figures"] == ["| a | b |", "|---|---|", "| 1 | 2 |"]
    assert facts["megabytes"] == 1.5
