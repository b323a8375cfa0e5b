"""One job of the training benchmark, in a process of its own: SPEC.json in, RESULT.json out.

Every step is timed from the end of an optimizer step to the end of the next. What it is made of is
timed by wrapping the networks' forward, Tensor.backward, and the like; no script is changed.
"""

from __future__ import annotations

import functools
import importlib.util
import json
import runpy
import sys
import time
from collections.abc import Callable, Iterator
from contextlib import ExitStack
from pathlib import Path
from typing import Any
from unittest import mock

import torch
from torch import Tensor, nn
from torch.optim.optimizer import (
    register_optimizer_step_post_hook,
    register_optimizer_step_pre_hook,
)

Part = Callable[..., str]


class Stopwatch(ExitStack):
    """The seconds of steps and their parts while it is entered; wraps what it times."""

    def __init__(self, parts: bool = True) -> None:
        super().__init__()
        self.parts = parts  # on a GPU they cost speed: each waits for it
        self.stamps: list[float] = []
        self.steps: list[dict[str, float]] = []
        self.losses: list[Tensor] = []
        self.trained = 0
        self.peak = 0.0
        self.running: dict[str, float] = {}
        self.began = 0.0

    def __enter__(self) -> Stopwatch:
        super().__enter__()
        self.replace(torch.Tensor, "backward", self.noting(torch.Tensor.backward))
        self.timed(torch.Tensor, "backward", "backward")
        self.timed(nn.utils, "clip_grad_norm_", "clip")
        self.callback(register_optimizer_step_pre_hook(self.before_step).remove)
        self.callback(register_optimizer_step_post_hook(self.after_step).remove)
        return self

    def now(self) -> float:
        """Seconds, once the GPU has done what it was told."""
        if torch.cuda.is_available():
            torch.cuda.synchronize()
        return time.perf_counter()

    def replace(self, owner: Any, name: str, value: Any) -> None:
        """Put `value` in place of an attribute until the end."""
        self.enter_context(mock.patch.object(owner, name, value))

    def timed(self, owner: Any, name: str, part: str | Part) -> None:
        """Count the time in a method as a part; it may depend on the arguments."""
        inner = getattr(owner, name)
        if not self.parts:
            return

        @functools.wraps(inner)
        def outer(*args: Any, **kwargs: Any) -> Any:
            began = self.now()
            result = inner(*args, **kwargs)
            self.count(part if isinstance(part, str) else part(*args), self.now() - began)
            return result

        self.replace(owner, name, outer)

    def count(self, part: str, seconds: float) -> None:
        self.running[part] = self.running.get(part, 0.0) + seconds

    def noting(self, backward: Callable[..., None]) -> Callable[..., None]:
        """`backward`, keeping the losses that it starts from."""

        @functools.wraps(backward)
        def outer(loss: Tensor, *args: Any, **kwargs: Any) -> None:
            self.losses.append(loss.detach())
            backward(loss, *args, **kwargs)

        return outer

    def waiting(self, iterate: Callable[[Any], Iterator[Any]]) -> Callable[[Any], Iterator[Any]]:
        """`iterate`, an __iter__, with the wait for each item counted as data."""

        def outer(loader: Any) -> Iterator[Any]:
            iterator = iter(iterate(loader))
            while True:
                began = time.perf_counter()
                item = next(iterator, None)
                self.count("data", time.perf_counter() - began)
                if item is None:
                    return
                yield item

        return outer

    def before_step(self, *_: Any) -> None:
        self.began = self.now() if self.parts else 0.0

    def after_step(self, optimizer: torch.optim.Optimizer, *_: Any) -> None:
        """The end of a step."""
        now = self.now()
        if self.parts:
            self.count("optimizer", now - self.began)
        self.stamps.append(now)
        self.steps.append(self.running)
        self.running = {}
        parameters = [p for group in optimizer.param_groups for p in group["params"]]
        self.trained = sum(p.numel() for p in parameters if p.requires_grad)
        self.peak = peak_bytes()

    def result(self) -> dict[str, Any]:
        """All that was measured, as JSON."""
        return {
            "stamps": self.stamps,
            "parts": self.steps,
            "losses": [loss.item() for loss in self.losses],
            "trained": self.trained,
            "peak": self.peak,
            "threads": torch.get_num_threads(),
        }


def peak_bytes() -> float:
    """The most memory that was used so far: of the GPU, or resident of this process."""
    if torch.cuda.is_available():
        return float(torch.cuda.max_memory_allocated())
    status = Path("/proc/self/status")
    if status.exists():  # ru_maxrss would begin with what the parent had
        (line,) = (x for x in status.read_text().splitlines() if x.startswith("VmHWM"))
        return float(line.split()[1]) * 1024
    import resource

    return float(resource.getrusage(resource.RUSAGE_SELF).ru_maxrss)


def network_part(adapted: Callable[[Any], bool]) -> Part:
    """Which of the three calls of a distillation step a forward pass is."""

    def part(unet: nn.Module, *_: Any) -> str:
        if torch.is_grad_enabled():
            return "student forward"
        return "target forward" if adapted(unet) else "teacher forward"

    return part


# ── the jobs ──


def script(spec: dict[str, Any]) -> dict[str, Any]:
    """The published script with its arguments."""
    import diffusers
    import transformers
    from train_torchvision import torchvision

    @functools.cache
    def trains(unet: nn.Module) -> bool:
        return any(parameter.requires_grad for parameter in unet.parameters())

    with torchvision() as stand_in, Stopwatch(spec["parts"]) as watch:
        watch.timed(diffusers.UNet2DConditionModel, "forward", network_part(trains))
        watch.timed(diffusers.AutoencoderKL, "encode", "VAE")
        watch.timed(transformers.CLIPTextModel, "forward", "text")
        if importlib.util.find_spec("webdataset"):
            from webdataset import WebLoader

            watch.replace(WebLoader, "__iter__", watch.waiting(WebLoader.__iter__))
        if not spec["autocast"]:
            watch.replace(torch, "autocast", told_autocast(torch.autocast))
        watch.replace(sys, "argv", [spec["path"], *spec["arguments"]])
        runpy.run_path(spec["path"], run_name="__main__")
    return watch.result() | {"stand_in": stand_in, "diffusers": diffusers.__version__}


def told_autocast(autocast: Any) -> Callable[..., Any]:
    """`autocast` that does nothing where no dtype is given, as if that meant float32."""

    def outer(device: str, *args: Any, **options: Any) -> Any:
        enabled = bool(args or options)
        return autocast(device, *args, **options) if enabled else autocast(device, enabled=False)

    return outer


def fewstep(spec: dict[str, Any]) -> dict[str, Any]:
    """`train` of a recipe with overrides."""
    from fewstep.models.unet import UNet2DConditionModel
    from fewstep.training import train
    from fewstep.training.loop import Average
    from fewstep.training.phases.consistency import Consistency

    def switched_on(unet: Any) -> bool:
        return hasattr(unet, "lora_switch") and unet.lora_switch.on

    with Stopwatch(spec["parts"]) as watch:
        watch.timed(UNet2DConditionModel, "forward", network_part(switched_on))
        watch.timed(Consistency, "batch", "data")
        watch.timed(Average, "update", "average")
        train(spec["recipe"], spec["overrides"])
    return watch.result()


def cache(spec: dict[str, Any]) -> dict[str, Any]:
    """The seconds that encoding a recipe's pictures and captions takes, the base being loaded."""
    from fewstep.training.config import load_recipe
    from fewstep.training.data import prepare
    from fewstep.training.networks import load_base
    from fewstep.training.run import device_of

    recipe = load_recipe(spec["recipe"], spec["overrides"])
    pipe = load_base(recipe.settings, recipe.folder)
    pipe.to(device_of(recipe.run.device))
    began = time.perf_counter()
    encoding = prepare(recipe, pipe)
    return {"seconds": time.perf_counter() - began, "pictures": len(encoding.indices)}


def model(spec: dict[str, Any]) -> dict[str, Any]:
    """Write the model; nothing is measured."""
    from train_material import make_model

    make_model(spec["size"], Path(spec["folder"]))
    return {}


JOBS = {"script": script, "fewstep": fewstep, "cache": cache, "model": model}


def main() -> None:
    spec = json.loads(Path(sys.argv[1]).read_text())
    Path(sys.argv[2]).write_text(json.dumps(JOBS[spec["job"]](spec)))


if __name__ == "__main__":
    main()
