"""`fewstep recipes`: listed by group, shown, copied."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path

import pytest

from fewstep.training import load_recipe, recipe_names, recipe_path

Run = Callable[..., tuple[int, str, str]]


def test_all_are_listed_once_under_a_title_with_a_sentence_each(run: Run) -> None:
    code, out, _ = run("recipes")
    assert code == 0
    entries = [line.split() for line in out.splitlines() if line.startswith("  ")]
    assert sorted(name for name, *_ in entries) == recipe_names()
    assert all(len(words) > 4 for _, *words in entries)
    titles = [line for line in out.splitlines() if line.endswith(":")]
    assert len(titles) >= 5
    assert "Others:" not in titles
    below = out.partition("LCM-LoRA:")[2].partition("\n\n")[0]
    assert "lcm_lora_sdxl" in below and "lcm_sdxl" not in below


def test_one_is_printed_in_full(run: Run) -> None:
    name = recipe_names()[0]
    assert run("recipes", name)[1] == recipe_path(name).read_text(encoding="utf-8")


def test_one_is_copied_to_be_changed(run: Run) -> None:
    assert run("recipes", "lcm_lora_sd15", "--copy", "mine.toml") == (0, "mine.toml\n", "")
    assert load_recipe("mine.toml") == load_recipe("lcm_lora_sd15")
    Path("folder").mkdir()
    assert run("recipes", "lcm_lora_sd15", "--copy", "folder")[1] == "folder/lcm_lora_sd15.toml\n"
    assert sorted(path.name for path in Path().iterdir()) == ["folder", "mine.toml"]


@pytest.mark.parametrize(
    ("arguments", "words"),
    [
        ("nothing --copy a.toml", "'nothing' is neither a shipped recipe nor a file"),
        ("--copy a.toml", "--copy a.toml: says not which; give a recipe's name before it"),
        ("lcm_sd15 --copy there.toml", "--copy there.toml: exists; give another name"),
        ("lcm_sd15 --copy there.toml/a.toml", "--copy there.toml/a.toml: cannot be written"),
    ],
)
def test_what_cannot_be_copied_is_refused_in_a_line(arguments: str, words: str, run: Run) -> None:
    Path("there.toml").touch()
    code, out, error = run("recipes", *arguments.split())
    assert (code, out) == (2, "")
    assert words in error
    assert error.count("\n") == 1
    assert [path.name for path in Path().iterdir()] == ["there.toml"]
