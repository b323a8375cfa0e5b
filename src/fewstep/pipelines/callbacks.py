"""diffusers' `callback_on_step_end` over the loop's `Step`."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import replace
from typing import Any

import torch
from torch import Tensor

from ..errors import RequestError
from .denoise import Job, Step
from .request import CALLBACK_TENSORS, Request


def call_back(pipe: Any, request: Request, step: Step) -> Step:
    """The step that the request's callback leaves.

    The callback gets (pipe, index, t, tensors) and returns the tensors it wants changed. As in
    diffusers, prompt_embeds holds (2B, L, D), the negative half first, while guidance doubles the
    batch, and a callback may set `pipe._guidance_scale`.
    """
    callback: Callable[..., dict[str, Any] | None] | None = request.callback_on_step_end
    if callback is None:
        return step
    tensors = visible(step)
    returned = callback(pipe, step.index, step.t, {k: tensors[k] for k in request.callback_inputs})
    changed = {k: v for k, v in (returned or {}).items() if v is not tensors.get(k)}
    if unknown := sorted(set(changed) - set(CALLBACK_TENSORS)):
        raise RequestError(
            f"callback_on_step_end returned {unknown[0]!r}; it may return {CALLBACK_TENSORS}"
        )
    z0 = changed.get("denoised", step.z0)
    is_last = step.index == len(step.job.plan.timesteps) - 1
    z = changed.get("latents", z0 if is_last and "denoised" in changed else step.z)
    return replace(step, z=z, z0=z0, job=reconditioned(step.job, changed, pipe.guidance_scale))


def visible(step: Step) -> dict[str, Tensor | None]:
    """The tensors of a step under their public names."""
    cond, uncond = step.job.cond, step.job.uncond
    return {
        "latents": step.z,
        "denoised": step.z0,
        "prompt_embeds": cond.text if uncond is None else torch.cat([uncond.text, cond.text]),
        "negative_prompt_embeds": None if uncond is None else uncond.text,
        "w_embedding": cond.w,
    }


def reconditioned(job: Job, changed: dict[str, Tensor], guidance_scale: float) -> Job:
    """`job` with the conditioning and the guidance scale that a callback changed."""
    rows = job.shape[0]
    text = job.cond.text
    negative = None if job.uncond is None else job.uncond.text
    if "prompt_embeds" in changed:
        text = changed["prompt_embeds"]
        if len(text) == 2 * rows:
            negative, text = text.chunk(2)
        elif len(text) != rows:
            raise RequestError(
                f"callback_on_step_end returned prompt_embeds of {len(text)} rows; "
                f"it must have {rows}, or {2 * rows} with the negative ones first"
            )
    negative = changed.get("negative_prompt_embeds", negative)
    cond = replace(job.cond, text=text, w=changed.get("w_embedding", job.cond.w))
    uncond = None
    if guidance_scale > 1 and cond.w is None and job.uncond is not None and negative is not None:
        uncond = replace(job.uncond, text=negative)
    return replace(job, cond=cond, uncond=uncond, guidance_scale=guidance_scale)
