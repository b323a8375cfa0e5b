"""A byte-pair tokenizer in CLIP's form (vocab.json, merges.txt), trained on captions."""

from __future__ import annotations

import json
from collections.abc import Iterable
from pathlib import Path
from typing import Any

START, END = "<|startoftext|>", "<|endoftext|>"


def train_tokenizer(captions: Iterable[str], vocab_size: int, length: int, folder: Path) -> Any:
    """Train a CLIP tokenizer of `vocab_size` entries and `length` tokens, and save it in `folder`.

    As CLIP's: lower case, bytes, `</w>` at the end of a word, start and end token last in the
    vocabulary, padding with the end token. A tokenizer that is there is loaded, not trained again.
    """
    from tokenizers import Regex, Tokenizer, models, normalizers, pre_tokenizers, trainers
    from transformers import CLIPTokenizer

    if not (folder / "tokenizer_config.json").exists():  # the last of its files
        learner = Tokenizer(models.BPE(end_of_word_suffix="</w>"))
        learner.normalizer = normalizers.Sequence([normalizers.NFC(), normalizers.Lowercase()])
        words = Regex(r"'s|'t|'re|'ve|'m|'ll|'d|\p{L}+|\p{N}|[^\s\p{L}\p{N}]+")
        learner.pre_tokenizer = pre_tokenizers.Sequence(
            [
                pre_tokenizers.Split(words, behavior="removed", invert=True),
                pre_tokenizers.ByteLevel(add_prefix_space=False, use_regex=False),
            ]
        )
        alphabet = sorted(pre_tokenizers.ByteLevel.alphabet())
        # More merges than fit: the alphabet's "x</w>" entries, all of which CLIP has, come on top.
        trainer = trainers.BpeTrainer(
            vocab_size=vocab_size,
            initial_alphabet=alphabet,
            end_of_word_suffix="</w>",
            show_progress=False,
        )
        learner.train_from_iterator(captions, trainer)
        merges = json.loads(learner.to_str())["model"]["merges"]
        tokens = [*alphabet, *(f"{c}</w>" for c in alphabet)]
        tokens += ["".join(pair) for pair in merges][: vocab_size - len(tokens) - 2]
        pairs = merges[: len(tokens) - 2 * len(alphabet)]
        # A small corpus gives fewer merges: the ids between stay unused, as the length is fixed.
        vocab = {token: i for i, token in enumerate(tokens)}
        vocab |= {START: vocab_size - 2, END: vocab_size - 1}
        folder.mkdir(parents=True, exist_ok=True)
        lines = ["#version: 0.2", *(" ".join(pair) for pair in pairs)]
        (folder / "merges.txt").write_text("\n".join(lines) + "\n", encoding="utf-8")
        (folder / "vocab.json").write_text(json.dumps(vocab, ensure_ascii=False), encoding="utf-8")
        made = CLIPTokenizer(
            vocab=str(folder / "vocab.json"),
            merges=str(folder / "merges.txt"),
            model_max_length=length,
            unk_token=END,
            bos_token=START,
            eos_token=END,
            pad_token=END,
        )
        made.save_pretrained(folder)
    return CLIPTokenizer.from_pretrained(folder, local_files_only=True)
