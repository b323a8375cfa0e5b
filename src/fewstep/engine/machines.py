"""What fewer bits need of a machine: why a network cannot compute so here, and what would do."""

from __future__ import annotations

from typing import Any

import torch

from ..kernels import build

onednn: Any = torch.ops.onednn


def refusal(kind: str, dtype: torch.dtype, device: torch.device) -> str | None:
    """Why a network cannot compute so here and what would do, None if it can."""
    if kind == "int8-weights":
        return None
    return (int8_refusal if kind == "int8" else fp8_refusal)(dtype, device)


def int8_refusal(dtype: torch.dtype, device: torch.device) -> str | None:
    if device.type != "cpu":
        return f"computes on a CPU, and the network is on {device}; take int8-weights"
    if not build.has("avx512_vnni"):
        return "needs a CPU with avx512_vnni, which this one lacks; take int8-weights"
    if not hasattr(onednn, "qlinear_pointwise") or not hasattr(onednn, "qconv_pointwise"):
        return f"PyTorch {torch.__version__} has no such products; take int8-weights"
    if dtype not in (torch.float32, torch.bfloat16):
        return f"computes beside float32 or bfloat16, not {dtype}; load the model in one of them"
    return None


def fp8_refusal(dtype: torch.dtype, device: torch.device) -> str | None:
    if device.type != "cuda" or torch.cuda.get_device_capability(device) < (8, 9):
        place = "on " + torch.cuda.get_device_name(device) if device.type == "cuda" else device.type
        return (
            f"needs an NVIDIA GPU of compute capability 8.9 or more (Ada, Hopper), got {place}; "
            "take int8-weights"
        )
    if dtype != torch.bfloat16:
        return f"computes beside bfloat16, not {dtype}; load the model with torch_dtype=bfloat16"
    return None


def bfloat16_refusal(device: torch.device) -> str | None:
    """Why bfloat16 gains nothing on a device, None if it does."""
    if device.type == "cuda":
        supported = torch.cuda.get_device_capability(device) >= (8, 0)
        return None if supported else "this GPU computes it no faster"
    if device.type != "cpu":
        return f"it was not measured on {device.type}; load the model with torch_dtype=float16"
    if build.has("avx512_bf16") or build.has("amx_bf16"):
        return None
    return "this CPU has no avx512_bf16, and computes it no faster"
