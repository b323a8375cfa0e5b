"""The training loop, in reading order: loss, backward, clip, step, average, log, checkpoint, sheet.

A phase says what is trained and how its loss is made; the loop knows nothing of the method. Every
draw depends on (seed, step, position in the batch) alone, so a run that is resumed equals one that
was not interrupted, and one on several devices equals one on a single device, but for rounding.
How gradients and parameters go over several devices stands in parallel.py.
"""

from __future__ import annotations

import contextlib
import math
import time
from collections.abc import Iterator, Mapping
from pathlib import Path
from typing import Any, Protocol

import torch
from PIL import Image
from torch import Tensor, nn

from ..errors import FewstepError
from .config import Optimizer, Recipe, Run
from .interruption import StoppedError, stopping
from .parallel import averaging, gather, shard, shares, together, whole
from .ranks import Ranks
from .report import LossLog, reporting
from .state import State


class Phase(Protocol):
    """A method: what is trained, on what loss, and what comes out."""

    trained: Mapping[str, nn.Module]  # by the name it has in checkpoints
    kept: Mapping[str, nn.Module] = {}  # not trained by gradient, but part of the state (a target)
    frozen: Mapping[str, nn.Module] = {}  # only in memory: run.shard spreads it as the others

    def loss(self, step: int, part: range) -> Tensor:
        """The mean loss of these positions of the batch of this step, a scalar with gradient."""

    def after_step(self, step: int) -> None:
        """Called after each optimizer step."""

    def show(self) -> tuple[Image.Image, dict[str, float]]:
        """A sheet of what the averaged weights, which are in place, draw; and figures about it."""

    def finish(self, folder: Path, figures: Mapping[str, float]) -> None:
        """Write the result, from the averaged weights; `figures` are those of the last sheet."""


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
        torch._foreach_lerp_(shares(self.values), shares(self.parameters), 1 - decay)

    @contextlib.contextmanager
    def in_place(self) -> Iterator[None]:
        """Within this context the modules hold the averaged weights."""
        self._swap()
        try:
            yield
        finally:
            self._swap()

    @torch.no_grad()
    def _swap(self) -> None:
        for parameter, value in zip(self.parameters, self.values, strict=True):
            held = parameter.detach().clone()  # values change places, not tensors: shares stay
            parameter.copy_(value)
            value.copy_(held)


def learning_rate(step: int, steps: int, settings: Optimizer) -> float:
    """Linear warm-up; then constant, or a cosine to `final_lr` times the peak at the last step."""
    if step < settings.warmup:
        return settings.lr * (step + 1) / settings.warmup
    if settings.schedule == "constant":
        return settings.lr
    done = (step - settings.warmup) / max(1, steps - settings.warmup)
    share = settings.final_lr + (1 - settings.final_lr) * 0.5 * (1 + math.cos(math.pi * done))
    return settings.lr * share


DTYPES = {"bf16": torch.bfloat16, "fp16": torch.float16}  # of a run's precision


def precision_of(run: Run, device: torch.device) -> contextlib.AbstractContextManager[None]:
    """The autocast context of a run's precision."""
    if run.precision == "fp32":
        return contextlib.nullcontext()
    return torch.autocast(device.type, DTYPES[run.precision])


def scaler_of(run: Run, device: torch.device) -> torch.amp.GradScaler:
    """float16's loss scaling; does nothing at another precision."""
    return torch.amp.GradScaler(device.type, enabled=run.precision == "fp16")


def optimizer_of(settings: Optimizer, parameters: list[nn.Parameter]) -> torch.optim.Optimizer:
    """AdamW, with moments of 32 bits, or of 8 by bitsandbytes."""
    options: dict[str, Any] = {"lr": settings.lr, "weight_decay": settings.weight_decay}
    if settings.kind == "adamw":
        return torch.optim.AdamW(parameters, betas=settings.betas, fused=True, **options)
    import bitsandbytes

    return bitsandbytes.optim.AdamW8bit(parameters, betas=settings.betas, **options)


def trainable(phase: Phase) -> dict[str, nn.Parameter]:
    """The parameters that a phase trains, by name."""
    return {
        f"{module}.{name}": parameter
        for module, network in phase.trained.items()
        for name, parameter in network.named_parameters()
        if parameter.requires_grad
    }


def check_finite(loss: float, done: int, folder: Path) -> None:
    """Raises DivergedError for a loss that is not."""
    if not math.isfinite(loss):
        raise DivergedError(
            f"the loss is {loss} at step {done}; the last good checkpoint stays in {folder}; "
            "lower optimizer.lr and start again"
        )


def train_phase(
    phase: Phase, recipe: Recipe, folder: Path, device: torch.device, ranks: Ranks | None = None
) -> None:
    """Train to the recipe's number of steps, going on from the checkpoint in `folder` if any.

    Raises StoppedError, after a checkpoint, if Ctrl-C or SIGTERM asks to end before.
    """
    run, ranks = recipe.run, ranks or Ranks()
    ranks.check(run.batch, run.accumulate)
    shard(phase, recipe, ranks, device)
    named = trainable(phase)
    parameters = list(named.values())
    optimizer = optimizer_of(recipe.optimizer, parameters)
    average = Average(parameters, run.ema)
    scaler = scaler_of(run, device)
    kept_scaler = scaler if scaler.is_enabled() else None
    state = State(named, optimizer, average.values, phase.kept, kept_scaler, ranks)
    start = state.load(folder)
    loss_of = together(phase, ranks)
    saved_at = time.monotonic()

    def show(name: str, done: int) -> dict[str, float]:
        if not ranks.is_first and not state.is_sharded:  # shares need everyone to draw
            return {}
        with average.in_place(), torch.no_grad():
            sheet, figures = phase.show()
        if report is not None:
            report.sheet(done, sheet, name, figures)
        return figures

    recent: list[Tensor] = []  # losses since the last look at them
    report_of = reporting(recipe, folder, start, device, ranks.is_first)
    with stopping() as stopped, report_of as report:
        for step in range(start, run.steps):
            rate = learning_rate(step, run.steps, recipe.optimizer)
            for group in optimizer.param_groups:
                group["lr"] = rate
            losses: list[Tensor] = []
            for part in ranks.parts(run.batch, run.accumulate):
                with averaging(loss_of, last=len(losses) == run.accumulate - 1):
                    with precision_of(run, device):
                        loss = loss_of(step, part)
                    scaler.scale(loss / run.accumulate).backward()
                losses.append(loss.detach())
            scaler.unscale_(optimizer)
            norm = whole(nn.utils.clip_grad_norm_(parameters, recipe.optimizer.clip))
            scaler.step(optimizer)
            scaler.update()
            optimizer.zero_grad(set_to_none=True)
            average.update(step)
            phase.after_step(step)

            done = step + 1
            recent.append(ranks.mean(torch.stack(losses).mean()))
            if report is not None:
                report.add(recent[-1], norm)
            late = time.monotonic() - saved_at > 60 * run.checkpoint_minutes
            stop, save = ranks.any(stopped(), late and ranks.is_first)
            if stop or done % LossLog.EVERY == 0 or done == run.steps:
                mean = torch.stack(recent).mean().item()
                recent = []
                check_finite(mean, done, folder)
                if report is not None:
                    report.write(done, rate)
                if done < run.steps and (stop or save):
                    state.save(folder, done)
                    saved_at = time.monotonic()
                if done < run.steps and stop:
                    raise StoppedError(f"stopped after step {done} of {run.steps}")
            if run.sheet_steps and done % run.sheet_steps == 0 and done < run.steps:
                show(f"sheet-{done:06d}.png", done)
        state.save_whole(folder, run.steps)
        figures = show("sheet.png", run.steps) if run.sheet_steps else {}
        with average.in_place(), torch.no_grad():
            gather(phase, keep=ranks.is_first)
            if ranks.is_first:
                phase.finish(folder, figures)
    ranks.wait()
