"""Families with a ControlNet or a T2I-Adapter beside the UNet, and what their tasks do first."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import replace
from typing import Any

from ..errors import RequestError
from ..models.controlnet import ControlNetModel, MultiControlNetModel
from ..models.t2i_adapter import MultiAdapter, T2IAdapter
from ..models.unet import UNet2DConditionModel
from ..models.vae import Autoencoder
from ..schedulers import Scheduler
from .controls import adapter_controls, controlnet_controls, size_of
from .denoise import Control, Job
from .families import StableDiffusion
from .request import Request
from .xl import StableDiffusionXL

ControlNets = ControlNetModel | list[ControlNetModel] | MultiControlNetModel
Adapters = T2IAdapter | list[T2IAdapter] | MultiAdapter


def one_or_several(name: str, given: Any, single: type, several: type) -> Any:
    """The component of a network or of a list of them. Raises RequestError for anything else."""
    if isinstance(given, (list, tuple)):
        given = several(given)
    if not isinstance(given, (single, several)):
        raise RequestError(
            f"{name} must be a fewstep {single.__name__} or a list of them, "
            f"got {type(given).__module__}.{type(given).__name__}"
        )
    return given


class WithControlNet(StableDiffusion):
    """Any family with ControlNets, which read `control_image`."""

    controlnet: ControlNetModel | MultiControlNetModel

    def add_controlnet(self, controlnet: ControlNets) -> None:
        """Make ControlNets a component."""
        found = one_or_several("controlnet", controlnet, ControlNetModel, MultiControlNetModel)
        self.register_modules(controlnet=found)

    def controls(self, request: Request, job: Job) -> tuple[Control, ...]:
        factor = self.vae_scale_factor
        return controlnet_controls(
            self.controlnet,
            request.control_image,
            unet=self.unet,
            shape=job.shape,
            size=(job.shape[2] * factor, job.shape[3] * factor),
            steps=len(job.plan.timesteps),
            scale=request.controlnet_conditioning_scale,
            start=request.control_guidance_start,
            end=request.control_guidance_end,
            guess_mode=request.guess_mode,
            name="image" if request.strength is None else "control_image",
        )


class WithAdapter(StableDiffusion):
    """Any family with T2I-Adapters, which read `control_image`."""

    adapter: T2IAdapter | MultiAdapter

    def add_adapter(self, adapter: Adapters) -> None:
        """Make T2I-Adapters a component."""
        self.register_modules(adapter=one_or_several("adapter", adapter, T2IAdapter, MultiAdapter))

    def controls(self, request: Request, job: Job) -> tuple[Control, ...]:
        factor = self.vae_scale_factor
        return adapter_controls(
            self.adapter,
            request.control_image,
            unet=self.unet,
            shape=job.shape,
            size=(job.shape[2] * factor, job.shape[3] * factor),
            steps=len(job.plan.timesteps),
            scale=request.adapter_conditioning_scale,
            factor=request.adapter_conditioning_factor,
        )


class StableDiffusionControlNet(WithControlNet):
    """Stable Diffusion with ControlNets."""

    def __init__(
        self,
        vae: Autoencoder,
        text_encoder: Any,
        tokenizer: Any,
        unet: UNet2DConditionModel,
        controlnet: ControlNets,
        scheduler: Scheduler,
        safety_checker: Any = None,
        feature_extractor: Any = None,
        image_encoder: Any = None,
        requires_safety_checker: bool = True,
    ) -> None:
        super().__init__(
            vae,
            text_encoder,
            tokenizer,
            unet,
            scheduler,
            safety_checker,
            feature_extractor,
            image_encoder,
            requires_safety_checker,
        )
        self.add_controlnet(controlnet)


class StableDiffusionAdapter(WithAdapter):
    """Stable Diffusion with T2I-Adapters."""

    def __init__(
        self,
        vae: Autoencoder,
        text_encoder: Any,
        tokenizer: Any,
        unet: UNet2DConditionModel,
        adapter: Adapters,
        scheduler: Scheduler,
        safety_checker: Any = None,
        feature_extractor: Any = None,
        requires_safety_checker: bool = True,
        image_encoder: Any = None,
    ) -> None:
        super().__init__(
            vae,
            text_encoder,
            tokenizer,
            unet,
            scheduler,
            safety_checker,
            feature_extractor,
            image_encoder,
            requires_safety_checker,
        )
        self.add_adapter(adapter)


class StableDiffusionXLControlNet(WithControlNet, StableDiffusionXL):
    """SDXL with ControlNets."""

    def __init__(
        self,
        vae: Autoencoder,
        text_encoder: Any,
        text_encoder_2: Any,
        tokenizer: Any,
        tokenizer_2: Any,
        unet: UNet2DConditionModel,
        controlnet: ControlNets,
        scheduler: Scheduler,
        force_zeros_for_empty_prompt: bool = True,
        add_watermarker: bool | None = None,
        feature_extractor: Any = None,
        image_encoder: Any = None,
        requires_aesthetics_score: bool = False,
    ) -> None:
        StableDiffusionXL.__init__(
            self,
            vae,
            text_encoder,
            text_encoder_2,
            tokenizer,
            tokenizer_2,
            unet,
            scheduler,
            image_encoder,
            feature_extractor,
            force_zeros_for_empty_prompt,
            add_watermarker,
            requires_aesthetics_score,
        )
        self.add_controlnet(controlnet)


class StableDiffusionXLAdapter(WithAdapter, StableDiffusionXL):
    """SDXL with T2I-Adapters."""

    def __init__(
        self,
        vae: Autoencoder,
        text_encoder: Any,
        text_encoder_2: Any,
        tokenizer: Any,
        tokenizer_2: Any,
        unet: UNet2DConditionModel,
        adapter: Adapters,
        scheduler: Scheduler,
        force_zeros_for_empty_prompt: bool = True,
        add_watermarker: bool | None = None,
        feature_extractor: Any = None,
        image_encoder: Any = None,
        requires_aesthetics_score: bool = False,
    ) -> None:
        StableDiffusionXL.__init__(
            self,
            vae,
            text_encoder,
            text_encoder_2,
            tokenizer,
            tokenizer_2,
            unet,
            scheduler,
            image_encoder,
            feature_extractor,
            force_zeros_for_empty_prompt,
            add_watermarker,
            requires_aesthetics_score,
        )
        self.add_adapter(adapter)


# ── tasks ──

Task = Callable[[Any, Request], Any]


def steered(task: Task) -> Task:
    """A text task whose `image` is what steers, and gives the size unless it is asked for."""

    def steered_task(pipe: Any, request: Request) -> Any:
        multiple = pipe.vae_scale_factor
        if isinstance(pipe, WithAdapter):
            multiple = max(multiple, pipe.adapter.downscale_factor)
        height, width = size_of(request.image, multiple)
        request = replace(
            request,
            height=request.height or height,
            width=request.width or width,
            image=None,
            control_image=request.image,
        )
        return task(pipe, request)

    steered_task.__doc__ = f"{task.__doc__} The network beside the UNet is shown `image`."
    return steered_task
