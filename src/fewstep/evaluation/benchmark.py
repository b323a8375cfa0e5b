"""Any model against reference pictures: FID, KID, CLIP score and seconds a picture.

What was judged is kept chunk by chunk, under a key of all that it depends on: an interrupted run
goes on, and a repeated one draws nothing again. Under torchrun the ranks share the chunks.
"""

from __future__ import annotations

import time
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from pathlib import Path

import numpy as np
from PIL import Image
from safetensors import SafetensorError
from safetensors.numpy import load_file, save_file

from fewstep.checkpoints.config import replacing
from fewstep.errors import RequestError
from fewstep.evaluation.fingerprints import settings_key
from fewstep.evaluation.judges import KID_SUBSETS, Judges, distances, kid_subset
from fewstep.evaluation.methods import Method
from fewstep.evaluation.moments import Moments
from fewstep.evaluation.ranks import Ranks
from fewstep.evaluation.references import RESIZE, References
from fewstep.evaluation.report import Column, Report, Row
from fewstep.evaluation.sheet import contact_sheet

_VERSION = 1  # raise it when what is computed changes
_SHOWN, _SHOWN_SIZE = 8, 128  # pictures of a method on the sheet, and their pixels
_SECONDS = Column("seconds", "seconds a picture", 1.0, 3)

Draw = Callable[[range], np.ndarray]
"""Numbers of prompts -> pictures uint8 [n, H, W, 3]."""


@dataclass(frozen=True, eq=False)
class Judged:
    """What is kept of a set of pictures, in the order of its prompts."""

    rows: dict[str, np.ndarray]  # by judge: features [N, D], "clip" [N, 1]; "seconds" [N, 1]
    moments: dict[str, Moments]  # by feature network
    shown: np.ndarray  # the first pictures, small


class PictureBenchmark:
    """Draws the captions of reference pictures and measures how far the results are from them.

    `prompts` of the captions are drawn, by default all, chosen by `seed`; picture i has the seed
    `seed` + i. All of the reference pictures are what they are compared with.
    """

    def __init__(
        self,
        references: References,
        judges: Judges,
        cache_folder: str | Path,
        *,
        size: tuple[int, int],
        prompts: int | None = None,
        batch: int = 8,
        seed: int = 0,
        subset: int | None = None,
        ranks: Ranks | None = None,
        advance: Callable[[int], object] = lambda pictures: None,
    ):
        """`size` is (width, height); `subset` is KID's; `advance` is told of pictures judged."""
        count = len(references) if prompts is None else prompts
        check_amounts(references, count, subset)
        for name, value, least in (("batch", batch, 1), ("seed", seed, 0)):
            if value < least:
                raise RequestError(f"{name} must be at least {least}, got {value}")
        self.references, self.judges, self.size = references, judges, size
        self.batch, self.seed, self.folder = batch, seed, Path(cache_folder) / "pictures"
        self.subset = kid_subset(subset, len(references), count)
        self.ranks, self.advance = ranks or Ranks(), advance
        chosen = np.random.default_rng(seed).permutation(len(references))[:count]
        self.asked = [int(row) for row in chosen]
        self.prompts = [references.captions[row] for row in self.asked]
        self._shown: dict[str, np.ndarray] = {}
        self._real: Judged | None = None

    # ── rows ──

    def reference_row(self) -> Row:
        """The real pictures: one half's distance from the other, which is the least to expect.

        FID grows as pictures get fewer, so this of halves lies above that of equally good pictures.
        """
        real = self.real
        subset = min(self.subset, len(self.references) // 2)
        scores: dict[str, float] = {}
        for name in self.judges.nets:
            features = real.rows[name]
            scores |= distances(name, features[::2], features[1::2], subset)
        return Row("real pictures, half against half", None, scores | self._fit(real))

    def row(self, method: Method) -> Row:
        """The pictures of a method, drawn or taken from the cache."""
        real = self.real
        made_by = f"{method.key}, seed {self.seed}"
        drawn = self._judged(made_by, self.prompts, lambda rows: self._draw(method, rows))
        steps = f"{method.steps} step{'s' * (method.steps != 1)}"
        self._shown[f"{method.name}, {steps}, guidance {method.guidance:g}"] = drawn.shown
        scores: dict[str, float] = {}
        for name in self.judges.nets:
            moments = real.moments[name], drawn.moments[name]
            scores |= distances(name, real.rows[name], drawn.rows[name], self.subset, moments)
        scores |= self._fit(drawn) | {"seconds": float(np.median(drawn.rows["seconds"]))}
        return Row(method.name, method.steps, scores, method.guidance)

    @property
    def real(self) -> Judged:
        """The reference pictures, judged once."""
        if self._real is None:
            captions, size = self.references.captions, self.size
            self._real = self._judged(
                self.references.hash, captions, lambda rows: self.references.pictures(rows, size)
            )
        return self._real

    def _fit(self, judged: Judged) -> dict[str, float]:
        return {"clip": float(judged.rows["clip"].mean())} if "clip" in judged.rows else {}

    def _draw(self, method: Method, rows: range) -> np.ndarray:
        width, height = self.size
        seeds = [self.seed + row for row in rows]
        asked = [self.prompts[row] for row in rows]
        return method.pictures(asked, seeds, width=width, height=height)

    # ── judging, chunk by chunk ──

    def _judged(self, made_by: str, texts: Sequence[str], draw: Draw) -> Judged:
        """Each rank judges its chunks; all get the sums and the rows of all."""
        key = settings_key(
            version=_VERSION,
            made_by=made_by,
            texts=texts,
            size=self.size,
            batch=self.batch,
            judges=self.judges.key,
        )
        starts = range(0, len(texts), self.batch)
        spans = [range(start, min(start + self.batch, len(texts))) for start in starts]
        mine = self.ranks.mine(spans)
        chunks = [self._chunk(self.folder / key, rows, texts, draw) for rows in mine]
        return self._joined([row for rows in mine for row in rows], chunks)

    def _joined(self, index: Sequence[int], chunks: Sequence[dict[str, np.ndarray]]) -> Judged:
        """This rank's chunks, of the rows `index`, and those of the others."""
        nets = self.judges.nets
        sizes = {name: net.size for name, net in nets.items()} | {"seconds": 1}
        sizes |= {"clip": 1} if self.judges.clip is not None else {}
        rows, moments = {}, {}
        for name, size in sizes.items():
            parts = [chunk[name] for chunk in chunks]
            if name in nets:
                moments[name] = self.ranks.summed(Moments.over(parts, size))
            own = np.concatenate([np.empty((0, size), np.float32), *parts])
            rows[name] = self.ranks.gathered(own, np.array(index, np.int64))
        shown = next((chunk["shown"] for chunk in chunks if "shown" in chunk), np.empty(0))
        return Judged(rows, moments, shown)

    def _chunk(
        self, folder: Path, rows: range, texts: Sequence[str], draw: Draw
    ) -> dict[str, np.ndarray]:
        """What the judges say of some rows, from its file if there is one."""
        file = folder / f"{rows.start:07d}.safetensors"
        found = _read(file)
        if found is None:
            began = time.perf_counter()
            pictures = draw(rows)
            seconds = (time.perf_counter() - began) / len(rows)
            found = self.judges(pictures, [texts[row] for row in rows])
            found["seconds"] = np.full((len(rows), 1), seconds, np.float32)
            if rows.start == 0:
                found["shown"] = np.stack([_small(picture) for picture in pictures[:_SHOWN]])
            with replacing(file) as beside:
                save_file(found, beside)
        self.advance(len(rows))
        return found

    # ── what is told ──

    def report(self, title: str, rows: Sequence[Row]) -> Report:
        """Rows of this benchmark with all that their numbers depend on."""
        columns = (*self.judges.columns(), _SECONDS)
        return Report(title, columns, tuple(rows), self.settings)

    @property
    def settings(self) -> dict[str, str | int | float]:
        """Sets, numbers, judges and ways of resizing."""
        width, height = self.size
        notes: dict[str, str | int | float] = {
            "reference": f"{self.references.folder.resolve().name}, {self.references.hash}",
            "reference pictures": len(self.references),
            "prompts": len(self.prompts),
            "seed": self.seed,
            "picture size": f"{width}x{height}",
            "resize of the reference": RESIZE,
            **self.judges.settings,
            "KID": f"{KID_SUBSETS} subsets of {self.subset}, ± their standard deviation",
            "seconds": f"median over batches of {self.batch}",
            "processes": self.ranks.count,
        }
        if self.judges.nets:
            notes["FID"] = "by these networks, not Inception's: compare at equal numbers only"
        return notes

    def sheet(self) -> Image.Image:
        """The first prompts down, real pictures and each method that was judged across."""
        count = min(_SHOWN, self.batch, len(self.prompts))
        real = self.references.pictures(self.asked[:count], self.size)
        columns = {"real": np.stack([_small(picture) for picture in real]), **self._shown}
        pictures = np.stack(list(columns.values()), axis=1)
        return contact_sheet(pictures, self.prompts[:count], list(columns))


def check_amounts(references: References, prompts: int, subset: int | None) -> None:
    """RequestError if there are fewer captions than prompts, or too few pictures for KID."""
    if not 1 <= prompts <= len(references):
        raise RequestError(
            f"prompts must be in [1, {len(references)}], the captions of {references.folder}, "
            f"got {prompts}"
        )
    kid_subset(subset, len(references), prompts)


def _read(file: Path) -> dict[str, np.ndarray] | None:
    """The arrays of a file; None if it is not there, or not whole."""
    try:
        return load_file(file)
    except (FileNotFoundError, SafetensorError):
        return None


def _small(picture: np.ndarray) -> np.ndarray:
    image = Image.fromarray(picture)
    image.thumbnail((_SHOWN_SIZE, _SHOWN_SIZE), Image.Resampling.LANCZOS)
    return np.asarray(image)
