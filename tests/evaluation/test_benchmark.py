"""The general benchmark on a dozen pictures, with tiny random networks in place of the large."""

from __future__ import annotations

import json
import subprocess
import sys
from collections.abc import Callable, Sequence
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import numpy as np
import pytest
import torch
from PIL import Image

from fewstep.errors import RequestError
from fewstep.evaluation.benchmark import PictureBenchmark
from fewstep.evaluation.judges import Judges, kid_subset
from fewstep.evaluation.kid import squared_mmd
from fewstep.evaluation.moments import Moments, frechet_distance
from fewstep.evaluation.references import References

COUNT = 13


class Pixels:
    """A feature network: 12 random projections of a picture."""

    size = 12

    def __init__(self, label: str = "Pixels", seed: int = 0):
        self.label, self.origin = label, f"seed {seed}"
        self.weight = np.random.default_rng(seed).normal(size=(8 * 8 * 3, self.size)) / 255

    def __call__(self, pictures: np.ndarray) -> np.ndarray:
        corner = pictures[:, :8, :8].reshape(len(pictures), -1)
        return (corner @ self.weight).astype(np.float32)


class Brightness:
    """A "CLIP" that likes bright pictures of long prompts."""

    source = "brightness"

    def __call__(self, pictures: np.ndarray, texts: Sequence[str]) -> np.ndarray:
        lengths = np.array([len(text) for text in texts])
        return (pictures.mean((1, 2, 3)) / 255 * lengths).astype(np.float32)


class Pipe:
    """A pipeline that draws noise, as bright as its guidance, until it has drawn enough."""

    device, dtype = torch.device("cpu"), torch.float32
    scheduler = SimpleNamespace(config={})

    def __init__(self, most: int = 10**6) -> None:
        self.drawn: list[str] = []
        self.most = most

    def __call__(self, prompts: list[str], generator: Any, **given: Any) -> tuple[np.ndarray]:
        if len(self.drawn) >= self.most:
            raise KeyboardInterrupt
        self.drawn += prompts
        shape = (given["height"], given["width"], 3)
        noise = [torch.rand(shape, generator=g).numpy() for g in generator]
        return (np.stack(noise) * given["guidance_scale"],)


@pytest.fixture(scope="module")
def references(tmp_path_factory: pytest.TempPathFactory) -> References:
    folder = tmp_path_factory.mktemp("reference")
    random = np.random.default_rng(0)
    for i in range(COUNT):
        pixels = random.integers(0, 256, (8, 8, 3)).astype(np.uint8)
        Image.fromarray(pixels).save(folder / f"{i:02d}.png")
        (folder / f"{i:02d}.txt").write_text("x" * (i + 1))
    return References.read(folder)


def method(pipe: Pipe, guidance: float = 1.0, steps: int = 4) -> Any:
    from fewstep.evaluation.methods import Method

    return Method("LCM", pipe, steps, guidance, "weights")


Make = Callable[..., PictureBenchmark]


@pytest.fixture
def make(references: References, tmp_path: Path) -> Make:
    judges: Any = Judges({"pixels": Pixels()}, Brightness())

    def made(**given: Any) -> PictureBenchmark:
        arguments = {"size": (8, 8), "batch": 4, "subset": 6} | given
        return PictureBenchmark(
            arguments.pop("references", references), judges, tmp_path, **arguments
        )

    return made


def test_a_row_is_the_metrics_computed_at_once(make: Make, references: References) -> None:
    benchmark, pipe = make(subset=None), Pipe()
    row = benchmark.row(method(pipe, 0.8))
    drawn = method(Pipe(), 0.8).pictures(benchmark.prompts, range(COUNT), width=8, height=8)
    real = references.pictures(range(COUNT), (8, 8))
    x, y = Pixels()(real), Pixels()(drawn)
    expected = frechet_distance(Moments.of(x), Moments.of(y))
    assert row.scores["fid/pixels"] == pytest.approx(expected, rel=1e-6)
    whole = squared_mmd(x.astype(np.float64), y.astype(np.float64))
    spread = row.scores["kid_std/pixels"]
    assert row.scores["kid/pixels"] == pytest.approx(whole, abs=spread)
    assert row.scores["clip"] == pytest.approx(Brightness()(drawn, benchmark.prompts).mean())
    assert 0 < row.scores["seconds"] < 1
    assert (row.method, row.steps, row.guidance) == ("LCM", 4, 0.8)


def test_worse_pictures_score_worse(make: Make) -> None:
    benchmark = make()
    good, dark = (benchmark.row(method(Pipe(), scale)).scores for scale in (1.0, 0.3))
    floor = benchmark.reference_row().scores
    for metric in ("fid/pixels", "kid/pixels"):
        assert dark[metric] > 2 * abs(good[metric]) and dark[metric] > floor[metric]
    assert dark["clip"] < good["clip"]
    assert "seconds" not in floor


def test_what_was_drawn_is_not_drawn_again(make: Make) -> None:
    pipe = Pipe()
    first = make().row(method(pipe))
    assert len(pipe.drawn) == COUNT
    assert make().row(method(pipe)) == first
    assert len(pipe.drawn) == COUNT
    for other in ({"seed": 1}, {"prompts": 7}, {"size": (16, 8)}, {"batch": 5}):
        before = len(pipe.drawn)
        make(**other).row(method(pipe))
        assert len(pipe.drawn) > before, other
    before = len(pipe.drawn)
    make().row(method(pipe, steps=8))
    assert len(pipe.drawn) == before + COUNT


def test_an_interrupted_run_goes_on_and_a_torn_file_is_made_again(
    make: Make, tmp_path: Path
) -> None:
    whole = make().row(method(Pipe()))
    files = {file: file.read_bytes() for file in tmp_path.rglob("*.safetensors")}
    for file in files:
        file.unlink()
    with pytest.raises(KeyboardInterrupt):
        make().row(method(Pipe(most=8)))
    pipe = Pipe()
    again = make().row(method(pipe))
    assert len(pipe.drawn) == COUNT - 8
    assert {k: v for k, v in again.scores.items() if k != "seconds"} == {
        k: v for k, v in whole.scores.items() if k != "seconds"
    }
    torn = max(files, key=lambda file: file.stat().st_mtime)
    torn.write_bytes(torn.read_bytes()[:50])
    make().row(method(pipe))
    assert COUNT - 8 < len(pipe.drawn) <= COUNT - 8 + 4


def test_pictures_do_not_depend_on_the_batch(make: Make) -> None:
    scores = [make(batch=size).row(method(Pipe())).scores for size in (1, 4, 13)]
    for other in scores[1:]:
        for key in ("fid/pixels", "kid/pixels", "clip"):
            assert other[key] == pytest.approx(scores[0][key], rel=1e-6)


def test_report_and_sheet_tell_what_they_are_of(make: Make, references: References) -> None:
    told: list[int] = []
    benchmark = make(prompts=9, advance=told.append)
    rows = [benchmark.reference_row(), benchmark.row(method(Pipe()))]
    report = benchmark.report("tiny", rows)
    assert sum(told) == COUNT + 9
    text = report.markdown()
    for words in ("FID-Pixels", "KID-Pixels x1000", "CLIP score", " ± ", "prompts: 9", "LANCZOS"):
        assert words in text
    assert references.hash in text and "seed 0" in text and "not Inception's" in text
    assert json.loads(report.json())["rows"][1]["guidance"] == 1.0
    assert benchmark.sheet().height > 4 * 8


def test_sets_that_are_too_small_are_refused_before_drawing(
    make: Make, references: References
) -> None:
    with pytest.raises(
        RequestError, match=r"prompts must be in \[1, 13\], the captions of .*, got 40"
    ):
        make(prompts=40)
    with pytest.raises(RequestError, match=r"kid_subset must be in \[2, 5\], .* got 6"):
        make(prompts=5)
    with pytest.raises(RequestError, match="KID needs 4 pictures in each set, got 3 prompts"):
        make(prompts=3, subset=None)
    with pytest.raises(RequestError, match="batch must be at least 1, got 0"):
        make(batch=0)
    assert (kid_subset(None, 4000, 4000), kid_subset(None, 30, 64), kid_subset(7, 9, 9)) == (
        500,
        15,
        7,
    )
    with pytest.raises(RequestError, match="there is no judge"):
        Judges.load(())


TWO_RANKS = """
import json, sys
sys.path.insert(0, sys.argv[1])
from pathlib import Path
from test_benchmark import Brightness, Pipe, Pixels, method
from fewstep.evaluation.benchmark import PictureBenchmark
from fewstep.evaluation.judges import Judges
from fewstep.evaluation.ranks import Ranks
from fewstep.evaluation.references import References
ranks, pipe = Ranks.of_environment(), Pipe()
judges = Judges({"pixels": Pixels()}, Brightness())
benchmark = PictureBenchmark(References.read(sys.argv[2]), judges, sys.argv[3],
                             size=(8, 8), batch=4, subset=6, ranks=ranks)
row = benchmark.row(method(pipe))
print(json.dumps([dict(row.scores), len(pipe.drawn)]))
ranks.close()
"""


def test_two_processes_share_the_prompts_and_find_what_one_finds(
    make: Make, references: References, tmp_path: Path
) -> None:
    alone = make().row(method(Pipe())).scores
    store = {"MASTER_ADDR": "127.0.0.1", "MASTER_PORT": str(free_port()), "WORLD_SIZE": "2"}
    script = [sys.executable, "-c", TWO_RANKS, Path(__file__).parent, references.folder]
    processes = [
        subprocess.Popen(
            [*map(str, script), str(tmp_path / "shared")],
            env={**environment(), **store, "RANK": str(rank), "LOCAL_RANK": str(rank)},
            stdout=subprocess.PIPE,
            text=True,
        )
        for rank in (0, 1)
    ]
    found = [json.loads(process.communicate(timeout=60)[0]) for process in processes]
    assert [drawn for _, drawn in found] == [8, 5]  # chunks of 4: the first has 0 and 2
    for scores, _ in found:
        for key in ("fid/pixels", "kid/pixels", "kid_std/pixels", "clip"):
            assert scores[key] == pytest.approx(alone[key], rel=1e-9)


def environment() -> dict[str, str]:
    import os

    return {**os.environ, "OMP_NUM_THREADS": "1"}


def free_port() -> int:
    import socket

    with socket.socket() as server:
        server.bind(("127.0.0.1", 0))
        return int(server.getsockname()[1])
