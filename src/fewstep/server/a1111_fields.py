"""The fields of AUTOMATIC1111's web UI: those that are honoured, and those that may be sent idle.

Its clients send every field there is. One that would change the picture, and that is not
implemented, is refused unless it has the value at which it does nothing.
"""

from __future__ import annotations

import re
from collections.abc import Mapping
from typing import Any, Literal

from pydantic import Field

from .asking import Fields
from .problems import did_you_mean, invalid

NOTHING: tuple[Any, ...] = (None, "", 0, False, [], {})
# Field -> the values at which it does nothing.
IDLE: Mapping[str, tuple[Any, ...]] = {
    "alwayson_scripts": NOTHING,
    "disable_extra_networks": NOTHING,
    "enable_hr": NOTHING,
    "eta": NOTHING,
    "firstpass_image": NOTHING,
    "image_cfg_scale": (None, 1, 1.5),
    "include_init_images": NOTHING,
    "infotext": NOTHING,
    "initial_noise_multiplier": (None, 1),
    "latent_mask": NOTHING,
    "refiner_checkpoint": (*NOTHING, "None"),
    "restore_faces": NOTHING,
    "s_churn": NOTHING,
    "s_min_uncond": NOTHING,
    "s_noise": (None, 1),
    "s_tmax": (*NOTHING, float("inf")),
    "s_tmin": NOTHING,
    "scheduler": (*NOTHING, "Automatic", "automatic"),
    "script_args": NOTHING,
    "script_name": (*NOTHING, "None"),
    "seed_resize_from_h": (None, 0, -1),
    "seed_resize_from_w": (None, 0, -1),
    "styles": NOTHING,
    "subseed_strength": NOTHING,
    "tiling": NOTHING,
}
# They concern files, or other fields that are refused.
UNUSED = frozenset(
    {
        *("comments", "do_not_save_grid", "do_not_save_samples", "firstphase_height"),
        *("firstphase_width", "force_task_id", "hr_additional_modules", "hr_cfg", "hr_scale"),
        *("hr_checkpoint_name", "hr_negative_prompt", "hr_prompt", "hr_resize_x", "hr_resize_y"),
        *("hr_sampler_name", "hr_scheduler", "hr_second_pass_steps", "hr_upscaler"),
        *("inpaint_full_res_padding", "refiner_switch_at", "subseed"),
    }
)
# Of a mask alone.
OF_MASK: Mapping[str, tuple[Any, ...]] = {
    "inpaint_full_res": NOTHING,
    "mask_blur": NOTHING,
    "mask_blur_x": NOTHING,
    "mask_blur_y": NOTHING,
    "mask_round": (None, True, 1),
    "inpainting_fill": (None, 1),
}
HINTS = {
    "alwayson_scripts": "no scripts run here",
    "inpaint_full_res": "the whole picture is drawn; send false",
    "mask_blur": "masks are taken as they are; send 0",
    "inpainting_fill": "only 1, the original, is there",
    "enable_hr": "ask for the full width and height at once",
}
LORA = re.compile(r"<lora:([^:<>]{1,256})(?::(-?\d{1,3}(?:\.\d{1,6})?))?>")


class Txt2Img(Fields):
    """Draw pictures of a prompt. Fields that other servers know must be idle."""

    prompt: str = ""
    negative_prompt: str | None = None
    seed: int = Field(-1, description="-1: drawn, and told.")
    steps: int | None = None
    cfg_scale: float | None = None
    width: int | None = None
    height: int | None = None
    batch_size: int = Field(1, ge=1, le=10)
    n_iter: int = Field(1, ge=1, le=10)
    sampler_name: str | None = None
    sampler_index: str | None = None
    denoising_strength: float | None = Field(None, description="Of img2img.")
    override_settings: dict[str, Any] | None = None
    override_settings_restore_afterwards: bool = True
    send_images: bool = True
    save_images: bool = False


class Img2Img(Txt2Img):
    """Draw a picture from another, or anew where a mask is white."""

    init_images: list[str] = Field(min_length=1, max_length=1, description="Base64.")
    denoising_strength: float | None = Field(0.75, description="How much changes.")
    mask: str | None = None
    inpainting_mask_invert: int | bool | None = None
    resize_mode: Literal[0, 1] = Field(0, description="0: stretched to the size; 1: cropped to it.")


def without_idle(fields: Mapping[str, Any], model: type[Fields]) -> dict[str, Any]:
    """The fields that mean something. Raises ServerError for one that cannot be honoured."""
    has_mask = fields.get("mask") is not None
    found = {}
    for name, value in fields.items():
        if name in model.model_fields:
            found[name] = value
        elif name in IDLE or name in OF_MASK:
            values = IDLE.get(name) or OF_MASK[name]
            if name in IDLE or has_mask:
                check_idle(name, value, values)
        elif name not in UNUSED:
            names = [*model.model_fields, *IDLE, *OF_MASK]
            raise invalid(f"there is no field {name[:64]!r}", name, did_you_mean(name, names))
    return found


def check_idle(name: str, value: Any, values: tuple[Any, ...]) -> None:
    """Raises ServerError unless a value is among those that do nothing."""
    if not any(value == idle for idle in values):
        raise invalid(f"{name} is not implemented", name, HINTS.get(name, "leave it out"))


def loras_of(prompt: str) -> tuple[str, list[tuple[str, float]]]:
    """The prompt without its `<lora:name:weight>`, and those."""
    found = [(name, float(weight or 1)) for name, weight in LORA.findall(prompt)]
    return LORA.sub("", prompt).strip() if found else prompt, found
