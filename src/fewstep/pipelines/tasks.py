"""The tasks: what a request becomes before the loop. catalog.py lists the pipelines of each.

A task makes an Assignment of a Request: a plan of times and a start; the rest is shared.
"""

from __future__ import annotations

import math
from collections.abc import Callable
from dataclasses import replace
from typing import Any

import torch
from torch import Tensor
from torch.nn import functional as F

from ..errors import RequestError
from ..schedulers import LCMScheduler, Plan
from .denoise import Job
from .families import Assignment, StableDiffusion
from .images import preprocess
from .masks import Canvas, canvas_of, fitted
from .request import Request


def text_to_image(pipe: StableDiffusion, request: Request) -> Assignment:
    """Pictures of a text."""
    return Assignment(request, section(pipe, pipe.plan(request), request), Job.from_noise)


def image_to_image(pipe: StableDiffusion, request: Request) -> Assignment:
    """Pictures of a text, made from other pictures: the last `strength` of the steps are taken."""
    plan = section(pipe, pipe.plan(request), request)
    request, start = from_image(pipe, request)
    return Assignment(request, plan, start)


def inpaint(pipe: StableDiffusion, request: Request) -> Assignment:
    """Pictures in which the white part of a mask is drawn anew, by a text."""
    plan = section(pipe, pipe.plan(request), request)
    size = pipe.size(request)
    canvas = canvas_of(
        request.image,
        request.mask_image,
        size,
        pipe.vae.config.latent_channels,
        crop=request.padding_mask_crop,
        blur=request.mask_blur,
        paste_back=request.paste_back,
    )
    request = replace(request, control_image=canvas.cut("control_image", request.control_image))
    if canvas.finish is not None and request.output_type != "pil":
        raise RequestError(
            f"output_type={request.output_type!r} cannot be pasted back; use 'pil', or leave out "
            "paste_back and padding_mask_crop"
        )
    for name, given in (("image", canvas.pictures), ("mask_image", canvas.masks)):
        check_pictures(name, given, request)

    def start(job: Job) -> Job:
        return repainting(pipe, request, canvas, job)

    return Assignment(request, plan, start, canvas.finish)


def lcm_text_to_image(pipe: StableDiffusion, request: Request) -> Assignment:
    """Pictures of a text, in a few steps of a guidance-distilled latent consistency model."""
    return Assignment(request, lcm_plan(pipe, request), Job.from_noise)


def lcm_image_to_image(pipe: StableDiffusion, request: Request) -> Assignment:
    """Pictures of a text, made from other pictures in a few steps of a latent consistency model.

    All steps are taken; `strength` says how high the noise is that they start from.
    """
    plan = lcm_plan(pipe, request, strength=request.strength)
    request, start = from_image(pipe, request)
    return Assignment(request, plan, start)


# ── where a run starts ──


def from_image(pipe: StableDiffusion, request: Request) -> tuple[Request, Callable[[Job], Job]]:
    """The request with the size of its image, and the start from it: z_0 noised to the first time.

    With `denoising_start` the image is taken as it is: another model has left it at that noise.
    """
    if request.image is None:
        raise RequestError("image is missing: give the picture to start from")
    factor, channels = pipe.vae_scale_factor, pipe.vae.config.latent_channels
    if request.height is None and request.width is None:
        pictures = preprocess(request.image, factor, channels)
    else:  # ControlNet tasks take a size
        height, width = pipe.size(request)
        pictures = fitted(request.image, None, (width, height), channels)
    check_pictures("image", pictures, request)
    is_latent = pictures.shape[1] != 3
    height, width = (side * factor if is_latent else side for side in pictures.shape[2:])

    def start(job: Job) -> Job:
        if job.z is not None:
            return job
        z0 = pipe.encode_image(pictures, job)
        if request.denoising_start is not None:
            return replace(job, z=z0)
        return replace(job, z=noised(pipe, z0, job.draw(), job))

    return replace(request, height=height, width=width), start


def check_pictures(name: str, pictures: Tensor, request: Request) -> None:
    """Raises RequestError unless there is one picture, or one per prompt."""
    if len(pictures) not in (1, request.prompts):
        raise RequestError(
            f"{name} holds {len(pictures)} pictures, but there are {request.prompts} prompts; "
            "give one picture, or one per prompt"
        )


def noised(pipe: StableDiffusion, z0: Tensor, noise: Tensor, job: Job) -> Tensor:
    """`z0` (B, C, h, w) at the first time of the job's plan."""
    return pipe.sampler.diffuse(z0, noise, job.plan.start.expand(len(z0)))


def repainting(pipe: StableDiffusion, request: Request, canvas: Canvas, job: Job) -> Job:
    """The job of an inpainting request, with its start and what keeps the rest of the picture.

    A UNet of 2C + 1 channels sees the mask and the masked picture. With any other, the known part
    is put back after each step at the noise of the next.
    """
    sees_mask = pipe.unet.config.in_channels != pipe.vae.config.latent_channels
    is_pure = request.strength == 1 and request.denoising_start is None
    # diffusers' order of draws: the picture's posterior, the start, the masked picture's posterior.
    needs_picture = not sees_mask or (job.z is None and not is_pure)
    z0 = pipe.encode_image(canvas.pictures, job) if needs_picture else None
    noise = job.draw() if job.z is None else job.z / job.start_scale
    if job.z is not None:
        z = job.z
    elif is_pure or z0 is None:
        z = noise * job.start_scale
    else:
        z = z0 if request.denoising_start is not None else noised(pipe, z0, noise, job)
    job = replace(job, z=z)
    copies = job.shape[0] // len(canvas.masks)
    mask = F.interpolate(canvas.masks, size=job.shape[2:]).to(z.device, z.dtype)
    mask = mask.repeat_interleave(copies, 0)
    if request.masked_image_latents is not None and not sees_mask:
        raise RequestError(
            "masked_image_latents is for UNets that see the mask, and this one has "
            f"in_channels={pipe.unet.config.in_channels}; leave it out"
        )
    if sees_mask:
        masked = masked_latents(pipe, request, canvas, job)
        return replace(job, extra_channels=torch.cat([mask, masked], 1).to(pipe.unet.dtype))
    assert z0 is not None
    known = z0
    # One of diffusers' draws, though only UNets that see the mask need what is drawn.
    pipe.pass_over(pixels_of(canvas), job)

    def keep(z: Tensor, t_next: Tensor) -> Tensor:
        last = t_next < 0
        at = pipe.sampler.diffuse(known, noise, t_next.clamp(min=0))
        at = torch.where(last.reshape(-1, 1, 1, 1), known, at)
        return (1 - mask) * at + mask * z

    return replace(job, keep=keep)


def masked_latents(pipe: StableDiffusion, request: Request, canvas: Canvas, job: Job) -> Tensor:
    """Latents (B, C, h, w) of the picture with its white part grey."""
    if request.masked_image_latents is not None:
        given = request.masked_image_latents
        if tuple(given.shape[1:]) != job.shape[1:] or job.shape[0] % len(given):
            raise RequestError(
                f"masked_image_latents must have shape {job.shape}, got {tuple(given.shape)}"
            )
        z = given.to(job.cond.text.device, job.dtype)
        return z.repeat_interleave(job.shape[0] // len(z), 0)
    return pipe.encode_image(pixels_of(canvas) * (canvas.masks < 0.5), job)


def pixels_of(canvas: Canvas) -> Tensor:
    """The pictures (B, 3, H, W). Raises RequestError if there are latents in their place."""
    if canvas.pictures.shape[1] != 3:
        raise RequestError(
            "image holds latents, from which no masked picture can be made; give "
            "masked_image_latents too"
        )
    return canvas.pictures


# ── which times a run takes ──


def section(pipe: StableDiffusion, plan: Plan, request: Request) -> Plan:
    """The steps of a plan that strength, denoising_start and denoising_end leave."""
    total = len(pipe.sampler)
    if request.denoising_start is not None:
        begin = int((plan.timesteps >= round(total * (1 - request.denoising_start))).sum())
        plan = steps_of(plan, begin, len(plan.timesteps))
    elif request.strength is not None:
        plan = last_steps(plan, request.strength)
    if request.denoising_end is not None:
        start = request.denoising_start
        if start is not None and start >= request.denoising_end:
            raise RequestError(
                f"denoising_start={start} must be less than denoising_end={request.denoising_end}"
            )
        end = int((plan.timesteps >= round(total * (1 - request.denoising_end))).sum())
        plan = steps_of(plan, 0, end)
    if not len(plan.timesteps):
        raise RequestError(
            f"denoising_start={request.denoising_start} and denoising_end={request.denoising_end} "
            f"leave no step of num_inference_steps={request.num_inference_steps}; use more steps"
        )
    return plan


def steps_of(plan: Plan, begin: int, end: int) -> Plan:
    """Steps `begin` to `end` - 1 of a plan."""
    return plan.part(begin, end)


def last_steps(plan: Plan, strength: float) -> Plan:
    """The last `strength` of a plan's steps. Raises RequestError if no step is left."""
    steps = len(plan.timesteps)
    kept = min(int(steps * strength), steps)
    if kept == 0:
        least = math.ceil(100 / steps) / 100
        raise RequestError(
            f"strength={strength} leaves no step of num_inference_steps={steps}; "
            f"use strength >= {least:g} or more steps"
        )
    return steps_of(plan, steps - kept, steps)


def lcm_plan(pipe: StableDiffusion, request: Request, **arguments: Any) -> Plan:
    """The plan of an LCM pipeline. Raises RequestError unless UNet and scheduler are an LCM's."""
    if not pipe.is_embedded:
        raise RequestError(
            f"{type(pipe).__name__} needs a guidance-distilled UNet, and this one has no "
            "time_cond_proj_dim; use StableDiffusionPipeline or StableDiffusionImg2ImgPipeline "
            "with an LCMScheduler"
        )
    if not isinstance(pipe.scheduler, LCMScheduler):
        raise RequestError(
            f"scheduler must be an LCMScheduler, got {type(pipe.scheduler).__name__}; "
            "set pipe.scheduler = LCMScheduler.from_config(pipe.scheduler.config)"
        )
    original = one_of(request.original_inference_steps, request.lcm_origin_steps)
    return pipe.plan(request, original_inference_steps=original, **arguments)


def one_of(original_inference_steps: int | None, lcm_origin_steps: int | None) -> int | None:
    """The value of an argument that has two names."""
    if original_inference_steps is not None and lcm_origin_steps is not None:
        raise RequestError(
            "original_inference_steps and lcm_origin_steps are one argument; give only one of them"
        )
    return lcm_origin_steps if original_inference_steps is None else original_inference_steps
