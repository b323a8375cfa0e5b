"""Stable Diffusion XL and SSD-1B: two text encoders, pooled text, and sizes as conditions.

Shapes: P prompts, B pictures, L tokens, D channels of both encoders together.
"""

from __future__ import annotations

from typing import Any, NamedTuple

import torch
from torch import Tensor

from ..errors import RequestError
from ..models.unet import UNet2DConditionModel
from ..models.vae import Autoencoder
from ..schedulers import Scheduler
from .denoise import Conditioning
from .families import StableDiffusion
from .notices import warn_caller
from .prompts import Encoder, embedded, listed
from .request import Request
from .text import hidden_text
from .textual_inversion import expanded


class Text(NamedTuple):
    """Embedded texts: every token's (P, L, D), and each text's as a whole (P, Q)."""

    tokens: Tensor
    pooled: Tensor

    def repeated(self, count: int) -> Text:
        """Each row `count` times in a row."""
        return Text(*(x.repeat_interleave(count, 0) for x in self))


class StableDiffusionXL(StableDiffusion):
    """SDXL and SSD-1B, and LCMs made from them.

    `force_zeros_for_empty_prompt`: no negative prompt means zeros, not an embedded "".
    `requires_aesthetics_score`: the refiner, which is told a score in place of the target size.
    """

    flags_pictures = False

    def __init__(
        self,
        vae: Autoencoder,
        text_encoder: Any,
        text_encoder_2: Any,
        tokenizer: Any,
        tokenizer_2: Any,
        unet: UNet2DConditionModel,
        scheduler: Scheduler,
        image_encoder: Any = None,
        feature_extractor: Any = None,
        force_zeros_for_empty_prompt: bool = True,
        add_watermarker: bool | None = None,
        requires_aesthetics_score: bool = False,
    ) -> None:
        if add_watermarker:
            raise RequestError(
                "add_watermarker=True is not supported: pictures carry their record as metadata, "
                "and no invisible mark; leave it out"
            )
        super().__init__(
            vae,
            text_encoder,
            tokenizer,
            unet,
            scheduler,
            feature_extractor=feature_extractor,
            image_encoder=image_encoder,
        )
        self.register_modules(text_encoder_2=text_encoder_2, tokenizer_2=tokenizer_2)
        self._names = tuple(name for name in self._names if name != "safety_checker")
        self.force_zeros_for_empty_prompt = force_zeros_for_empty_prompt
        self.requires_aesthetics_score = requires_aesthetics_score

    text_encoder_2: Any
    tokenizer_2: Any

    @property
    def options(self) -> dict[str, Any]:
        options = {"force_zeros_for_empty_prompt": self.force_zeros_for_empty_prompt}
        if self.requires_aesthetics_score:
            options["requires_aesthetics_score"] = True
        return options

    # ── text ──

    def encode_prompt(  # type: ignore[override]
        self,
        prompt: str | list[str] | None,
        prompt_2: str | list[str] | None = None,
        device: torch.device | str | None = None,
        num_images_per_prompt: int = 1,
        do_classifier_free_guidance: bool = True,
        negative_prompt: str | list[str] | None = None,
        negative_prompt_2: str | list[str] | None = None,
        prompt_embeds: Tensor | None = None,
        negative_prompt_embeds: Tensor | None = None,
        pooled_prompt_embeds: Tensor | None = None,
        negative_pooled_prompt_embeds: Tensor | None = None,
        clip_skip: int | None = None,
    ) -> tuple[Tensor, Tensor | None, Tensor, Tensor | None]:
        """(embeddings (B, L, D), the negative ones, pooled embeddings (B, Q), the negative ones).

        B is prompts x `num_images_per_prompt`. Without guidance the negative ones are None. The
        second text encoder reads `prompt_2`, or `prompt` if there is none.
        """
        positive = given_text("prompt", prompt_embeds, pooled_prompt_embeds)
        if positive is None:
            positive = self.texts(prompt, prompt_2, "prompt", clip_skip)
        negative = None
        if do_classifier_free_guidance:
            negative = given_text(
                "negative_prompt", negative_prompt_embeds, negative_pooled_prompt_embeds
            )
            if negative is None:
                negative = self.negative_text(negative_prompt, negative_prompt_2, positive)
            if any(a.shape != b.shape for a, b in zip(negative, positive, strict=True)):
                raise RequestError(
                    "negative_prompt_embeds and negative_pooled_prompt_embeds must have the shapes "
                    f"of the prompt's, {[tuple(x.shape) for x in positive]}, "
                    f"got {[tuple(x.shape) for x in negative]}"
                )
        device = device or self.unet.device
        found: list[Tensor | None] = []
        for text in (positive, negative):
            rows = None if text is None else text.repeated(num_images_per_prompt)
            found += [None, None] if rows is None else [x.to(device, self.text_dtype) for x in rows]
        tokens, pooled, negative_tokens, negative_pooled = found
        assert tokens is not None and pooled is not None
        return tokens, negative_tokens, pooled, negative_pooled

    @property
    def text_dtype(self) -> torch.dtype:
        """The dtype of embeddings, which the latents take too."""
        encoder = self.text_encoder_2
        return self.unet.dtype if encoder is None else encoder.dtype

    def texts(
        self,
        prompt: str | list[str] | None,
        prompt_2: str | list[str] | None,
        name: str,
        clip_skip: int | None = None,
    ) -> Text:
        """What both encoders read; a checkpoint may be without the first (the refiner)."""
        self.check_text_encoder(name)
        parts = []
        pooled: Tensor | None = None
        for encoder, texts in zip(self.encoders, self.read_by_each(prompt, prompt_2), strict=True):
            spelled = [expanded(encoder.tokenizer, text) for text in texts]
            tokens, pooled = hidden_text(
                encoder.tokenizer, encoder.text_encoder, spelled, clip_skip
            )
            parts.append(tokens)
        assert pooled is not None
        return Text(torch.cat([part.to(parts[-1]) for part in parts], dim=-1), pooled)

    def check_text_encoder(self, name: str) -> None:
        if self.text_encoder_2 is None or self.tokenizer_2 is None:
            raise RequestError(
                f"{name} cannot be read: this pipeline has no text_encoder_2 or no tokenizer_2; "
                f"give {name}_embeds and pooled_{name}_embeds"
            )

    @property
    def encoders(self) -> list[Encoder]:
        """The text encoders that there are, the one of the pooled texts last."""
        both = (
            Encoder(self.tokenizer, self.text_encoder, hidden_text),
            Encoder(self.tokenizer_2, self.text_encoder_2, hidden_text),
        )
        return [encoder for encoder in both if encoder.text_encoder is not None]

    def read_by_each(
        self, prompt: str | list[str] | None, prompt_2: str | list[str] | None
    ) -> list[list[str]]:
        """The texts for each of the text encoders."""
        first = listed(prompt)
        second = listed(prompt if prompt_2 is None else prompt_2)
        if len(second) == 1 < len(first):
            second *= len(first)
        return [first, second][-len(self.encoders) :]

    def weighed(self, request: Request) -> Request:
        if not request.weighted_prompt:
            return request
        self.check_text_encoder("prompt")
        negative, negative_2 = request.negative_prompt, request.negative_prompt_2
        is_zero = negative is None and negative_2 is None and self.force_zeros_for_empty_prompt
        negatives = None
        if self.doubles(request) and not is_zero:
            negatives = self.read_by_each(negative or "", negative_2)
        positives = self.read_by_each(request.prompt, request.prompt_2)
        return embedded(request, self.encoders, positives, negatives)

    def negative_text(
        self,
        negative: str | list[str] | None,
        negative_2: str | list[str] | None,
        positive: Text,
    ) -> Text:
        """The negative prompts' embeddings, one per prompt."""
        if negative is None and negative_2 is None and self.force_zeros_for_empty_prompt:
            return Text(*(torch.zeros_like(x) for x in positive))
        text = self.texts(negative or "", negative_2, "negative_prompt")
        count = len(positive.tokens)
        return text.repeated(count) if len(text.tokens) == 1 else text

    # ── the job's conditions ──

    def condition(
        self, request: Request, size: tuple[int, int]
    ) -> tuple[Conditioning, Conditioning | None, torch.dtype]:
        tokens, negative_tokens, pooled, negative_pooled = self.encode_prompt(
            request.prompt,
            request.prompt_2,
            self.unet.device,
            request.num_images_per_prompt,
            self.doubles(request),
            request.negative_prompt,
            request.negative_prompt_2,
            request.prompt_embeds,
            request.negative_prompt_embeds,
            request.pooled_prompt_embeds,
            request.negative_pooled_prompt_embeds,
            request.clip_skip,
        )
        dtype = self.unet.dtype
        ids, negative_ids = (
            torch.tensor([row], dtype=dtype, device=tokens.device).expand(request.batch, -1)
            for row in self.size_ids(request, size)
        )
        self.check_ids(ids, pooled)
        cond = Conditioning(tokens.to(dtype), pooled.to(dtype), ids, w=self.guidance_input(request))
        if negative_tokens is None or negative_pooled is None:
            return cond, None, tokens.dtype
        uncond = Conditioning(negative_tokens.to(dtype), negative_pooled.to(dtype), negative_ids)
        return cond, uncond, tokens.dtype

    def size_ids(self, request: Request, size: tuple[int, int]) -> tuple[list[float], list[float]]:
        """The six numbers (five of a refiner) that say how large and how cropped, and the negative.

        As in diffusers, text to picture takes negative sizes only if both are given.
        """
        original: list[float] = list(request.original_size or size)
        target: list[float] = list(request.target_size or size)
        crop, negative_crop = (
            list(request.crops_coords_top_left),
            list(request.negative_crops_coords_top_left),
        )
        negative_original, negative_target = (
            request.negative_original_size,
            request.negative_target_size,
        )
        starts_from_picture = request.strength is not None
        scores = (request.aesthetic_score, request.negative_aesthetic_score)
        if scores != (6.0, 2.5) and not self.requires_aesthetics_score:
            warn_caller("aesthetic_score has no effect: only an SDXL refiner is told a score")
        if self.requires_aesthetics_score:
            return (
                [*original, *crop, request.aesthetic_score],
                [
                    *(negative_original or original),
                    *negative_crop,
                    request.negative_aesthetic_score,
                ],
            )
        positive: list[float] = [*original, *crop, *target]
        if starts_from_picture:
            # diffusers forgets the negative crop here and takes the crop; so do we if none is given
            cropped = negative_crop if any(negative_crop) else crop
            return positive, [
                *(negative_original or original),
                *cropped,
                *(negative_target or target),
            ]
        if negative_original and negative_target:
            return positive, [*negative_original, *negative_crop, *negative_target]
        if negative_original or negative_target or any(negative_crop):
            raise RequestError(
                "negative_original_size, negative_target_size and negative_crops_coords_top_left "
                "work together; give both sizes"
            )
        return positive, positive

    def check_ids(self, ids: Tensor, pooled: Tensor) -> None:
        """Raises RequestError unless the UNet takes that many numbers and pooled channels."""
        config = self.unet.config
        wanted, per_number = (
            config.projection_class_embeddings_input_dim,
            config.addition_time_embed_dim,
        )
        if config.addition_embed_type != "text_time" or wanted is None or per_number is None:
            raise RequestError(
                "unet is not SDXL's: its config has no addition_embed_type='text_time'"
            )
        given = ids.shape[1] * per_number + pooled.shape[1]
        if given != wanted:
            raise RequestError(
                f"unet takes {wanted} channels of sizes and pooled text, but {given} were made; "
                f"requires_aesthetics_score={self.requires_aesthetics_score} or text_encoder_2 "
                "does not belong to it"
            )


def given_text(name: str, tokens: Tensor | None, pooled: Tensor | None) -> Text | None:
    """Embeddings that came as arguments, or None. Raises RequestError if one half is missing."""
    if tokens is None and pooled is None:
        return None
    if tokens is None or pooled is None:
        pooled_name = name.replace("prompt", "pooled_prompt_embeds")
        raise RequestError(
            f"{name}_embeds and {pooled_name} belong together; give both (encode_prompt returns "
            "them)"
        )
    return Text(tokens, pooled)
