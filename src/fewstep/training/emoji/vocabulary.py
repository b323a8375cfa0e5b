"""What may be said of each concept of a selection, and in which colours it can be shown."""

from __future__ import annotations

from functools import cached_property

from fewstep.training.emoji.concepts import OBJECT_GROUPS, SYMBOLS
from fewstep.training.emoji.english import is_countable
from fewstep.training.emoji.scenes import BACKGROUNDS, RECOLOURS
from fewstep.training.emoji.sprites import Sprites
from fewstep.training.emoji.words import COLOURS, SIDED

# before a darker colour the black lines could not be seen
_LINE_BACKGROUNDS = frozenset({"white", "yellow", "light blue", "pink", "orange"})


class Vocabulary:
    """Names, keywords and possible colours of the concepts at `rows` of the sprites.

    A keyword alone names a concept if at most `rarest_tag` concepts at `rows` share it.
    """

    def __init__(self, sprites: Sprites, rows: list[int], *, rarest_tag: int = 3) -> None:
        self.sprites, self.rows, self.rarest_tag = sprites, rows, rarest_tag

    @cached_property
    def names(self) -> dict[int, str]:
        """English name by row."""
        return {row: self.sprites.concepts[row].name for row in self.rows}

    @cached_property
    def countable(self) -> list[int]:
        """Rows of which "three ..." can be said."""
        return [
            row
            for row in self.rows
            if self.sprites.concepts[row].group != SYMBOLS and is_countable(self.names[row])
        ]

    @cached_property
    def pairable(self) -> list[int]:
        """Rows whose names stay one thing beside "and": not "fork and knife"."""
        joined = (" and ", " with ", ":", ",")
        return [row for row in self.rows if not any(mark in self.names[row] for mark in joined)]

    @cached_property
    def own_tags(self) -> dict[int, tuple[str, ...]]:
        """Keywords of each row that at most `rarest_tag` concepts of the selection share.

        A keyword that is another concept's name is not the row's own.
        """
        concepts = [self.sprites.concepts[row] for row in self.rows]
        owners: dict[str, int] = {}
        for concept in concepts:
            for tag in concept.tags:
                owners[tag] = owners.get(tag, 0) + 1
        taken = {concept.name.lower() for concept in concepts}
        return {
            row: tuple(t for t in concept.tags if owners[t] <= self.rarest_tag and t not in taken)
            for row, concept in zip(self.rows, concepts, strict=True)
        }

    def recolours(self, row: int, style: str) -> list[str]:
        """Colours the concept can truthfully be given: only objects of one clear hue that no word
        of the name fixes, and only hues that are far from their own and light enough."""
        concept, look = self.sprites.concepts[row], self.sprites.looks[style][row]
        fixed = not COLOURS.isdisjoint(concept.name.lower().replace("-", " ").split())
        if look is None or look.hue is None or fixed or concept.group not in OBJECT_GROUPS:
            return []
        return [
            name
            for name, (hue, least) in RECOLOURS.items()
            if look.value >= least and abs((hue - look.hue + 180) % 360 - 180) > 40
        ]

    def backgrounds(self, row: int, style: str) -> list[str]:
        """Colours other than white before which the concept can be seen in this style."""
        look = self.sprites.looks[style][row]
        if look is None:
            return []
        return [
            name
            for name, rgb in BACKGROUNDS.items()
            if name != "white"
            and (style != "high_contrast" or name in _LINE_BACKGROUNDS)
            and sum((a - b) ** 2 for a, b in zip(rgb, look.rgb, strict=True)) > 60**2
        ]

    def mirrorable(self, row: int) -> bool:
        """Whether a mirrored picture is still true: no letters, clock hands or named sides."""
        concept = self.sprites.concepts[row]
        words = concept.name.lower().replace("-", " ").split()
        return concept.group != SYMBOLS and SIDED.isdisjoint([*words, *concept.name.split()])
