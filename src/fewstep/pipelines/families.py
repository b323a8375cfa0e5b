"""Families of models: the components they consist of, and how text and pictures become tensors.

A public pipeline is one family with one task as its `__call__` (see catalog.py).
"""

from __future__ import annotations

from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass, replace
from functools import partial
from typing import Any, ClassVar, cast

import numpy as np
import PIL.Image
import torch
from torch import Tensor

from ..checkpoints.config import DEFAULTED
from ..diffusion.guidance import guidance_embedding
from ..errors import RequestError
from ..models.unet import UNet2DConditionModel
from ..models.vae import Autoencoder
from ..outputs import Output
from ..random import Generators, randn
from ..schedulers import (
    ConfigOnlyScheduler,
    LCMScheduler,
    Plan,
    SamplingScheduler,
    Scheduler,
)
from .advice import advise
from .approximations import Approximations
from .base import DiffusionPipeline
from .callbacks import call_back
from .denoise import Conditioning, Control, Job, Network, Step, Update
from .images import postprocess
from .ip_adapter import IPAdapterLoader
from .lora import LoraLoader
from .notices import warn_caller
from .prompts import Encoder, embedded, listed
from .record import write_records
from .request import Request
from .safety import StableDiffusionSafetyChecker, checked, extractor
from .speed import Speed
from .text import encode_text
from .textual_inversion import TextualInversionLoader, expanded


@dataclass
class StableDiffusionPipelineOutput(Output):
    """What a pipeline returns.

    `images`: list of PIL pictures, array (B, H, W, 3), tensor (B, 3, H, W) or latents, as
    `output_type` asked. `nsfw_content_detected`: what the safety checker flagged, None without.
    """

    images: list[PIL.Image.Image] | np.ndarray | Tensor
    nsfw_content_detected: list[bool] | None = None


@dataclass(frozen=True, eq=False)
class Assignment:
    """What a task makes of a request.

    `start` gives the job its first latents, unless the request brought them. `finish`, if given, is
    applied to the decoded pictures.
    """

    request: Request
    plan: Plan
    start: Callable[[Job], Job]
    finish: Callable[[Any], Any] | None = None


class StableDiffusion(
    Approximations, Speed, IPAdapterLoader, TextualInversionLoader, LoraLoader, DiffusionPipeline
):
    """Stable Diffusion 1.x and 2.x, and LCMs made from them: CLIP text encoder, UNet and VAE.

    Works for guidance by two network calls (batched as one), for guidance as an input of the
    network (`time_cond_proj_dim`), and without guidance.
    """

    flags_pictures: ClassVar[bool] = True  # whether the tuple of a call tells of a safety checker

    def __init__(
        self,
        vae: Autoencoder,
        text_encoder: Any,
        tokenizer: Any,
        unet: UNet2DConditionModel,
        scheduler: Scheduler,
        safety_checker: StableDiffusionSafetyChecker | None = None,
        feature_extractor: Any = None,
        image_encoder: Any = None,
        requires_safety_checker: bool = True,
    ) -> None:
        super().__init__()
        for name, value, kind in (
            ("vae", vae, Autoencoder),
            ("unet", unet, UNet2DConditionModel),
            ("scheduler", scheduler, Scheduler),
        ):
            if not isinstance(value, kind):
                raise RequestError(
                    f"{name} must be a fewstep {kind.__name__}, "
                    f"got {type(value).__module__}.{type(value).__name__}"
                )
        if safety_checker is not None:
            if not isinstance(safety_checker, StableDiffusionSafetyChecker):
                raise RequestError(
                    "safety_checker must be fewstep's, as from_pretrained loads it, or None, "
                    f"got {type(safety_checker).__module__}.{type(safety_checker).__name__}"
                )
            feature_extractor = feature_extractor or extractor(safety_checker)
        self.register_modules(
            vae=vae,
            text_encoder=text_encoder,
            tokenizer=tokenizer,
            unet=unet,
            scheduler=self.adjusted(scheduler),
            safety_checker=safety_checker,
            feature_extractor=feature_extractor,
            image_encoder=image_encoder,
        )
        self.requires_safety_checker = requires_safety_checker
        self._interrupt = False
        self._guidance_scale = 1.0
        self._num_timesteps = 0

    vae: Autoencoder
    unet: UNet2DConditionModel
    scheduler: Scheduler
    tokenizer: Any
    text_encoder: Any

    @property
    def options(self) -> dict[str, Any]:
        return {"requires_safety_checker": self.requires_safety_checker}

    @staticmethod
    def adjusted(scheduler: Scheduler) -> Scheduler:
        """The scheduler without two settings of old checkpoints that Stable Diffusion cannot mean.

        `clip_sample` would clip latents to [-1, 1]; `steps_offset` is 1 in every Stable Diffusion.
        """
        changes: dict[str, Any] = {}
        if scheduler.config.get("clip_sample"):
            changes["clip_sample"] = False
        if scheduler.config.get("steps_offset", 1) != 1 and not isinstance(scheduler, LCMScheduler):
            changes["steps_offset"] = 1
        if not changes:
            return scheduler
        shown = ", ".join(f"{name}={scheduler.config[name]} by {v}" for name, v in changes.items())
        warn_caller(f"the scheduler's config is outdated; replaced {shown}")
        config = {key: v for key, v in scheduler.config.items() if key != DEFAULTED}
        return type(scheduler).from_config(config | changes)

    # ── facts about the components ──

    @property
    def vae_scale_factor(self) -> int:
        """Picture pixels per latent pixel, in each direction."""
        return self.vae.downscale

    @property
    def is_embedded(self) -> bool:
        """Whether guidance is an input of the network, as in a guidance-distilled LCM."""
        return self.unet.config.time_cond_proj_dim is not None

    @property
    def guidance_scale(self) -> float:
        """The guidance scale of the running or last call; a callback may set `_guidance_scale`."""
        return self._guidance_scale

    @property
    def do_classifier_free_guidance(self) -> bool:
        """Whether the running or last call doubles the batch."""
        return self._guidance_scale > 1 and not self.is_embedded

    @property
    def num_timesteps(self) -> int:
        """The number of steps of the running or last call."""
        return self._num_timesteps

    @property
    def interrupt(self) -> bool:
        """Whether the running call was asked to stop, by `pipe._interrupt = True` in a callback."""
        return self._interrupt

    @property
    def sampler(self) -> SamplingScheduler | ConfigOnlyScheduler:
        """The scheduler; one that only carries its config refuses to plan, saying what to do."""
        if not isinstance(self.scheduler, (SamplingScheduler, ConfigOnlyScheduler)):
            raise RequestError(
                f"scheduler must be one of fewstep's, got {type(self.scheduler).__module__}."
                f"{type(self.scheduler).__name__}; use fewstep.LCMScheduler.from_config(config)"
            )
        return self.scheduler

    # ── memory and FreeU ──

    def enable_vae_slicing(self) -> None:
        """Decode the pictures of a batch one after another, to save memory."""
        self.vae.enable_slicing()

    def disable_vae_slicing(self) -> None:
        """Undo `enable_vae_slicing`."""
        self.vae.disable_slicing()

    def enable_vae_tiling(self) -> None:
        """Decode and encode in stripes, to save memory: the same pictures but for rounding."""
        self.vae.enable_tiling()

    def disable_vae_tiling(self) -> None:
        """Undo `enable_vae_tiling`."""
        self.vae.disable_tiling()

    def enable_freeu(self, s1: float, s2: float, b1: float, b2: float) -> None:
        """FreeU (Si et al. 2023): scale skips by s and backbone by b in the first two up blocks."""
        self.unet.enable_freeu(s1, s2, b1, b2)

    def disable_freeu(self) -> None:
        """Undo `enable_freeu`."""
        self.unet.disable_freeu()

    # ── text and pictures to tensors ──

    def encode_prompt(
        self,
        prompt: str | list[str] | None,
        device: torch.device | str | None = None,
        num_images_per_prompt: int = 1,
        do_classifier_free_guidance: bool = True,
        negative_prompt: str | list[str] | None = None,
        prompt_embeds: Tensor | None = None,
        negative_prompt_embeds: Tensor | None = None,
        clip_skip: int | None = None,
    ) -> tuple[Tensor, Tensor | None]:
        """Embeddings (B, L, D) of the prompts and, with guidance, of the negative prompts.

        B is prompts x `num_images_per_prompt`, the pictures of one prompt side by side. The
        negative prompt is "" by default; one serves all prompts.
        """
        device = device or self.unet.device
        # The latents take this dtype too, so it decides which random numbers are drawn.
        dtype = self.unet.dtype if self.text_encoder is None else self.text_encoder.dtype
        if prompt_embeds is None:
            prompt_embeds = self.embed(prompt, "prompt", clip_skip=clip_skip)
        self.check_channels(prompt_embeds)
        positive = prompt_embeds.to(device, dtype)
        if not do_classifier_free_guidance:
            return positive.repeat_interleave(num_images_per_prompt, 0), None
        if negative_prompt_embeds is None:
            texts = (
                [negative_prompt or ""]
                if isinstance(negative_prompt, str | None)
                else negative_prompt
            )
            length = positive.shape[1]
            # clip_skip is for the prompt alone, as in diffusers.
            negative = self.embed(texts, "negative_prompt", length=length)
            negative = negative.expand(len(positive), -1, -1) if len(negative) == 1 else negative
        else:
            negative = negative_prompt_embeds
        if negative.shape != positive.shape:
            raise RequestError(
                f"negative_prompt_embeds must have the shape of prompt_embeds, "
                f"{tuple(positive.shape)}, got {tuple(negative.shape)}"
            )
        negative = negative.to(device, dtype)
        return (
            positive.repeat_interleave(num_images_per_prompt, 0),
            negative.repeat_interleave(num_images_per_prompt, 0),
        )

    def embed(
        self,
        texts: str | list[str] | None,
        name: str,
        *,
        length: int | None = None,
        clip_skip: int | None = None,
    ) -> Tensor:
        """Embeddings (P, L, D) of texts that came in as the argument `name`."""
        self.check_text_encoder(name)
        spelled = [expanded(self.tokenizer, text) for text in listed(texts)]
        return encode_text(
            self.tokenizer, self.text_encoder, spelled, length=length, clip_skip=clip_skip
        )

    def weighed(self, request: Request) -> Request:
        """The request with embeddings in place of its weighted prompts; any other as it is."""
        if not request.weighted_prompt:
            return request
        self.check_text_encoder("prompt")

        def encode(tokenizer: Any, encoder: Any, texts: Any, skip: int | None) -> Any:
            return encode_text(tokenizer, encoder, texts, clip_skip=skip), None

        encoder = Encoder(self.tokenizer, self.text_encoder, encode)
        negatives = [listed(request.negative_prompt or "")] if self.doubles(request) else None
        return embedded(request, [encoder], [listed(request.prompt)], negatives)

    def check_text_encoder(self, name: str) -> None:
        """Raises RequestError unless the argument `name`, a text, can be read."""
        if self.text_encoder is None or self.tokenizer is None:
            raise RequestError(
                f"{name} cannot be read: this pipeline has no text_encoder or no tokenizer; "
                f"give {name}_embeds"
            )

    def check_channels(self, embeds: Tensor) -> None:
        """Raises RequestError unless embeddings (P, L, D) have the D that the UNet reads."""
        channels = self.unet.config.per_level("cross_attention_dim")[0]
        if embeds.shape[2] != channels:
            raise RequestError(
                f"prompt_embeds must have {channels} channels, as the UNet's cross_attention_dim, "
                f"got {embeds.shape[2]}"
            )

    def size(self, request: Request) -> tuple[int, int]:
        """Height and width in pixels of the pictures. Raises RequestError if they do not fit."""
        factor, sample = self.vae_scale_factor, self.unet.config.sample_size
        default = sample if isinstance(sample, tuple) else (sample, sample)
        sides = []
        for name, given, latent in zip(
            ("height", "width"), (request.height, request.width), default, strict=True
        ):
            if given is None and latent is None:
                raise RequestError(f"{name} is missing: this UNet's config has no sample_size")
            side = given if given is not None else cast(int, latent) * factor
            if side % factor:
                raise RequestError(
                    f"{name} must be a multiple of {factor} (pixels per latent of this VAE), "
                    f"got {side}; use {max(side // factor, 1) * factor}"
                )
            sides.append(int(side))
        return sides[0], sides[1]

    def plan(self, request: Request, **arguments: Any) -> Plan:
        """The times of the scheduler for a request; `arguments` are those of LCMs."""
        steps = int(request.num_inference_steps) if request.timesteps is None else None
        return self.sampler.plan(steps, timesteps=request.timesteps, **arguments)

    def update_of(self, request: Request, plan: Plan) -> Update:
        """The scheduler's steps for a run, with the request's eta."""
        update = self.sampler.updater(plan)
        if self.sampler.takes_eta:
            return partial(update, eta=request.eta)
        if request.eta != 0:
            raise RequestError(
                f"eta={request.eta} is an argument of the DDIMScheduler and the TCDScheduler, and "
                f"the scheduler is a {type(self.scheduler).__name__}; leave it out"
            )
        return update

    def prepare(self, request: Request, plan: Plan) -> Job:
        """The job of a request: text to tensors. It starts from the request's latents, if any."""
        height, width = self.size(request)
        factor, channels = self.vae_scale_factor, self.vae.config.latent_channels
        shape = (request.batch, channels, height // factor, width // factor)
        self.check_unet(request, channels)
        if request.latents is not None and tuple(request.latents.shape) != shape:
            raise RequestError(
                f"latents must have shape {shape} (pictures, channels, height, width), "
                f"got {tuple(request.latents.shape)}"
            )
        update = self.update_of(request, plan)
        if request.prompt_embeds is not None:
            self.check_channels(request.prompt_embeds)
        self.check_picture_prompts(request, self.doubles(request))
        request.warn_of_no_effect(embedded=self.is_embedded)
        cond, uncond, dtype = self.condition(self.weighed(request), (height, width))
        cond, uncond = self.with_pictures(request, cond, uncond)
        scale = self.sampler.start_scale(plan)
        latents = request.latents
        return Job(
            cond=cond,
            uncond=uncond,
            guidance_scale=request.guidance_scale,
            guidance_rescale=request.guidance_rescale,
            plan=plan,
            update=update,
            shape=shape,
            dtype=dtype,
            generator=request.generator,
            start_scale=scale,
            z=None if latents is None else latents.to(self.unet.device, dtype) * scale,
        )

    def check_unet(self, request: Request, channels: int) -> None:
        """Raises RequestError unless the UNet takes what this task gives it."""
        given = {channels} if request.mask_image is None else {channels, 2 * channels + 1}
        if self.unet.config.in_channels not in given:
            raise RequestError(
                f"unet has in_channels={self.unet.config.in_channels}, but this task gives it "
                f"{' or '.join(map(str, sorted(given)))} channels; use a UNet made for them"
            )

    def condition(
        self, request: Request, size: tuple[int, int]
    ) -> tuple[Conditioning, Conditioning | None, torch.dtype]:
        """What the network is told, with and without the text, and the dtype of the latents."""
        positive, negative = self.encode_prompt(
            request.prompt,
            self.unet.device,
            request.num_images_per_prompt,
            self.doubles(request),
            request.negative_prompt,
            prompt_embeds=request.prompt_embeds,
            negative_prompt_embeds=request.negative_prompt_embeds,
            clip_skip=request.clip_skip,
        )
        dtype = self.unet.dtype
        return (
            Conditioning(positive.to(dtype), w=self.guidance_input(request)),
            None if negative is None else Conditioning(negative.to(dtype)),
            positive.dtype,
        )

    def doubles(self, request: Request) -> bool:
        """Whether a request is guided by two network calls, batched as one."""
        return request.guidance_scale > 1 and not self.is_embedded

    def controls(self, request: Request, job: Job) -> tuple[Control, ...]:
        """The further conditions of a request; families with a control have their own."""
        return ()

    def guidance_input(self, request: Request) -> Tensor | None:
        """The embedding (B, W) of the paper's omega, if the network takes one."""
        dim = self.unet.config.time_cond_proj_dim
        if dim is None:
            return None
        # diffusers' guidance_scale is the paper's omega + 1.
        w = torch.full((request.batch,), request.guidance_scale - 1.0, device=self.unet.device)
        return guidance_embedding(w, dim).to(self.unet.dtype)

    def encode_image(self, pictures: Tensor, job: Job) -> Tensor:
        """z_0 (B, C, h, w), drawn from the VAE's posterior of pictures (b, 3, H, W) in [-1, 1].

        Without a draw where the VAE has no posterior.

        Latents (b, C, h, w) pass as they are. Each of the b pictures serves B / b rows in a row.
        """
        rows, channels = job.shape[:2]
        if pictures.shape[1] == channels and channels != 3:
            z0 = pictures.to(job.cond.text.device, job.dtype)
            return z0.repeat_interleave(rows // len(z0), 0)
        with self.safe_vae() as dtype:
            mean, std = self.vae.moments(pictures.to(self.vae.device, dtype))
        generator: Generators = job.generator
        if std is not None:
            if isinstance(generator, (list, tuple)):  # each row draws from its own
                mean, std = (v.repeat_interleave(rows // len(v), 0) for v in (mean, std))
            mean = mean + std * randn(mean.shape, generator, mean.device, mean.dtype)
        z0 = self.scaled(mean).to(job.cond.text.device, job.dtype)
        return z0.repeat_interleave(rows // len(z0), 0)

    def pass_over(self, pictures: Tensor, job: Job) -> None:
        """Draws what `encode_image` would of pictures whose latents nobody reads.

        Later draws of the generators stand behind it.
        """
        if self.vae.has_posterior:
            each_row_draws = isinstance(job.generator, (list, tuple))
            rows = job.shape[0] if each_row_draws else len(pictures)
            with self.safe_vae() as dtype:
                randn((rows, *job.shape[1:]), job.generator, self.vae.device, dtype)

    # ── tensors to pictures ──

    def decode(
        self, z: Tensor, output_type: str = "pil"
    ) -> list[PIL.Image.Image] | np.ndarray | Tensor:
        """Pictures of latents (B, C, h, w), as `output_type` asks; "latent" gives them back."""
        if output_type == "latent":
            return z
        before = self.vae.dtype
        with self.safe_vae() as dtype:
            unscaled = self.unscaled(z).to(self.vae.device, dtype)
            pictures = self.decoded(unscaled, is_settled=dtype == before)
        return postprocess(pictures, output_type)

    @contextmanager
    def safe_vae(self) -> Iterator[torch.dtype]:
        """The VAE in float32 while it runs, if in half precision it would overflow (SDXL's)."""
        overflows = self.vae.dtype == torch.float16 and self.vae.config.force_upcast
        if overflows:
            self.vae.float()
        try:
            yield self.vae.dtype
        finally:
            if overflows:
                self.vae.half()

    def scaled(self, z: Tensor) -> Tensor:
        """The VAE's latents in the UNet's units."""
        mean, std = self.statistics(z)
        return (z - mean) * self.vae.config.scaling_factor / std

    def unscaled(self, z: Tensor) -> Tensor:
        """The UNet's latents in the VAE's units."""
        mean, std = self.statistics(z)
        return z / self.vae.config.scaling_factor * std + mean

    def statistics(self, like: Tensor) -> tuple[Tensor | float, Tensor | float]:
        """Mean and standard deviation of the VAE's latents per channel, 0 and 1 if not recorded."""
        config = self.vae.config
        if config.get("latents_mean") is None or config.get("latents_std") is None:
            return 0.0, 1.0
        values = (
            like.new_tensor(v).reshape(1, -1, 1, 1)
            for v in (config.latents_mean, config.latents_std)
        )
        mean, std = values
        return mean, std

    # ── the whole way ──

    @torch.no_grad()
    def generate(self, assignment: Assignment) -> StableDiffusionPipelineOutput | tuple[Any, ...]:
        """The answer to a request: text to tensors, the start, the loop, latents to pictures."""
        with self.lora_scaled(assignment.request.cross_attention_kwargs):
            z, job = self.sample(assignment, self.unet)
            return self.finished(z, job, assignment)

    def sample(self, assignment: Assignment, network: Network) -> tuple[Tensor, Job]:
        """z_0 of a request, by the loop, and the job that it was made from."""
        request, plan = assignment.request, assignment.plan
        self._interrupt = False
        self._guidance_scale = request.guidance_scale
        self._num_timesteps = len(plan.timesteps)
        advise(self, request, self._num_timesteps)
        job = self.begun(assignment)
        with self.progress_bar(total=len(plan.timesteps)) as bar:

            def on_step(step: Step) -> Step:
                step = call_back(self, request, step)
                bar.update()
                return replace(step, stop=self._interrupt)

            return self.loop(network, job, request, on_step, bar.update), job

    def begun(self, assignment: Assignment) -> Job:
        """The job of a request, at its start and with its controls."""
        request = assignment.request
        job = assignment.start(self.prepare(request, assignment.plan))
        return replace(job, controls=self.controls(request, job))

    def finished(
        self, z: Tensor, job: Job, assignment: Assignment
    ) -> StableDiffusionPipelineOutput | tuple[Any, ...]:
        """What a call returns for z_0 (B, C, h, w)."""
        request, flags = assignment.request, None
        images: Any = self.decode(z, request.output_type)
        if request.output_type != "latent":
            images, flags = checked(self, images)
        if assignment.finish is not None:
            images = assignment.finish(images)
        if isinstance(images, list):
            write_records(images, self, request, job)
        if not request.return_dict:
            return (images, flags) if self.flags_pictures else (images,)
        return StableDiffusionPipelineOutput(images, flags)
