"""The server: many people draw at once with one model.

    worker = PipelineWorker("fewstep-emoji")  # orders go in, pictures come out, batched
    app = create_app(worker)                  # all interfaces over it, as an ASGI app

Names are imported when they are first used: most of the package does without torch.
"""

from __future__ import annotations

import importlib
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from .app import create_app
    from .orders import Limits, Order, ServerError
    from .settings import Settings
    from .worker import PipelineWorker

__all__ = ["Limits", "Order", "PipelineWorker", "ServerError", "Settings", "create_app"]
PLACES = {
    "create_app": "app",
    "Limits": "orders",
    "Order": "orders",
    "ServerError": "orders",
    "Settings": "settings",
    "PipelineWorker": "worker",
}


def __getattr__(name: str) -> Any:
    if name not in PLACES:
        raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
    return getattr(importlib.import_module(f".{PLACES[name]}", __name__), name)
