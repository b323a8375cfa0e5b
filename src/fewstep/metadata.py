"""What a picture file says of itself: the texts that PNG, WebP, JPEG and GIF files carry.

The record is JSON: a PNG has it under `fewstep`, a GIF as its comment, the others in EXIF's
ImageDescription. All but GIFs hold the same in the words of AUTOMATIC1111's web UI too, where many
programs look: `parameters`, and EXIF's UserComment.
"""

from __future__ import annotations

import json
import re
from collections.abc import Mapping
from typing import Any

import PIL.Image
from PIL.PngImagePlugin import PngInfo

KEY = "fewstep"
MARK = f"{KEY} "  # before the JSON, where other programs write their own texts
# EXIF's tags, and its name of the encoding of the text that follows.
IMAGE_DESCRIPTION, EXIF_IFD, USER_COMMENT, UTF_16 = 0x010E, 0x8769, 0x9286, b"UNICODE\0"
NEGATIVE = "Negative prompt: "
# A setting of the last line: a name, and a value that is quoted where it holds a comma.
SETTING = re.compile(r'\s*([\w \-/]{1,64}):\s*("(?:\\.|[^\\"])*"|[^,]*)(?:,|$)')


def kept(record: Mapping[str, Any], parameters: str, suffix: str) -> dict[str, Any]:
    """Both texts as keywords for PIL's `save` to a file of that suffix."""
    marked = MARK + json.dumps(record, default=float)  # ASCII, as GIF and EXIF want it
    if suffix.lower() == ".gif":
        return {"comment": marked.encode("ascii")}
    if suffix.lower() in (".webp", ".jpg", ".jpeg"):
        exif = PIL.Image.Exif()
        exif[IMAGE_DESCRIPTION] = marked
        exif[EXIF_IFD] = {USER_COMMENT: UTF_16 + parameters.encode("utf-16-be")}
        return {"exif": exif.tobytes()}
    return {"pnginfo": png_info(record, parameters)}


def png_info(record: Mapping[str, Any], parameters: str) -> PngInfo:
    """The text chunks of a PNG file."""
    text = PngInfo()
    text.add_itxt(KEY, json.dumps(record, ensure_ascii=False, default=float))
    text.add_itxt("parameters", parameters)
    return text


def stored_json(picture: PIL.Image.Image) -> str | None:
    """The record's text in an open picture, or None if there is none."""
    if picture.format == "PNG":
        picture.load()  # text chunks may come after the pixels
        return getattr(picture, "text", {}).get(KEY)
    found = picture.info.get("comment", b"")
    if picture.format in ("WEBP", "JPEG"):
        found = picture.getexif().get(IMAGE_DESCRIPTION, "")
    text = found.decode("ascii", "replace") if isinstance(found, bytes) else str(found)
    return text.removeprefix(MARK) if text.startswith(MARK) else None


def stored_parameters(picture: PIL.Image.Image) -> str | None:
    """The settings in the web UI's words in an open picture, or None if there are none."""
    if picture.format == "PNG":
        picture.load()
        return getattr(picture, "text", {}).get("parameters")
    found = picture.getexif().get_ifd(EXIF_IFD).get(USER_COMMENT)
    if not isinstance(found, bytes) or not found.startswith(UTF_16):
        return None
    return found.removeprefix(UTF_16).decode("utf-16-be", "replace")


def parameters(prompt: str, negative: str | None, settings: Mapping[str, Any]) -> str:
    """The settings as the web UI writes them; those that are None are left out."""
    line = ", ".join(f"{key}: {value}" for key, value in settings.items() if value is not None)
    return "\n".join([prompt, *([] if negative is None else [NEGATIVE + negative]), line])


def lora_tag(name: str, weight: float) -> str:
    """A LoRA as it stands in the web UI's prompts, without exponents, which it does not read."""
    return f"<lora:{name}:{f'{weight:.6f}'.rstrip('0').rstrip('.')}>"


def parsed_parameters(text: str) -> dict[str, Any]:
    """The prompts, with LoRAs in them, and the settings of `parameters`, by their names there."""
    *lines, last = text.strip().split("\n")
    settings = {name.strip(): value.strip() for name, value in SETTING.findall(last)}
    if "Steps" not in settings:
        lines, settings = [*lines, last], {}
    start = next((i for i, line in enumerate(lines) if line.startswith(NEGATIVE)), len(lines))
    negative = "\n".join(lines[start:]).removeprefix(NEGATIVE)
    return {"Prompt": "\n".join(lines[:start]), "Negative prompt": negative, **settings}
