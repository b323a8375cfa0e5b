"""What makes pictures quicker or smaller at the price of an error: off unless asked, and named.

    bfloat16, float16   the networks in 16 bits
    int8, int8-weights, fp8   the UNet's layers in 8 bits (engine/quantize.py)
    tiny-vae            decoding by a tiny autoencoder (TAESD)

Which of them a pipeline has is read off its networks, and written into every picture's record.
"""

from __future__ import annotations

import sys
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch

from ..engine.machines import bfloat16_refusal
from ..engine.machines import refusal as quantization_refusal
from ..engine.quantize import KINDS, quantization_of, quantize
from ..errors import RequestError
from ..models.vae_tiny import AutoencoderTiny
from .previews import check_vae

TINY_VAE = "tiny-vae"
FOLDER = "vae_tiny"  # beside a model's other networks
WIDE = 256  # channels of a UNet's first level; narrower ones wait for calls, not for products


@dataclass(frozen=True)
class Choice:
    """An approximation, whether it is on, and why."""

    name: str
    is_on: bool
    why: str

    def __str__(self) -> str:
        return f"{self.name}: {'on' if self.is_on else 'left out'}, {self.why}"


class Approximations:
    """What pipelines have to turn approximations on and to say which are on."""

    unet: Any
    vae: Any
    name_or_path: str

    @property
    def approximations(self) -> list[str]:
        """The names of what the next picture is approximated by; empty: nothing."""
        return approximations_of(self)

    def quantize(self, kind: str) -> None:
        """Keep the UNet's weights in 8 bits: "int8", "int8-weights" or "fp8".

        int8 is the quick one, on CPUs with AVX-512 VNNI; int8-weights only saves memory, anywhere;
        fp8 is for linear layers on GPUs from Ada and Hopper on. The original weights are let go:
        load LoRAs, move and save before. Raises RequestError, and changes nothing, where it cannot
        be done.
        """
        quantize(self.unet, kind)

    def enable_fast(self, vae: AutoencoderTiny | None = None) -> list[Choice]:
        """Turn on every approximation that gains on this machine with this model.

        Prints which those are, and which are left out and why, and returns the same. `vae` decodes
        in place of the model's own; without it that in the folder `vae_tiny` of the model does.
        """
        if vae is not None:
            check_tiny(vae, self.unet)
        choices = [self.choose_dtype(), self.choose_quantization(), self.choose_vae(vae)]
        if not any(choice.is_on for choice in choices):
            print("fast: without effect on this machine with this model", file=sys.stderr)
        for choice in choices:
            print(f"fast: {choice}", file=sys.stderr)
        return choices

    # ── one at a time ──

    def choose_dtype(self) -> Choice:
        """16 bits where they are quicker."""
        name = "bfloat16"
        if self.unet.dtype != torch.float32:
            return Choice(str(self.unet.dtype).removeprefix("torch."), True, "as it was loaded")
        if quantization_of(self.unet) == "fp8":
            return Choice(name, False, "the UNet is fp8")
        if (why := too_narrow(self.unet) or bfloat16_refusal(self.unet.device)) is not None:
            return Choice(name, False, why)
        to: Any = self  # a pipeline
        to.to(torch.bfloat16)
        return Choice(name, True, "its products take half of float32's time here")

    def choose_quantization(self) -> Choice:
        """int8 where it is quicker."""
        now = quantization_of(self.unet)
        if now is not None:
            return Choice(now, True, "as it was asked for")
        if self.unet.device.type == "cuda":
            return Choice("fp8", False, 'not measured to gain; quantize("fp8") asks for it')
        why = too_narrow(self.unet) or quantization_refusal(
            "int8", self.unet.dtype, self.unet.device
        )
        if why is not None:
            return Choice("int8", False, why)
        self.quantize("int8")
        return Choice("int8", True, "its products take half of bfloat16's time here")

    def choose_vae(self, vae: AutoencoderTiny | None) -> Choice:
        """A tiny autoencoder where there is one."""
        if vae is None and isinstance(self.vae, AutoencoderTiny):
            return Choice(TINY_VAE, True, "as it was loaded")
        folder = tiny_beside(self.name_or_path)
        if vae is None and folder is None:
            return Choice(
                TINY_VAE,
                False,
                f"none was given and there is no folder {FOLDER} in the model's; "
                "madebyollin/taesd suits Stable Diffusion 1 and 2, madebyollin/taesdxl SDXL",
            )
        why = "as it was given" if vae is not None else f"from {folder}"
        if vae is None:
            vae = AutoencoderTiny.from_pretrained(str(folder))
            check_tiny(vae, self.unet)
        self.vae = vae.to(device=self.vae.device, dtype=self.vae.dtype)
        return Choice(TINY_VAE, True, why)


def approximations_of(pipe: Any) -> list[str]:
    """The names of what a pipeline's pictures are approximated by."""
    dtype = str(pipe.unet.dtype).removeprefix("torch.")
    names = [
        dtype if dtype in ("bfloat16", "float16") else None,
        quantization_of(pipe.unet),
        TINY_VAE if isinstance(pipe.vae, AutoencoderTiny) else None,
    ]
    return [name for name in names if name is not None]


def check_tiny(vae: Any, unet: Any) -> None:
    """Raises RequestError unless `vae` is a tiny autoencoder of the UNet's latents."""
    if not isinstance(vae, AutoencoderTiny):
        raise RequestError(
            "vae must be a fewstep AutoencoderTiny, "
            f"got {type(vae).__module__}.{type(vae).__name__}"
        )
    check_vae(vae, unet)


def tiny_beside(model: str) -> Path | None:
    """The folder of a tiny autoencoder in that of a model, if there is one."""
    folder = Path(model) / FOLDER if model else None
    return folder if folder is not None and (folder / "config.json").is_file() else None


def too_narrow(unet: Any) -> str | None:
    """Why fewer bits gain nothing with a UNet, None if they may."""
    first = unet.config.block_out_channels[0]
    if first >= WIDE:
        return None
    return f"this model is too small to gain by it ({first} channels, from {WIDE} on it does)"


def quantization_in(names: Sequence[str]) -> str | None:
    """The kind of quantisation among the names of approximations."""
    return next((name for name in names if name in KINDS), None)
