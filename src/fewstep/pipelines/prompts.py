"""Weighted and long prompts: `(a word:1.3)`, `[less]`, `BREAK`, and any number of tokens.

`(word)` counts 1.1 times, `[word]` 1 / 1.1 times, `(word:1.3)` 1.3 times; they nest. A backslash
makes a bracket text. A text is read in chunks of 75 tokens (77 with start and end), BREAK begins a
new one, and the embeddings of all chunks follow each other.

Weights are A1111's, the convention that published prompts are written for: each token's embedding
is multiplied by its weight, and then the chunk scaled so that its mean is what it was; without
this, weights above 1 would also raise contrast, as more guidance does.

Shapes: P texts, K chunks, L tokens of a chunk, D channels.
"""

from __future__ import annotations

import re
from collections.abc import Callable, Sequence
from dataclasses import dataclass, replace
from typing import Any, NamedTuple

import torch
from torch import Tensor

from ..errors import RequestError
from .request import Request
from .textual_inversion import expanded

ROUND, SQUARE = 1.1, 1 / 1.1
BREAK = "BREAK"
_SYMBOL = re.compile(
    r"""\\(?P<escaped>[\\()\[\]])
    | (?P<open>[(\[])
    | :\s*(?P<weight>[+-]?(?:\d+\.?\d*|\.\d+))\s*\)
    | (?P<close>[)\]])
    | (?P<cut>\bBREAK\b)
    | [^\\()\[\]:B]+
    | .""",
    re.VERBOSE | re.DOTALL,
)
# What the same programs read in prompts too -> what to do here.
_FOREIGN = {
    r"<(lora|lyco|hypernet):[^>]*>": "load LoRAs with load_lora_weights",
    r"\[[^\[\]]*:\s*\d*\.?\d+\s*\]": "prompts do not change with the steps; leave it out",
    r"\[[^\[\]]*\|[^\[\]]*\]": "prompts do not change with the steps; leave it out",
}

Tokens = list[tuple[int, float]]  # of a chunk, each with its weight
Encode = Callable[[Any, Any, Sequence[str], "int | None"], tuple[Tensor, "Tensor | None"]]


class Piece(NamedTuple):
    """A part of a text of one weight; None stands for a break."""

    text: str | None
    weight: float


class Encoder(NamedTuple):
    """A text encoder, its tokenizer, and the function that reads with them.

    `encode(tokenizer, text_encoder, texts, clip_skip)` gives embeddings (P, L, D) and, perhaps,
    each text as a whole (P, Q).
    """

    tokenizer: Any
    text_encoder: Any
    encode: Encode

    @property
    def length(self) -> int:
        """The tokens L of a chunk."""
        places = self.text_encoder.config.max_position_embeddings
        return int(min(self.tokenizer.model_max_length, places))


# ── from text to tokens ──


def parse(text: str) -> list[list[Piece]]:
    """The pieces of a text, parted at its breaks. A bracket that stays open counts to the end."""
    pieces: list[Piece] = []
    opened: dict[str, list[int]] = {"(": [], "[": []}

    def weigh(bracket: str, factor: float) -> bool:
        if not opened[bracket]:
            return False
        start = opened[bracket].pop()
        pieces[start:] = [Piece(t, w * factor) for t, w in pieces[start:]]
        return True

    for match in _SYMBOL.finditer(text):
        if match["open"]:
            opened[match["open"]].append(len(pieces))
        elif match["cut"]:
            pieces.append(Piece(None, 1.0))
        elif (closed := closing(match)) is None or not weigh(*closed):
            pieces.append(Piece(match["escaped"] or match[0], 1.0))
    for bracket, factor in (("(", ROUND), ("[", SQUARE)):
        while weigh(bracket, factor):
            pass
    return parted(pieces)


def closing(match: re.Match[str]) -> tuple[str, float] | None:
    """The bracket that a symbol closes, and the weight of what is in it."""
    if match["weight"]:
        return "(", float(match["weight"])
    return {")": ("(", ROUND), "]": ("[", SQUARE)}.get(match["close"] or "")


def parted(pieces: Sequence[Piece]) -> list[list[Piece]]:
    """Pieces by section; neighbours of equal weight are one, so that words stay whole."""
    sections: list[list[Piece]] = [[]]
    for piece in pieces:
        section = sections[-1]
        if piece.text is None:
            sections.append([])
        elif section and section[-1].weight == piece.weight:
            section[-1] = Piece(f"{section[-1].text}{piece.text}", piece.weight)
        else:
            section.append(piece)
    return sections


def refuse_foreign(text: str) -> None:
    """Raises RequestError for what other programs do with prompts and this one does not."""
    plain = re.sub(r"\\.", "", text)
    for pattern, remedy in _FOREIGN.items():
        if match := re.search(pattern, plain):
            raise RequestError(f"prompt holds {match[0]!r}, which is not supported: {remedy}")


def chunks_of(encoder: Encoder, text: str) -> list[Tokens]:
    """The chunks of a text, without start and end; at least one."""
    refuse_foreign(text)
    size = encoder.length - 2
    chunks: list[Tokens] = []
    for section in parse(text):
        tokens = [
            (token, piece.weight)
            for piece in section
            for token in encoder.tokenizer(
                expanded(encoder.tokenizer, piece.text or ""),
                add_special_tokens=False,
                verbose=False,
            ).input_ids
        ]
        chunks += [tokens[i : i + size] for i in range(0, len(tokens), size)]
    return chunks or [[]]


@dataclass(frozen=True, eq=False)
class Chunks:
    """P texts of K chunks as token ids. Takes a tokenizer's place where these texts are read."""

    input_ids: Tensor  # (P K, L)
    attention_mask: Tensor  # (P K, L)
    weights: Tensor  # (P K, L)
    count: int  # K

    @classmethod
    def of(cls, encoder: Encoder, texts: Sequence[list[Tokens]], count: int) -> Chunks:
        """Texts with empty chunks up to `count` each, and each chunk filled up to L tokens."""
        tokenizer, length = encoder.tokenizer, encoder.length
        rows = [chunk for text in texts for chunk in [*text, *[[]] * (count - len(text))]]
        shape = (len(rows), length)
        ids = torch.full(shape, tokenizer.pad_token_id, dtype=torch.long)
        mask, weights = torch.zeros_like(ids), torch.ones(shape)
        for row, chunk in enumerate(rows):
            end = len(chunk) + 1
            own = [tokenizer.bos_token_id, *(token for token, _ in chunk), tokenizer.eos_token_id]
            ids[row, : end + 1] = torch.tensor(own)
            mask[row, : end + 1] = 1
            weights[row, 1:end] = torch.tensor([weight for _, weight in chunk])
        return cls(ids, mask, weights, count)

    @property
    def model_max_length(self) -> int:
        """The tokens L of a chunk, under the name that tokenizers have for it."""
        return self.input_ids.shape[1]

    def __call__(self, texts: Sequence[str], **how: Any) -> Chunks:
        """Itself, as the answer of a tokenizer."""
        return self

    def weighed(self, embeds: Tensor) -> Tensor:
        """Embeddings (P, K L, D) with their weights, of those (P K, L, D) without."""
        plain, weights = embeds.float(), self.weights.to(embeds.device)[..., None]
        changed = plain * weights
        before, after = (x.mean((1, 2), keepdim=True) for x in (plain, changed))
        # Tokens whose means have one sign cannot leave these bounds. A mean of about 0, as it is
        # right behind a plain layer norm, says nothing and must not blow the chunk up.
        low = 1 / weights.amax(1, keepdim=True).clamp(min=1)
        high = 1 / weights.amin(1, keepdim=True).clamp(0.1, 1)
        restored = torch.where(after == 0, 1.0, before / after).clamp(low, high)
        changed = changed * restored
        untouched = (weights == 1).all(dim=1, keepdim=True)
        return (
            torch.where(untouched, embeds, changed.to(embeds.dtype))
            .unflatten(0, (-1, self.count))
            .flatten(1, 2)
        )


# ── a request ──


def embedded(
    request: Request,
    encoders: Sequence[Encoder],
    prompts: Sequence[list[str]],
    negatives: Sequence[list[str]] | None,
) -> Request:
    """`request` with embeddings in place of its weighted prompts.

    `prompts` and, with guidance, `negatives` hold the texts for each encoder. All of them get as
    many chunks as the longest has. A text as a whole is that of its first chunk.
    """
    roles = {"prompt": prompts} | ({} if negatives is None else {"negative_prompt": negatives})
    read = {
        name: [[chunks_of(e, text) for text in own] for e, own in zip(encoders, texts, strict=True)]
        for name, texts in roles.items()
    }
    count = max(len(text) for own in read.values() for texts in own for text in texts)
    found: dict[str, Any] = {}
    for name, own in read.items():
        # As without weights, clip_skip is for the prompt alone.
        skip = request.clip_skip if name == "prompt" else None
        tokens, pooled = embed(encoders, own, count, skip)
        found[f"{name}_embeds"] = tokens.expand(request.prompts, -1, -1)
        if pooled is not None:
            key = name.replace("prompt", "pooled_prompt_embeds")
            found[key] = pooled.expand(request.prompts, -1)
    gone: dict[str, Any] = dict.fromkeys(
        ("prompt", "prompt_2", "negative_prompt", "negative_prompt_2")
    )
    return replace(request, **(gone | found | {"weighted_prompt": False}))


def embed(
    encoders: Sequence[Encoder],
    texts: Sequence[Sequence[list[Tokens]]],
    count: int,
    clip_skip: int | None,
) -> tuple[Tensor, Tensor | None]:
    """(embeddings (P, K L, D) of all encoders together, the last one's texts as a whole (P, Q))."""
    parts, pooled = [], None
    for encoder, own in zip(encoders, texts, strict=True):
        chunks = Chunks.of(encoder, own, count)
        tokens, pooled = encoder.encode(chunks, encoder.text_encoder, (), clip_skip)
        parts.append(chunks.weighed(tokens))
    whole = None if pooled is None else pooled.unflatten(0, (-1, count))[:, 0]
    return torch.cat([part.to(parts[-1]) for part in parts], dim=-1), whole


def listed(text: str | Sequence[str] | None) -> list[str]:
    """One text or several as a list."""
    return [text] if isinstance(text, str) else list(text or ())
