"""Scenes of emoji as a source: drawn anew for the encoder, known by their settings and number."""

from __future__ import annotations

import hashlib
import json
import re
from dataclasses import asdict
from pathlib import Path

import numpy as np
from PIL import Image, ImageOps

from ...errors import RequestError
from ..config import Recipe
from ..emoji.compose import SceneSampler
from ..emoji.render import render
from ..scenes import sampler_of
from .sources import Facts, Source, digest_of, remember, remembered
from .store import checksum


class EmojiScenes(Source):
    """The first scenes of a recipe's sampler."""

    def __init__(self, recipe: Recipe, memory: Path) -> None:
        data = recipe.scenes
        self.sampler, self.size = sampler_of(recipe), data.size
        self.duotone = two_colours(data.duotone)
        self.settings = settings_digest(self.sampler, Path(data.sprites))
        self.name = f"emoji {self.settings}"
        self.keys = [f"scene {index}" for index in range(data.scenes)]
        self.captions = [(caption,) for caption in self.said(data.scenes, memory)]

    def said(self, count: int, memory: Path) -> list[str]:
        """The captions of the first scenes, which take longer to make than to read."""
        path = remembered(memory, "scenes", [self.settings])
        known: list[str] = json.loads(path.read_bytes()) if path.is_file() else []
        if len(known) < count:
            known += [self.sampler.scene(index).caption for index in range(len(known), count)]
            remember(path, known)
        return known[:count]

    def stamp(self, index: int) -> str:
        return ""

    def look(self, index: int) -> Facts:
        style = " ".join(["", *self.duotone])
        digest = hashlib.sha256(f"{self.settings} {self.size} {index}{style}".encode()).hexdigest()
        return Facts(digest, self.size, self.size)

    def load(self, index: int) -> Image.Image:
        scene = self.sampler.scene(index)
        drawn = Image.fromarray(
            np.ascontiguousarray(render(scene, self.sampler.sprites, self.size))
        )
        if not self.duotone:
            return drawn
        dark, light = self.duotone
        return ImageOps.colorize(drawn.convert("L"), dark, light)


def two_colours(given: tuple[str, ...]) -> tuple[str, ...]:
    """`data.duotone`, checked."""
    if len(given) not in (0, 2) or not all(re.fullmatch("#[0-9a-fA-F]{6}", c) for c in given):
        raise RequestError(
            f"data.duotone={list(given)} must hold two colours, as ['#10306b', '#ffffff']"
        )
    return given


def settings_digest(sampler: SceneSampler, folder: Path) -> str:
    """sha256 of all that decides the scenes: sprites, selection, mix and seed."""
    parts: list[object] = ["scenes 1", sampler.seed, asdict(sampler.mix), sampler.rows]
    for stem in ("concepts", *sorted(sampler.styles)):
        for path in sorted(folder.glob(f"{stem}.*")):
            parts.append([path.name, checksum(path)])
    return digest_of(parts)
