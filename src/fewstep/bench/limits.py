"""How many operations a work takes, and how many of them this machine can do in a second.

An operation is a multiplication or an addition, so a product of m x k and k x n matrices has 2 m n
k. They are counted on networks without numbers (device "meta") by torch.utils.flop_counter;
attention is counted as the two products that it is. The ceilings are the best of several shapes:
matrix products, convolutions, and copies of memory.
"""

from __future__ import annotations

import time
from collections.abc import Callable, Iterator, Mapping
from dataclasses import replace
from pathlib import Path
from typing import Any

import torch
from torch import Tensor
from torch.nn import functional as F
from torch.utils.flop_counter import FlopCounterMode

from ..checkpoints.config import read_json
from ..errors import RequestError
from ..models.base import Model
from ..models.controlnet import ControlNetModel
from ..models.unet import UNet2DConditionModel
from ..models.vae import AutoencoderKL
from .checkpoints import UNET_FILE, addition, checkpoint, levels
from .inputs import latents, tokens, unet_inputs
from .work import STRENGTH, Setting, Work

PATIENCE = 0.15  # seconds that each shape is tried for
# (rows, inner, columns) of matrix products, and (batch, channels, side) of convolutions.
PRODUCTS = {"cpu": ((2048, 2048, 2048), (4096, 320, 2560)), "cuda": ((8192, 8192, 8192),) * 2}
CONVOLUTIONS = {
    "cpu": ((1, 320, 64), (1, 640, 32), (1, 1280, 16), (1, 256, 128)),
    "cuda": ((16, 320, 64), (16, 640, 32), (8, 512, 128)),
}
COPIED = {"cpu": 2**28, "cuda": 2**31}  # bytes


def prepared(work: Mapping[str, Any], cache: str) -> dict[str, Any]:
    """Writes what a work needs; the setting of its sides and the work's operations."""
    wanted = Work.from_dict(work)
    folder = checkpoint(wanted, Path(cache))
    sized = with_size(wanted, folder)
    beside = addition(sized, folder, Path(cache))
    place = None if beside is None else str(beside)
    setting = Setting(sized, str(folder), place, sized.dtype, cache)
    bytes_read = sum(f.stat().st_size for f in folder.rglob("*.safetensors"))
    return {
        "setting": setting.to_dict(),
        "operations": operations(setting),
        "weights": bytes_read,
    }


def with_size(work: Work, folder: Path) -> Work:
    """A work with the size of its pictures. Raises RequestError if the model cannot draw it."""
    scale = 2 ** (levels(read_json(folder / "vae" / "config.json")) - 1)
    if work.size is None:
        side = read_json(folder / UNET_FILE)["sample_size"] * scale
        return replace(work, size=(side, side))
    if any(side % scale for side in work.size):
        raise RequestError(
            f"size {work.size[0]}x{work.size[1]}: must be a multiple of {scale} for "
            f"{work.model}; give for example {max(work.size[0] // scale, 1) * scale}"
        )
    return work


# ── counting ──


def operations(setting: Setting) -> dict[str, float]:
    """Operations by component, and their `total`: of one run of the work."""
    work = setting.work
    unet = read_json(Path(setting.folder) / UNET_FILE)
    # Guidance by two network calls, unless the network reads it.
    rows = 1 if unet.get("time_cond_proj_dim") or work.part != "picture" else 2
    steps = network_calls(work, distilled=rows == 1)
    found: dict[str, float] = {}
    if work.part != "vae":
        found["unet"] = rows * steps * unet_operations(setting)
    if work.part != "unet":
        found["vae_decode"] = vae_operations(setting, "decode")
    if work.part == "picture":
        found["text"] = rows * text_operations(setting)
        if work.task == "image-to-image":
            found["vae_encode"] = vae_operations(setting, "encode")
        if work.task == "controlnet":
            found["controlnet"] = rows * steps * controlnet_operations(setting)
    return {**found, "total": sum(found.values())}


def network_calls(work: Work, *, distilled: bool) -> int:
    """How often the UNet is called."""
    if work.part != "picture":
        return 1
    if work.task != "image-to-image" or distilled:  # an LCM takes all of its steps
        return work.steps
    return max(1, int(work.steps * STRENGTH))


def counted(call: Callable[[], Any]) -> float:
    """The operations of a call."""
    with FlopCounterMode(display=False) as counter, torch.no_grad():
        call()
    return float(counter.get_total_flops())


def weightless(kind: type[Model], folder: Path) -> Any:
    """A network of a config without numbers."""
    with torch.device("meta"):
        return kind.from_config(read_json(folder / "config.json")).eval()


def moved(value: Any) -> Any:
    """Tensors, also in a mapping, without their numbers."""
    if isinstance(value, Mapping):
        return {name: moved(inner) for name, inner in value.items()}
    return value.to("meta", torch.float32) if isinstance(value, Tensor) else value


def unet_operations(setting: Setting) -> float:
    """Of one call for the whole batch."""
    network = weightless(UNet2DConditionModel, Path(setting.folder) / "unet")
    given = moved(unet_inputs(setting))
    return counted(lambda: network(**given))


def controlnet_operations(setting: Setting) -> float:
    """Of one call for the whole batch."""
    assert setting.beside is not None and setting.work.size is not None
    network = weightless(ControlNetModel, Path(setting.beside))
    given = moved({k: v for k, v in unet_inputs(setting).items() if k != "timestep_cond"})
    width, height = setting.work.size
    picture = torch.empty(setting.work.batch, 3, height, width, device="meta")
    return counted(lambda: network(**given, controlnet_cond=picture))


def vae_operations(setting: Setting, way: str) -> float:
    """Of decoding, or of encoding, the whole batch."""
    assert setting.work.size is not None
    network = weightless(AutoencoderKL, Path(setting.folder) / "vae")
    width, height = setting.work.size
    picture = torch.empty(setting.work.batch, 3, height, width, device="meta")
    given = moved(latents(setting)) if way == "decode" else picture
    return counted(lambda: getattr(network, way)(given))


def text_operations(setting: Setting) -> float:
    """Of the text encoders, by the sizes of their products: 2 numbers a weight and a token."""
    length, total = tokens(setting), 0.0
    for folder in Path(setting.folder).glob("text_encoder*"):
        config = read_json(folder / "config.json")
        width = config["hidden_size"]
        layer = 4 * width**2 + 2 * width * config["intermediate_size"] + 2 * length * width
        total += 2.0 * length * config["num_hidden_layers"] * layer
    return setting.work.batch * total


# ── the machine ──


def ceilings(dtype: str, device: str, threads: int) -> dict[str, Any]:
    """Operations a second of the best product and convolution, bytes a second of a copy."""
    if threads:
        torch.set_num_threads(threads)
    kind = "cpu" if device.startswith("cpu") else "cuda"
    how = {"dtype": getattr(torch, dtype), "device": device}
    found = {
        "product": max(rate(*product(*shape, **how), device) for shape in PRODUCTS[kind]),
        "convolution": max(
            rate(call, count, device)
            for shape in CONVOLUTIONS[kind]
            for call, count in convolutions(*shape, **how)
        ),
        "copy": rate(*copy(COPIED[kind], device), device),
        "threads": torch.get_num_threads(),
        "gpu": torch.cuda.get_device_name(device) if device.startswith("cuda") else None,
    }
    if device.startswith("cuda"):
        torch.cuda.empty_cache()  # the sides need it
    return found


def rate(call: Callable[[], Any], count: float, device: str) -> float:
    """`count` per second of the quickest of many calls."""
    best, ends = float("inf"), time.perf_counter() + PATIENCE
    tries = 0
    while tries < 3 or time.perf_counter() < ends:
        began = time.perf_counter()
        call()
        wait(device)
        best, tries = min(best, time.perf_counter() - began), tries + 1
    return count / best


def wait(device: str) -> None:
    """Returns when the device has done all that it was told."""
    if not device.startswith("cpu"):
        getattr(torch, device.partition(":")[0]).synchronize()


def product(rows: int, inner: int, columns: int, **how: Any) -> tuple[Callable[[], Any], float]:
    """A matrix product and its operations."""
    a, b = torch.randn(rows, inner, **how), torch.randn(inner, columns, **how)
    return lambda: a @ b, 2.0 * rows * inner * columns


def convolutions(
    batch: int, channels: int, side: int, **how: Any
) -> Iterator[tuple[Callable[[], Any], float]]:
    """3 x 3 convolutions that keep the channels, and their operations; on a CPU packed as well."""
    nhwc = torch.channels_last
    x = torch.randn(batch, channels, side, side, **how).contiguous(memory_format=nhwc)
    weight = torch.randn(channels, channels, 3, 3, **how).contiguous(memory_format=nhwc)
    count = 2.0 * 9 * channels**2 * batch * side**2
    yield lambda: F.conv2d(x, weight, padding=1), count
    if how["device"] == "cpu" and torch.backends.mkldnn.is_available():
        one = ((1, 1), (1, 1), (1, 1), 1)  # padding, stride, dilation, groups
        packed = torch.ops.aten.mkldnn_reorder_conv2d_weight(weight.to_mkldnn(), *one)
        blocked = x.contiguous().to_mkldnn()
        yield lambda: torch.ops.aten.mkldnn_convolution(blocked, packed, None, *one), count


def copy(size: int, device: str) -> tuple[Callable[[], Any], float]:
    """A copy of `size` bytes, and the bytes that it reads and writes."""
    source = torch.ones(size // 4, device=device)
    target = torch.empty_like(source)
    return lambda: target.copy_(source), 2.0 * size
