"""The tasks: each is the `__call__` of the pipelines that catalog.py lists for it.

A task turns its arguments into a Request, a plan of times and a start; the rest is shared.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Sequence
from dataclasses import replace
from typing import Any

import numpy as np
import PIL.Image
import torch
from torch import Tensor

from ..errors import RequestError
from ..schedulers import LCMScheduler, Plan
from .arguments import documented
from .denoise import Job
from .families import StableDiffusion, StableDiffusionPipelineOutput
from .images import Pictures, preprocess
from .request import Callback, Request

Result = StableDiffusionPipelineOutput | tuple[list[PIL.Image.Image] | np.ndarray | Tensor, None]


@documented
def text_to_image(
    self: StableDiffusion,
    prompt: str | list[str] | None = None,
    height: int | None = None,
    width: int | None = None,
    num_inference_steps: int = 50,
    timesteps: list[int] | None = None,
    sigmas: None = None,
    guidance_scale: float = 7.5,
    negative_prompt: str | list[str] | None = None,
    num_images_per_prompt: int = 1,
    eta: float = 0.0,
    generator: torch.Generator | list[torch.Generator] | None = None,
    latents: Tensor | None = None,
    prompt_embeds: Tensor | None = None,
    negative_prompt_embeds: Tensor | None = None,
    ip_adapter_image: None = None,
    ip_adapter_image_embeds: None = None,
    output_type: str = "pil",
    return_dict: bool = True,
    cross_attention_kwargs: None = None,
    guidance_rescale: float = 0.0,
    clip_skip: int | None = None,
    callback_on_step_end: Callback | None = None,
    callback_on_step_end_tensor_inputs: Sequence[str] = ("latents",),
) -> Result:
    """Pictures of a text."""
    request = Request(
        prompt=prompt,
        height=height,
        width=width,
        num_inference_steps=num_inference_steps,
        timesteps=timesteps,
        sigmas=sigmas,
        guidance_scale=guidance_scale,
        negative_prompt=negative_prompt,
        num_images_per_prompt=num_images_per_prompt,
        eta=eta,
        generator=generator,
        latents=latents,
        prompt_embeds=prompt_embeds,
        negative_prompt_embeds=negative_prompt_embeds,
        ip_adapter_image=ip_adapter_image,
        ip_adapter_image_embeds=ip_adapter_image_embeds,
        output_type=output_type,
        return_dict=return_dict,
        cross_attention_kwargs=cross_attention_kwargs,
        guidance_rescale=guidance_rescale,
        clip_skip=clip_skip,
        callback_on_step_end=callback_on_step_end,
        callback_on_step_end_tensor_inputs=callback_on_step_end_tensor_inputs,
    )
    return self.generate(request, self.plan(request), Job.from_noise)


@documented
def image_to_image(
    self: StableDiffusion,
    prompt: str | list[str] | None = None,
    image: Pictures | None = None,
    strength: float = 0.8,
    num_inference_steps: int = 50,
    timesteps: list[int] | None = None,
    sigmas: None = None,
    guidance_scale: float = 7.5,
    negative_prompt: str | list[str] | None = None,
    num_images_per_prompt: int = 1,
    eta: float = 0.0,
    generator: torch.Generator | list[torch.Generator] | None = None,
    prompt_embeds: Tensor | None = None,
    negative_prompt_embeds: Tensor | None = None,
    ip_adapter_image: None = None,
    ip_adapter_image_embeds: None = None,
    output_type: str = "pil",
    return_dict: bool = True,
    cross_attention_kwargs: None = None,
    clip_skip: int | None = None,
    callback_on_step_end: Callback | None = None,
    callback_on_step_end_tensor_inputs: Sequence[str] = ("latents",),
) -> Result:
    """Pictures of a text, made from other pictures: the last `strength` of the steps are taken."""
    request = Request(
        prompt=prompt,
        strength=strength,
        num_inference_steps=num_inference_steps,
        timesteps=timesteps,
        sigmas=sigmas,
        guidance_scale=guidance_scale,
        negative_prompt=negative_prompt,
        num_images_per_prompt=num_images_per_prompt,
        eta=eta,
        generator=generator,
        prompt_embeds=prompt_embeds,
        negative_prompt_embeds=negative_prompt_embeds,
        ip_adapter_image=ip_adapter_image,
        ip_adapter_image_embeds=ip_adapter_image_embeds,
        output_type=output_type,
        return_dict=return_dict,
        cross_attention_kwargs=cross_attention_kwargs,
        clip_skip=clip_skip,
        callback_on_step_end=callback_on_step_end,
        callback_on_step_end_tensor_inputs=callback_on_step_end_tensor_inputs,
    )
    plan = last_steps(self.plan(request), strength)
    request, start = from_image(self, request, image)
    return self.generate(request, plan, start)


@documented
def lcm_text_to_image(
    self: StableDiffusion,
    prompt: str | list[str] | None = None,
    height: int | None = None,
    width: int | None = None,
    num_inference_steps: int = 4,
    original_inference_steps: int | None = None,
    timesteps: list[int] | None = None,
    guidance_scale: float = 8.5,
    num_images_per_prompt: int = 1,
    generator: torch.Generator | list[torch.Generator] | None = None,
    latents: Tensor | None = None,
    prompt_embeds: Tensor | None = None,
    ip_adapter_image: None = None,
    ip_adapter_image_embeds: None = None,
    output_type: str = "pil",
    return_dict: bool = True,
    cross_attention_kwargs: None = None,
    clip_skip: int | None = None,
    callback_on_step_end: Callback | None = None,
    callback_on_step_end_tensor_inputs: Sequence[str] = ("latents",),
    *,
    negative_prompt: str | list[str] | None = None,
    lcm_origin_steps: int | None = None,
) -> Result:
    """Pictures of a text, in a few steps of a guidance-distilled latent consistency model."""
    request = Request(
        prompt=prompt,
        height=height,
        width=width,
        num_inference_steps=num_inference_steps,
        original_inference_steps=one_of(original_inference_steps, lcm_origin_steps),
        timesteps=timesteps,
        guidance_scale=guidance_scale,
        negative_prompt=negative_prompt,
        num_images_per_prompt=num_images_per_prompt,
        generator=generator,
        latents=latents,
        prompt_embeds=prompt_embeds,
        ip_adapter_image=ip_adapter_image,
        ip_adapter_image_embeds=ip_adapter_image_embeds,
        output_type=output_type,
        return_dict=return_dict,
        cross_attention_kwargs=cross_attention_kwargs,
        clip_skip=clip_skip,
        callback_on_step_end=callback_on_step_end,
        callback_on_step_end_tensor_inputs=callback_on_step_end_tensor_inputs,
    )
    return self.generate(request, lcm_plan(self, request), Job.from_noise)


@documented
def lcm_image_to_image(
    self: StableDiffusion,
    prompt: str | list[str] | None = None,
    image: Pictures | None = None,
    num_inference_steps: int = 4,
    strength: float = 0.8,
    original_inference_steps: int | None = None,
    timesteps: list[int] | None = None,
    guidance_scale: float = 8.5,
    num_images_per_prompt: int = 1,
    generator: torch.Generator | list[torch.Generator] | None = None,
    latents: Tensor | None = None,
    prompt_embeds: Tensor | None = None,
    ip_adapter_image: None = None,
    ip_adapter_image_embeds: None = None,
    output_type: str = "pil",
    return_dict: bool = True,
    cross_attention_kwargs: None = None,
    clip_skip: int | None = None,
    callback_on_step_end: Callback | None = None,
    callback_on_step_end_tensor_inputs: Sequence[str] = ("latents",),
    *,
    negative_prompt: str | list[str] | None = None,
    lcm_origin_steps: int | None = None,
) -> Result:
    """Pictures of a text, made from other pictures in a few steps of a latent consistency model.

    All steps are taken; `strength` says how high the noise is that they start from.
    """
    request = Request(
        prompt=prompt,
        strength=strength,
        num_inference_steps=num_inference_steps,
        original_inference_steps=one_of(original_inference_steps, lcm_origin_steps),
        timesteps=timesteps,
        guidance_scale=guidance_scale,
        negative_prompt=negative_prompt,
        num_images_per_prompt=num_images_per_prompt,
        generator=generator,
        latents=latents,
        prompt_embeds=prompt_embeds,
        ip_adapter_image=ip_adapter_image,
        ip_adapter_image_embeds=ip_adapter_image_embeds,
        output_type=output_type,
        return_dict=return_dict,
        cross_attention_kwargs=cross_attention_kwargs,
        clip_skip=clip_skip,
        callback_on_step_end=callback_on_step_end,
        callback_on_step_end_tensor_inputs=callback_on_step_end_tensor_inputs,
    )
    plan = lcm_plan(self, request, strength=strength)
    request, start = from_image(self, request, image)
    return self.generate(request, plan, start)


def from_image(
    pipe: StableDiffusion, request: Request, image: Pictures | None
) -> tuple[Request, Callable[[Job], Job]]:
    """The request with the size of `image`, and the start from it: z_0 noised to the first time."""
    if image is None:
        raise RequestError("image is missing: give the picture to start from")
    factor = pipe.vae_scale_factor
    channels = pipe.vae.config.latent_channels
    pictures = preprocess(image, factor, channels)
    if len(pictures) not in (1, request.prompts):
        raise RequestError(
            f"image holds {len(pictures)} pictures, but there are {request.prompts} prompts; "
            "give one picture, or one per prompt"
        )
    is_latent = pictures.shape[1] != 3
    height, width = (side * factor if is_latent else side for side in pictures.shape[2:])

    def start(job: Job) -> Job:
        z0 = pipe.encode_image(pictures, job)
        first = job.plan.timesteps[0].expand(len(z0))
        return replace(job, z=pipe.sampler.add_noise(z0, job.draw(), first))

    return replace(request, height=height, width=width), start


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
    return Plan(plan.timesteps[steps - kept :], plan.next_timesteps[steps - kept :])


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
    return pipe.plan(
        request, original_inference_steps=request.original_inference_steps, **arguments
    )


def one_of(original_inference_steps: int | None, lcm_origin_steps: int | None) -> int | None:
    """The value of an argument that has two names."""
    if original_inference_steps is not None and lcm_origin_steps is not None:
        raise RequestError(
            "original_inference_steps and lcm_origin_steps are one argument; give only one of them"
        )
    return lcm_origin_steps if original_inference_steps is None else original_inference_steps
