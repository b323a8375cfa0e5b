"""Training scenes with exact captions, and the held-out ones that evaluation asks for.

Scenes are drawn without shared state: scene `i` of a seed is always the same one.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass

import numpy as np

from fewstep.errors import RequestError
from fewstep.training.emoji.english import NUMBERS, plural, with_article
from fewstep.training.emoji.scenes import (
    POSITIONS,
    RELATIONS,
    HeldOut,
    Placed,
    Scene,
)
from fewstep.training.emoji.sprites import Sprites
from fewstep.training.emoji.vocabulary import Vocabulary

STYLE_PHRASES: dict[str, tuple[str, str]] = {
    "3d": ("3d render of {}", "{}, 3d render"),
    "flat": ("flat icon of {}", "{}, flat icon"),
    "noto": ("noto style {}", "{}, noto style"),
    "high_contrast": ("outline drawing of {}", "{}, outline drawing"),
    "color": ("gradient icon of {}", "{}, gradient icon"),
    "twemoji": ("twemoji style {}", "{}, twemoji style"),
    "openmoji": ("openmoji style {}", "{}, openmoji style"),
}
COUNT_PLACES: dict[int, tuple[tuple[float, float], ...]] = {
    2: ((0.26, 0.5), (0.74, 0.5)),
    3: ((0.5, 0.27), (0.26, 0.73), (0.74, 0.73)),
    4: ((0.26, 0.26), (0.74, 0.26), (0.26, 0.74), (0.74, 0.74)),
}
# the first of the caption is at the left, or on top
PAIR_PLACES: dict[str, tuple[tuple[float, float], ...]] = {
    "and": ((0.26, 0.5), (0.74, 0.5)),
    "next to": ((0.26, 0.5), (0.74, 0.5)),
    "above": ((0.5, 0.26), (0.5, 0.74)),
}
# "{0}" is the bare name, "{1}" the name after its article
_MEDIA = ("a picture of ", "an image of ", "an emoji of ")
TEMPLATES = ("{0}", "{1}", *(medium + "{1}" for medium in _MEDIA))


@dataclass(frozen=True)
class Mix:
    """How often what occurs in training scenes. Weights need not sum to 1; the rest are chances.

    single, placed, pair, count   weights of: one object that fills the picture; one small or large
                                  or put into one of nine places; two different; two to four equal
    styles                        (style, weight) pairs; the first also serves the held-out scenes
    coloured_background           chance of another background than white
    say_white                     chance that the caption of a white scene says so
    recoloured                    chance that a single object with a clear hue gets another
    say_3d                        chance that a 3d scene says so
    say_style                     chance that a scene of another style says so
    label, label_tags, tag_only   weights of the three ways to name a single object
    rarest_tag                    most concepts that may share a keyword which alone names an object
    jitter                        how far sizes and places vary: 1 as usual, 0 not at all
    mirrored                      chance of mirroring, where mirroring does not make it untrue
    """

    single: float = 0.65
    placed: float = 0.10
    pair: float = 0.15
    count: float = 0.10
    styles: tuple[tuple[str, float], ...] = (("3d", 0.8), ("flat", 0.2))
    coloured_background: float = 0.5
    say_white: float = 0.1
    recoloured: float = 0.12
    say_3d: float = 0.15
    say_style: float = 1.0
    label: float = 0.60
    label_tags: float = 0.25
    tag_only: float = 0.15
    rarest_tag: int = 3
    jitter: float = 1.0
    mirrored: float = 0.5


class SceneSampler:
    """Training scenes over a selection of the sprites' concepts.

    `scene(i)` depends on (seed, i) alone. Raises RequestError on a style the sprites lack and on
    an empty selection.
    """

    def __init__(
        self,
        sprites: Sprites,
        *,
        seed: int = 0,
        selection: str = "all",
        mix: Mix | None = None,
    ) -> None:
        self.sprites, self.seed, self.mix = sprites, seed, mix or Mix()
        self.styles = tuple(style for style, _ in self.mix.styles)
        if missing := [style for style in self.styles if style not in sprites.styles]:
            raise RequestError(f"mix.styles has {missing}, the sprites have {sprites.styles}")
        fallback = self.styles[0]
        self.rows = [row for row in sprites.rows(selection) if sprites.has(fallback, row)]
        if not self.rows:
            raise RequestError(f"selection={selection!r} has no picture in style {fallback!r}")
        self.vocabulary = Vocabulary(sprites, self.rows, rarest_tag=self.mix.rarest_tag)

    # Training scenes

    def scene(self, index: int) -> Scene:
        """Training scene number `index`; no held-out combination."""
        rng = np.random.default_rng(np.random.SeedSequence([self.seed, index]))
        mix = self.mix
        kinds = ("single", "placed", "pair", "count")
        kind = kinds[_weighted(rng, (mix.single, mix.placed, mix.pair, mix.count))]
        style = self.styles[_weighted(rng, [weight for _, weight in mix.styles])]
        match kind:
            case "single":
                return self._single(rng, self._drawn_row(rng, self.rows, style), style)
            case "placed":
                return self._placed(rng, self._drawn_row(rng, self.rows, style), style)
            case "pair":
                return self._pair(rng, style)
            case _:
                return self._count(rng, style)

    def _drawn_row(self, rng: np.random.Generator, rows: list[int], style: str) -> int:
        """A random row of `rows` that has a picture in `style`."""
        for _ in range(50):
            row = rows[rng.integers(len(rows))]
            if self.sprites.has(style, row):
                return row
        raise RequestError(f"hardly any concept of the selection has style {style!r}")

    def _single(self, rng: np.random.Generator, row: int, style: str) -> Scene:
        recolour = None
        if rng.random() < self.mix.recoloured:
            recolour = self._pick(
                rng,
                [
                    colour
                    for colour in self.vocabulary.recolours(row, style)
                    if not HeldOut.recolour(self.sprites.concepts[row].code, colour)
                ],
            )
        size = self._between(rng, 0.80, 0.95)
        x, y = self._nudged(rng, (0.5, 0.5), min(0.04, (1 - size) / 2))
        placed = Placed(row, x, y, size, self._mirror(rng, row), recolour)
        background = self._background(rng, (row,), style, recolour)
        subject = self._subject(rng, row, recolour)
        return self._finish(rng, "single", subject, (placed,), style, background)

    def _placed(self, rng: np.random.Generator, row: int, style: str) -> Scene:
        name, size_word, position = self.vocabulary.names[row], "", None
        choice = rng.random()
        if choice < 0.15:
            size_word, size = "large", self._between(rng, 0.97, 1.0)
        elif choice < 0.35:
            size_word, size = "small", self._between(rng, 0.38, 0.46)
        else:
            position = list(POSITIONS)[rng.integers(len(POSITIONS))]
            size_word = "small" if rng.random() < 0.5 else ""
            size = self._between(rng, 0.38, 0.46) if size_word else self._between(rng, 0.42, 0.5)
        x, y = self._nudged(rng, POSITIONS[position or "in the center"], 0.02)
        subject = _described(name, size_word) + (f" {position}" if position else "")
        placed = Placed(row, x, y, float(size), self._mirror(rng, row))
        background = self._background(rng, (row,), style)
        return self._finish(rng, "placed", subject, (placed,), style, background, position=position)

    def _pair(self, rng: np.random.Generator, style: str) -> Scene:
        rows = self._drawn_pair(rng, style, held_out=False)
        if rows is None:  # a tiny selection may hold none
            return self._single(rng, self._drawn_row(rng, self.rows, style), style)
        relation = RELATIONS[rng.integers(len(RELATIONS))]
        size = self._between(rng, 0.43, 0.49)
        objects = tuple(
            Placed(row, *self._nudged(rng, centre), size, self._mirror(rng, row))
            for row, centre in zip(rows, PAIR_PLACES[relation], strict=True)
        )
        subject = self._pair_caption(rows, relation)
        background = self._background(rng, rows, style)
        return self._finish(rng, "pair", subject, objects, style, background, relation=relation)

    def _drawn_pair(
        self, rng: np.random.Generator, style: str, *, held_out: bool
    ) -> tuple[int, int] | None:
        for _ in range(50):
            a, b = (self._drawn_row(rng, self.vocabulary.pairable, style) for _ in range(2))
            codes = [self.sprites.concepts[row].code for row in (a, b)]
            if a != b and HeldOut.pair(*codes) is held_out:
                return a, b
        return None

    def _pair_caption(self, rows: tuple[int, int], relation: str) -> str:
        return f" {relation} ".join(with_article(self.vocabulary.names[row]) for row in rows)

    def _count(self, rng: np.random.Generator, style: str) -> Scene:
        if not self.vocabulary.countable:
            return self._single(rng, self._drawn_row(rng, self.rows, style), style)
        row = self._drawn_row(rng, self.vocabulary.countable, style)
        number = int(rng.integers(2, 5))
        size, mirrored = self._between(rng, 0.42, 0.47), self._mirror(rng, row)
        objects = tuple(
            Placed(row, *self._nudged(rng, c), size, mirrored) for c in COUNT_PLACES[number]
        )
        subject = f"{NUMBERS[number]} {plural(self.vocabulary.names[row])}"
        background = self._background(rng, (row,), style)
        return self._finish(rng, "count", subject, objects, style, background)

    def _subject(self, rng: np.random.Generator, row: int, recolour: str | None) -> str:
        """The words for a single object; "a blue apple" keeps to the plain name."""
        concept, mix = self.sprites.concepts[row], self.mix
        way = _weighted(rng, (mix.label, mix.label_tags, mix.tag_only))
        if recolour is None and way == 1 and concept.tags:
            count = min(len(concept.tags), int(rng.integers(1, 4)))
            chosen = rng.permutation(len(concept.tags))[:count]
            return ", ".join([concept.name, *(concept.tags[i] for i in sorted(chosen))])
        if recolour is None and way == 2 and self.vocabulary.own_tags[row]:
            return self._pick(rng, self.vocabulary.own_tags[row]) or concept.name
        template = TEMPLATES[rng.integers(len(TEMPLATES))]
        name = f"{recolour} {concept.name}" if recolour else concept.name
        return template.format(name, _described(concept.name, recolour or ""))

    def _background(
        self,
        rng: np.random.Generator,
        rows: tuple[int, ...],
        style: str,
        recolour: str | None = None,
    ) -> str:
        if rng.random() >= self.mix.coloured_background:
            return "white"
        colours = [
            colour
            for colour in self.vocabulary.backgrounds(rows[0], style)
            if colour != recolour
            and all(colour in self.vocabulary.backgrounds(row, style) for row in rows[1:])
            and not any(HeldOut.background(self.sprites.concepts[row].code, colour) for row in rows)
        ]
        return self._pick(rng, colours) or "white"

    def _finish(
        self,
        rng: np.random.Generator,
        kind: str,
        subject: str,
        objects: tuple[Placed, ...],
        style: str,
        background: str,
        **truth: str | None,
    ) -> Scene:
        caption = subject
        if background != "white" or rng.random() < self.mix.say_white:
            caption += _on(background)
        if self._says(style, rng):
            before, after = STYLE_PHRASES[style]
            # no "flat icon of a picture of ..."
            first = rng.random() < 0.5 and not caption.startswith(_MEDIA)
            caption = (before if first else after).format(caption)
        return Scene(caption, kind, objects, style, background, **truth)

    def _says(self, style: str, rng: np.random.Generator) -> bool:
        """Whether a caption tells the style."""
        if style == "3d":
            return bool(rng.random() < self.mix.say_3d)
        return self.mix.say_style == 1 or bool(rng.random() < self.mix.say_style)

    def _mirror(self, rng: np.random.Generator, row: int) -> bool:
        return bool(rng.random() < self.mix.mirrored) and self.vocabulary.mirrorable(row)

    def _between(self, rng: np.random.Generator, low: float, high: float) -> float:
        """A size from `low` to `high`, as near their middle as the mix's jitter says."""
        middle = (low + high) / 2
        return middle + self.mix.jitter * (float(rng.uniform(low, high)) - middle)

    def _nudged(
        self, rng: np.random.Generator, centre: tuple[float, float], most: float = 0.01
    ) -> tuple[float, float]:
        x, y = self.mix.jitter * rng.uniform(-most, most, 2)
        return centre[0] + float(x), centre[1] + float(y)

    @staticmethod
    def _pick(rng: np.random.Generator, choices: list[str] | tuple[str, ...]) -> str | None:
        return choices[rng.integers(len(choices))] if choices else None

    # What evaluation asks for

    def concept_prompts(self) -> list[tuple[int, str]]:
        """(row, "a red apple") for every concept of the selection."""
        return [(row, with_article(self.vocabulary.names[row])) for row in self.rows]

    def held_out_scenes(self, kind: str, count: int, *, seed: int = 0) -> list[Scene]:
        """`count` different scenes with a combination of `kind` that training never shows, in 3d
        (or the mix's first style), plainly captioned.

        kind: "background", "pair" or "recolour". Returns fewer if there are fewer.
        """
        rng = np.random.default_rng(np.random.SeedSequence([seed, 0x4E1D]))
        style = self.styles[0]
        match kind:
            case "background":
                combos = self._held_out_colours(
                    self.vocabulary.backgrounds, HeldOut.background, style
                )
            case "recolour":
                combos = self._held_out_colours(self.vocabulary.recolours, HeldOut.recolour, style)
            case "pair":
                return self._held_out_pairs(rng, count, style)
            case _:
                raise RequestError(f"kind={kind!r} (have: background, pair, recolour)")
        chosen = rng.permutation(len(combos))[:count]
        return [self._held_out_single(combos[i], kind, style) for i in chosen]

    def _held_out_colours(
        self,
        possible: Callable[[int, str], list[str]],
        is_held_out: Callable[[str, str], bool],
        style: str,
    ) -> list[tuple[int, str]]:
        return [
            (row, colour)
            for row in self.rows
            for colour in possible(row, style)
            if is_held_out(self.sprites.concepts[row].code, colour)
        ]

    def _held_out_single(self, combo: tuple[int, str], kind: str, style: str) -> Scene:
        row, colour = combo
        recolour, background = (colour, "white") if kind == "recolour" else (None, colour)
        described = _described(self.vocabulary.names[row], recolour)
        caption = described if recolour else described + _on(background)
        placed = Placed(row, 0.5, 0.5, 0.88, recolour=recolour)
        return Scene(caption, "single", (placed,), style, background)

    def _held_out_pairs(self, rng: np.random.Generator, count: int, style: str) -> list[Scene]:
        scenes: dict[frozenset[int], Scene] = {}
        for _ in range(20 * count):
            rows = self._drawn_pair(rng, style, held_out=True)
            if rows is None or len(scenes) == count:
                break
            relation = RELATIONS[rng.integers(len(RELATIONS))]
            objects = tuple(
                Placed(row, x, y, 0.46)
                for row, (x, y) in zip(rows, PAIR_PLACES[relation], strict=True)
            )
            caption = self._pair_caption(rows, relation)
            scenes[frozenset(rows)] = Scene(caption, "pair", objects, style, "white", relation)
        return list(scenes.values())


def _described(name: str, adjective: str | None) -> str:
    """The name with an adjective and an article, if it takes one: "an orange kite"."""
    return with_article(f"{adjective} {name}" if adjective else name)


def _on(background: str) -> str:
    """The words for the background: " on a blue background"."""
    return f" on {with_article(background + ' background')}"


def _weighted(rng: np.random.Generator, weights: Sequence[float]) -> int:
    """A random index by weight."""
    ends = np.cumsum(weights)
    return int(np.searchsorted(ends, rng.random() * ends[-1], side="right"))
