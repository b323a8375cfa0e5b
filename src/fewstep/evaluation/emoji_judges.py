"""What the emoji benchmark judges with: probes, a ridge map and reference features, made once.

Fitted on real pictures of all of the sprites' concepts, so that they serve every selection. The
probes never see the style that is generated.
"""

from __future__ import annotations

import hashlib
import json
from functools import cached_property
from pathlib import Path

import numpy as np
from safetensors.numpy import load_file, save_file

from fewstep.errors import RequestError
from fewstep.evaluation.features import FEATURE_NETS, RESIZE, FeatureNet, load_feature_net
from fewstep.evaluation.open_prompt import RidgeMap, choose_strength
from fewstep.evaluation.pictures import check_pictures
from fewstep.evaluation.probe import LinearProbe
from fewstep.evaluation.text_features import TextEncoder
from fewstep.training.emoji import Placed, Scene, Sprites, render
from fewstep.training.emoji.vocabulary import Vocabulary

STYLE = "3d"  # what is generated and judged
PROBE_STYLES = ("color", "flat", "noto", "twemoji", "openmoji")
PROBE_L2 = 1e-3
RECALL_NET = "mobilenet-v2"  # judges compositions and checkpoints: the quicker of the two
_REFERENCE_SEED = 1
_VERSION = 2  # raise it when what is computed changes


def is_held_out(code: str) -> bool:
    """Whether the ridge map never sees a concept: 20 % of them, by hash."""
    return hashlib.sha256(f"open-prompt|{code}".encode()).digest()[0] < 0.2 * 256


def varied(vocabulary: Vocabulary, row: int, style: str, seed: int, caption: str = "") -> Scene:
    """A single object on white as training shows it: random size, place and, if true, mirrored."""
    random = np.random.default_rng([seed, row, *style.encode()])
    size = random.uniform(0.80, 0.95)
    x, y = 0.5 + random.uniform(-0.5, 0.5, 2) * min(0.08, 1 - size)
    mirrored = vocabulary.mirrorable(row) and bool(random.random() < 0.5)
    placed = Placed(row, float(x), float(y), float(size), mirrored)
    return Scene(caption, "single", (placed,), style, "white")


class EmojiJudges:
    """Frozen networks and what was fitted on their features, for one picture size.

    `build` makes the files in `folder`, which are read when they are first needed.
    """

    def __init__(
        self, sprites: Sprites, size: int, folder: Path, feature_folder: str | Path | None = None
    ) -> None:
        if missing := [s for s in (STYLE, *PROBE_STYLES) if s not in sprites.styles]:
            raise RequestError(f"the judges need the styles {missing}, have {sprites.styles}")
        self.sprites, self.size = sprites, size
        self.folder = folder / f"emoji-{size}px-{_fingerprint(sprites)}"
        self._feature_folder = feature_folder
        self._nets: dict[str, FeatureNet] = {}
        self._probes: dict[str, LinearProbe] = {}
        self._vocabulary = Vocabulary(sprites, sprites.rows("all"))

    def features(self, pictures: np.ndarray, net: str, *, progress: bool = False) -> np.ndarray:
        """Features [N, 1280] of pictures of the judges' own size."""
        if check_pictures(pictures).shape[1:3] != (self.size, self.size):
            raise RequestError(
                f"these judges know {self.size} px pictures, got {list(pictures.shape)}; "
                "prepare a benchmark of that size"
            )
        if net not in self._nets:
            self._nets[net] = load_feature_net(net, self._feature_folder)
        return self._nets[net](pictures, progress=progress)

    def probe(self, net: str) -> LinearProbe:
        """The probe on the features of `net`; its classes are the code points of all concepts."""
        if net not in self._probes:
            self._probes[net] = LinearProbe.load(self._file(f"probe-{net}"))
        return self._probes[net]

    @cached_property
    def references(self) -> dict[str, np.ndarray]:
        """For each network, the features of the real 3d picture of each row of the sprites."""
        return load_file(self._file("references"))

    @cached_property
    def ridge(self) -> RidgeMap:
        """From both networks' features, side by side, to the embeddings of names."""
        return RidgeMap.load(self._file("ridge"))

    @cached_property
    def name_embeddings(self) -> np.ndarray:
        """The sentence embedding of the name of each row of the sprites, [N, 384]."""
        return load_file(self._file("names"))["names"]

    def build(self, *, recall_only: bool = False, progress: bool = True) -> None:
        """Make what `folder` lacks; each file appears only when it is whole.

        `recall_only` makes no more than the probe of RECALL_NET.
        """
        self.folder.mkdir(parents=True, exist_ok=True)
        for net in [RECALL_NET] if recall_only else FEATURE_NETS:
            if not self._file(f"probe-{net}").exists():
                self._fit_probe(net, progress)
        if recall_only:
            return
        if not self._file("names").exists():
            names = [concept.name for concept in self.sprites.concepts]
            self._save("names", {"names": TextEncoder()(names)})
        if not self._file("ridge").exists():
            self._fit_ridge(progress)
        if not self._file("references").exists():
            rows = range(len(self.sprites.concepts))
            pictures = self._rendered(
                [varied(self._vocabulary, row, STYLE, _REFERENCE_SEED) for row in rows]
            )
            self._save(
                "references",
                {net: self.features(pictures, net, progress=progress) for net in FEATURE_NETS},
            )

    def _fit_probe(self, net: str, progress: bool) -> None:
        shown = [i for i, scene in enumerate(self._training_scenes) if scene.style in PROBE_STYLES]
        features = self._training_features(net, progress)[shown]
        labels = [self._training_codes[i] for i in shown]
        LinearProbe.fit(features, labels, l2=PROBE_L2).save(self._part(f"probe-{net}"))
        self._finish(f"probe-{net}")

    def _fit_ridge(self, progress: bool) -> None:
        seen = [i for i, code in enumerate(self._training_codes) if not is_held_out(code)]
        features = np.concatenate(
            [self._training_features(net, progress)[seen] for net in FEATURE_NETS], axis=1
        )
        rows = [self._training_scenes[i].objects[0].concept for i in seen]
        texts = self.name_embeddings[rows]
        strength = choose_strength(features, texts, [self._training_codes[i] for i in seen])
        RidgeMap.fit(features, texts, strength=strength).save(self._part("ridge"))
        self._finish("ridge")

    @cached_property
    def _training_scenes(self) -> list[Scene]:
        """Each concept in each style, plainly: probes fitted on these know the others, too."""
        return [
            Scene(concept.name, "single", (Placed(row, 0.5, 0.5, 0.88),), style, "white")
            for style in (*PROBE_STYLES, STYLE)
            for row, concept in enumerate(self.sprites.concepts)
            if self.sprites.has(style, row)
        ]

    @cached_property
    def _training_codes(self) -> list[str]:
        concepts = self.sprites.concepts
        return [concepts[scene.objects[0].concept].code for scene in self._training_scenes]

    def _training_features(self, net: str, progress: bool) -> np.ndarray:
        """Features of `_training_scenes`; the slowest part, so it is kept in a file."""
        name = f"training-{net}"
        if not self._file(name).exists():
            pictures = self._rendered(self._training_scenes)
            self._save(name, {"features": self.features(pictures, net, progress=progress)})
        return load_file(self._file(name))["features"]

    def _rendered(self, scenes: list[Scene]) -> np.ndarray:
        return np.stack([render(scene, self.sprites, self.size) for scene in scenes])

    def _file(self, name: str) -> Path:
        return self.folder / f"{name}.safetensors"

    def _part(self, name: str) -> Path:
        return self.folder / f"{name}.part"

    def _finish(self, name: str) -> None:
        self._part(name).replace(self._file(name))

    def _save(self, name: str, arrays: dict[str, np.ndarray]) -> None:
        save_file(arrays, self._part(name))
        self._finish(name)


def _fingerprint(sprites: Sprites) -> str:
    """Names a cache by what it was made from: the pictures' concepts and looks, the settings."""
    codes = [concept.code for concept in sprites.concepts]
    looks = [
        [look and look.rgb for look in sprites.looks[style]] for style in (STYLE, *PROBE_STYLES)
    ]
    text = json.dumps([_VERSION, PROBE_L2, RESIZE, codes, looks])
    return hashlib.sha256(text.encode()).hexdigest()[:8]
