"""Files that are not what they say, and processes that read them, for the tests of faults."""

from __future__ import annotations

import io
import json
import os
import pickle
import shutil
import struct
import subprocess
import sys
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import torch

WEIGHTS = {
    "unet": "unet/diffusion_pytorch_model.safetensors",
    "vae": "vae/diffusion_pytorch_model.safetensors",
    "text_encoder": "text_encoder/model.safetensors",
}


class Creates:
    """An object whose pickle makes a folder when it is read."""

    def __init__(self, canary: Path) -> None:
        self.canary = canary

    def __reduce__(self) -> tuple[Any, ...]:
        return os.mkdir, (str(self.canary),)


def pickled(canary: Path) -> bytes:
    """A pickle that makes the folder `canary` when it is read."""
    return pickle.dumps(Creates(canary))


def zipped(canary: Path) -> bytes:
    """The same in a zip, as PyTorch writes it."""
    stream = io.BytesIO()
    torch.save({"weight": Creates(canary)}, stream)
    return stream.getvalue()


def floats(begin: int, end: int) -> dict[str, Any]:
    """The entry of a row of floats in the list of a safetensors file."""
    return {"dtype": "F32", "shape": [(end - begin) // 4], "data_offsets": [begin, end]}


def safetensors(header: Mapping[str, Any] | bytes, data: bytes = b"", size: int = -1) -> bytes:
    """A file with any list of tensors, which may say a `size` that it has not."""
    text = header if isinstance(header, bytes) else json.dumps(header).encode()
    return struct.pack("<Q", len(text) if size < 0 else size) + text + data


def copied(folder: Path, place: Path, **files: bytes) -> Path:
    """A copy of a model in which the weights of some components are other bytes."""
    shutil.copytree(folder, place)
    for component, content in files.items():
        (place / WEIGHTS[component]).write_bytes(content)
    return place


def changed(folder: Path, place: Path, file: str, **entries: Any) -> Path:
    """A copy of a model with other entries in one of its JSON files."""
    shutil.copytree(folder, place)
    stored = json.loads((place / file).read_text())
    (place / file).write_text(json.dumps(stored | entries))
    return place


def python(
    *arguments: object, timeout: float = 60, **variables: str | None
) -> subprocess.CompletedProcess[str]:
    """Runs Python on one core; variables that are None are not there."""
    environment = {**os.environ, "OMP_NUM_THREADS": "1", "HF_HUB_OFFLINE": "1"}
    for name, value in variables.items():
        environment.pop(name, None)
        if value is not None:
            environment[name] = value
    command = [sys.executable, *map(str, arguments)]
    return subprocess.run(
        command, capture_output=True, encoding="utf-8", env=environment, timeout=timeout
    )
