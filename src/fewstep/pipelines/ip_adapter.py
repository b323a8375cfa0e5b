"""IP-Adapters of a pipeline: files in, scales, and pictures as further prompts of a request.

Shapes: b rows (twice as many with guidance, the negative half first), n pictures per row, S and E
tokens and channels of the vision encoder, B pictures to draw.
"""

from __future__ import annotations

import os
from collections.abc import Mapping, Sequence
from dataclasses import replace
from typing import Any

import numpy as np
import PIL.Image
import torch
from torch import Tensor

from ..checkpoints.locate import HOW_TO_CONVERT, PICKLED, Source
from ..checkpoints.weights import read_tensors
from ..errors import CheckpointError, RequestError
from ..models.ip_adapter import IPAdapter, adapter_of, attach, set_scales
from ..models.motion_unet import UNetMotionModel
from ..models.unet import UNet2DConditionModel
from .denoise import Conditioning
from .loading import Part, image_processor, load_part
from .request import Request


class IPAdapterLoader:
    """The IP-Adapter methods of a pipeline. The adapters live with the UNet, which may be shared.

    A call without `ip_adapter_image` and `ip_adapter_image_embeds` draws by the text alone.
    """

    unet: UNet2DConditionModel
    image_encoder: Any
    feature_extractor: Any

    def load_ip_adapter(
        self,
        pretrained_model_name_or_path_or_dict: Any,
        subfolder: str | Sequence[str] | None = None,
        weight_name: str | Sequence[str] | None = None,
        image_encoder_folder: str | None = "image_encoder",
        *,
        revision: str | None = None,
        cache_dir: str | os.PathLike[str] | None = None,
        force_download: bool = False,
        local_files_only: bool | None = None,
        token: str | bool | None = None,
    ) -> None:
        """Load IP-Adapters in place of those loaded before: base, Plus, Plus Face, Full Face.

        From `weight_name`, safetensors, in a `subfolder` of a local folder or hub repository, or
        from a dict of tensors; lists load several. If the pipeline has no image encoder it is taken
        from `image_encoder_folder`, in the subfolder unless it is a path itself; None leaves it
        out, and calls then need `ip_adapter_image_embeds`.

        Raises CheckpointError for files that are missing, pickled or made for another UNet; the
        pipeline then stays as it was.
        """
        if isinstance(self.unet, UNetMotionModel):
            raise RequestError(
                f"load_ip_adapter is not supported by {type(self).__name__}: IP-Adapters are not "
                "implemented for videos"
            )
        given = matched(
            pretrained_model_name_or_path_or_dict=pretrained_model_name_or_path_or_dict,
            subfolder=subfolder,
            weight_name=weight_name,
        )
        place: dict[str, Any] = {
            "revision": revision,
            "cache_dir": cache_dir,
            "force_download": force_download,
            "local_files_only": local_files_only,
            "token": token,
        }
        adapters = [read_adapter(*one, self.unet, place) for one in given]
        found = [(os.fspath(path), folder) for path, folder, _ in given if not is_dict(path)]
        if self.image_encoder is None and image_encoder_folder is not None and found:
            folder = encoder_folder(found[0][1], image_encoder_folder)
            self.image_encoder = load_encoder(Source(found[0][0], folder, **place), self.unet)
        if self.feature_extractor is None and self.image_encoder is not None:
            self.feature_extractor = extractor(self.image_encoder)
        attach(self.unet, adapters)

    def set_ip_adapter_scale(self, scale: Any) -> None:
        """Set how strongly pictures steer: 0 not at all, 1 as trained; a list has one per adapter.

        A dict says it by block, and means 0 where it says nothing:
        `{"down": 0.5, "up": {"block_0": [0.0, 1.0, 0.0]}}`.
        """
        count = len(self.loaded_ip_adapters)
        if not count:
            raise RequestError(f"set_ip_adapter_scale({scale!r}): call load_ip_adapter first")
        scales = list(scale) if isinstance(scale, (list, tuple)) else [scale] * count
        if len(scales) != count:
            raise RequestError(
                f"scale holds {len(scales)} scales, but there are {count} IP-Adapters; give one, "
                "or one for each"
            )
        set_scales(self.unet, scales)

    def unload_ip_adapter(self) -> None:
        """Take all IP-Adapters off the UNet, and the image encoder out of the pipeline."""
        attach(self.unet, [])
        self.image_encoder = None
        self.feature_extractor = None

    @property
    def loaded_ip_adapters(self) -> tuple[IPAdapter, ...]:
        """The IP-Adapters of the UNet."""
        adapters: Any = self.unet.ip_adapters
        return tuple(adapters)

    # ── pictures to tokens ──

    @torch.no_grad()
    def prepare_ip_adapter_image_embeds(
        self,
        ip_adapter_image: Any,
        ip_adapter_image_embeds: Sequence[Tensor] | None = None,
        device: torch.device | str | None = None,
        num_images_per_prompt: int = 1,
        do_classifier_free_guidance: bool = True,
    ) -> list[Tensor]:
        """What the image encoder sees, (b, n, E) or (b, n, S, E) for each adapter.

        With guidance the negative half comes first. They serve as `ip_adapter_image_embeds` of
        later calls; embeddings that are given are only repeated.
        """
        guided = do_classifier_free_guidance
        if ip_adapter_image_embeds is None:
            pictures = per_adapter(ip_adapter_image, len(self.loaded_ip_adapters))
            pairs = zip(self.loaded_ip_adapters, pictures, strict=True)
            found = [self._seen(adapter, several, guided) for adapter, several in pairs]
        else:
            found = list(ip_adapter_image_embeds)
        device = device or self.unet.device
        return [repeated(x, num_images_per_prompt, guided).to(device) for x in found]

    def _seen(self, adapter: IPAdapter, pictures: Any, guided: bool) -> Tensor:
        """(1, n, E) or (1, n, S, E) of pictures; with guidance the negative ones before them."""
        if self.image_encoder is None:
            raise RequestError(
                "ip_adapter_image cannot be read: this pipeline has no image_encoder; name its "
                "folder by image_encoder_folder= of load_ip_adapter, or give "
                "ip_adapter_image_embeds"
            )
        encoder = self.image_encoder
        pixels = self._pixels(pictures).to(encoder.device, encoder.dtype)
        if adapter.sees_hidden:
            seen = encoder(pixels, output_hidden_states=True).hidden_states[-2]
        else:
            seen = encoder(pixels).image_embeds
        if not guided:
            return seen[None]
        nothing = torch.zeros_like(seen)
        if adapter.sees_hidden:
            black = torch.zeros_like(pixels[:1])
            nothing = encoder(black, output_hidden_states=True).hidden_states[-2].expand_as(seen)
        return torch.stack([nothing, seen])

    def _pixels(self, pictures: Any) -> Tensor:
        """The encoder's input (n, 3, H, W); a tensor is taken to be that already."""
        if isinstance(pictures, Tensor):
            return pictures if pictures.ndim == 4 else pictures[None]
        kept = self.feature_extractor or extractor(self.image_encoder)
        return kept(pictures, return_tensors="pt").pixel_values

    # ── a request ──

    def check_picture_prompts(self, request: Request, guided: bool) -> None:
        """Raises RequestError for picture prompts that the loaded adapters cannot read."""
        pictures, embeds = request.ip_adapter_image, request.ip_adapter_image_embeds
        if pictures is None and embeds is None:
            return
        adapters = self.loaded_ip_adapters
        name = "ip_adapter_image" if embeds is None else "ip_adapter_image_embeds"
        if not adapters:
            raise RequestError(f"{name} needs an IP-Adapter; call load_ip_adapter first")
        if embeds is None:
            per_adapter(pictures, len(adapters))
            return
        if len(embeds) != len(adapters):
            raise RequestError(
                f"{name} holds {len(embeds)} tensors, but there are {len(adapters)} IP-Adapters"
            )
        for adapter, seen in zip(adapters, embeds, strict=True):
            check_embeds(name, seen, adapter, request.prompts, guided)

    def with_pictures(
        self, request: Request, cond: Conditioning, uncond: Conditioning | None
    ) -> tuple[Conditioning, Conditioning | None]:
        """The conditions with the tokens of the request's picture prompts, if it has any."""
        pictures, embeds = request.ip_adapter_image, request.ip_adapter_image_embeds
        if pictures is None and embeds is None:
            return cond, uncond
        guided = uncond is not None
        seen = self.prepare_ip_adapter_image_embeds(
            pictures, embeds, do_classifier_free_guidance=guided
        )
        tokens = [
            adapter.tokens(x.to(self.unet.dtype))
            for adapter, x in zip(self.loaded_ip_adapters, seen, strict=True)
        ]
        if uncond is None:
            return replace(cond, image=tuple(rows(t, request.batch) for t in tokens)), None
        halves = [[rows(half, request.batch) for half in t.chunk(2)] for t in tokens]
        negative, positive = zip(*halves, strict=True)
        return replace(cond, image=positive), replace(uncond, image=negative)


def rows(tokens: Tensor, batch: int) -> Tensor:
    """Tokens (b, N, D) for B pictures: each row serves B / b of them in a row."""
    return tokens.repeat_interleave(batch // len(tokens), 0)


def repeated(seen: Tensor, count: int, guided: bool) -> Tensor:
    """Each row `count` times; with guidance in each half."""
    halves = seen.chunk(2) if guided else (seen,)
    return torch.cat([half.repeat_interleave(count, 0) for half in halves])


def per_adapter(pictures: Any, count: int) -> list[Any]:
    """What each of `count` adapters is given: a picture, or a list of several."""
    listed = list(pictures) if isinstance(pictures, (list, tuple)) else [pictures]
    if len(listed) != count:
        raise RequestError(
            f"ip_adapter_image holds {len(listed)} pictures, but there are {count} IP-Adapters; "
            "give a picture for each, or [[a, b]] for several pictures for one adapter"
        )
    for one in listed:
        for picture in one if isinstance(one, (list, tuple)) and one else [one]:
            if not isinstance(picture, (PIL.Image.Image, np.ndarray, Tensor)):
                raise RequestError(
                    "ip_adapter_image must be a PIL picture, an array, or a tensor as the image "
                    f"encoder reads it, got {type(picture).__name__}"
                )
            if isinstance(picture, Tensor) and isinstance(one, (list, tuple)):
                raise RequestError(
                    "ip_adapter_image holds a list of tensors for one adapter; stack them to "
                    "(pictures, 3, height, width)"
                )
    return listed


def check_embeds(name: str, seen: Any, adapter: IPAdapter, prompts: int, guided: bool) -> None:
    """Raises RequestError unless an adapter can read these embeddings for that many prompts."""
    shape = f"(rows, pictures, {'tokens, ' * adapter.sees_hidden}{adapter.channels})"
    if seen.ndim != 3 + adapter.sees_hidden or seen.shape[-1] != adapter.channels:
        raise RequestError(
            f"{name} must have shape {shape} for this IP-Adapter, got {tuple(seen.shape)}"
        )
    times = 2 if guided else 1
    if len(seen) not in (times, times * prompts):
        half = "the negative half first, since guidance is on" if guided else "guidance is off"
        wanted = " or ".join(str(times * n) for n in sorted({1, prompts}))
        raise RequestError(f"{name} holds {len(seen)} rows, expected {wanted}: {half}")


# ── files ──


def is_dict(given: Any) -> bool:
    """Whether this is a dict of tensors, not the name of a place."""
    return isinstance(given, Mapping)


def matched(**arguments: Any) -> list[tuple[Any, Any, Any]]:
    """Places, subfolders and names, one each per adapter; a single one serves all."""
    listed = {n: list(v) if isinstance(v, (list, tuple)) else [v] for n, v in arguments.items()}
    count = max(map(len, listed.values()))
    for name, values in listed.items():
        if len(values) not in (1, count):
            raise RequestError(f"{name} holds {len(values)} entries, expected 1 or {count}")
    columns = (values * count if len(values) == 1 else values for values in listed.values())
    return list(zip(*columns, strict=True))


def read_adapter(
    given: Any,
    subfolder: str | None,
    weight_name: str | None,
    unet: UNet2DConditionModel,
    place: Mapping[str, Any],
) -> IPAdapter:
    """The adapter of a file or a dict."""
    if is_dict(given):
        return adapter_of(given, unet, "the given dict")
    if weight_name is None:
        raise RequestError(
            "weight_name is missing: name the file, as weight_name='ip-adapter_sd15.safetensors'"
        )
    if weight_name.lower().endswith(PICKLED):
        stem = weight_name.rpartition(".")[0]
        raise CheckpointError(
            f"weight_name={weight_name!r} is not a safetensors file: {HOW_TO_CONVERT}; often "
            f"{stem}.safetensors lies beside it"
        )
    path = Source(os.fspath(given), subfolder, **place).fetch(weight_name)
    return adapter_of(dict(read_tensors([path])), unet, str(path))


def encoder_folder(subfolder: str | None, folder: str) -> str:
    """Where an image encoder lies: beside the adapter, unless `folder` is a path of its own."""
    return folder if "/" in folder or not subfolder else f"{subfolder}/{folder}"


def load_encoder(source: Source, unet: UNet2DConditionModel) -> Any:
    """The image encoder of a folder, in the UNet's dtype and on its device."""
    try:
        source.weights("model")  # says what is there instead
        folder = source.folder(["config.json", "model*.safetensors*"])
    except CheckpointError as error:
        raise CheckpointError(
            f"{error}; image_encoder_folder=None leaves the image encoder out"
        ) from error
    part = Part("image_encoder", "CLIPVisionModelWithProjection")
    return load_part(part, Source(str(folder)), unet.dtype).to(unet.device)


def extractor(image_encoder: Any) -> Any:
    """What makes the encoder's input of pictures."""
    size = image_encoder.config.image_size
    return image_processor()(size=size, crop_size=size)
