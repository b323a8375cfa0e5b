"""Draws the pictures of docs/tasks.md with the model inside the package."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path
from typing import Any

import torch
from PIL import Image, ImageDraw, ImageOps

from fewstep import (
    EMBEDDED,
    AutoPipelineForImage2Image,
    AutoPipelineForInpainting,
    AutoPipelineForText2Image,
    StableDiffusionAdapterPipeline,
    T2IAdapter,
)
from fewstep.annotate import canny
from fewstep.utils import PreviewCallback

HERE = Path(__file__).parent
SIDE, GAP = 128, 8  # pixels of a picture as shown, and between two
SEED = 7


def strip(name: str, pictures: Sequence[Image.Image]) -> None:
    """Writes pictures side by side."""
    row = Image.new("RGB", (len(pictures) * (SIDE + GAP) - GAP, SIDE), "white")
    for index, picture in enumerate(pictures):
        shown = picture.convert("RGB").resize((SIDE, SIDE), Image.Resampling.BICUBIC)
        row.paste(shown, (index * (SIDE + GAP), 0))
    row.save(HERE / f"{name}.png", optimize=True)


def one(pipe: Any, prompt: str, seed: int = SEED, **arguments: Any) -> Image.Image:
    """A picture of four steps."""
    generator = torch.Generator().manual_seed(seed)
    arguments = {"num_inference_steps": 4, "guidance_scale": 4.0, **arguments}
    return pipe(prompt, generator=generator, **arguments).images[0]


draw = AutoPipelineForText2Image.from_pretrained(EMBEDDED)
change = AutoPipelineForImage2Image.from_pipe(draw)
paint = AutoPipelineForInpainting.from_pipe(draw)
for pipe in (draw, change, paint):
    pipe.set_progress_bar_config(disable=True)

prompts = ("a rocket", "a penguin", "a sunflower", "a lemon on a blue background", "a house")
strip("text", [one(draw, prompt) for prompt in prompts])

lemon = one(draw, "a lemon on a blue background")
berry = "a strawberry on a blue background"
changed = [one(change, berry, image=lemon, strength=s) for s in (0.1, 0.2, 0.4, 0.6)]
strip("image_to_image", [lemon, *changed])

mask = Image.new("L", lemon.size)
ImageDraw.Draw(mask).rectangle((lemon.width // 2, 0, *lemon.size), fill=255)
painted = one(paint, berry, image=lemon, mask_image=mask, paste_back=True, mask_blur=2)
strip("inpainting", [lemon, mask, painted])

steps: list[Image.Image] = []
seen = PreviewCallback(lambda index, pictures: steps.append(pictures[0]))
one(draw, "a rocket", callback_on_step_end=seen)
strip("previews", steps)

things = ("a house", "a red apple", "a rocket", "a car")
plain = [one(draw, prompt) for prompt in things]
draw.load_lora_weights(EMBEDDED.parent / "fewstep-emoji-blueprint")
worn = [one(draw, prompt) for prompt in things]
draw.unload_lora_weights()
strip("lora", [picture for pair in zip(plain, worn, strict=True) for picture in pair])

adapter = T2IAdapter.from_pretrained(EMBEDDED.parent / "fewstep-emoji-edges")
steered = StableDiffusionAdapterPipeline(
    **draw.components, adapter=adapter, requires_safety_checker=False
)
steered.set_progress_bar_config(disable=True)
shown: list[Image.Image] = []
for prompt in ("a penguin", "a rocket", "a mushroom"):
    free = one(draw, prompt)
    sketch = Image.new("RGB", free.size, "white")
    sketch.paste(ImageOps.mirror(free).resize((44, 44)), (16, 16))
    edges = canny(sketch, 60, 120)
    shown += [free, edges, one(steered, prompt, image=edges)]
strip("adapter", shown)

prompts = [f"a (lemon:{weight}) and a strawberry" for weight in (0, 0.5, 1, 2)]
strip("weights", [one(draw, prompt, weighted_prompt=True) for prompt in prompts])
