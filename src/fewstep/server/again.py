"""What a record tells beside what was asked, so that `fewstep repro` can draw a picture again."""

from __future__ import annotations

import os
import re
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import torch

from ..models.lora import adapters_of
from ..pipelines.request import Request

REPOSITORY = re.compile(r"\w[\w.-]*/\w[\w.-]*")


def again(pipe: Any, request: Request, made: Mapping[str, Any]) -> dict[str, Any]:
    """The scheduler's config, the threads, and what the call got in place of what was asked."""
    config = {key: v for key, v in pipe.scheduler.config.items() if not key.startswith("_")}
    passed = {
        "steps": request.num_inference_steps,
        "strength": request.strength,
        "negative_prompt": request.negative_prompt,
    }
    return {
        "scheduler_config": {"_class_name": type(pipe.scheduler).__name__, **config},
        "threads": torch.get_num_threads(),
        "passed": {name: value for name, value in passed.items() if value != made[name]},
    }


def sources_of(pipe: Any) -> dict[str, str]:
    """Where the loaded LoRAs came from, by their ids, without folders of this machine."""
    parts = [part for part in pipe.components.values() if isinstance(part, torch.nn.Module)]
    loaded = [entry for part in parts for entry in adapters_of(part).loaded.items()]
    return {name: bare_name(adapter.source or name) for name, adapter in loaded}


def bare_name(place: str) -> str:
    """A repository's name as it is; of a folder or a file the last part, with its suffix."""
    is_repository = REPOSITORY.fullmatch(place) and not os.path.exists(place)
    return place if is_repository else Path(place).name
