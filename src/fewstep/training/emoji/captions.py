"""Text without pictures: for training the tokenizer and for aligning the text encoder."""

from __future__ import annotations

from collections.abc import Iterator, Sequence

from fewstep.training.emoji.compose import SceneSampler
from fewstep.training.emoji.concepts import Concept
from fewstep.training.emoji.english import with_article
from fewstep.training.emoji.scenes import BACKGROUNDS


def caption_corpus(sampler: SceneSampler, count: int) -> Iterator[str]:
    """The captions of scenes 0 to `count` - 1; the same ones every time."""
    return (sampler.scene(index).caption for index in range(count))


def keyword_phrases(concepts: Sequence[Concept]) -> list[str]:
    """Every name and keyword once, in order of first use, and the names after their articles."""
    phrases = (
        phrase
        for concept in concepts
        for phrase in (concept.name, with_article(concept.name), *concept.tags)
    )
    return list(dict.fromkeys([*phrases, *BACKGROUNDS]))
