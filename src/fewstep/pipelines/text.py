"""Prompts to embeddings, by the CLIP text encoder and tokenizer of transformers.

Shapes: P prompts, L tokens (77 in Stable Diffusion), D channels.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import torch
from torch import Tensor

from ..errors import RequestError
from .notices import warn_caller


def encode_text(
    tokenizer: Any,
    text_encoder: Any,
    prompts: Sequence[str],
    *,
    length: int | None = None,
    clip_skip: int | None = None,
) -> Tensor:
    """Embeddings (P, L, D) in the text encoder's dtype and on its device.

    `clip_skip` leaves out that many of the last layers. Text behind the last token is cut off with
    a warning that quotes it.
    """
    layers = text_encoder.config.num_hidden_layers
    if clip_skip is not None and not 0 <= clip_skip < layers:
        raise RequestError(
            f"clip_skip must lie in [0, {layers - 1}] (the text encoder has {layers} layers), "
            f"got {clip_skip}"
        )
    tokens = tokenized(tokenizer, text_encoder, prompts, length)
    mask = None
    if getattr(text_encoder.config, "use_attention_mask", False):
        mask = tokens.attention_mask.to(text_encoder.device)
    ids = tokens.input_ids.to(text_encoder.device)
    if clip_skip is None:
        return text_encoder(ids, attention_mask=mask).last_hidden_state
    hidden = text_encoder(ids, attention_mask=mask, output_hidden_states=True).hidden_states
    # transformers 5 has no inner `text_model` any more.
    model = getattr(text_encoder, "text_model", text_encoder)
    return model.final_layer_norm(hidden[-(clip_skip + 1)])


def hidden_text(
    tokenizer: Any, text_encoder: Any, prompts: Sequence[str], clip_skip: int | None = None
) -> tuple[Tensor, Tensor | None]:
    """(embeddings (P, L, D) of the last layer but one, pooled texts (P, Q) if it projects them).

    As SDXL reads them: without the final norm; `clip_skip` leaves out that many layers more.
    """
    layers = text_encoder.config.num_hidden_layers
    if clip_skip is not None and not 0 <= clip_skip < layers - 1:
        raise RequestError(
            f"clip_skip must lie in [0, {layers - 2}] (the text encoder has {layers} layers, and "
            f"SDXL leaves out one more), got {clip_skip}"
        )
    tokens = tokenized(tokenizer, text_encoder, prompts)
    found = text_encoder(tokens.input_ids.to(text_encoder.device), output_hidden_states=True)
    return found.hidden_states[-(2 + (clip_skip or 0))], getattr(found, "text_embeds", None)


def tokenized(
    tokenizer: Any, text_encoder: Any, prompts: Sequence[str], length: int | None = None
) -> Any:
    """Token ids and mask (P, L), padded and cut to `length` or to what the text encoder reads."""
    limit = min(tokenizer.model_max_length, text_encoder.config.max_position_embeddings)
    tokens = tokenizer(
        list(prompts),
        padding="max_length",
        max_length=length or limit,
        truncation=True,
        return_tensors="pt",
    )
    if tokens.attention_mask[:, -1].any():  # no padding: there may have been more
        warn_of_cut_text(tokenizer, prompts, length or limit)
    return tokens


def warn_of_cut_text(tokenizer: Any, prompts: Sequence[str], limit: int) -> None:
    """Warn, quoting it, of text that `limit` tokens do not hold."""
    whole = tokenizer(list(prompts), truncation=False, verbose=False).input_ids
    cut = [tokenizer.decode(ids[limit - 1 : -1]) for ids in whole if len(ids) > limit]
    if cut:
        warn_caller(
            f"the prompt is longer than the {limit} tokens that the text encoder reads; "
            f"cut off: {', '.join(map(repr, cut))}"
        )


def check_prompt(name: str, prompt: Any) -> None:
    """Raises RequestError unless `prompt` is a text or a list of at least one text."""
    texts = prompt if isinstance(prompt, (list, tuple)) else [prompt]
    if not texts or not all(isinstance(text, str) for text in texts):
        raise RequestError(f"{name} must be a string or a list of strings, got {prompt!r}")
    if any("\ud800" <= letter <= "\udfff" for text in texts for letter in text):
        raise RequestError(
            f"{name} holds bytes or half characters that are no text; give UTF-8, got {prompt!r}"
        )


def check_embeds(name: str, embeds: Any) -> None:
    """Raises RequestError unless `embeds` is a tensor (P, L, D)."""
    if not isinstance(embeds, torch.Tensor) or embeds.ndim != 3:
        shape = tuple(embeds.shape) if isinstance(embeds, torch.Tensor) else type(embeds).__name__
        raise RequestError(f"{name} must be a tensor (prompts, tokens, channels), got {shape}")
