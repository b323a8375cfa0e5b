"""The emoji benchmark: how well does a generator draw what it is asked for?

It joins the general metrics of this package with the emoji scenes of `fewstep.training.emoji`.
Every score has a ceiling: the same score for the real pictures of the same prompts, rendered at the
same size as in training.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, replace
from pathlib import Path

import numpy as np

from fewstep.errors import RequestError
from fewstep.evaluation.checks import background_names, hue_names, object_counts
from fewstep.evaluation.emoji_judges import RECALL_NET, STYLE, EmojiJudges, is_held_out, varied
from fewstep.evaluation.features import FEATURE_NETS, RESIZE
from fewstep.evaluation.kid import kid
from fewstep.evaluation.open_prompt import retrieval
from fewstep.evaluation.pictures import check_pictures, framed, halves
from fewstep.evaluation.report import Column, Row
from fewstep.training.emoji import Mix, Scene, SceneSampler, load_sprites, render
from fewstep.training.emoji.scenes import BACKGROUNDS, RECOLOURS

_KID_SUBSET = 250
_PLAIN = Mix(styles=((STYLE, 1.0),), coloured_background=0.0, say_white=0.0, say_3d=0.0)

Draw = Callable[[list[str], int], np.ndarray]
"""(prompts, seed) -> pictures uint8 [len(prompts), size, size, 3]; any generator."""


@dataclass(frozen=True)
class Amounts:
    """How many prompts of each kind are asked; `concepts` None means all of the selection.

    The same `seed` asks for the same prompts. A kind of which 0 are asked is left out.
    """

    concepts: int | None = None
    backgrounds: int = 128
    recolours: int = 64
    pairs: int = 128
    counts: int = 96
    seed: int = 0

    def __post_init__(self) -> None:
        for name, value in vars(self).items():
            if value is not None and value < 0:
                raise RequestError(f"{name} must not be negative, got {value}")


def columns() -> tuple[Column, ...]:
    """The metrics of `EmojiBenchmark.score`, in the order of a report; shares in per cent."""
    labels = {net: spec.label for net, spec in FEATURE_NETS.items()}
    return (
        *(
            Column(f"recall@{k}/{among}/{net}", f"concept recall@{k}, {among} ({label} probe)")
            for net, label in labels.items()
            for among in ("all", "trained")
            for k in (1, 5)
        ),
        *(Column(f"kid/{net}", f"KID-{label} x1000", 1000.0) for net, label in labels.items()),
        *(Column(f"open@{k}", f"open-prompt retrieval@{k} (ridge to MiniLM)") for k in (1, 5, 10)),
        Column("background/colour", "held-out background: colour"),
        Column("background/object@5", "held-out background: object@5"),
        Column("recolour/colour", "held-out recolouring: colour"),
        Column("recolour/object@5", "held-out recolouring: object@5"),
        Column("pair/object@5", "held-out pair: object@5"),
        Column("pair/both@5", "held-out pair: both objects@5"),
        Column("count/number", "two to four objects: number"),
    )


class EmojiBenchmark:
    """Asks a generator for 3d pictures of a selection of concepts and judges what it draws.

    Make it with `prepare`. `codes` names the selection's concepts, the probes' "trained" classes.
    """

    def __init__(self, judges: EmojiJudges, selection: str):
        self.judges, self.selection = judges, selection
        self.sampler = SceneSampler(judges.sprites, selection=selection, mix=_PLAIN)
        self.codes = [judges.sprites.concepts[row].code for row in self.sampler.rows]

    @classmethod
    def prepare(
        cls,
        sprites_folder: str | Path,
        cache_folder: str | Path,
        *,
        size: int = 64,
        selection: str = "objects512",
        feature_folder: str | Path | None = None,
        recall_only: bool = False,
        progress: bool = True,
    ) -> EmojiBenchmark:
        """The benchmark for pictures of `size` pixels; what `cache_folder` lacks is made first.

        That takes minutes on one core, fewer with `recall_only`, which is enough for `recall` and
        `recall_ceiling`. It depends on the sprites and the size, not on the selection.
        `feature_folder` is that of `load_feature_net`.
        """
        sprites = load_sprites(sprites_folder)
        judges = EmojiJudges(sprites, size, Path(cache_folder), feature_folder)
        judges.build(recall_only=recall_only, progress=progress)
        return cls(judges, selection)

    # What is asked

    def tasks(self, amounts: Amounts | None = None) -> dict[str, list[Scene]]:
        """The scenes whose captions a generator is asked for, by kind; always the same ones."""
        amounts = amounts or Amounts()
        seed, held_out = amounts.seed, self.sampler.held_out_scenes
        scenes = {
            "concept": self._concepts(amounts.concepts, seed),
            "background": held_out("background", amounts.backgrounds, seed=seed),
            "recolour": held_out("recolour", amounts.recolours, seed=seed),
            "pair": held_out("pair", amounts.pairs, seed=seed),
            "count": self._counts(amounts.counts, seed),
        }
        return {kind: of_kind for kind, of_kind in scenes.items() if of_kind}

    def _concepts(self, count: int | None, seed: int) -> list[Scene]:
        prompts = self.sampler.concept_prompts()
        chosen = np.random.default_rng(seed).permutation(len(prompts))[:count]
        return [
            varied(self.sampler.vocabulary, prompts[i][0], STYLE, seed, prompts[i][1])
            for i in chosen
        ]

    def _counts(self, count: int, seed: int) -> list[Scene]:
        mix = replace(_PLAIN, single=0.0, placed=0.0, pair=0.0, count=1.0)
        sampler = SceneSampler(self.judges.sprites, seed=seed, selection=self.selection, mix=mix)
        return [sampler.scene(i) for i in range(count)]

    # How a generator does

    def score(
        self, draw: Draw, amounts: Amounts | None = None, *, batch_size: int = 32
    ) -> dict[str, float]:
        """The metrics of `columns()`: shares of 1, and KID.

        `draw` is called with up to `batch_size` prompts and seeds that count up from that of
        `amounts`.
        """
        amounts = amounts or Amounts()
        tasks = self.tasks(amounts)
        pictures = {
            kind: self._drawn(draw, scenes, amounts.seed, batch_size)
            for kind, scenes in tasks.items()
        }
        return self._judged(tasks, pictures)

    def ceiling(self, amounts: Amounts | None = None) -> dict[str, float]:
        """The same metrics for the real pictures of the same prompts."""
        tasks = self.tasks(amounts)
        return self._judged(tasks, {kind: self.real(x) for kind, x in tasks.items()})

    def recall(
        self, draw: Draw, count: int = 128, *, seed: int = 0, batch_size: int = 32
    ) -> dict[str, float]:
        """Concept recall alone, judged by one network in about 3 s: for picking checkpoints."""
        scenes = self._concepts(count, seed)
        return self._recall(scenes, self._drawn(draw, scenes, seed, batch_size))

    def recall_ceiling(self, count: int = 128, *, seed: int = 0) -> dict[str, float]:
        """`recall` for the real pictures of the same prompts."""
        scenes = self._concepts(count, seed)
        return self._recall(scenes, self.real(scenes))

    def row(self, method: str, steps: int, draw: Draw, amounts: Amounts | None = None) -> Row:
        """`score` as a row of a report."""
        return Row(method, steps, self.score(draw, amounts))

    def ceiling_row(self, amounts: Amounts | None = None) -> Row:
        """`ceiling` as a row of a report."""
        return Row("real pictures (ceiling)", None, self.ceiling(amounts))

    def settings(self, amounts: Amounts | None = None) -> dict[str, str | int | float]:
        """What a report should say about how its scores came about."""
        return {
            "picture size": self.judges.size,
            "all classes": len(self.judges.sprites.concepts),
            "trained classes": f"{len(self.codes)} ({self.selection})",
            **{f"{kind} prompts": len(scenes) for kind, scenes in self.tasks(amounts).items()},
            "open-prompt candidates": len(self._open_codes()),
            "resize for the judges": RESIZE,
        }

    def _drawn(self, draw: Draw, scenes: Sequence[Scene], seed: int, batch: int) -> np.ndarray:
        if batch < 1:
            raise RequestError(f"batch_size must be at least 1, got {batch}")
        prompts = [scene.caption for scene in scenes]
        drawn = []
        for i, start in enumerate(range(0, len(prompts), batch)):
            asked = prompts[start : start + batch]
            drawn.append(check_pictures(draw(asked, seed + i)))
            if len(drawn[-1]) != len(asked):
                raise RequestError(
                    f"draw must return a picture for each of {len(asked)} prompts, "
                    f"got {len(drawn[-1])}"
                )
        return np.concatenate(drawn)

    def real(self, scenes: Sequence[Scene]) -> np.ndarray:
        """The real pictures of scenes, uint8 (N, size, size, 3), as in training."""
        judges = self.judges
        return np.stack([render(scene, judges.sprites, judges.size) for scene in scenes])

    # The metrics, by kind of task

    def _judged(
        self, tasks: Mapping[str, Sequence[Scene]], pictures: Mapping[str, np.ndarray]
    ) -> dict[str, float]:
        scores: dict[str, float] = {}
        for kind, scenes in tasks.items():
            match kind:
                case "concept":
                    scores |= self._concept_scores(scenes, pictures[kind])
                case "background":
                    asked = [scene.background for scene in scenes]
                    named = background_names(pictures[kind], BACKGROUNDS)
                    scores["background/colour"] = _share_equal(named, asked)
                    scores["background/object@5"] = self._object_recall(scenes, pictures[kind])
                case "recolour":
                    colours = [scene.objects[0].recolour for scene in scenes]
                    hues = {name: hue for name, (hue, _) in RECOLOURS.items()}
                    scores["recolour/colour"] = _share_equal(
                        hue_names(pictures[kind], hues), colours
                    )
                    scores["recolour/object@5"] = self._object_recall(scenes, pictures[kind])
                case "pair":
                    hits = self._pair_hits(scenes, pictures[kind])
                    scores["pair/object@5"] = sum(hits) / (2 * len(hits))
                    scores["pair/both@5"] = hits.count(2) / len(hits)
                case "count":
                    counts = object_counts(pictures[kind])
                    scores["count/number"] = _share_equal(counts, [s.count for s in scenes])
        return scores

    def _concept_scores(self, scenes: Sequence[Scene], pictures: np.ndarray) -> dict[str, float]:
        features = {net: self.judges.features(pictures, net) for net in FEATURE_NETS}
        scores: dict[str, float] = {}
        for net in FEATURE_NETS:
            scores |= self._recall_of(scenes, features[net], net)
            real = self.judges.references[net][self.sampler.rows]
            subset = min(len(real), len(scenes), _KID_SUBSET)
            if subset > 1:
                scores[f"kid/{net}"] = kid(features[net], real, subset_size=subset).mean
        return scores | self._open_scores(scenes, np.concatenate([*features.values()], axis=1))

    def _recall(self, scenes: Sequence[Scene], pictures: np.ndarray) -> dict[str, float]:
        return self._recall_of(scenes, self.judges.features(pictures, RECALL_NET), RECALL_NET)

    def _recall_of(
        self, scenes: Sequence[Scene], features: np.ndarray, net: str
    ) -> dict[str, float]:
        probe, labels = self.judges.probe(net), self._codes_of(scenes)
        return {
            f"recall@{k}/{among}/{net}": probe.accuracy(features, labels, k, among=codes)
            for among, codes in (("all", None), ("trained", self.codes))
            for k in (1, 5)
            if k <= len(self.codes)
        }

    def _open_scores(self, scenes: Sequence[Scene], features: np.ndarray) -> dict[str, float]:
        """Retrieval of a name among the selection's concepts that the ridge map never saw."""
        candidates = self._open_codes()
        labels = self._codes_of(scenes)
        asked = [i for i, code in enumerate(labels) if is_held_out(code)]
        if not asked:
            return {}
        rows = [row for row in self.sampler.rows if is_held_out(self._code(row))]
        texts = self.judges.name_embeddings[rows]
        answers = [candidates.index(labels[i]) for i in asked]
        mapped = self.judges.ridge(features[asked])
        ranks = (k for k in (1, 5, 10) if k <= len(candidates))
        return {f"open@{k}": retrieval(mapped, texts, answers, k) for k in ranks}

    def _object_recall(self, scenes: Sequence[Scene], pictures: np.ndarray) -> float:
        features = self.judges.features(pictures, RECALL_NET)
        probe = self.judges.probe(RECALL_NET)
        k = min(5, len(self.codes))
        return probe.accuracy(features, self._codes_of(scenes), k, among=self.codes)

    def _pair_hits(self, scenes: Sequence[Scene], pictures: np.ndarray) -> list[int]:
        """How many of each picture's two objects are found, one in each half, in either order."""
        crops = [
            framed(half, self.judges.size)[0]
            for scene, picture in zip(scenes, pictures, strict=True)
            for half in halves(
                picture[None], "top-bottom" if scene.relation == "above" else "left-right"
            )
        ]
        features = self.judges.features(np.stack(crops), RECALL_NET)
        probe = self.judges.probe(RECALL_NET)
        top = probe.top(features, min(5, len(self.codes)), among=self.codes)
        hits = []
        for scene, one, other in zip(scenes, top[::2], top[1::2], strict=True):
            a, b = (self._code(placed.concept) for placed in scene.objects)
            hits.append(max((a in one) + (b in other), (b in one) + (a in other)))
        return hits

    def _open_codes(self) -> list[str]:
        return [code for code in self.codes if is_held_out(code)]

    def _codes_of(self, scenes: Sequence[Scene]) -> list[str]:
        return [self._code(scene.objects[0].concept) for scene in scenes]

    def _code(self, row: int) -> str:
        return self.judges.sprites.concepts[row].code


def _share_equal(found: Sequence[object], asked: Sequence[object]) -> float:
    return sum(a == b for a, b in zip(found, asked, strict=True)) / len(asked)
