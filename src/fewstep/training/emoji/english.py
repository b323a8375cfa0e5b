"""The little English the captions need: a or an, and plurals."""

from __future__ import annotations

import re

from fewstep.training.emoji.words import COUNTED_NAMES, DESCRIBING, IRREGULAR, PLURALS, UNCOUNTED

NUMBERS = {2: "two", 3: "three", 4: "four"}

_VOWEL_SOUND = re.compile(r"[aeio]|u(?!ni|su|ra|ti|ten|k)|hour|heir|honest|x-|ng\b|sos\b", re.I)
_CONSONANT_SOUND = re.compile(r"one|once|eu|ewe", re.I)
_NO_ARTICLE = re.compile(r"(?:no|input|rolling|palms|flower playing) ")
_JOINED = re.compile(r" and |[,:!(]")


def article(word: str) -> str:
    """ "a" or "an", by the sound `word` begins with: an hourglass, a unicorn, a one-way street."""
    return "an" if _VOWEL_SOUND.match(word) and not _CONSONANT_SOUND.match(word) else "a"


def with_article(name: str) -> str:
    """The name after its article, if it takes one: "an apple", "french fries", "fire"."""
    return name if _stands_bare(name) else f"{article(name)} {name}"


def is_countable(name: str) -> bool:
    """Whether "three ..." can be said of the name: one singular noun, no "and", not a mass."""
    return not (_JOINED.search(name) or _stands_bare(name))


def plural(name: str) -> str:
    """The plural of the name's main noun: "glass of milk" -> "glasses of milk"."""
    words, rest = _split(name)
    return " ".join([*words[:-1], _plural_word(words[-1]), *rest])


def _plural_word(word: str) -> str:
    lower = word.lower()
    if lower in IRREGULAR:
        return IRREGULAR[lower]
    if lower.endswith("man") and lower not in ("human", "talisman", "caiman"):
        return word[:-2] + "en"
    if re.search(r"(?:s|x|z|ch|sh)$", lower):
        return word + "es"
    if re.search(r"[^aeiou]y$", lower):
        return word[:-1] + "ies"
    return word + "s"


def _stands_bare(name: str) -> bool:
    """Whether the name takes neither article nor number, being a plural or a mass."""
    noun = _split(name)[0][-1].lower()
    mass = noun in UNCOUNTED and name not in COUNTED_NAMES
    return mass or noun in PLURALS or _NO_ARTICLE.match(name) is not None


def _split(name: str) -> tuple[list[str], list[str]]:
    """The words up to the main noun, and those that follow it: ["glass"], ["of", "milk"]."""
    words = name.split()
    end = next((i for i, word in enumerate(words) if i and word in DESCRIBING), len(words))
    return words[:end], words[end:]
