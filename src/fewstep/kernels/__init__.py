"""Our own C kernels for the CPU: compiled at first use, with PyTorch beside them.

Every function answers None where it does not serve a call; the caller then asks PyTorch.
"""

from __future__ import annotations

from . import build
from .attention import attention

__all__ = ["attention", "available", "status"]


def available() -> bool:
    """Whether the kernels run here; the first call may compile them, for about a second."""
    return build.library() is not None


def status() -> str:
    """One line for people: on, with what and from where, or off and why."""
    found = build.kernels()
    if found.library is None:
        return f"off: {found.reason}"
    types = "float32 and bfloat16" if build.has("avx512_bf16") else "float32"
    return f"on, {types}: {found.reason}"
