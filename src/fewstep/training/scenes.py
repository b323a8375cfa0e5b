"""Training pictures and captions of a recipe, and their cache of latents and tokens."""

from __future__ import annotations

import hashlib
import json
from collections.abc import Sequence
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

import numpy as np
import torch
from torch import Tensor
from torch.utils.data import DataLoader, Dataset
from tqdm import tqdm

from ..checkpoints.config import replacing
from ..errors import RequestError
from ..models.vae import AutoencoderKL
from .config import Recipe
from .config import Scenes as SceneData
from .emoji.compose import Mix, SceneSampler
from .emoji.render import render
from .emoji.sprites import load_sprites
from .schema import parse


def sampler_of(recipe: Recipe) -> SceneSampler:
    """The recipe's scenes. Raises RequestError if there are no sprites, naming the command."""
    data = recipe.scenes
    if not Path(data.sprites).is_dir():
        raise RequestError(
            f"data.sprites={data.sprites!r} is not a folder; "
            f"run: fewstep data emoji --output {data.sprites}"
        )
    mix = dict(data.mix)
    if "styles" in mix:
        mix["styles"] = tuple((str(name), float(weight)) for name, weight in mix["styles"])
    return SceneSampler(
        load_sprites(data.sprites),
        seed=recipe.seed,
        selection=data.selection,
        mix=parse(Mix, mix, "data.mix"),
    )


class DrawnScenes(Dataset):
    """Scenes `start` to `stop` of a sampler: (picture (3, size, size) uint8, caption)."""

    def __init__(self, sampler: SceneSampler, start: int, stop: int, size: int) -> None:
        self.sampler, self.start, self.stop, self.size = sampler, start, stop, size

    def __len__(self) -> int:
        return self.stop - self.start

    def __getitem__(self, index: int) -> tuple[Tensor, str]:
        scene = self.sampler.scene(self.start + index)
        drawn = render(scene, self.sampler.sprites, size=self.size)
        return torch.from_numpy(drawn).permute(2, 0, 1), scene.caption

    def batches(self, batch: int, workers: int) -> DataLoader:
        """The scenes in order, drawn by `workers` processes, or by this one if there are none."""
        return DataLoader(self, batch, num_workers=workers)


def normalised(pixels: Tensor, device: torch.device) -> Tensor:
    """Pictures (B, 3, H, W) uint8 as float32 in [-1, 1] on `device`."""
    return pixels.to(device).float().div(127.5).sub(1)


@dataclass(frozen=True, eq=False)
class Latents:
    """Encoded scenes: z (N, C, h, w) float16 of about unit deviation, tokens (N, L) int32."""

    z: np.ndarray
    tokens: np.ndarray
    captions: list[str]

    def __len__(self) -> int:
        return len(self.z)


def encoded_scenes(recipe: Recipe, folder: Path, vae: AutoencoderKL, tokenizer: Any) -> Latents:
    """The recipe's scenes as latents, from the cache in `folder` or made now.

    The cache is keyed by everything the latents depend on; a stale one is made anew.
    """
    data = recipe.scenes
    key = _key(data, recipe.seed, vae)
    paths = {name: folder / f"{name}-{key}.npy" for name in ("latents", "captions")}
    if not all(path.exists() for path in paths.values()):
        sampler = sampler_of(recipe)
        z, captions = _encode(sampler, data, vae)
        folder.mkdir(parents=True, exist_ok=True)
        save_array(paths["captions"], np.array(captions))
        save_array(paths["latents"], z)
    captions = np.load(paths["captions"]).tolist()
    return Latents(np.load(paths["latents"]), tokenize(tokenizer, captions), captions)


def tokenize(tokenizer: Any, captions: Sequence[str]) -> np.ndarray:
    """Token ids (N, L) int32, padded and cut to the tokenizer's length."""
    ids = tokenizer(
        list(captions),
        padding="max_length",
        truncation=True,
        max_length=tokenizer.model_max_length,
    ).input_ids
    return np.asarray(ids, dtype=np.int32)


@torch.no_grad()
def _encode(
    sampler: SceneSampler, data: SceneData, vae: AutoencoderKL
) -> tuple[np.ndarray, list[str]]:
    rows, captions = [], []
    scenes = DrawnScenes(sampler, 0, data.scenes, data.size).batches(64, data.workers)
    for pixels, said in tqdm(scenes, desc="encode scenes", unit="batch"):
        x = normalised(pixels, vae.device)
        with torch.autocast(x.device.type, torch.bfloat16, enabled=x.device.type == "cuda"):
            z = vae.encode(x).latent_dist.mode().float() * vae.config.scaling_factor
        rows.append(z.half().cpu().numpy())
        captions += said
    return np.concatenate(rows), captions


def _key(data: SceneData, seed: int, vae: AutoencoderKL) -> str:
    drawn = asdict(data) | dict.fromkeys(("workers", "empty_captions", "held_out", "cache"), 0)
    digest = hashlib.sha256(json.dumps([drawn, seed], sort_keys=True, default=list).encode())
    for name, tensor in sorted(vae.state_dict().items()):
        digest.update(name.encode())
        digest.update(tensor.float().cpu().numpy().tobytes())
    return digest.hexdigest()[:16]


def save_array(path: Path, array: np.ndarray) -> None:
    """Write an .npy file: all of it, or nothing."""
    with replacing(path) as beside, beside.open("wb") as file:
        np.save(file, array, allow_pickle=False)
