"""What starting costs, told by what is imported and by the collector, not by the clock."""

from __future__ import annotations

import gc
import json
import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path
from types import ModuleType

import pytest
import torch
from torch import nn

from fewstep.checkpoints.weights import Unfilled, read_ahead
from fewstep.imports import first_import

LIBRARY = "a_large_library"

DRAW = """
import fewstep
pipe = fewstep.DiffusionPipeline.from_pretrained(fewstep.EMBEDDED)
pipe.set_progress_bar_config(disable=True)
pipe("a red apple", num_inference_steps=4).images[0].save("apple.png")
"""
# What transformers brings on its own, for a text encoder and its tokenizer, and torch with it.
ENCODE = """
import torch, transformers, PIL.Image, PIL.PngImagePlugin, tqdm.auto
from transformers import CLIPTextModel, CLIPTokenizer
"""
DRAW_FROM_EMBEDDINGS = """
import fewstep
pipe = fewstep.LatentConsistencyModelPipeline.from_pretrained(
    fewstep.EMBEDDED, text_encoder=None, tokenizer=None
)
pipe.set_progress_bar_config(disable=True)
import torch
pipe(prompt_embeds=torch.zeros(1, 64, 192), num_inference_steps=1)
"""
LOAD_A_NETWORK = """
import fewstep
fewstep.AutoencoderKL.from_pretrained(fewstep.EMBEDDED, subfolder="vae")
"""
# Never needed for a picture, whether they are installed or not.
NEEDLESS = {
    "cv2", "datasets", "diffusers", "imageio", "IPython", "matplotlib", "pandas", "peft", "ray",
    "resvg_py", "rich", "sklearn", "tensorboard", "torchvision", "typer", "wandb",
    "fewstep.cli", "fewstep.evaluation", "fewstep.training",
    "torch._inductor.compile_fx",
}  # fmt: skip


def modules_after(code: str, folder: Path) -> set[str]:
    """The names of all modules in a fresh process after `code`."""
    told = "\nimport json, sys; print(json.dumps(sorted(sys.modules)))"
    done = subprocess.run(
        [sys.executable, "-c", code + told], cwd=folder, capture_output=True, text=True, check=True
    )
    return set(json.loads(done.stdout.splitlines()[-1]))


def test_a_picture_imports_nothing_that_it_does_not_need(tmp_path: Path) -> None:
    drawn = modules_after(DRAW, tmp_path)
    assert (tmp_path / "apple.png").is_file()
    assert drawn & NEEDLESS == set()
    others = {name for name in drawn if name.split(".")[0] != "fewstep"}
    assert len(drawn - others) <= 110
    further = others - modules_after(ENCODE, tmp_path)
    assert len(further) <= 25, sorted(further)


def test_embeddings_are_drawn_without_transformers(tmp_path: Path) -> None:
    assert "transformers" not in modules_after(DRAW_FROM_EMBEDDINGS, tmp_path)


def test_building_a_network_starts_none_of_the_compiler(tmp_path: Path) -> None:
    loaded = modules_after(LOAD_A_NETWORK, tmp_path)
    assert loaded & {"sympy", "torch._dynamo", "transformers"} == set()


# ── the collector ──


@pytest.fixture
def thawed() -> Iterator[None]:
    """A test after which all objects are collected again."""
    yield
    gc.unfreeze()
    gc.enable()


def test_the_collector_rests_while_a_library_is_new(
    monkeypatch: pytest.MonkeyPatch, thawed: None
) -> None:
    before = gc.get_freeze_count()
    with first_import(LIBRARY):
        assert not gc.isenabled()
        monkeypatch.setitem(sys.modules, LIBRARY, ModuleType(LIBRARY))
        with first_import("another"):  # as when one library imports another
            assert not gc.isenabled()
        assert not gc.isenabled()
    assert gc.isenabled()
    assert gc.get_freeze_count() > before


def test_the_collector_works_on_where_the_library_is_there(
    monkeypatch: pytest.MonkeyPatch, thawed: None
) -> None:
    monkeypatch.setitem(sys.modules, LIBRARY, ModuleType(LIBRARY))
    before = gc.get_freeze_count()
    with first_import(LIBRARY):
        assert gc.isenabled()
    assert gc.get_freeze_count() == before


def test_a_failed_import_leaves_the_collector_as_it_was(thawed: None) -> None:
    before = gc.get_freeze_count()
    with pytest.raises(ImportError), first_import(LIBRARY):
        raise ImportError
    assert gc.isenabled()
    assert gc.get_freeze_count() == before


def test_a_collector_that_was_off_stays_off(monkeypatch: pytest.MonkeyPatch, thawed: None) -> None:
    gc.disable()
    with first_import(LIBRARY):
        monkeypatch.setitem(sys.modules, LIBRARY, ModuleType(LIBRARY))
    assert not gc.isenabled()


def test_what_was_garbage_before_an_import_is_not_kept(
    monkeypatch: pytest.MonkeyPatch, thawed: None
) -> None:
    freed = []

    class Cycle:
        def __init__(self) -> None:
            self.itself = self

        def __del__(self) -> None:
            freed.append(True)

    Cycle()
    with first_import(LIBRARY):
        monkeypatch.setitem(sys.modules, LIBRARY, ModuleType(LIBRARY))
    assert freed


# ── the weights ──


def test_networks_are_filled_unless_they_have_no_numbers() -> None:
    with Unfilled():
        filled = nn.Linear(64, 64)
        with torch.device("meta"):
            norm = nn.GroupNorm(8, 64)
    assert 0 < filled.weight.abs().max() <= 1 / 8  # U(-1/sqrt(n), 1/sqrt(n))
    assert norm.weight.is_meta


def test_reading_ahead_leaves_errors_to_the_reader(tmp_path: Path) -> None:
    (tmp_path / "a").write_bytes(b"x" * 10_000)
    read_ahead([tmp_path / "missing", tmp_path / "a"])
    read_ahead([])
    assert (tmp_path / "a").read_bytes() == b"x" * 10_000
