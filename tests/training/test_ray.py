"""A cluster of this machine alone: it trains, encodes and draws as one process does."""

from __future__ import annotations

import os
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import many
import numpy as np
import pytest
import torch

from fewstep import DiffusionPipeline
from fewstep.errors import RequestError
from fewstep.training import ray_cluster
from fewstep.training.run import train
from fewstep.training.state import read_weights

LORA = {
    "lora": {"rank": 2, "alpha": 2.0, "targets": ["to_q"]},
    "guidance_dim": 0,
    "target": "stopgrad",
}


def test_a_cluster_without_workers_is_refused() -> None:
    with pytest.raises(RequestError, match="--ray 0: there must be at least 1"):
        ray_cluster.train_on_ray(many.recipe(), 0)


def test_missing_ray_is_named_with_the_remedy(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setitem(__import__("sys").modules, "ray", None)
    with pytest.raises(RequestError, match=r"pip install 'fewstep\[ray\]'"):
        ray_cluster.connect()


@pytest.fixture(scope="module")
def cluster() -> Iterator[Any]:
    ray = pytest.importorskip("ray")
    os.environ.setdefault("RAY_TRAIN_V2_ENABLED", "1")
    ray.init(num_cpus=4, include_dashboard=False, log_to_driver=False, logging_level="ERROR")
    yield ray
    ray.shutdown()


@pytest.mark.filterwarnings("ignore")  # Ray's own, of many kinds
def test_a_cluster_encodes_trains_and_draws(
    cluster: Any, sd_folder: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    data = many.pictures(tmp_path / "pictures")
    made = many.student(sd_folder, data, tmp_path / "ray", LORA)
    ray_cluster.encode_on_ray(made, 2)
    stored = sorted((data / "cache").rglob("*.safetensors"))
    assert len(stored) >= 2
    folder = ray_cluster.train_on_ray(made, 2)
    assert sorted((data / "cache").rglob("*.safetensors")) == stored  # nothing was encoded again
    alone = train(many.student(sd_folder, data, tmp_path / "alone", LORA))
    a, b = read_weights(folder), read_weights(alone)
    assert a.keys() == b.keys()
    assert all(torch.allclose(a[key], b[key], atol=1e-4) for key in a)

    request = {"num_inference_steps": 2, "height": 32, "width": 32}
    prompts, seeds = ["a cat", "a red dog", "red"], [3, 4, 5]
    drawn = dict(ray_cluster.draw_on_ray(sd_folder, prompts, seeds, request, 1, batch=2))
    pipe = DiffusionPipeline.from_pretrained(sd_folder)
    pipe.set_progress_bar_config(disable=True)
    for number, (prompt, seed) in enumerate(zip(prompts, seeds, strict=True)):
        alone_drawn = pipe(prompt, generator=torch.Generator().manual_seed(seed), **request)
        off = np.asarray(alone_drawn.images[0], int) - np.asarray(drawn[number], int)
        assert abs(off).max() <= 1


def test_more_workers_than_the_cluster_has_are_refused(cluster: Any) -> None:
    with pytest.raises(RequestError, match="--ray 99: the cluster has 4 CPUs"):
        ray_cluster.train_on_ray(many.recipe(), 99)
