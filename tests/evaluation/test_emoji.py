"""The whole benchmark on twelve concepts, with tiny random networks in place of the large ones."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path

import numpy as np
import pytest
import torch
from torch import nn

from fewstep.errors import RequestError
from fewstep.evaluation import emoji_judges
from fewstep.evaluation.emoji import Amounts, EmojiBenchmark, columns
from fewstep.evaluation.features import FeatureNet, FeatureNetSpec
from fewstep.evaluation.report import Report
from fewstep.training.emoji import render

SPRITES = Path(__file__).parents[1] / "data" / "emoji"
AMOUNTS = Amounts(backgrounds=6, recolours=4, pairs=6, counts=6)


def pixels_net(name: str, folder: object = None) -> FeatureNet:
    """A random linear map of the picture in 7 x 7 pixels: crude, but it tells concepts apart."""
    torch.manual_seed(len(name))
    module = nn.Sequential(nn.AvgPool2d(32), nn.Flatten(), nn.Linear(3 * 7 * 7, 1280))
    spec = FeatureNetSpec(
        name, (), lambda: module, lambda net, x: net(x), (127.0,) * 3, (128.0,) * 3
    )
    return FeatureNet(spec, module)


class Letters:
    """Sentences as random vectors of their letters."""

    def __call__(self, texts: Sequence[str]) -> np.ndarray:
        vectors = np.random.default_rng(0).normal(size=(128, 384))
        return np.stack([vectors[[ord(c) % 128 for c in text]].sum(0) for text in texts])


@pytest.fixture(scope="module")
def cache(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return tmp_path_factory.mktemp("cache")


@pytest.fixture(scope="module")
def benchmark(cache: Path) -> EmojiBenchmark:
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(emoji_judges, "PROBE_STYLES", ("flat", "noto"))
        patch.setattr(emoji_judges, "load_feature_net", pixels_net)
        patch.setattr(emoji_judges, "TextEncoder", Letters)
        made = EmojiBenchmark.prepare(SPRITES, cache, size=32, selection="all", progress=False)
        made.ceiling(AMOUNTS)  # loads both networks
        return made


class Painter:
    """A generator that knows the right picture of each prompt, and can be told to cheat."""

    def __init__(self, benchmark: EmojiBenchmark, shift: int = 0):
        scenes = [scene for of_kind in benchmark.tasks(AMOUNTS).values() for scene in of_kind]
        captions = [scene.caption for scene in scenes]
        self.pictures = {
            caption: render(scene, benchmark.judges.sprites, 32)
            for caption, scene in zip(captions[shift:] + captions[:shift], scenes, strict=True)
        }
        self.calls: list[tuple[int, int]] = []

    def __call__(self, prompts: list[str], seed: int) -> np.ndarray:
        self.calls.append((len(prompts), seed))
        return np.stack([self.pictures[prompt] for prompt in prompts])


def test_the_right_pictures_reach_the_ceiling_and_the_wrong_ones_do_not(
    benchmark: EmojiBenchmark,
) -> None:
    ceiling = benchmark.ceiling(AMOUNTS)
    assert benchmark.score(Painter(benchmark), AMOUNTS) == ceiling
    assert ceiling["recall@5/all/mobilenet-v2"] > 0.8
    assert ceiling["background/colour"] == 1.0
    assert ceiling["count/number"] > 0.6
    wrong = benchmark.score(Painter(benchmark, shift=1), AMOUNTS)
    for key in ("recall@1/all/mobilenet-v2", "background/colour", "pair/both@5"):
        assert wrong[key] < ceiling[key]


def test_every_score_has_a_column(benchmark: EmojiBenchmark) -> None:
    row = benchmark.ceiling_row(AMOUNTS)
    report = Report("emoji", columns(), (row,), benchmark.settings(AMOUNTS))
    assert "KID-EffLite0 x1000" in report.markdown()
    # twelve concepts have too few held out of the ridge map for retrieval among five and ten
    missing = {column.key for column in columns()} - set(row.scores)
    assert all(key.startswith("open@") for key in missing)


def test_batches_get_seeds_that_count_up(benchmark: EmojiBenchmark) -> None:
    painter = Painter(benchmark)
    few = benchmark.recall(painter, 10, batch_size=4)
    assert painter.calls == [(4, 0), (4, 1), (2, 2)]
    assert few == benchmark.recall_ceiling(10)
    assert benchmark.tasks(AMOUNTS) == benchmark.tasks(AMOUNTS)


def test_what_was_made_is_not_made_again(benchmark: EmojiBenchmark, cache: Path) -> None:
    times = {file: file.stat().st_mtime_ns for file in benchmark.judges.folder.iterdir()}
    assert {file.suffix for file in times} == {".safetensors"}
    benchmark.judges.build(progress=False)
    assert times == {file: file.stat().st_mtime_ns for file in benchmark.judges.folder.iterdir()}


def test_pictures_of_another_size_or_number_are_refused(benchmark: EmojiBenchmark) -> None:
    with pytest.raises(RequestError, match="these judges know 32 px pictures"):
        benchmark.recall(lambda prompts, seed: np.zeros((len(prompts), 64, 64, 3), np.uint8), 4)
    with pytest.raises(RequestError, match="a picture for each of 4 prompts, got 1"):
        benchmark.recall(lambda prompts, seed: np.zeros((1, 32, 32, 3), np.uint8), 4)
    with pytest.raises(RequestError, match="pairs must not be negative"):
        Amounts(pairs=-1)
