"""What a caller asks for: the arguments of all tasks, checked before any work is done."""

from __future__ import annotations

import math
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from numbers import Integral, Real
from typing import Any

import torch
from torch import Tensor

from ..errors import RequestError
from ..random import Generators
from .images import Pictures, check_output_type
from .notices import warn_caller
from .text import check_embeds, check_prompt

# What a callback may ask for and give back.
CALLBACK_TENSORS = (
    "latents",
    "denoised",
    "prompt_embeds",
    "negative_prompt_embeds",
    "w_embedding",
)

Callback = Callable[[Any, int, Tensor, dict[str, Any]], "dict[str, Any] | None"]


@dataclass(frozen=True, eq=False)
class Request:
    """One call of a pipeline, under the public names of its arguments.

    Raises RequestError for a value that no pipeline can serve.
    """

    prompt: str | list[str] | None = None
    prompt_2: str | list[str] | None = None  # SDXL's second text encoder
    num_inference_steps: int = 50
    guidance_scale: float = 7.5
    height: int | None = None
    width: int | None = None
    image: Pictures | None = None
    mask_image: Pictures | None = None
    masked_image_latents: Tensor | None = None
    padding_mask_crop: int | None = None
    mask_blur: float = 0.0
    paste_back: bool = False
    strength: float | None = None
    timesteps: Sequence[int] | None = None
    original_inference_steps: int | None = None
    lcm_origin_steps: int | None = None
    denoising_start: float | None = None
    denoising_end: float | None = None
    negative_prompt: str | list[str] | None = None
    negative_prompt_2: str | list[str] | None = None
    num_images_per_prompt: int = 1
    eta: float = 0.0
    guidance_rescale: float = 0.0
    generator: Generators = None
    latents: Tensor | None = None
    prompt_embeds: Tensor | None = None
    negative_prompt_embeds: Tensor | None = None
    pooled_prompt_embeds: Tensor | None = None
    negative_pooled_prompt_embeds: Tensor | None = None
    original_size: tuple[int, int] | None = None
    crops_coords_top_left: tuple[int, int] = (0, 0)
    target_size: tuple[int, int] | None = None
    negative_original_size: tuple[int, int] | None = None
    negative_crops_coords_top_left: tuple[int, int] = (0, 0)
    negative_target_size: tuple[int, int] | None = None
    aesthetic_score: float = 6.0
    negative_aesthetic_score: float = 2.5
    control_image: Pictures | Sequence[Pictures] | None = None
    controlnet_conditioning_scale: float | Sequence[float] = 1.0
    guess_mode: bool = False
    control_guidance_start: float | Sequence[float] = 0.0
    control_guidance_end: float | Sequence[float] = 1.0
    adapter_conditioning_scale: float | Sequence[float] = 1.0
    adapter_conditioning_factor: float = 1.0
    clip_skip: int | None = None
    output_type: str = "pil"
    return_dict: bool = True
    callback_on_step_end: Callback | None = None
    callback_on_step_end_tensor_inputs: Sequence[str] = ("latents",)
    cross_attention_kwargs: dict[str, Any] | None = None
    ip_adapter_image: Pictures | Sequence[Pictures] | None = None
    ip_adapter_image_embeds: Sequence[Tensor] | None = None
    weighted_prompt: bool = False
    # Arguments of diffusers that cannot be served yet: None only.
    sigmas: None = None

    @classmethod
    def asked(cls, **arguments: Any) -> Request:
        """The request of a call with these arguments."""
        return cls(**arguments)

    def __post_init__(self) -> None:
        self.check_supported()
        self.check_lora_scale()
        self.check_text()
        self.check_weighted()
        self.check_picture_prompts()
        self.check_numbers()
        self.check_generators()
        check_output_type(self.output_type)
        if self.latents is not None and not isinstance(self.latents, Tensor):
            raise RequestError(f"latents must be a tensor, got {type(self.latents).__name__}")
        self.check_callback()

    def check_supported(self) -> None:
        """Refuse what is not implemented, with the way around it."""
        remedies = {
            "sigmas": "give timesteps instead",
        }
        for name, remedy in remedies.items():
            if (value := getattr(self, name)) is not None:
                shown = value if isinstance(value, (dict, list, str)) else type(value).__name__
                raise RequestError(f"{name}={shown!r} is not supported: {remedy}")

    def check_lora_scale(self) -> None:
        """Refuse cross_attention_kwargs other than {"scale": number}, the scale of LoRAs."""
        given = self.cross_attention_kwargs
        if given is None or (isinstance(given, Mapping) and all(k == "scale" for k in given)):
            if given and not is_number(scale := given["scale"]):
                raise RequestError(
                    f"cross_attention_kwargs['scale'] must be a finite number, got {scale!r}"
                )
            return
        raise RequestError(
            f"cross_attention_kwargs={given!r} is not supported: it may hold the scale of LoRAs, "
            "{'scale': number}, and nothing else"
        )

    def check_text(self) -> None:
        """Refuse prompts that are absent, doubly given or of the wrong type."""
        for name in ("prompt_2", "negative_prompt_2"):
            if (text := getattr(self, name)) is not None:
                check_prompt(name, text)
                self.check_count(name, text)
        for name in ("prompt", "negative_prompt"):
            text, embeds = getattr(self, name), getattr(self, f"{name}_embeds")
            if text is not None and embeds is not None:
                raise RequestError(
                    f"{name} and {name}_embeds were both given; give only one of them"
                )
            if text is not None:
                check_prompt(name, text)
            if embeds is not None:
                check_embeds(f"{name}_embeds", embeds)
        if self.prompt is None and self.prompt_embeds is None:
            raise RequestError("prompt is missing: give prompt or prompt_embeds")
        self.check_count("negative_prompt", self.negative_prompt)

    def check_weighted(self) -> None:
        """Refuse weights for prompts that are embedded already."""
        if not isinstance(self.weighted_prompt, bool):
            raise RequestError(f"weighted_prompt must be True or False, got {self.weighted_prompt}")
        for name in ("prompt_embeds", "negative_prompt_embeds"):
            if self.weighted_prompt and getattr(self, name) is not None:
                raise RequestError(
                    f"weighted_prompt=True cannot read {name}; give texts, or leave it out"
                )

    def check_picture_prompts(self) -> None:
        """Refuse pictures for IP-Adapters that are doubly given, and embeddings of no tensors."""
        embeds = self.ip_adapter_image_embeds
        if embeds is None:
            return
        if self.ip_adapter_image is not None:
            raise RequestError(
                "ip_adapter_image and ip_adapter_image_embeds were both given; give only one of "
                "them"
            )
        if not isinstance(embeds, (list, tuple)) or not all(isinstance(e, Tensor) for e in embeds):
            raise RequestError(
                "ip_adapter_image_embeds must be a list of tensors, one for each IP-Adapter, got "
                f"{type(embeds).__name__}"
            )

    def check_count(self, name: str, texts: str | list[str] | None) -> None:
        """Refuse a list of texts that is not one per prompt."""
        if isinstance(texts, (list, tuple)) and len(texts) != self.prompts:
            raise RequestError(
                f"{name} holds {len(texts)} texts, but there are {self.prompts} "
                "prompts; give one, or one per prompt"
            )

    def check_numbers(self) -> None:
        """Refuse numbers out of their ranges."""
        for name in ("num_inference_steps", "num_images_per_prompt", "height", "width"):
            value = getattr(self, name)
            if value is None and name in ("height", "width"):
                continue
            if not isinstance(value, Integral) or value < 1:
                raise RequestError(f"{name} must be a positive integer, got {value!r}")
        scale = self.guidance_scale
        if not is_number(scale):
            raise RequestError(f"guidance_scale must be a finite number, got {scale!r}")
        strength = self.strength
        if strength is not None and not (is_number(strength) and 0 < strength <= 1):
            raise RequestError(f"strength must be in (0, 1], got {strength!r}")
        for name in ("guidance_rescale", "eta"):
            value = getattr(self, name)
            if not is_number(value) or not 0 <= value <= 1:
                raise RequestError(f"{name} must be in [0, 1], got {value!r}")
        for name in ("denoising_start", "denoising_end"):
            value = getattr(self, name)
            if value is not None and not (is_number(value) and 0 < value < 1):
                raise RequestError(f"{name} must be in (0, 1), got {value!r}")
        if not is_number(self.mask_blur) or self.mask_blur < 0:
            raise RequestError(f"mask_blur must be at least 0 pixels, got {self.mask_blur!r}")

    def check_generators(self) -> None:
        """Refuse anything but one generator, or one per picture."""
        generator = self.generator
        if generator is None or isinstance(generator, torch.Generator):
            return
        if not isinstance(generator, (list, tuple)) or not all(
            isinstance(g, torch.Generator) for g in generator
        ):
            raise RequestError(
                "generator must be a torch.Generator or a list of them, "
                f"got {generator!r}; use torch.Generator().manual_seed(seed)"
            )
        if len(generator) != self.batch:
            raise RequestError(
                f"generator holds {len(generator)} generators, but {self.batch} pictures are asked "
                "for; give one, or one per picture"
            )

    def check_callback(self) -> None:
        """Refuse a callback that cannot be called, or that asks for what it cannot see."""
        if self.callback_on_step_end is not None and not callable(self.callback_on_step_end):
            raise RequestError(
                "callback_on_step_end must be a function of (pipe, index, timestep, tensors), "
                f"got {self.callback_on_step_end!r}"
            )
        for name in self.callback_inputs:
            if name not in CALLBACK_TENSORS:
                raise RequestError(
                    f"callback_on_step_end_tensor_inputs must be among {CALLBACK_TENSORS}, "
                    f"got {name!r}"
                )

    @property
    def prompts(self) -> int:
        """The number of prompts."""
        if self.prompt_embeds is not None:
            return len(self.prompt_embeds)
        return 1 if isinstance(self.prompt, str) else len(self.prompt or ())

    @property
    def batch(self) -> int:
        """The number of pictures."""
        return self.prompts * self.num_images_per_prompt

    @property
    def callback_inputs(self) -> Sequence[str]:
        """The tensors that the callback sees; diffusers' callback objects bring their own list."""
        own = getattr(self.callback_on_step_end, "tensor_inputs", None)
        return self.callback_on_step_end_tensor_inputs if own is None else own

    def warn_of_no_effect(self, *, embedded: bool) -> None:
        """Warn of a negative prompt that is not read; `embedded`: guidance is a network input."""
        names = ("negative_prompt", "negative_prompt_2", "negative_prompt_embeds")
        given = [name for name in names if getattr(self, name) is not None]
        if not given or (self.guidance_scale > 1 and not embedded):
            return
        why = (
            "guidance is an input of this network, which was distilled without one"
            if embedded
            else f"guidance_scale={self.guidance_scale} turns guidance off; use more than 1"
        )
        warn_caller(f"{given[0]} has no effect: {why}")


def is_number(value: Any) -> bool:
    """Whether `value` is a real number, numpy's included, and neither infinite nor NaN."""
    return isinstance(value, Real) and math.isfinite(value)
