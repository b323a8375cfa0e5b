"""What can be drawn: emoji joined by code point to their English names and keywords."""

from __future__ import annotations

import json
import re
from dataclasses import dataclass
from functools import cache
from importlib import resources
from pathlib import Path
from typing import Any

from fewstep.errors import RequestError
from fewstep.training.emoji.fetch import fetch, read_json, read_members
from fewstep.training.emoji.words import CONTROL, LEFT_OUT

# emojibase: 0 smileys, 1 people, 3 animals, 4 food, 5 travel, 6 activities, 7 objects, 8 symbols
OBJECT_GROUPS = (3, 4, 5, 6, 7)
SYMBOLS = 8
SELECTIONS = ("all", "objects", "objects512")

_WORDS = re.compile(r"[a-z][a-z '-]+")


@dataclass(frozen=True)
class Concept:
    """One emoji: `code` as in `code_key`, its English `name`, keywords and emojibase `group`."""

    code: str
    name: str
    tags: tuple[str, ...]
    group: int


def code_key(hexcode: str) -> str:
    """The code points in the form shared by all packages: `1F3CB-FE0F` -> `1f3cb`.

    Lower case, without the presentation selector fe0f and without leading zeros, because the
    packages disagree on all three.
    """
    return "-".join(p.lstrip("0") for p in hexcode.lower().split("-") if p != "fe0f")


@cache
def _data_file(name: str) -> Any:
    path = resources.files("fewstep.training.emoji") / name
    return json.loads(path.read_text(encoding="utf-8"))


def load_concepts(packages: Path | str | None = None) -> list[Concept]:
    """The 1,538 allowed concepts in emojibase order.

    The list leaves out flags, keycaps and pictures that are not in Microsoft's open release.
    """
    paths = fetch(["names", "keywords"], packages)
    entries = {code_key(e["hexcode"]): e for e in read_json(paths["names"], "en/data.json")}
    _, keywords = next(read_members(paths["keywords"], {"dist/emoji-en-US.json"}))
    by_code = {_emoji_key(emoji): words for emoji, words in json.loads(keywords).items()}
    return [
        _concept(code, entries[code], by_code.get(code, [])) for code in _data_file("allow.json")
    ]


def _emoji_key(emoji: str) -> str:
    return code_key("-".join(f"{ord(char):x}" for char in emoji))


def _concept(code: str, entry: dict[str, Any], keywords: list[str]) -> Concept:
    name = _readable(entry["label"])
    words = [word.replace("_", " ").lower() for word in [*entry.get("tags", ()), *keywords]]
    tags = dict.fromkeys(word for word in words if _is_keyword(word) and word != name.lower())
    return Concept(code, name, tuple(tags), entry["group"])


def _readable(label: str) -> str:
    """The label as one says it: "woman: red hair" -> "woman with red hair"."""
    for typographic, plain in (("\u2019", "'"), ("\u201c", '"'), ("\u201d", '"')):
        label = label.replace(typographic, plain)
    return label.replace(": bald", " with bald head").replace(": ", " with ")


def _is_keyword(word: str) -> bool:
    plain = len(word) > 2 and _WORDS.fullmatch(word) is not None
    return plain and word not in LEFT_OUT and not CONTROL.issuperset(word.split())


def select(selection: str, concepts: list[Concept]) -> list[int]:
    """Rows of `concepts` that belong to `selection`, in the order of `concepts`.

    "all"         every one of them
    "objects"     animals, food, travel, activities and objects without the 24 clock faces
    "objects512"  512 of these: animals and food without near duplicates, then what is concrete
                  and told apart at 64 px, picked by name in `objects512.json`
    """
    match selection:
        case "all":
            return list(range(len(concepts)))
        case "objects":
            return [i for i, c in enumerate(concepts) if c.group in OBJECT_GROUPS and not _clock(c)]
        case "objects512":
            rule = _data_file("objects512.json")
            whole, skip, pick = rule["whole_groups"], set(rule["skip"]), set(rule["pick"])
            return [
                i
                for i, c in enumerate(concepts)
                if (c.group in whole and c.name not in skip) or c.name in pick
            ]
        case _:
            raise RequestError(f"selection={selection!r} (have: {', '.join(SELECTIONS)})")


def _clock(concept: Concept) -> bool:
    return concept.name.endswith(("o'clock", "-thirty"))
