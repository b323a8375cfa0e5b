"""What a benchmark ran on: processor, memory, versions. Nothing here imports torch."""

from __future__ import annotations

import importlib.metadata
import os
import platform
import sys
from pathlib import Path
from typing import Any

PACKAGES = ("torch", "diffusers", "transformers", "openvino", "onnxruntime", "numpy")
# The instructions that decide how quick a dtype is.
FLAGS = (
    "avx2",
    "avx_vnni",
    "avx512f",
    "avx512_bf16",
    "avx512_fp16",
    "avx512_vnni",
    "amx_bf16",
    "amx_int8",
    "amx_fp16",
    "asimd",
    "asimdhp",
    "bf16",
    "i8mm",
    "sve",
    "sve2",
)


def machine() -> dict[str, Any]:
    """Processor, its instructions, cores, memory, system and versions, as JSON."""
    from .. import __version__

    name, flags = processor()
    return {
        "processor": name,
        "flags": [flag for flag in FLAGS if flag in flags],
        "cores": cores(),
        "memory_bytes": memory("MemTotal"),
        "system": platform.platform(),
        "python": platform.python_version(),
        "versions": {"fewstep": __version__, **versions()},
        "executable": Path(sys.executable).name,
    }


def processor() -> tuple[str, set[str]]:
    """The processor's name and the instructions that it knows, as far as the system tells."""
    try:
        lines = Path("/proc/cpuinfo").read_text().splitlines()
    except OSError:
        return platform.processor() or platform.machine(), set()
    pairs = [line.split(":", 1) for line in lines if ":" in line]
    found = {key.strip(): value.strip() for key, value in reversed(pairs)}
    name = found.get("model name") or platform.processor() or platform.machine()
    if {"cpu family", "model"} <= set(found):  # clouds shorten the name
        name += f" (family {found['cpu family']}, model {found['model']})"
    return name, set(found.get("flags", found.get("Features", "")).split())


def cores() -> int:
    """The cores that this process may use."""
    if hasattr(os, "sched_getaffinity"):
        return len(os.sched_getaffinity(0))
    return os.cpu_count() or 1


def versions() -> dict[str, str]:
    """Of the packages that are there."""
    found = {}
    for name in PACKAGES:
        try:
            found[name] = importlib.metadata.version(name)
        except importlib.metadata.PackageNotFoundError:
            continue
    return found


def available_memory() -> int | None:
    """Bytes of memory that can be had, None where the system does not tell."""
    return memory("MemAvailable")


def memory(name: str) -> int | None:
    """Bytes of an entry of the system's table."""
    try:
        lines = Path("/proc/meminfo").read_text().splitlines()
    except OSError:
        return None
    found = {line.split(":")[0]: line.split()[1] for line in lines}
    return int(found[name]) * 1024
