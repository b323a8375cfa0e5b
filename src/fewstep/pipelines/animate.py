"""AnimateDiff: videos by Stable Diffusion with motion modules in its UNet.

Shapes: B videos, F frames, C latent channels, h and w latent height and width, L text tokens, D
text channels.
"""

from __future__ import annotations

import bisect
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, replace
from numbers import Integral
from typing import Any

import numpy as np
import PIL.Image
import torch
from torch import Tensor

from ..errors import RequestError
from ..models.motion import MotionAdapter
from ..models.motion_unet import UNetMotionModel
from ..models.unet import UNet2DConditionModel
from ..models.vae import Autoencoder
from ..outputs import Output
from ..schedulers import Plan, Scheduler
from .denoise import Conditioning, Job
from .families import Assignment, StableDiffusion
from .request import Request
from .text import check_prompt
from .windows import Windows

Frames = list[list[PIL.Image.Image]] | np.ndarray | Tensor


@dataclass
class AnimateDiffPipelineOutput(Output):
    """What AnimateDiff returns.

    `frames`: a list of PIL pictures per video, array (B, F, H, W, 3), tensor (B, F, 3, H, W) or
    latents (B, C, F, h, w), as `output_type` asked.
    """

    frames: Frames


@dataclass(frozen=True, eq=False)
class VideoRequest(Request):
    """One call of AnimateDiff. `num_images_per_prompt` counts videos."""

    num_frames: int = 16
    decode_chunk_size: int = 16
    context_length: int | None = None
    context_overlap: int = 4
    travel: Mapping[int, str] | None = None  # key frame -> text; `prompt` is then any one of them

    @classmethod
    def asked(cls, **arguments: Any) -> VideoRequest:
        """The request of a call, whose arguments have AnimateDiff's names."""
        videos, prompt = arguments.pop("num_videos_per_prompt"), arguments.pop("prompt")
        check_whole("num_videos_per_prompt", videos, 1)
        one, travel = split(prompt)
        return cls(prompt=one, travel=travel, num_images_per_prompt=videos, **arguments)

    def check_numbers(self) -> None:
        super().check_numbers()
        check_whole("num_frames", self.num_frames, 1)
        check_whole("decode_chunk_size", self.decode_chunk_size, 1)
        if self.context_length is not None:
            check_whole("context_length", self.context_length, 1)
        check_whole("context_overlap", self.context_overlap, 0)
        for frame, text in (self.travel or {}).items():
            check_whole("a frame of prompt", frame, 0)
            check_prompt(f"prompt[{frame}]", text)
            if frame >= self.num_frames:
                raise RequestError(
                    f"prompt names frame {frame}, but with num_frames={self.num_frames} the last "
                    f"is {self.num_frames - 1}"
                )


def check_whole(name: str, value: Any, least: int) -> None:
    """Raises RequestError unless `value` is an integer of at least `least`."""
    if not isinstance(value, Integral) or value < least:
        raise RequestError(f"{name} must be an integer from {least} up, got {value!r}")


def split(
    prompt: str | list[str] | Mapping[int, str] | None,
) -> tuple[str | list[str] | None, Mapping[int, str] | None]:
    """(any one text, the texts by frame) of texts by frame, or (`prompt`, None)."""
    if isinstance(prompt, Mapping):
        return next(iter(prompt.values()), None), prompt
    return prompt, None


def travelled(keys: Sequence[int], texts: Tensor, frames: int) -> Tensor:
    """A text per frame (F, L, D), from those (K, L, D) of the ascending key frames `keys`.

    Linear between two key frames; before the first and behind the last it stays.
    """
    found = []
    for frame in range(frames):
        after = bisect.bisect_left(keys, frame)
        before = max(after - 1, 0)
        after = min(after, len(keys) - 1)
        part = (frame - keys[before]) / max(keys[after] - keys[before], 1) if after > before else 0
        found.append(torch.lerp(texts[before], texts[after], part))
    return torch.stack(found)


class AnimateDiff(StableDiffusion):
    """Stable Diffusion 1.x and 2.x, and LCMs made from them, with motion modules.

    A plain `unet` gets those of `motion_adapter`.
    """

    leaves_out = ("safety_checker",)

    unet: UNetMotionModel
    motion_adapter: MotionAdapter | None

    def __init__(
        self,
        vae: Autoencoder,
        text_encoder: Any,
        tokenizer: Any,
        unet: UNet2DConditionModel,
        motion_adapter: MotionAdapter | None,
        scheduler: Scheduler,
        feature_extractor: Any = None,
        image_encoder: None = None,
        safety_checker: None = None,
        requires_safety_checker: bool = True,
    ) -> None:
        if motion_adapter is not None and not isinstance(motion_adapter, MotionAdapter):
            raise RequestError(
                f"motion_adapter must be a fewstep MotionAdapter, got "
                f"{type(motion_adapter).__module__}.{type(motion_adapter).__name__}"
            )
        if isinstance(unet, UNet2DConditionModel) and not isinstance(unet, UNetMotionModel):
            if motion_adapter is None:
                raise RequestError(
                    "motion_adapter is missing: this UNet has no motion modules; load one with "
                    'MotionAdapter.from_pretrained("guoyww/animatediff-motion-adapter-v1-5-2")'
                )
            unet = UNetMotionModel.from_unet2d(unet, motion_adapter)
        super().__init__(
            vae=vae,
            text_encoder=text_encoder,
            tokenizer=tokenizer,
            unet=unet,
            scheduler=scheduler,
            safety_checker=safety_checker,
            feature_extractor=feature_extractor,
            image_encoder=image_encoder,
            requires_safety_checker=requires_safety_checker,
        )
        self.register_modules(motion_adapter=motion_adapter)
        # Only taken so that checkpoints of Stable Diffusion load; videos are not checked.
        self._names = tuple(name for name in self._names if name != "safety_checker")

    @property
    def options(self) -> dict[str, Any]:
        return {}

    def condition(
        self, request: Request, size: tuple[int, int]
    ) -> tuple[Conditioning, Conditioning | None, torch.dtype]:
        cond, uncond, dtype = super().condition(request, size)
        assert isinstance(request, VideoRequest)
        if request.travel is None:
            return cond, uncond, dtype
        frames, keys = request.num_frames, sorted(request.travel)
        texts = [request.travel[key] for key in keys]
        embedded = self.embed(texts, "prompt", clip_skip=request.clip_skip)
        path = travelled(keys, embedded.to(cond.text.device), frames).to(cond.text.dtype)
        cond = replace(cond, text=path.expand(request.batch, -1, -1, -1))
        if uncond is not None:
            uncond = replace(uncond, text=uncond.text[:, None].expand(-1, frames, -1, -1))
        return cond, uncond, dtype

    def prepare(self, request: Request, plan: Plan) -> Job:
        """The job of a request; its latents are (B, C, F, h, w)."""
        assert isinstance(request, VideoRequest)
        height, width = (side // self.vae_scale_factor for side in self.size(request))
        shape = (
            request.batch,
            self.vae.config.latent_channels,
            request.num_frames,
            height,
            width,
        )
        latents = request.latents
        if latents is not None and tuple(latents.shape) != shape:
            raise RequestError(
                f"latents must have shape {shape} (videos, channels, frames, height, width), "
                f"got {tuple(latents.shape)}"
            )
        job = super().prepare(replace(request, latents=None), plan)
        if latents is not None:
            latents = latents.to(self.unet.device, job.dtype) * job.start_scale
        return replace(job, shape=shape, z=latents)

    def network(self, request: VideoRequest) -> Windows:
        """The UNet for the frames that a request asks for."""
        known = self.unet.config.motion_max_seq_length
        length = known if request.context_length is None else request.context_length
        if length > known:
            raise RequestError(
                f"context_length={length} is more than the {known} frames that the motion modules "
                "know; leave it out"
            )
        if request.num_frames > length and request.context_overlap >= length:
            raise RequestError(
                f"context_overlap={request.context_overlap} must be less than context_length, "
                f"{length}"
            )
        return Windows(self.unet, length, request.context_overlap)

    @torch.no_grad()
    def animate(self, request: Request) -> AnimateDiffPipelineOutput | tuple[Frames]:
        """The answer to a request: text to tensors, the loop, latents to frames."""
        assert isinstance(request, VideoRequest)
        network, plan = self.network(request), self.plan(request)
        with self.lora_scaled(request.cross_attention_kwargs):
            z, _ = self.sample(Assignment(request, plan, Job.from_noise), network)
            frames = self.decode_video(z, request.output_type, request.decode_chunk_size)
        return AnimateDiffPipelineOutput(frames) if request.return_dict else (frames,)

    def decode_video(self, z: Tensor, output_type: str, chunk: int) -> Frames:
        """Frames of latents (B, C, F, h, w), as `output_type` asks, decoded `chunk` at a time."""
        if output_type == "latent":
            return z
        videos, frames = z.shape[0], z.shape[2]
        rows = z.transpose(1, 2).flatten(0, 1).split(chunk)
        parts: list[Any] = [self.decode(part, output_type) for part in rows]
        if output_type == "pt":
            return torch.cat(parts).float().unflatten(0, (videos, frames))
        if output_type == "np":
            pictures = np.concatenate(parts)
            return pictures.reshape(videos, frames, *pictures.shape[1:])
        flat = [picture for part in parts for picture in part]
        return [flat[i * frames : (i + 1) * frames] for i in range(videos)]


def text_to_video(pipe: AnimateDiff, request: VideoRequest) -> Any:
    """Videos of a text, or of texts that follow each other: `prompt={0: "dawn", 8: "night"}`.

    Such texts turn into each other between their frames. "np" gives (B, F, H, W, 3), "pt" and
    `latents` are (B, F, 3, H, W) and (B, C, F, h, w).
    """
    return pipe.animate(request)
