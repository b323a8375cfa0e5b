"""`fewstep bench`: what is refused before anything is measured, and what a failure looks like."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest

from fewstep.bench import turns
from fewstep.bench.report import Measured, Result
from fewstep.bench.work import Work

Run = Callable[..., tuple[int, str, str]]
CEILINGS = {"product": 1e9, "convolution": 1e9, "copy": 1e9}


@pytest.mark.parametrize(
    ("options", "message"),
    [
        (["--task", "inpainting"], "task 'inpainting' is unknown; give one of text-to-image"),
        (["--part", "text"], "part 'text' is unknown"),
        (["--dtype", "float8"], "'float8' is unknown"),
        (["--dtype", "auto"], "dtype 'auto' is unknown; give one of float32"),
        (["--steps", "4,x"], "--steps 4,x: must be numbers"),
        (["--part", "unet", "--steps", "1,2"], "--steps 1,2: mean nothing to --part unet"),
        (["--size", "x"], "'x' is no size"),
        (["--peer", "pytorch"], "peer 'pytorch' is unknown; give one of fewstep, diffusers"),
        (["--peer", "fewstep"], "peer: one is named twice"),
        (["--runs", "0"], "runs 0: must be at least 1"),
        (["--plot", "bars.svg"], "--plot bars.svg: the plot is a PNG file"),
        (["--json", "."], "--json .: is a folder; give a file"),
        (["--error"], "error: compares part unet or vae"),
        (["--device", "tpu"], "device 'tpu' is unknown"),
    ],
)
def test_options_that_cannot_be_served_are_named(
    run: Run, options: list[str], message: str
) -> None:
    code, out, err = run("bench", *options)
    assert (code, out) == (2, "") and message in err and err.count("\n") == 1


@pytest.fixture
def works(monkeypatch: pytest.MonkeyPatch) -> list[Work]:
    """The works that are measured, instead of measuring them; one of 3 steps fails."""
    seen: list[Work] = []

    def measure(work: Work, sides: Any, how: Any) -> Result:
        seen.append(work)
        failed = "it broke" if work.steps == 3 else None
        sides = {side.name: Measured((1.0,), (1.0,), failed=failed) for side in sides}
        return Result(work, how.cold, how.runs, how.warmup, sides, {"total": 1e9}, CEILINGS)

    monkeypatch.setattr(turns, "measure", measure)
    return seen


def test_every_number_of_steps_is_a_work(run: Run, works: list[Work], tmp_path: Path) -> None:
    code, out, _ = run("bench", "--steps", "1,2", "--batch", "2", "--size", "64x32", "--peer", "")
    assert code == 0 and out.count("fewstep reaches 100% of this machine's limit") == 2
    assert [work.steps for work in works] == [1, 2]
    assert {(work.batch, work.size) for work in works} == {(2, (64, 32))}


def test_the_exit_code_tells_that_fewstep_failed(run: Run, works: list[Work]) -> None:
    code, out, _ = run("bench", "--steps", "3", "--plot", "bars.png")
    assert code == 1 and "fewstep: it broke" in out
    assert not Path("bars.png").exists()
