"""The training loop, in reading order: loss, backward, clip, step, average, log, checkpoint, sheet.

A phase says what is trained and how its loss is made; the loop knows nothing of the method. Every
draw depends on (seed, step) alone, so a run that is resumed equals one that was not interrupted.
"""

from __future__ import annotations

import contextlib
import json
import math
import time
from collections.abc import Iterator, Mapping, Sequence
from pathlib import Path
from typing import Protocol

import numpy as np
import torch
from PIL import Image
from torch import Tensor, nn
from tqdm import tqdm

from ..errors import FewstepError
from .config import Optimizer, Recipe
from .state import load_state, save_state


class Phase(Protocol):
    """A method: what is trained, on what loss, and what comes out."""

    trained: Mapping[str, nn.Module]  # by the name it has in checkpoints
    kept: Mapping[str, nn.Module]  # not trained by gradient, but part of the state (EMA target)

    def loss(self, step: int) -> Tensor:
        """The loss of the batch of this step, a scalar with gradient."""

    def after_step(self) -> None:
        """Called after each optimizer step."""

    def sheet(self) -> Image.Image:
        """What the weights now draw; called with the averaged weights in place."""

    def finish(self, folder: Path) -> None:
        """Write the result; called with the averaged weights in place."""


class DivergedError(FewstepError):
    """The loss is no longer finite; the last good checkpoint is kept."""


class Average:
    """Exponential moving average of parameters, and a way to put it in their place."""

    def __init__(self, parameters: list[nn.Parameter], decay: float) -> None:
        self.parameters = parameters
        self.decay = decay
        self.values = [p.detach().clone() for p in parameters]

    @torch.no_grad()
    def update(self, step: int) -> None:
        """Average after step number `step`; the decay grows towards its value as steps go by."""
        decay = min(self.decay, (1 + step) / (10 + step))
        torch._foreach_lerp_(self.values, [p.detach() for p in self.parameters], 1 - decay)

    @contextlib.contextmanager
    def in_place(self) -> Iterator[None]:
        """Within this context the modules hold the averaged weights."""
        self._swap()
        try:
            yield
        finally:
            self._swap()

    def _swap(self) -> None:
        for parameter, value in zip(self.parameters, self.values, strict=True):
            held = parameter.data
            parameter.data = value.data
            value.data = held


class Draws:
    """The random numbers of one step of one run: they depend on (seed, step) alone."""

    def __init__(self, seed: int, step: int, device: torch.device) -> None:
        high, low = np.random.SeedSequence([seed, step]).generate_state(2, np.uint32)
        self.generator = torch.Generator(device).manual_seed(int(high) << 32 | int(low))
        self.device = device

    def normal(self, shape: Sequence[int]) -> Tensor:
        """Standard normal numbers."""
        return torch.randn(shape, generator=self.generator, device=self.device)

    def integers(self, low: int, high: int, count: int) -> Tensor:
        """`count` int64 numbers from `low` to `high` - 1."""
        return torch.randint(low, high, (count,), generator=self.generator, device=self.device)

    def times(self, count: int, steps: int, power: float = 1.0) -> Tensor:
        """`count` times from 0 to `steps` - 1, of a density that grows as t^(power - 1)."""
        if power == 1.0:
            return self.integers(0, steps, count)
        return (steps * self.uniform(0, 1, count) ** (1 / power)).long().clamp(max=steps - 1)

    def uniform(self, low: float, high: float, count: int) -> Tensor:
        """`count` numbers in [low, high)."""
        return low + (high - low) * torch.rand(count, generator=self.generator, device=self.device)


def learning_rate(step: int, steps: int, settings: Optimizer) -> float:
    """Linear warm-up, then a cosine down to `final_lr` times the peak at the last step."""
    if step < settings.warmup:
        return settings.lr * (step + 1) / settings.warmup
    done = (step - settings.warmup) / max(1, steps - settings.warmup)
    share = settings.final_lr + (1 - settings.final_lr) * 0.5 * (1 + math.cos(math.pi * done))
    return settings.lr * share


def precision_of(recipe: Recipe, device: torch.device) -> contextlib.AbstractContextManager[None]:
    """The autocast context of a recipe's precision."""
    if recipe.run.precision == "fp32":
        return contextlib.nullcontext()
    return torch.autocast(device.type, torch.bfloat16)


def train_phase(phase: Phase, recipe: Recipe, folder: Path, device: torch.device) -> None:
    """Train to the recipe's number of steps, going on from the checkpoint in `folder` if any."""
    run = recipe.run
    named = {
        f"{module}.{name}": parameter
        for module, network in phase.trained.items()
        for name, parameter in network.named_parameters()
    }
    parameters = list(named.values())
    optimizer = torch.optim.AdamW(
        parameters,
        lr=recipe.optimizer.lr,
        betas=recipe.optimizer.betas,
        weight_decay=recipe.optimizer.weight_decay,
        fused=True,
    )
    average = Average(parameters, run.ema)
    start = load_state(folder, named, optimizer, average.values, phase.kept)

    log = LossLog(folder / "log.jsonl", start)
    saved_at = time.monotonic()
    bar = tqdm(
        range(start, run.steps), initial=start, total=run.steps, desc=recipe.phase, unit="step"
    )
    for step in bar:
        rate = learning_rate(step, run.steps, recipe.optimizer)
        for group in optimizer.param_groups:
            group["lr"] = rate
        with precision_of(recipe, device):
            loss = phase.loss(step)
        loss.backward()
        norm = nn.utils.clip_grad_norm_(parameters, recipe.optimizer.clip)
        optimizer.step()
        optimizer.zero_grad(set_to_none=True)
        average.update(step)
        phase.after_step()

        log.add(loss.detach(), norm)
        done = step + 1
        if log.due(done):
            figures = log.write(done, rate)
            if not math.isfinite(figures["loss"]):
                raise DivergedError(
                    f"the loss is {figures['loss']} at step {done}; the last good checkpoint "
                    f"stays in {folder}; lower optimizer.lr and start again"
                )
            bar.set_postfix(loss=f"{figures['loss']:.4f}", lr=f"{rate:.1e}")
            if time.monotonic() - saved_at > 60 * run.checkpoint_minutes:
                save_state(folder, done, named, optimizer, average.values, phase.kept)
                saved_at = time.monotonic()
        if run.sheet_steps and done % run.sheet_steps == 0:
            with average.in_place(), torch.no_grad():
                phase.sheet().save(folder / f"sheet-{done:06d}.png")
    save_state(folder, run.steps, named, optimizer, average.values, phase.kept)
    with average.in_place(), torch.no_grad():
        if run.sheet_steps:
            phase.sheet().save(folder / "sheet.png")
        phase.finish(folder)


class LossLog:
    """Means of loss and gradient norm over some steps, one JSON line each, read without a sync."""

    EVERY = 20

    def __init__(self, path: Path, start: int) -> None:
        self.path = path
        self.began = time.monotonic()
        self.losses: list[Tensor] = []
        self.norms: list[Tensor] = []
        lines = path.read_text().splitlines() if path.exists() else []
        kept = [line for line in lines if json.loads(line)["step"] <= start]
        path.write_text("".join(f"{line}\n" for line in kept))

    def add(self, loss: Tensor, norm: Tensor) -> None:
        self.losses.append(loss)
        self.norms.append(norm)

    def due(self, done: int) -> bool:
        return done % self.EVERY == 0

    def write(self, done: int, rate: float) -> dict[str, float]:
        figures = {
            "step": done,
            "loss": torch.stack(self.losses).mean().item(),
            "grad_norm": torch.stack(self.norms).mean().item(),
            "lr": rate,
            "seconds": time.monotonic() - self.began,
        }
        self.losses, self.norms = [], []
        with self.path.open("a") as file:
            file.write(json.dumps(figures) + "\n")
        return figures
