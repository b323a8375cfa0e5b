"""The picture of every step: what the model predicts, on the way, that the end will be."""

from __future__ import annotations

import copy
from collections.abc import Callable
from typing import Any

import PIL.Image
from torch import Tensor

from ..errors import RequestError
from ..models.vae import Autoencoder
from .safety import checked

CHUNK = 16  # frames decoded at a time

OnPictures = Callable[[int, list[PIL.Image.Image]], Any]


class PreviewCallback:
    """Hands the pictures of every step to a function, as a pipeline's `callback_on_step_end`.

    `on_pictures(index, pictures)` gets the decoded prediction of z_0 after step `index`, counted
    from 0: a list of PIL pictures, one for each of the batch. Of a video it is the first frame, or
    with `every_frame` all of them, video after video. What the pipeline returns does not change.

    `vae` decodes in place of the pipeline's own: an `AutoencoderTiny` (TAESD) takes a fraction of
    its time. The part that inpainting keeps is shown as predicted, since it is put back later.
    """

    tensor_inputs = ("denoised",)  # what pipelines hand to this callback

    def __init__(
        self, on_pictures: OnPictures, *, vae: Autoencoder | None = None, every_frame: bool = False
    ) -> None:
        if not callable(on_pictures):
            raise RequestError(
                f"on_pictures must be a function of (index, pictures), got {on_pictures!r}"
            )
        if vae is not None and not isinstance(vae, Autoencoder):
            raise RequestError(
                "vae must be a fewstep AutoencoderTiny or AutoencoderKL, "
                f"got {type(vae).__module__}.{type(vae).__name__}"
            )
        self.on_pictures = on_pictures
        self.vae = vae
        self.every_frame = every_frame

    def __call__(self, pipe: Any, index: int, t: Tensor, tensors: dict[str, Any]) -> dict[str, Any]:
        self.on_pictures(index, self.pictures(pipe, tensors["denoised"]))
        return {}

    def pictures(self, pipe: Any, z0: Tensor) -> list[PIL.Image.Image]:
        """The pictures of latents (B, C, h, w), or of a video's (B, C, F, h, w); flagged: black."""
        return checked(pipe, self.decoded(pipe, z0))[0]

    def decoded(self, pipe: Any, z0: Tensor) -> list[PIL.Image.Image]:
        """The same, as no safety checker has seen them."""
        if self.vae is not None:
            check_vae(self.vae, pipe.unet)
            pipe = copy.copy(pipe)  # the same pipeline with another autoencoder
            pipe.vae = self.vae
        if z0.ndim == 5:
            z0 = z0 if self.every_frame else z0[:, :, :1]
            z0 = z0.transpose(1, 2).flatten(0, 1)
        return [picture for part in z0.split(CHUNK) for picture in pipe.decode(part)]


def check_vae(vae: Any, unet: Any) -> None:
    """Raises RequestError unless an autoencoder's latents have the channels of the UNet's."""
    given, wanted = vae.config.latent_channels, unet.config.out_channels
    if given != wanted:
        raise RequestError(
            f"vae has latent_channels={given}, and this model's latents have {wanted}; give an "
            "autoencoder that was made for this model"
        )
