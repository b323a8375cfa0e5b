"""A job as tensors and a key, and back: what a recording of the loop is made of.

Tensors are its inputs. What decides the course of the loop otherwise is in the key.
"""

from __future__ import annotations

import copy
from collections.abc import Callable, Hashable, Iterator, Mapping
from dataclasses import dataclass, field
from functools import partial
from typing import Any

import torch
from torch import Tensor

from ..models.unet import UNet2DConditionModel
from ..ops.layers import is_plain
from ..schedulers import Plan
from .denoise import Conditioning, Job, Network
from .request import Request


@dataclass(frozen=True, eq=False)
class Facts:
    """What a recording needs to know of a plan."""

    draws: int  # of the updates
    times: Tensor  # (N,) on the device


@dataclass(frozen=True, eq=False)
class PlanAt(Plan):
    """A plan whose `timesteps` lie on a device, while the loop still goes by those on the CPU."""

    host: Plan | None = None

    def __iter__(self) -> Iterator[Tensor]:
        assert self.host is not None
        return iter(self.host)


@dataclass(frozen=True, eq=False)
class Drawn(Job):
    """A job whose noise was drawn before."""

    noise: Iterator[Tensor] = field(default_factory=lambda: iter(()))

    def draw(self) -> Tensor:
        """The next noise."""
        return next(self.noise)


def is_recordable(unet: Any, job: Job, request: Request) -> bool:
    """Whether a job needs nothing of Python between its steps."""
    asks = request.callback_on_step_end is not None or job.controls or job.keep is not None
    is_ours = isinstance(unet, UNet2DConditionModel) and not unet.training
    return is_ours and not asks and not torch.is_grad_enabled()


def inputs_of(job: Job) -> dict[str, Tensor]:
    """The tensors of a job by name; the guidance scale is one of them."""
    found: dict[str, Tensor | None] = {"z": job.z, "extra_channels": job.extra_channels}
    for side, told in (("cond", job.cond), ("uncond", job.uncond)):
        if told is not None:
            for name in ("text", "pooled", "time_ids", "w"):
                found[f"{side}.{name}"] = getattr(told, name)
            found |= {f"{side}.image{i}": image for i, image in enumerate(told.image)}
    if job.uncond is not None:
        device, scale = job.cond.text.device, job.guidance_scale
        found["guidance"] = torch.full((1,), scale, dtype=torch.float32, device=device)
    return {name: value for name, value in found.items() if value is not None}


def without_tensors(job: Job, facts: Facts) -> Callable[..., Drawn]:
    """What makes a job like this one of tensors; it holds on to none of this one's."""
    plan = job.plan
    at = PlanAt(facts.times, plan.next_timesteps, plan.exact, plan.begin, plan.total, plan)
    return partial(
        Drawn,
        plan=at,
        shape=job.shape,
        dtype=job.dtype,
        guidance_rescale=job.guidance_rescale,
        start_scale=job.start_scale,
    )


def drawn(bare: Callable[..., Drawn], update: Any, given: Mapping[str, Tensor]) -> Drawn:
    """The job of the tensors that `inputs_of` named."""
    cond = conditioning(given, "cond")
    assert cond is not None
    return bare(
        cond=cond,
        uncond=conditioning(given, "uncond"),
        guidance_scale=given.get("guidance", 1.0),
        update=update,
        extra_channels=given.get("extra_channels"),
        z=given["z"],
        noise=iter(given["noise"].unbind(0)) if "noise" in given else iter(()),
    )


def conditioning(given: Mapping[str, Tensor], side: str) -> Conditioning | None:
    """One side of the conditions, None if it is not there."""
    if f"{side}.text" not in given:
        return None
    images = tuple(value for name, value in given.items() if name.startswith(f"{side}.image"))
    pooled, time_ids, w = (given.get(f"{side}.{name}") for name in ("pooled", "time_ids", "w"))
    return Conditioning(given[f"{side}.text"], pooled, time_ids, w, images)


def count_draws(job: Job) -> int:
    """How often a run of the job's updates draws noise; they run here on a single number."""
    counted = 0

    def draw() -> Tensor:
        nonlocal counted
        counted += 1
        return torch.zeros_like(z)

    z = torch.zeros([1] * len(job.shape), dtype=job.dtype)
    update = copy.copy(job.update)
    for t, t_next in zip(*job.plan, strict=True):
        update(torch.zeros_like(z), z, t.expand(1), t_next.expand(1), draw)
    return counted


def timed(unet: Any) -> Network:
    """The network, told its times by filling them in on its device: nothing is copied there.

    All rows stand at one time.
    """

    def called(x: Tensor, t: Tensor, *args: Any, **kwargs: Any) -> Any:
        if t.device != x.device:
            t = torch.full((len(x),), t[0].item(), dtype=t.dtype, device=x.device)
        return unet(x, t, *args, **kwargs)

    called.keeps_memo = getattr(unet, "keeps_memo", False)  # type: ignore[attr-defined]
    return called


# ── keys ──


def layout(inputs: Mapping[str, Tensor]) -> Hashable:
    """Shapes, strides, dtypes and devices by name."""
    return tuple((n, x.shape, x.stride(), x.dtype, x.device) for n, x in inputs.items())


def numbers_of(plan: Plan) -> tuple[Hashable, ...]:
    """The times of a plan."""
    exact = None if plan.exact is None else tuple(plan.exact.tolist())
    times = (tuple(plan.timesteps.tolist()), tuple(plan.next_timesteps.tolist()))
    return (*times, exact, plan.begin, plan.total)


def state_of(unet: Any) -> Hashable:
    """What a UNet does by settings, not by weights."""
    layers = (layer for adapter in unet.ip_adapters for layer in adapter.ip_adapter.values())
    return unet.freeu, tuple(layer.scale for layer in layers)


def settings_of(vae: Any) -> Hashable:
    """How a VAE decodes."""
    names = ("use_slicing", "use_tiling", "exact_tiling", "stripe", "tile_sample_min_size")
    return (type(vae), *(getattr(vae, name) for name in names))


def modes() -> Hashable:
    """What PyTorch was told about how to compute."""
    return (
        torch.is_autocast_enabled("cuda"),
        torch.are_deterministic_algorithms_enabled(),
        torch.get_float32_matmul_precision(),
        is_plain(),
    )
