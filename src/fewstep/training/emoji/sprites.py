"""Every concept in every style as a small RGBA picture, stored memory-mappable.

Layout of a sprite directory:
    concepts.json        size, concepts in row order, and what is known of each style's picture
    {style}.npy          uint8 (N, S, S, 4), straight alpha; all zero where the style lacks it
    {style}.webp         instead of the .npy in the small test subset: the rows, one below another
"""

from __future__ import annotations

import io
import json
from collections.abc import Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import numpy as np
from PIL import Image
from tqdm import tqdm

from fewstep.errors import FewstepError, RequestError
from fewstep.training.emoji.concepts import Concept, code_key, load_concepts, select
from fewstep.training.emoji.fetch import fetch, read_json, read_members

STYLES = ("3d", "flat", "noto", "high_contrast", "color", "twemoji", "openmoji")
SIZE = 128


@dataclass(frozen=True)
class Look:
    """What one picture looks like: its mean colour (0-255 RGB) and, if it has one, its hue.

    `hue` is in degrees and None unless most of the picture is saturated and of that hue;
    `value` is the HSV value (0-1) of the pixels that have the hue.
    """

    rgb: tuple[int, int, int]
    hue: float | None = None
    value: float = 0.0


@dataclass(frozen=True, eq=False)
class Sprites:
    """Pictures (N, S, S, 4) by style, with the concepts of their rows.

    `looks[style][row]` is None where the style has no picture of the concept.
    """

    concepts: list[Concept]
    pictures: dict[str, np.ndarray]
    looks: dict[str, list[Look | None]] = field(repr=False)

    @property
    def styles(self) -> tuple[str, ...]:
        return tuple(self.pictures)

    def has(self, style: str, row: int) -> bool:
        """Whether there is a picture of concept `row` in `style`."""
        return self.looks[style][row] is not None

    def rows(self, selection: str) -> list[int]:
        """Rows of a named selection (see `concepts.select`)."""
        return select(selection, self.concepts)


def prepare(
    output: Path | str,
    packages: Path | str | None = None,
    *,
    styles: Sequence[str] = STYLES,
    selection: str = "all",
    size: int = SIZE,
    progress: bool = True,
) -> Sprites:
    """Render `selection` in `styles` into the directory `output`; a style that is there is kept.

    Raises RequestError on an unknown style or selection, or when `output` holds other concepts.
    """
    if unknown := [style for style in styles if style not in STYLES]:
        raise RequestError(f"styles={unknown} (have: {', '.join(STYLES)})")
    folder = Path(output)
    folder.mkdir(parents=True, exist_ok=True)
    everything = load_concepts(packages)
    concepts = [everything[row] for row in select(selection, everything)]
    looks = _known_looks(folder, concepts, size)
    for style in styles:
        if style in looks and (folder / f"{style}.npy").exists():
            continue
        pictures = render_style(style, concepts, packages, size=size, progress=progress)
        looks[style] = [look_of(picture) for picture in pictures]
        _write_array(folder / f"{style}.npy", pictures)
        write_index(folder, concepts, looks, size)
    return load_sprites(folder)


def render_style(
    style: str,
    concepts: Sequence[Concept],
    packages: Path | str | None = None,
    *,
    size: int = SIZE,
    progress: bool = False,
) -> np.ndarray:
    """Pictures of `concepts` in `style`, uint8 (N, size, size, 4), all zero where there is none."""
    row = {concept.code: i for i, concept in enumerate(concepts)}
    pictures = np.zeros((len(concepts), size, size, 4), np.uint8)
    tarball = fetch([style], packages)[style]
    with tqdm(total=len(concepts), desc=style, unit="picture", disable=not progress) as bar:
        if style == "3d":
            for name, data in read_members(tarball):
                code = code_key(Path(name).stem)
                if name.endswith(".webp") and code in row:
                    pictures[row[code]] = _scaled(data, size)
                    bar.update()
        else:
            icons, names = _icon_set(style, tarball, packages)
            for code, i in row.items():
                if (icon := icons.get(names.get(code, ""))) is not None:
                    pictures[i] = _drawn(icon, size)
                bar.update()
    return pictures


def _scaled(data: bytes, size: int) -> np.ndarray:
    image = Image.open(io.BytesIO(data)).convert("RGBA")
    # Pillow resizes RGBA with premultiplied alpha, so hidden colours do not bleed into the edge
    return np.asarray(image.resize((size, size), Image.Resampling.LANCZOS))


def _icon_set(
    style: str, tarball: Path, packages: Path | str | None
) -> tuple[dict[str, dict[str, Any]], dict[str, str]]:
    """Icons by name, with their box filled in, and the icon name of each code point."""
    icon_set = read_json(tarball, "icons.json")
    box = {"width": icon_set.get("width", 16), "height": icon_set.get("height", 16)}
    icons = {name: {"left": 0, "top": 0, **box, **icon} for name, icon in icon_set["icons"].items()}
    for name, alias in icon_set.get("aliases", {}).items():
        if set(alias) == {"parent"} and alias["parent"] in icons:
            icons[name] = icons[alias["parent"]]
    chars = read_json(tarball, "chars.json")
    if not chars:  # the gradient set comes without the table but with the flat set's names
        chars = read_json(fetch(["flat"], packages)["flat"], "chars.json")
    return icons, {code_key(code): name for code, name in chars.items()}


def _drawn(icon: dict[str, Any], size: int) -> np.ndarray:
    try:
        import resvg_py
    except ImportError as error:
        raise FewstepError("drawing SVG pictures needs `pip install resvg_py==0.5.0`") from error
    box = " ".join(str(icon[key]) for key in ("left", "top", "width", "height"))
    svg = (
        f'<svg xmlns="http://www.w3.org/2000/svg" xmlns:xlink="http://www.w3.org/1999/xlink" '
        f'width="{size}" height="{size}" viewBox="{box}" color="#000">{icon["body"]}</svg>'
    )
    # no system fonts: the result must not depend on the machine
    png = resvg_py.svg_to_bytes(svg_string=svg, width=size, height=size, skip_system_fonts=True)
    return np.asarray(Image.open(io.BytesIO(bytes(png))).convert("RGBA"))


def look_of(picture: np.ndarray) -> Look | None:
    """Mean colour and main hue of an RGBA picture (S, S, 4); None if it is empty."""
    weight = picture[..., 3].astype(np.float64) / 255
    if weight.sum() < 1:
        return None
    rgb = (picture[..., :3] * weight[..., None]).sum((0, 1)) / weight.sum()
    mean_rgb = (round(float(rgb[0])), round(float(rgb[1])), round(float(rgb[2])))
    hsv = np.asarray(Image.fromarray(picture).convert("RGB").convert("HSV"))
    angle, saturation, value = hsv[..., 0] * (360 / 256), hsv[..., 1] / 255, hsv[..., 2] / 255
    hue = _commonest_hue(angle, weight * saturation * value)
    near = weight * (np.abs((angle - hue + 180) % 360 - 180) < 35) * (saturation > 0.3)
    near *= value > 0.2
    # 60 % of the area must carry the hue, and strongly, or "a blue ..." would name a detail or lie
    if near.sum() < 0.6 * weight.sum() or (near * saturation).sum() < 0.5 * near.sum():
        return Look(mean_rgb)
    return Look(mean_rgb, round(hue, 1) % 360, round(float((near * value).sum() / near.sum()), 3))


def _commonest_hue(angle: np.ndarray, weight: np.ndarray) -> float:
    """Where the hues (degrees) are densest: the circular mean would lie between two colours."""
    histogram, _ = np.histogram(angle, bins=36, range=(0, 360), weights=weight)
    smooth = histogram + 0.7 * (np.roll(histogram, 1) + np.roll(histogram, -1))
    peak = 10 * float(np.argmax(smooth)) + 5
    close = weight * (np.abs((angle - peak + 180) % 360 - 180) < 25)
    offset = (angle - peak + 180) % 360 - 180
    return float(peak + (close * offset).sum() / max(close.sum(), 1e-9)) % 360


def write_index(
    folder: Path, concepts: Sequence[Concept], looks: dict[str, list[Look | None]], size: int
) -> None:
    """Write `concepts.json`, beside the old one and then over it."""
    rows = [
        {
            "code": c.code,
            "name": c.name,
            "tags": list(c.tags),
            "group": c.group,
            "looks": {
                style: [*look.rgb, look.hue, look.value]
                for style, of_style in looks.items()
                if (look := of_style[i]) is not None
            },
        }
        for i, c in enumerate(concepts)
    ]
    lines = ",\n".join(json.dumps(row, ensure_ascii=False) for row in rows)
    text = f'{{"size": {size}, "styles": {json.dumps(list(looks))}, "concepts": [\n{lines}\n]}}\n'
    beside = folder / "concepts.json.part"
    beside.write_text(text, encoding="utf-8")
    beside.replace(folder / "concepts.json")


def _write_array(path: Path, array: np.ndarray) -> None:
    beside = path.with_suffix(".part")
    with beside.open("wb") as file:
        np.save(file, array, allow_pickle=False)
    beside.replace(path)


def _read_index(folder: Path) -> tuple[list[Concept], dict[str, list[Look | None]], int]:
    index = json.loads((folder / "concepts.json").read_text(encoding="utf-8"))
    rows = index["concepts"]
    concepts = [Concept(r["code"], r["name"], tuple(r["tags"]), r["group"]) for r in rows]
    looks = {style: [_look(r["looks"].get(style)) for r in rows] for style in index["styles"]}
    return concepts, looks, index["size"]


def _look(fields: list[Any] | None) -> Look | None:
    return None if fields is None else Look((fields[0], fields[1], fields[2]), *fields[3:])


def _known_looks(folder: Path, concepts: list[Concept], size: int) -> dict[str, list[Look | None]]:
    if not (folder / "concepts.json").exists():
        return {}
    there, looks, size_there = _read_index(folder)
    if (there, size_there) != (concepts, size):
        raise RequestError(
            f"output={str(folder)!r} holds {len(there)} other concepts at {size_there} px; "
            "choose another directory or delete it"
        )
    return looks


def load_sprites(folder: Path | str) -> Sprites:
    """The sprites of a directory, arrays memory-mapped. Raises FewstepError if it is not one."""
    folder = Path(folder)
    if not (folder / "concepts.json").exists():
        raise FewstepError(
            f"{folder} has no concepts.json; make it with `fewstep data emoji --output {folder}`"
        )
    concepts, looks, size = _read_index(folder)
    pictures = {style: _pictures(folder, style) for style in looks}
    for style, array in pictures.items():
        if array.shape != (len(concepts), size, size, 4) or array.dtype != np.uint8:
            raise FewstepError(
                f"{folder}: {style} is {array.dtype} {array.shape}, "
                f"expected uint8 {(len(concepts), size, size, 4)}"
            )
    return Sprites(concepts, pictures, looks)


def _pictures(folder: Path, style: str) -> np.ndarray:
    if (folder / f"{style}.npy").exists():
        return np.load(folder / f"{style}.npy", mmap_mode="r", allow_pickle=False)
    if (folder / f"{style}.webp").exists():
        strip = np.asarray(Image.open(folder / f"{style}.webp").convert("RGBA"))
        return strip.reshape(-1, strip.shape[1], strip.shape[1], 4)
    raise FewstepError(f"{folder} has neither {style}.npy nor {style}.webp")
