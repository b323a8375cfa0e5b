"""`fewstep info`: versions, devices, and what the embedded model's card says."""

from __future__ import annotations

import json
import os
import platform
from pathlib import Path
from typing import Any

import torch

from .. import EMBEDDED
from .drawing import versions


def info(as_json: bool) -> None:
    """Prints what a report of a fault should hold."""
    facts: dict[str, Any] = {
        "versions": {**versions(), "python": platform.python_version()},
        "platform": platform.platform(),
        "devices": devices(),
        "model": model_facts(EMBEDDED),
    }
    if as_json:
        print(json.dumps(facts, ensure_ascii=False))
        return
    for name, version in facts["versions"].items():
        print(f"{name:<13}{version}")
    print(f"{'platform':<13}{facts['platform']}")
    for device in facts["devices"]:
        print(f"{'device':<13}{device}")
    model = facts["model"]
    print(f"{'model':<13}{model['name']}, {model['megabytes']} MB, in {model['folder']}")
    for line in model["figures"]:
        print(line)


def devices() -> list[str]:
    """The devices that pictures can be drawn on, the fastest first."""
    cuda = torch.cuda.device_count() if torch.cuda.is_available() else 0
    found = [f"cuda:{i} ({torch.cuda.get_device_name(i)})" for i in range(cuda)]
    if torch.backends.mps.is_available():
        found.append("mps")
    return [*found, f"cpu ({os.cpu_count()} cores, {torch.get_num_threads()} threads)"]


def model_facts(folder: Path) -> dict[str, Any]:
    """Name, place and size of a model, and the tables of its card."""
    size = sum(file.stat().st_size for file in folder.rglob("*") if file.is_file())
    card = folder / "README.md"
    lines = card.read_text(encoding="utf-8").splitlines() if card.is_file() else []
    return {
        "name": folder.name,
        "folder": str(folder),
        "megabytes": round(size / 1e6, 1),
        "figures": [line for line in lines if line.startswith("|")],
    }
