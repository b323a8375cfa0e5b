"""Warnings that point at the line that called a pipeline, however deep the reason lies."""

from __future__ import annotations

import sys
import warnings

OWN = __name__.rpartition(".")[0]  # fewstep.pipelines


def warn_caller(message: str) -> None:
    """Warn (UserWarning) at the first frame outside the pipelines and torch's decorators."""
    level, frame = 1, sys._getframe()
    while frame.f_back is not None and is_inside(frame.f_globals.get("__name__", "")):
        level, frame = level + 1, frame.f_back
    warnings.warn(message, stacklevel=level)


def is_inside(module: str) -> bool:
    """Whether a module of this name is one of the pipelines' or torch's."""
    return module == OWN or module.startswith((f"{OWN}.", "torch."))
