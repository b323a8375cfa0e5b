"""Environment variables as values."""

from __future__ import annotations

import os
from pathlib import Path

from ..errors import RequestError


def text(name: str, default: str) -> str:
    """A variable, or the default where it is missing or empty."""
    return os.environ.get(name) or default


def number(name: str, default: int) -> int:
    """A whole number of the environment."""
    value = text(name, str(default))
    try:
        return int(value)
    except ValueError:
        raise RequestError(f"the environment's {name}={value!r} must be a whole number") from None


def home() -> Path:
    """Where fewstep keeps what it can make again: $FEWSTEP_CACHE, or ~/.cache/fewstep."""
    return Path(text("FEWSTEP_CACHE", "~/.cache/fewstep")).expanduser()
