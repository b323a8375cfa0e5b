"""CLIP's tokenizer, from the list of merges that OpenAI published with it."""

from __future__ import annotations

import gzip
import json
from collections.abc import Iterator
from pathlib import Path
from tempfile import TemporaryDirectory
from typing import Any

MERGES = Path(__file__).parent / "bpe_simple_vocab_16e6.txt.gz"
SIZE = 49_408  # 256 bytes, the same at the end of a word, the merges, and two marks
START, END = "<|startoftext|>", "<|endoftext|>"
LENGTH = 77


def clip_tokenizer(pad_token: str = END) -> Any:
    """The CLIPTokenizer of Stable Diffusion: `START` is 49406, `END` 49407, 77 tokens at most.

    Stable Diffusion 1 and SDXL's first tokenizer pad with `END`, Stable Diffusion 2 and SDXL's
    second with "!" (0).
    """
    from transformers import CLIPTokenizer

    with TemporaryDirectory() as folder:  # the one way in that all versions of transformers share
        write_tokenizer(Path(folder), pad_token)
        tokenizer = CLIPTokenizer.from_pretrained(folder, local_files_only=True)
    tokenizer.name_or_path = ""  # not a folder that is gone
    return tokenizer


def write_tokenizer(folder: Path, pad_token: str) -> None:
    """Write the files of a CLIP tokenizer: its words, its merges, and how it pads."""
    merges = read_merges()
    letters = list(byte_letters())
    words = [*letters, *(letter + "</w>" for letter in letters)]
    words += [merge.replace(" ", "") for merge in merges] + [START, END]
    marks = {"bos_token": START, "eos_token": END, "unk_token": END, "pad_token": pad_token}
    config = {"tokenizer_class": "CLIPTokenizer", "model_max_length": LENGTH, **marks}
    ids = {word: index for index, word in enumerate(words)}
    for name, content in (
        ("vocab.json", json.dumps(ids, ensure_ascii=False)),
        ("merges.txt", "\n".join(["#version: 0.2", *merges, ""])),
        ("tokenizer_config.json", json.dumps(config)),
        ("special_tokens_map.json", json.dumps(marks)),
    ):
        (folder / name).write_text(content, encoding="utf-8")


def read_merges() -> list[str]:
    """The merges that CLIP uses, "left right" each; the file holds a heading and more of them."""
    with gzip.open(MERGES, "rt", encoding="utf-8") as file:
        lines = file.read().split("\n")
    return lines[1 : 1 + SIZE - 2 * 256 - 2]


def byte_letters() -> Iterator[str]:
    """A printable letter for each of the 256 bytes, in the order of their ids."""
    printable = [*range(ord("!"), ord("~") + 1), *range(ord("¡"), ord("¬") + 1)]
    printable += range(ord("®"), ord("ÿ") + 1)
    yield from map(chr, printable)
    yield from map(chr, range(256, 512 - len(printable)))  # the others, in their order
