"""Frozen sentence embeddings, as all-MiniLM-L6-v2 makes them."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path
from typing import Any

import numpy as np
import torch

from ..errors import CheckpointError, RequestError


class SentenceEncoder:
    """Texts -> unit vectors float32 [N, D]: token states averaged over the text, normalised."""

    def __init__(self, folder: str | Path, max_tokens: int) -> None:
        """`folder` holds config.json, model.safetensors and the tokenizer; longer texts are cut."""
        from transformers import AutoModel, AutoTokenizer

        if not (Path(folder) / "model.safetensors").is_file():
            raise CheckpointError(
                f"no model.safetensors in {folder}; give another sentence encoder"
            )
        place, self._most = str(folder), max_tokens
        self._tokenizer: Any = AutoTokenizer.from_pretrained(place, local_files_only=True)
        model = AutoModel.from_pretrained(place, local_files_only=True, use_safetensors=True)
        self._model: Any = model.eval().requires_grad_(False)

    @torch.inference_mode()
    def __call__(self, texts: Sequence[str], *, batch_size: int = 64) -> np.ndarray:
        """Embeddings in the order of `texts`, of which there must be at least one."""
        if isinstance(texts, str) or not texts:
            raise RequestError(f"texts must be a list of at least one string, got {texts!r}")
        batches = [texts[i : i + batch_size] for i in range(0, len(texts), batch_size)]
        return np.concatenate([self._embed(list(batch)) for batch in batches])

    def _embed(self, texts: list[str]) -> np.ndarray:
        tokens = self._tokenizer(
            texts, padding=True, truncation=True, max_length=self._most, return_tensors="pt"
        )
        states = self._model(**tokens).last_hidden_state  # (B, L, D)
        mask = tokens["attention_mask"].unsqueeze(-1).to(states.dtype)
        mean = (states * mask).sum(1) / mask.sum(1)
        return torch.nn.functional.normalize(mean, dim=-1).float().numpy()
