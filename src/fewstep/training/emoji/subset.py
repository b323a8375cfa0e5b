"""A few concepts as small files, so that everything runs without network: for tests."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path

import numpy as np
from PIL import Image

from fewstep.errors import RequestError
from fewstep.training.emoji.notices import ATTRIBUTION, NOTICE
from fewstep.training.emoji.sprites import Sprites, load_sprites, write_index

NAMES = (
    "dog",
    "fox",
    "butterfly",
    "octopus",
    "red apple",
    "banana",
    "mushroom",
    "pizza",
    "rocket",
    "sailboat",
    "umbrella",
    "key",
)


def subset(
    sprites: Sprites,
    output: Path | str,
    *,
    names: Sequence[str] = NAMES,
    styles: Sequence[str] = ("3d", "flat", "noto"),
    size: int = 64,
) -> Sprites:
    """Write the concepts called `names` as one WebP strip a style, `size` px, with the notice.

    The directory is read by `load_sprites` like any other. Raises RequestError on a name or a
    style that `sprites` lacks.
    """
    rows = {concept.name: row for row, concept in enumerate(sprites.concepts)}
    if missing := [name for name in names if name not in rows]:
        raise RequestError(f"names={missing} are not among the {len(rows)} concepts")
    if missing := [style for style in styles if style not in sprites.styles]:
        raise RequestError(f"styles={missing} (have: {', '.join(sprites.styles)})")
    folder = Path(output)
    folder.mkdir(parents=True, exist_ok=True)
    chosen = [rows[name] for name in names]
    for style in styles:
        strip = np.concatenate([_scaled(sprites.pictures[style][row], size) for row in chosen])
        Image.fromarray(strip).save(folder / f"{style}.webp", lossless=True, exact=True, method=6)
    looks = {style: [sprites.looks[style][row] for row in chosen] for style in styles}
    write_index(folder, [sprites.concepts[row] for row in chosen], looks, size)
    credits = "".join(f"{ATTRIBUTION[style]}\n" for style in styles if style in ATTRIBUTION)
    (folder / "NOTICE").write_text(NOTICE + credits, encoding="utf-8")
    return load_sprites(folder)


def _scaled(picture: np.ndarray, size: int) -> np.ndarray:
    image = Image.fromarray(np.ascontiguousarray(picture))
    return np.asarray(image.resize((size, size), Image.Resampling.LANCZOS))
