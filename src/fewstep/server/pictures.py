"""Pictures of strangers, read safely; and pictures of ours as files that hold their record.

What is read is PNG, JPEG or WebP and nothing else, its size is known before a pixel is decoded,
and what Pillow says of a broken file stays here.
"""

from __future__ import annotations

import base64
import binascii
import io
import logging
from collections.abc import Mapping
from typing import Any, Literal

import numpy as np
import PIL.Image
import PIL.ImageOps

from .. import metadata
from .orders import Limits, ServerError
from .problems import invalid

log = logging.getLogger(__name__)
Format = Literal["png", "jpeg", "webp"]
FORMATS = ("PNG", "JPEG", "WEBP")
MEDIA: Mapping[str, str] = {"png": "image/png", "jpeg": "image/jpeg", "webp": "image/webp"}
QUALITY = 90
MOST_EXIF = 65_000  # bytes of a JPEG's


def decode(data: bytes, name: str, limits: Limits) -> PIL.Image.Image:
    """A picture of a file's bytes: one frame, upright, in mode RGB, L or RGBA.

    Raises ServerError that names the field `name`.
    """
    picture = opened(data, name, limits)
    try:
        upright = PIL.ImageOps.exif_transpose(picture)
        return plain(upright)
    except Exception as error:  # of a broken file Pillow raises anything
        raise broken(name, error) from None


def decode_rgb(data: bytes, name: str, limits: Limits) -> PIL.Image.Image:
    """A picture in RGB; what is transparent lies on white."""
    return flat(decode(data, name, limits))


def opened(data: bytes, name: str, limits: Limits) -> PIL.Image.Image:
    """A picture whose header was read and is within `limits`, and no pixel yet."""
    if not data:
        raise invalid(f"{name} is empty", name, "send a PNG, JPEG or WebP file")
    check_pixels(webp_size(data), name, limits)  # Pillow would take memory for it at once
    try:
        picture = PIL.Image.open(io.BytesIO(data), formats=FORMATS)
        frames = getattr(picture, "n_frames", 1)
    except (PIL.Image.DecompressionBombError, PIL.Image.DecompressionBombWarning):
        raise too_many_pixels(name, limits) from None
    except Exception as error:
        raise broken(name, error) from None
    check_pixels(picture.size, name, limits)
    if frames != 1 and picture.format != "MPO":  # a photo with others beside it is no animation
        raise ServerError(
            "unsupported_media", f"{name} is animated", param=name, hint="send one frame"
        )
    return picture


def webp_size(data: bytes) -> tuple[int, int]:
    """Width and height that a WebP file's head tells; zeros for other files."""
    if data[:4] != b"RIFF" or data[8:12] != b"WEBP" or len(data) < 30:
        return (0, 0)
    if data[12:16] == b"VP8X":
        return (_number(data[24:27]) + 1, _number(data[27:30]) + 1)
    if data[12:16] == b"VP8L":
        bits = _number(data[21:25])
        return ((bits & 0x3FFF) + 1, (bits >> 14 & 0x3FFF) + 1)
    return (_number(data[26:28]) & 0x3FFF, _number(data[28:30]) & 0x3FFF)


def _number(data: bytes) -> int:
    return int.from_bytes(data, "little")


def check_pixels(size: tuple[int, int], name: str, limits: Limits) -> None:
    """Raises ServerError for more pixels than are taken."""
    if size[0] * size[1] > limits.decoded_pixels:
        raise too_many_pixels(name, limits)


def too_many_pixels(name: str, limits: Limits) -> ServerError:
    """The refusal of a large picture."""
    return ServerError(
        "too_large",
        f"{name} has more than {limits.decoded_pixels} pixels",
        param=name,
        hint="send a smaller one",
    )


def broken(name: str, error: Exception) -> ServerError:
    """The refusal of what is no picture; what Pillow said of it goes to the log alone."""
    log.info("%s cannot be read: %r", name, error)
    return ServerError(
        "unsupported_media",
        f"{name} cannot be read as a picture",
        param=name,
        hint="send a whole PNG, JPEG or WebP file",
    )


def plain(picture: PIL.Image.Image) -> PIL.Image.Image:
    """A picture of any mode in RGB, L or RGBA, 8 bits each."""
    if picture.mode.startswith("I;16") or picture.mode in ("I", "F"):
        levels = np.asarray(picture, dtype=np.float32)
        return PIL.Image.fromarray((levels / 257 + 0.5).clip(0, 255).astype(np.uint8))
    has_alpha = picture.mode in ("RGBA", "LA", "PA", "RGBa", "La") or "transparency" in picture.info
    if has_alpha:
        return picture.convert("RGBA")
    return picture.convert("L" if picture.mode in ("1", "L") else "RGB")


def flat(picture: PIL.Image.Image) -> PIL.Image.Image:
    """The picture in RGB, on white."""
    if picture.mode != "RGBA":
        return picture.convert("RGB")
    white = PIL.Image.new("RGBA", picture.size, "white")
    return PIL.Image.alpha_composite(white, picture).convert("RGB")


def unpack(text: str, name: str) -> bytes:
    """The bytes of base64 or of a data URL that holds it. Raises ServerError."""
    if text.startswith("data:"):
        head, _, text = text.partition(",")
        if not head.endswith(";base64"):
            raise invalid(f"{name} is a data URL without base64", name)
    try:
        return base64.b64decode("".join(text.split()), validate=True)
    except (binascii.Error, ValueError):
        raise invalid(f"{name} is not base64", name, "send a file's bytes in base64") from None


# ── as files ──


def encode(
    image: PIL.Image.Image,
    format: Format = "png",
    record: Mapping[str, Any] | None = None,
    quality: int = QUALITY,
) -> bytes:
    """A picture as a file's bytes, with its record inside if there is one.

    A JPEG has no room for that of a very long prompt, and is without it then.
    """
    file = io.BytesIO()
    told = metadata.kept(record, infotext(record), f".{format}") if record else {}
    if format == "png":
        image.save(file, "PNG", compress_level=1, **told)
    else:
        if format == "jpeg" and len(told.get("exif", b"")) > MOST_EXIF:
            told = {}
        image.save(file, format.upper(), quality=max(1, quality), **told)
    return file.getvalue()


def packed(data: bytes) -> str:
    """Bytes as base64."""
    return base64.b64encode(data).decode("ascii")


def infotext(record: Mapping[str, Any]) -> str:
    """A record in the words of AUTOMATIC1111's web UI, LoRAs behind the prompt."""
    size = f"{record['width']}x{record['height']}" if "width" in record else None
    settings = {
        "Steps": record.get("steps"),
        "Sampler": str(record.get("scheduler") or "").removesuffix("Scheduler") or None,
        "CFG scale": record.get("guidance_scale"),
        "Seed": record.get("seed"),
        "Size": size,
        "Model": record.get("model"),
        "Denoising strength": record.get("strength"),
        "Version": f"fewstep {record.get('versions', {}).get('fewstep', '')}".strip(),
    }
    loras = (metadata.lora_tag(lora["name"], lora["weight"]) for lora in record.get("loras", ()))
    prompt = " ".join([*filter(None, [str(record.get("prompt") or "")]), *loras])
    return metadata.parameters(prompt, record.get("negative_prompt") or None, settings)
