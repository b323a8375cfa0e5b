"""Textual inversion (Gal et al. 2022): learned words, as rows of a text encoder's embedding.

Shapes: n vectors of a word, D channels of the text encoder.
"""

from __future__ import annotations

import copy
import os
import re
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any, NamedTuple

import torch
from torch import Tensor, nn

from ..checkpoints.locate import HOW_TO_CONVERT, PICKLED, Source
from ..checkpoints.single_file import SUFFIXES, find_file
from ..checkpoints.weights import read_tensors
from ..errors import CheckpointError, RequestError

WEIGHTS_NAME = "learned_embeds.safetensors"
A1111_KEYS = ("emb_params", "string_to_param.*")
ENCODERS = {"clip_l": ("tokenizer", "text_encoder"), "clip_g": ("tokenizer_2", "text_encoder_2")}

Words = dict[str, Tensor]  # name -> (n, D)


class Reader(NamedTuple):
    """A text encoder and its tokenizer, with what to call them in messages."""

    tokenizer: Any
    text_encoder: Any
    name: str


class TextualInversionLoader:
    """The textual-inversion methods of a pipeline.

    Words live with tokenizer and text encoder, so pipelines that share these know them too.
    """

    def load_textual_inversion(
        self,
        pretrained_model_name_or_path: Any,
        token: str | Sequence[str] | None = None,
        tokenizer: Any = None,
        text_encoder: Any = None,
        *,
        weight_name: str | None = None,
        subfolder: str | None = None,
        revision: str | None = None,
        cache_dir: str | os.PathLike[str] | None = None,
        force_download: bool = False,
        local_files_only: bool | None = None,
        hf_token: str | bool | None = None,
    ) -> None:
        """Teach the text encoder a word, which prompts then use by its name, `token`.

        From a safetensors file, a folder or hub repository, a dict or a tensor, or a list of these:
        in the layouts of diffusers ({word: vectors}), of A1111 (emb_params; the word is by default
        the file's name) and of SDXL (clip_l, clip_g). A word of several vectors takes as many
        tokens. On SDXL, what is for one encoder needs `tokenizer` and `text_encoder`.

        Raises CheckpointError for files that are missing, pickled or made for another text encoder,
        RequestError for words that are taken; nothing is changed then.
        """
        given = pretrained_model_name_or_path
        listed = list(given) if isinstance(given, (list, tuple)) else [given]
        names: list[Any] = (
            list(token) if isinstance(token, (list, tuple)) else [token] * len(listed)
        )
        if len(listed) == 1 and len(names) > 1:
            listed, names = one_of_many(listed[0], names)
        if len(listed) != len(names):
            raise RequestError(
                f"token holds {len(names)} names for {len(listed)} embeddings; give one for each"
            )
        place = {
            "subfolder": subfolder,
            "revision": revision,
            "cache_dir": cache_dir,
            "force_download": force_download,
            "local_files_only": local_files_only,
            "token": hf_token,
        }
        new: dict[str, tuple[Reader, Words]] = {}
        for one, name in zip(listed, names, strict=True):
            tensors, default = read(one, weight_name, place)
            for key, word, vectors in words_of(tensors, name, default):
                reader = self._reader(key, tokenizer, text_encoder)
                words = new.setdefault(reader.name, (reader, {}))[1]
                if word in words:
                    raise RequestError(f"token={word!r} is given twice")
                words[word] = checked(word, vectors, reader)
        for reader, words in new.values():
            rewrite(reader, learned(reader.text_encoder) | words)

    def unload_textual_inversion(
        self,
        tokens: str | Sequence[str] | None = None,
        tokenizer: Any = None,
        text_encoder: Any = None,
    ) -> None:
        """Forget words, all of them if None. Tokenizer and text encoder are then as before.

        Words that came with the checkpoint's own files stay.
        """
        readers = [self._reader(key, tokenizer, text_encoder) for key in self._keys(text_encoder)]
        known = {word for reader in readers for word in learned(reader.text_encoder)}
        gone = {tokens} if isinstance(tokens, str) else known if tokens is None else set(tokens)
        if unknown := sorted(gone - known):
            loaded = ", ".join(sorted(known)) or "none"
            raise RequestError(f"tokens: no {unknown[0]!r} was loaded; loaded: {loaded}")
        for reader in readers:
            words = learned(reader.text_encoder)
            if gone & words.keys():
                rewrite(reader, {word: v for word, v in words.items() if word not in gone})

    def maybe_convert_prompt(self, prompt: str | list[str], tokenizer: Any) -> str | list[str]:
        """The prompts with each word of several vectors as `word word_1 word_2`."""
        if isinstance(prompt, str):
            return expanded(tokenizer, prompt)
        return [expanded(tokenizer, text) for text in prompt]

    def _keys(self, text_encoder: Any) -> list[str | None]:
        """Keys of ENCODERS that this pipeline has; None stands for an encoder that is given."""
        if text_encoder is not None:
            return [None]
        return [k for k, (_, name) in ENCODERS.items() if getattr(self, name, None) is not None]

    def _reader(self, key: str | None, tokenizer: Any, text_encoder: Any) -> Reader:
        """The encoder that a file's key is for; None stands for the only one there is."""
        if (tokenizer is None) != (text_encoder is None):
            raise RequestError("tokenizer and text_encoder belong together; give both, or neither")
        if text_encoder is not None:
            return Reader(tokenizer, text_encoder, "text_encoder")
        is_double = hasattr(self, "text_encoder_2")
        if key is None and is_double:
            raise RequestError(
                "this embedding is for one text encoder, and the pipeline has two; pass the one it "
                "is for: tokenizer=pipe.tokenizer, text_encoder=pipe.text_encoder"
            )
        names = ENCODERS[key or "clip_l"]
        if (key == "clip_g" and not is_double) or getattr(self, names[1], None) is None:
            raise RequestError(
                f"this embedding is for {names[1]}, which the pipeline does not have"
            )
        return Reader(getattr(self, names[0]), getattr(self, names[1]), names[1])


def expanded(tokenizer: Any, text: str) -> str:
    """A prompt with each word of several vectors as `word word_1 word_2`."""
    added = getattr(tokenizer, "added_tokens_encoder", {})
    several = {name.lower(): name for name in added if f"{name}_1" in added}
    if not several:
        return text

    def spelled(match: re.Match[str]) -> str:
        name = several.get(match[0].lower())
        return match[0] if name is None else " ".join(parts_of(name, added))

    # The longest first, as tokenizers find them: a text may say `word_1` itself.
    names = sorted(added, key=len, reverse=True)
    return re.sub("|".join(map(re.escape, names)), spelled, text, flags=re.IGNORECASE)


def parts_of(name: str, added: Mapping[str, Any]) -> list[str]:
    """`name`, `name_1`, ... as far as a tokenizer knows them."""
    parts = [name]
    while f"{name}_{len(parts)}" in added:
        parts.append(f"{name}_{len(parts)}")
    return parts


# ── files ──


def one_of_many(given: Any, names: list[Any]) -> tuple[list[Any], list[Any]]:
    """The rows of one tensor, for as many names."""
    if not isinstance(given, Tensor) or len(given) != len(names):
        shown = tuple(given.shape) if isinstance(given, Tensor) else type(given).__name__
        raise RequestError(
            f"token holds {len(names)} names, but there is one embedding ({shown}); give one name, "
            "or a tensor with a row for each"
        )
    return list(given), names


def read(
    given: Any, weight_name: str | None, place: Mapping[str, Any]
) -> tuple[Mapping[str, Any], str | None]:
    """The tensors of a file, a dict or a tensor, and the file's name without its extension."""
    if isinstance(given, Tensor):
        return {"emb_params": given}, None
    if isinstance(given, Mapping):
        return given, None
    path = os.fspath(given)
    if path.lower().endswith((*PICKLED, *SUFFIXES)):
        if weight_name is not None or place["subfolder"] is not None:
            raise RequestError(
                f"weight_name and subfolder are for folders, but {path} is a file; leave them out"
            )
        file = find_file(path, **{k: v for k, v in place.items() if k != "subfolder"})
    else:
        name = weight_name or WEIGHTS_NAME
        if name.lower().endswith(PICKLED):
            raise CheckpointError(
                f"weight_name={name!r} is not a safetensors file: {HOW_TO_CONVERT}"
            )
        file = Source(path, **place).fetch(name)
    return dict(read_tensors([file])), Path(file).stem


def words_of(
    tensors: Mapping[str, Any], token: str | None, default: str | None
) -> list[tuple[str | None, str, Any]]:
    """(key of ENCODERS or None, word, vectors) of what a file holds; `token` overrides its word."""
    if "string_to_param" in tensors:  # A1111's own file, read by the caller
        default = tensors.get("name") or default
        found: dict[str | None, Any] = {None: tensors["string_to_param"]["*"]}
    elif tensors.keys() and tensors.keys() <= ENCODERS.keys():
        found = {key: tensors[key] for key in ENCODERS if key in tensors}
    elif len(tensors) == 1:
        ((key, value),) = tensors.items()
        default = default if key in A1111_KEYS else key
        found = {None: value}
    else:
        raise CheckpointError(
            "this is no textual inversion: it holds "
            f"{', '.join(sorted(map(str, tensors))[:5]) or 'nothing'}, and one tensor is expected "
            "(or clip_l and clip_g)"
        )
    word = token or default
    if not word:
        raise RequestError("token is missing: name the word, as token='<cat-toy>'")
    return [(key, word, value) for key, value in found.items()]


def checked(word: str, vectors: Any, reader: Reader) -> Tensor:
    """The vectors (n, D) of a word. Raises an error unless the encoder can learn it."""
    if not isinstance(vectors, Tensor) or vectors.ndim not in (1, 2):
        raise CheckpointError(f"the embedding of {word!r} is no tensor (vectors, channels)")
    vectors = vectors.detach().reshape(-1, vectors.shape[-1]).cpu()
    channels = reader.text_encoder.get_input_embeddings().weight.shape[1]
    if vectors.shape[1] != channels:
        raise CheckpointError(
            f"the embedding of {word!r} has {vectors.shape[1]} channels, but {reader.name} has "
            f"{channels}: it was made for another family of models"
        )
    if not isinstance(word, str) or word != word.strip() or len(word.split()) != 1:
        raise RequestError(f"token must be one word without spaces, got {word!r}")
    known = reader.tokenizer.get_vocab()
    for name in spellings(word, vectors):
        if name in known:
            raise RequestError(
                f"token={name!r} is in the vocabulary already; choose another, or call "
                "unload_textual_inversion first"
            )
    return vectors


def spellings(word: str, vectors: Tensor) -> list[str]:
    """The tokens of a word, one per vector."""
    return [word, *(f"{word}_{i}" for i in range(1, len(vectors)))]


# ── tokenizer and text encoder ──


def learned(text_encoder: Any) -> Words:
    """The words that a text encoder was taught here."""
    words: Words = getattr(text_encoder, "learned_words", {})
    return words


def rewrite(reader: Reader, words: Words) -> None:
    """Let tokenizer and text encoder know exactly these words beside those of their files."""
    tokenizer, encoder, _ = reader
    original = restored(tokenizer)
    first = len(original)
    embedding: nn.Embedding = encoder.get_input_embeddings()
    weight = embedding.weight.data
    # Rows without a token, which some checkpoints have.
    unused: Tensor = getattr(encoder, "unused_rows", weight[first:])
    new = [v.to(weight) for v in words.values()]
    count = sum(map(len, new))
    tokenizer.add_tokens([name for word, v in words.items() for name in spellings(word, v)])
    rows = torch.cat([weight[:first], *new, unused[count:].to(weight)])
    embedding.weight = nn.Parameter(rows, requires_grad=embedding.weight.requires_grad)
    embedding.num_embeddings = encoder.config.vocab_size = len(rows)
    object.__setattr__(encoder, "learned_words", words)
    object.__setattr__(encoder, "unused_rows", unused.clone())
    pool_at_end(encoder, tokenizer.eos_token_id)


def restored(tokenizer: Any) -> Any:
    """A tokenizer as its files have it; makes the given one such again, in place."""
    original = vars(tokenizer).get("untaught") or copy.deepcopy(tokenizer)
    fresh = copy.deepcopy(original)
    vars(tokenizer).clear()
    vars(tokenizer).update(vars(fresh))
    vars(tokenizer)["untaught"] = original
    return original


def pool_at_end(encoder: Any, end: int) -> None:
    """Let a text be summed up at its end token, not at the highest one.

    Old configs (eos_token_id=2) do the latter, which is the same until words are learned.
    """
    for owner in (encoder.config, *encoder.modules()):
        if vars(owner).get("eos_token_id") == 2:
            owner.eos_token_id = end
