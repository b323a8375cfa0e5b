"""Case 23: a cache that is damaged, foreign or unwritable changes no picture."""

from __future__ import annotations

import shutil
from pathlib import Path

import numpy as np
import pytest
from bad_files import python

from fewstep import kernels
from fewstep.kernels import build

DRAW = """
import sys, warnings
warnings.simplefilter("ignore")
import numpy, torch, fewstep
pipe = fewstep.DiffusionPipeline.from_pretrained(fewstep.EMBEDDED)
pipe.set_progress_bar_config(disable=True)
generator = torch.Generator().manual_seed(3)
pictures = pipe("a red apple", num_inference_steps=1, generator=generator, output_type="np").images
numpy.save(sys.argv[1], pictures)
"""


def drawn(file: Path, **variables: str) -> np.ndarray:
    done = python("-c", DRAW, file, **variables)
    assert done.returncode == 0, done.stderr
    found: np.ndarray = np.load(file)
    return found


@pytest.fixture(scope="module")
def expected(tmp_path_factory: pytest.TempPathFactory) -> np.ndarray:
    """The picture of this machine as it is."""
    return drawn(tmp_path_factory.mktemp("drawn") / "whole.npy")


@pytest.fixture
def cached() -> Path:
    """The kernels of this machine, compiled."""
    if not kernels.available():
        pytest.skip(kernels.status())
    return Path(build.kernels().reason)


def test_a_damaged_object_and_a_foreign_one_beside_it_change_no_bit_of_a_picture(
    cached: Path, expected: np.ndarray, tmp_path: Path
) -> None:
    """Case 23: a corrupt object is compiled again, one of an older version is left alone."""
    folder = tmp_path / "cache" / "kernels"
    folder.mkdir(parents=True)
    foreign = folder / "kernels-00000000000000000000.so"
    foreign.write_bytes(b"of another version")
    damaged = bytearray(cached.read_bytes())
    damaged[len(damaged) // 2] ^= 1
    (folder / cached.name).write_bytes(damaged)
    picture = drawn(tmp_path / "a.npy", FEWSTEP_CACHE=str(folder.parent))
    assert np.array_equal(picture, expected)
    assert build._is_sound(folder / cached.name)
    assert {path.name for path in folder.iterdir()} == {cached.name, foreign.name}
    assert foreign.read_bytes() == b"of another version"


def test_a_cache_that_cannot_be_written_costs_speed_and_not_the_picture(
    cached: Path, expected: np.ndarray, tmp_path: Path
) -> None:
    """Case 23: a read-only cache. PyTorch computes, and rounds otherwise."""
    (tmp_path / "file").touch()
    picture = drawn(tmp_path / "a.npy", FEWSTEP_CACHE=str(tmp_path / "file"))
    assert np.abs(picture - expected).max() < 1e-3
    assert (tmp_path / "file").read_bytes() == b""


def test_a_whole_object_is_used_from_a_copy_of_the_cache(cached: Path, tmp_path: Path) -> None:
    """Case 23: a cache that is moved is none that is damaged."""
    shutil.copy2(cached, tmp_path / cached.name)
    assert build._is_sound(tmp_path / cached.name)
