"""Rows of many runs in one call of the network.

A UNet treats each row by itself: it has a time, a guidance, a text and a noise level of its own.
So runs at different steps, of different tasks, guided by one row or by two, share a call wherever
their shapes agree. What differs from a call of its own is rounding (docs/serving.md).
"""

from __future__ import annotations

from collections.abc import Hashable, Sequence
from dataclasses import replace
from typing import Any

import torch
from torch import Tensor

from ..pipelines.controls import ControlNetControl, T2IAdapterControl, tiled, within
from ..pipelines.denoise import Asked, Conditioning, Control, Network, Run, answer


def kind_of(run: Run) -> Hashable:
    """What rows must agree in to share a call with those of a run at its step."""
    job = run.job
    extra = job.extra_channels
    return (
        job.shape[1:],
        kind(job.cond.text),
        run.times[run.index][0].dtype,
        *(kind(x) for x in (job.cond.pooled, job.cond.time_ids, job.cond.w)),
        tuple(map(kind, job.cond.image)),
        kind(extra),
        tuple(kind_of_control(control, run) for control in job.controls),
    )


def kind(x: Tensor | None) -> Hashable:
    """Shape of a row, dtype and device."""
    return None if x is None else (x.shape[1:], x.dtype, x.device)


def kind_of_control(control: Control, run: Run) -> Hashable:
    """The same of a control."""
    if isinstance(control, T2IAdapterControl):
        shapes = tuple(map(kind, control.features))
        return T2IAdapterControl, shapes, within(run.span, 0.0, control.end)
    if isinstance(control, ControlNetControl) and not control.guess_mode:
        is_on = within(run.span, control.start, control.end)
        return id(control.net), kind(control.hint), control.scale, is_on
    return id(control)  # it looks at halves of its rows: nobody joins


def answers(unet: Network, runs: Sequence[Run]) -> list[Tensor]:
    """The network's output for each of some runs of one kind, by one call of it."""
    if len(runs) == 1:
        return [answer(unet, runs[0].asks())]
    asked = [alone(run) for run in runs]
    output = answer(unet, together(asked))
    return list(output.split([len(each.x) for each in asked]))


def alone(run: Run) -> Asked:
    """What a run asks, told by itself: without a memo, its controls made for its rows."""
    asked = replace(run.asks(), memo=None)
    rows = len(asked.x)
    return replace(asked, controls=tuple(for_rows(c, rows, run.span) for c in asked.controls))


def for_rows(control: Control, rows: int, span: tuple[float, float]) -> Control:
    """A control whose tensors have `rows` rows, on throughout or not at all."""
    if isinstance(control, T2IAdapterControl):
        is_on = within(span, 0.0, control.end)
        features = tuple(tiled(x, rows) for x in control.features)
        return T2IAdapterControl(features, 1.0 if is_on else 0.0)
    assert isinstance(control, ControlNetControl)
    is_on = within(span, control.start, control.end)
    return replace(control, hint=tiled(control.hint, rows), start=0.0 if is_on else 1.0, end=1.0)


def together(asked: Sequence[Asked]) -> Asked:
    """One question of the rows of several of one kind, in their order."""
    conditions: list[Conditioning] = [each.cond for each in asked]
    extras = [each.extra_channels for each in asked if each.extra_channels is not None]
    return Asked(
        torch.cat([each.x for each in asked]),
        torch.cat([each.t for each in asked]),
        conditions[0].joined(*conditions[1:]),
        controls=tuple(map(joined, zip(*(each.controls for each in asked), strict=True))),
        extra_channels=torch.cat(extras) if extras else None,
    )


def joined(controls: Sequence[Any]) -> Control:
    """Controls of one kind, each for its own rows, as one."""
    first = controls[0]
    if isinstance(first, T2IAdapterControl):
        features = zip(*(control.features for control in controls), strict=True)
        return replace(first, features=tuple(map(torch.cat, features)))
    return replace(first, hint=torch.cat([control.hint for control in controls]))
