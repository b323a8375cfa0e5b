"""Training, encoding and drawing on the workers of a Ray cluster; needs `fewstep[ray]`.

Everything runs as it does under torchrun: Ray finds the machines, starts the processes, and starts
them again when a machine is taken away. Folders must be the same on every machine. RAY_ADDRESS
names the cluster; without it this machine is one.
"""

from __future__ import annotations

import os
from collections.abc import Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any

import numpy as np
from PIL import Image

from ..errors import FewstepError, RequestError
from .config import Recipe

RETRIES = 3  # of a group that lost a worker; it goes on from the last checkpoint


class ClusterError(FewstepError):
    """The workers of a cluster failed, more often than they are started again."""


def train_on_ray(recipe: Recipe, workers: int, retries: int = RETRIES) -> Path:
    """Train on so many workers of a cluster, each with a GPU if it has any; the run's folder."""
    check(workers)
    ray = connect()
    from ray.train import FailureConfig, RunConfig, ScalingConfig, TrainingFailedError
    from ray.train.torch import TorchConfig, TorchTrainer

    from .ranks import PATIENCE

    gpu = uses_gpu(ray, recipe, workers)
    folder = recipe.output.absolute()
    trainer = TorchTrainer(
        work,
        train_loop_config={"recipe": recipe, "here": os.getcwd()},
        torch_config=TorchConfig(
            backend="cpu:gloo,cuda:nccl" if gpu else "gloo", timeout_s=int(PATIENCE.total_seconds())
        ),
        scaling_config=ScalingConfig(num_workers=workers, use_gpu=gpu),
        run_config=RunConfig(
            name="ray", storage_path=str(folder), failure_config=FailureConfig(retries)
        ),
    )
    try:
        trainer.fit()
    except TrainingFailedError as error:
        raise ClusterError(
            f"--ray {workers}: the workers failed ({last_line(error)}); the same command goes on "
            f"from the last checkpoint in {folder}"
        ) from error
    return folder


def work(settings: dict[str, Any]) -> None:
    """One worker's part of a training run."""
    from .run import train

    os.chdir(settings["here"])  # for paths in the recipe
    train(settings["recipe"])


def encode_on_ray(recipe: Recipe, workers: int) -> None:
    """Fill the cache of a recipe's encoded data: by Ray Data, each worker encodes a share."""
    check(workers)
    recipe.from_base  # noqa: B018 - raises for a phase that encodes nothing
    ray = connect()
    gpu = uses_gpu(ray, recipe, workers)
    shares = ray.data.range(workers, override_num_blocks=workers)
    done = shares.map_batches(
        Encoder,
        fn_constructor_args=(recipe, workers, os.getcwd()),
        batch_size=1,
        concurrency=workers,
        num_gpus=int(gpu),
    )
    done.materialize()


class Encoder:
    """A worker that encodes the shares of which it gets the numbers."""

    def __init__(self, recipe: Recipe, shares: int, here: str) -> None:
        from .networks import load_base
        from .run import device_of

        os.chdir(here)
        self.recipe, self.shares = recipe, shares
        self.pipe = load_base(recipe.from_base, recipe.folder).to(device_of(recipe.run.device))

    def __call__(self, batch: dict[str, np.ndarray]) -> dict[str, np.ndarray]:
        from .data import encode_share

        for share in batch["id"]:
            encode_share(self.recipe, self.pipe, int(share), self.shares)
        return batch


def draw_on_ray(
    model: str | Path,
    prompts: Sequence[str],
    seeds: Sequence[int],
    request: Mapping[str, Any],
    workers: int,
    *,
    batch: int = 8,
    gpu: bool | None = None,
) -> Iterator[tuple[int, Image.Image]]:
    """The number and picture of each prompt, in any order, drawn with its own seed by Ray Data.

    `request` holds further arguments of the pipeline's call. `gpu` None: if the cluster has any.
    """
    check(workers)
    if len(prompts) != len(seeds):
        raise RequestError(f"seeds holds {len(seeds)} numbers for {len(prompts)} prompts")
    ray = connect()
    gpu = bool(ray.cluster_resources().get("GPU")) if gpu is None else gpu
    rows = [
        {"number": number, "prompt": prompt, "seed": seed}
        for number, (prompt, seed) in enumerate(zip(prompts, seeds, strict=True))
    ]
    drawn = ray.data.from_items(rows, override_num_blocks=max(1, -(-len(rows) // batch)))
    drawn = drawn.map_batches(
        Drawer,
        fn_constructor_args=(str(model), dict(request), os.getcwd(), gpu),
        batch_size=batch,
        concurrency=workers,
        num_gpus=int(gpu),
    )
    for row in drawn.iter_rows():
        yield int(row["number"]), Image.fromarray(np.asarray(row["picture"]))


class Drawer:
    """A worker that draws batches of prompts."""

    def __init__(self, model: str, request: dict[str, Any], here: str, gpu: bool) -> None:
        from ..pipelines.base import DiffusionPipeline

        os.chdir(here)
        self.pipe: Any = DiffusionPipeline.from_pretrained(model).to("cuda" if gpu else "cpu")
        self.pipe.set_progress_bar_config(disable=True)
        self.request = request

    def __call__(self, batch: dict[str, np.ndarray]) -> dict[str, np.ndarray]:
        import torch

        seeds = [torch.Generator().manual_seed(int(seed)) for seed in batch["seed"]]
        prompts = [str(prompt) for prompt in batch["prompt"]]
        pictures = self.pipe(prompts, generator=seeds, **self.request).images
        return {"number": batch["number"], "picture": np.stack([np.asarray(p) for p in pictures])}


# ── the cluster ──


def connect() -> Any:
    """Ray, connected. Raises RequestError where it is not installed."""
    try:
        import ray
        import ray.data
        import ray.train.torch
    except ImportError as error:
        raise RequestError(
            f"--ray needs Ray, and {error.name or 'a part of it'} is missing; "
            "pip install 'fewstep[ray]', or leave --ray out"
        ) from None
    if not ray.is_initialized():
        ray.init(address=os.environ.get("RAY_ADDRESS"), include_dashboard=False)
    ray.data.DataContext.get_current().enable_progress_bars = False
    return ray


def uses_gpu(ray: Any, recipe: Recipe, workers: int) -> bool:
    """Whether workers get a GPU each. Raises RequestError for a cluster that has too little."""
    resources: dict[str, float] = ray.cluster_resources()
    gpu = recipe.run.device.startswith("cuda")
    if recipe.run.device == "auto":
        gpu = resources.get("GPU", 0) > 0
    kind = "GPU" if gpu else "CPU"
    if resources.get(kind, 0) < workers:
        raise RequestError(
            f"--ray {workers}: the cluster has {resources.get(kind, 0):.0f} {kind}s; ask for at "
            "most so many workers, or set RAY_ADDRESS to a larger cluster"
        )
    return gpu


def check(workers: int) -> None:
    """Raises RequestError for a number of workers that cannot be."""
    if workers < 1:
        raise RequestError(f"--ray {workers}: there must be at least 1 worker")


def last_line(error: BaseException) -> str:
    """What an error of a worker says in the end."""
    lines = [line for line in str(error).splitlines() if line.strip()]
    return lines[-1].strip() if lines else type(error).__name__
