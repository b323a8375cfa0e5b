"""Training data with exact captions, composed from openly licensed emoji.

fetch -> concepts -> sprites (files) -> compose (captioned scenes) -> render (pixels)
"""

from fewstep.training.emoji.captions import caption_corpus, keyword_phrases
from fewstep.training.emoji.compose import Mix, SceneSampler
from fewstep.training.emoji.concepts import Concept
from fewstep.training.emoji.render import render
from fewstep.training.emoji.scenes import HeldOut, Placed, Scene
from fewstep.training.emoji.sprites import STYLES, Sprites, load_sprites
from fewstep.training.emoji.sprites import prepare as prepare_emoji
from fewstep.training.emoji.subset import subset

__all__ = [
    "STYLES",
    "Concept",
    "HeldOut",
    "Mix",
    "Placed",
    "Scene",
    "SceneSampler",
    "Sprites",
    "caption_corpus",
    "keyword_phrases",
    "load_sprites",
    "prepare_emoji",
    "render",
    "subset",
]
