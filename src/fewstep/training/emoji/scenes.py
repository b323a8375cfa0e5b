"""What a composed picture is: a `Scene` holds the whole truth, and `HeldOut` says which
combinations training never shows, so that a model can be asked for what it cannot have seen.
"""

from __future__ import annotations

import hashlib
from dataclasses import dataclass

BACKGROUNDS: dict[str, tuple[int, int, int]] = {
    "white": (255, 255, 255),
    "black": (24, 24, 24),
    "gray": (150, 150, 150),
    "red": (222, 58, 58),
    "orange": (247, 150, 46),
    "yellow": (250, 216, 66),
    "green": (68, 168, 90),
    "blue": (48, 102, 220),
    "light blue": (150, 208, 250),
    "purple": (140, 86, 200),
    "pink": (242, 146, 190),
    "brown": (132, 86, 56),
}
# hue in degrees, and the least HSV value at which the rotated colour still has the name:
# a dark yellow is olive, a dark orange is brown
RECOLOURS: dict[str, tuple[float, float]] = {
    "red": (2.0, 0.6),
    "orange": (28.0, 0.75),
    "yellow": (52.0, 0.82),
    "green": (125.0, 0.4),
    "blue": (216.0, 0.45),
    "purple": (278.0, 0.45),
    "pink": (328.0, 0.75),
}
POSITIONS: dict[str, tuple[float, float]] = {
    "in the top left corner": (0.25, 0.25),
    "at the top": (0.5, 0.25),
    "in the top right corner": (0.75, 0.25),
    "on the left": (0.25, 0.5),
    "in the center": (0.5, 0.5),
    "on the right": (0.75, 0.5),
    "in the bottom left corner": (0.25, 0.75),
    "at the bottom": (0.5, 0.75),
    "in the bottom right corner": (0.75, 0.75),
}
RELATIONS = ("and", "next to", "above")


@dataclass(frozen=True)
class Placed:
    """One object: row of its concept, centre and size as fractions of the picture's side."""

    concept: int
    x: float
    y: float
    size: float
    mirrored: bool = False
    recolour: str | None = None


@dataclass(frozen=True)
class Scene:
    """A picture as it is: caption, kind, objects in the order of the caption, style, background.

    `relation` is one of RELATIONS for a pair, `position` a key of POSITIONS if the caption has one.
    """

    caption: str
    kind: str
    objects: tuple[Placed, ...]
    style: str
    background: str
    relation: str | None = None
    position: str | None = None

    @property
    def count(self) -> int:
        return len(self.objects)


class HeldOut:
    """Which combinations training must never show; by hash, so independent of seed and selection.

    10 % of (object, background colour), 20 % of unordered object pairs, 10 % of (object, recolour).
    """

    @staticmethod
    def background(code: str, colour: str) -> bool:
        """Whether the concept never occurs before `colour` in training (never so for white)."""
        return colour != "white" and _share("background", code, colour) < 0.10

    @staticmethod
    def pair(code: str, other: str) -> bool:
        """Whether the two concepts never occur together in training."""
        return _share("pair", *sorted((code, other))) < 0.20

    @staticmethod
    def recolour(code: str, colour: str) -> bool:
        """Whether the concept never occurs recoloured so in training."""
        return _share("recolour", code, colour) < 0.10


def _share(*parts: str) -> float:
    digest = hashlib.sha256("|".join(parts).encode()).digest()
    return int.from_bytes(digest[:8], "big") / 2**64
