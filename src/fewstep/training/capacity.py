"""What the device has: memory and speed; and what is said when a run needs more."""

from __future__ import annotations

import contextlib
import time
import warnings
from collections.abc import Iterator
from pathlib import Path

import torch
from torch import nn
from torch.nn.attention import SDPBackend, sdpa_kernel

from ..errors import RequestError
from ..models.layers import Context, ResnetBlock, Time, Transformer2D
from .config import ConsistencyPhase, Recipe, Run
from .estimates import GIB, Estimate
from .loop import precision_of
from .traces import Trace

MEMINFO = Path("/proc/meminfo")
UNITS = (("days", 86400.0), ("h", 3600.0), ("min", 60.0), ("s", 1.0))
CHANNELS = 320  # of the blocks whose speed is measured, those of Stable Diffusion's first level
SECONDS = 0.1  # of measuring
# Training takes this many times what its operations take at the blocks' rate: the levels differ,
# and there are the optimizer and the data. Measured with Stable Diffusion's shape on a CPU.
USUAL = (1.0, 3.0)


def memory_of(device: torch.device) -> tuple[float, float] | None:
    """Bytes that are free on a device, and that it has; None where that cannot be told."""
    if device.type == "cuda":
        free, whole = torch.cuda.mem_get_info(device)
        return float(free), float(whole)
    if device.type != "cpu" or not MEMINFO.exists():
        return None
    lines = (line.split() for line in MEMINFO.read_text().splitlines())
    kib = {words[0].rstrip(":"): float(words[1]) for words in lines if len(words) > 1}
    return kib["MemAvailable"] * 1024, kib["MemTotal"] * 1024


def check_memory(recipe: Recipe, estimate: Estimate, device: torch.device) -> None:
    """Warn if a run will hardly fit; raises RequestError if its weights alone do not."""
    held = memory_of(device)
    if held is None:
        return
    free, whole = held
    told = (
        f"this run needs about {gib(estimate.total)}, and {device.type} has {gib(whole)}, of which "
        f"{gib(free)} are free"
    )
    if estimate.least > whole:
        raise RequestError(
            f"{told}; {gib(estimate.least)} of it are weights and what belongs to them: "
            f"{remedies(recipe, device, whole_weights=True)}"
        )
    if estimate.total > free:
        warnings.warn(f"{told}; if it fails: {remedies(recipe, device)}", stacklevel=2)


def remedies(recipe: Recipe, device: torch.device, whole_weights: bool = False) -> str:
    """The settings that would save memory, those that cost least first.

    With `whole_weights` only such as make weights, gradients and moments smaller.
    """
    settings, run = recipe.settings, recipe.run
    found: list[tuple[bool, str]] = [
        (not run.gradient_checkpointing, "run.gradient_checkpointing=true"),
        (run.precision == "fp32", "run.precision=bf16"),
        (run.batch > run.accumulate, f"run.accumulate={more_parts(run.batch, run.accumulate)}"),
    ]
    smaller: list[tuple[bool, str]] = [
        (device.type == "cuda" and recipe.optimizer.kind == "adamw", "optimizer.kind=adamw8bit"),
    ]
    if isinstance(settings, ConsistencyPhase):
        full = settings.lora is None
        smaller += [
            (settings.target == "ema", "consistency.target=stopgrad"),
            (
                full,
                "a LoRA: consistency.lora.rank=64 consistency.guidance_dim=0 "
                "consistency.target=stopgrad",
            ),
        ]
    smaller.append((not run.shard, "run.shard=true on several devices"))
    listed = [text for helps, text in ([] if whole_weights else found) + smaller if helps]
    return "set " + ", or ".join(listed) if listed else "use a larger device"


def more_parts(batch: int, parts: int) -> int:
    """The next larger number of parts that divides a batch."""
    return next(number for number in range(parts + 1, batch + 1) if batch % number == 0)


@contextlib.contextmanager
def memory_explained(recipe: Recipe, device: torch.device) -> Iterator[None]:
    """Within this context a lack of memory is a RequestError that names what saves some."""
    try:
        yield
    except (torch.cuda.OutOfMemoryError, MemoryError, RuntimeError) as error:
        if not is_lack_of_memory(error):
            raise
        held = memory_of(device)
        size = f" of {gib(held[1])}" if held else ""
        raise RequestError(
            f"the memory of {device}{size} was not enough; {remedies(recipe, device)}; a "
            f"checkpoint stays in {recipe.output}, and the same command goes on from it"
        ) from error


def is_lack_of_memory(error: BaseException) -> bool:
    """Whether an allocator gave up, which on the CPU is a plain RuntimeError."""
    if isinstance(error, (torch.cuda.OutOfMemoryError, MemoryError)):
        return True
    return isinstance(error, RuntimeError) and "can't allocate memory" in str(error)


def network_rate(device: torch.device, run: Run) -> float:
    """Operations a second of a UNet's blocks there and back in a run's precision, measured now.

    Norms, activations and small products take their part, as in training.
    """
    big = device.type == "cuda"
    rows, side = (8, 64) if big else (1, 24)
    with torch.device("meta"):  # without drawing weights: that would move the global generator
        made = (
            ResnetBlock(CHANNELS, CHANNELS, 4 * CHANNELS, 32, 1e-5),
            Transformer2D(CHANNELS, 8, 768, 1, 32, linear_projection=False, upcast=False),
        )
    blocks = [block.to_empty(device=device) for block in made]
    for block in blocks:
        for parameter in block.parameters():
            nn.init.constant_(parameter, 0.01)
    with torch.device(device):
        x = torch.linspace(-1, 1, rows * CHANNELS * side**2).reshape(rows, CHANNELS, side, side)
        beside = [
            Time(torch.ones(rows, 4 * CHANNELS)),
            Context(torch.ones(rows, 77, 768)),
        ]
    x.requires_grad_(True)

    def step() -> None:
        y = x
        with precision_of(run, device):
            for block, given in zip(blocks, beside, strict=True):
                y = block(y, given)
        y.float().square().mean().backward()
        wait(device)

    fused = contextlib.nullcontext() if big else sdpa_kernel([SDPBackend.MATH])
    with fused:
        with Trace() as trace:
            step()
        count, start = 0, time.perf_counter()
        while count < 2 or time.perf_counter() - start < SECONDS:
            step()
            count += 1
        return trace.operations * count / (time.perf_counter() - start)


def wait(device: torch.device) -> None:
    """Returns when the device has done what it was told."""
    if device.type == "cuda":
        torch.cuda.synchronize(device)


def duration(operations: float, rate: float, devices: int) -> str:
    """How long steps of so many operations in all take, in words: "2 to 6 h"."""
    low, high = (factor * operations / (rate * devices) for factor in USUAL)
    unit, size = next((u, s) for u, s in UNITS if high >= s or s == 1)
    return f"{short(low / size)} to {short(high / size)} {unit}"


def short(number: float) -> str:
    """A number with about two digits: 2,200; 22; 2.2; 0.2."""
    return f"{number:.1f}" if number < 10 else f"{number:,.0f}"


def gib(size: float) -> str:
    """Bytes as GiB."""
    return f"{size / GIB:.3g} GiB"
