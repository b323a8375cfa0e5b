"""Short hashes that name what made a number: weights, settings."""

from __future__ import annotations

import hashlib
import json
from collections.abc import Mapping
from typing import Any

import torch
from torch import Tensor

from fewstep.training.data.sources import digest_of

DIGITS = 12


def fingerprint(tensors: Mapping[str, Tensor]) -> str:
    """12 digits of the sha256 of named tensors: of their names, types, shapes and bytes.

    Equal for equal weights, whatever file or device they come from.
    """
    digest = hashlib.sha256()
    for name in sorted(tensors):
        tensor = tensors[name].detach().cpu().contiguous()
        digest.update(json.dumps([name, str(tensor.dtype), list(tensor.shape)]).encode())
        digest.update(tensor.reshape(-1).view(torch.uint8).numpy().data)
    return digest.hexdigest()[:DIGITS]


def settings_key(**settings: Any) -> str:
    """12 digits of the sha256 of settings that JSON can hold."""
    return digest_of(settings)[:DIGITS]
