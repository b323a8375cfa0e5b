"""What the arguments of pipelines mean, said once; and the answer to a misspelt one."""

from __future__ import annotations

import difflib
import functools
import inspect
import textwrap
from collections.abc import Callable
from typing import Any, TypeVar

TaskT = TypeVar("TaskT", bound=Callable[..., Any])

MEANINGS = {
    "prompt": "Text, or one text per picture. Needed unless prompt_embeds is given.",
    "image": "The picture to start from, or one per prompt: PIL, numpy (H, W, 3) or tensor "
    "(3, H, W), floats in [0, 1] or [-1, 1], or latents. Its sides are floored to what the VAE "
    "can hold.",
    "strength": "In (0, 1]: how much of the picture is replaced; 1 keeps next to nothing of it.",
    "height": "Height in pixels, a multiple of the VAE's factor (8 in Stable Diffusion); by "
    "default what the UNet was trained for.",
    "width": "Width in pixels, like height.",
    "num_inference_steps": "Number of steps; more take longer.",
    "original_inference_steps": "Steps of the grid that the LCM was distilled on, of which "
    "num_inference_steps are taken; by default the scheduler's, 50.",
    "lcm_origin_steps": "An older name of original_inference_steps.",
    "timesteps": "The times to step through, descending, in place of num_inference_steps.",
    "sigmas": "Not supported; give timesteps.",
    "guidance_scale": "How strongly the text steers. With a guidance-distilled LCM an input of the "
    "network, 3 to 13; otherwise 1 is off and each step costs twice as much above 1.",
    "guidance_rescale": "In [0, 1]: pulls guided contrast back to the unguided (Lin et al. 2024).",
    "negative_prompt": "What to steer away from, one text or one per prompt. Without guidance by "
    "two network calls (an LCM, or guidance_scale <= 1) it has no effect, and a warning says so.",
    "num_images_per_prompt": "Pictures per prompt.",
    "eta": "In [0, 1]: fresh noise per step of the DDIM scheduler; 0 draws none.",
    "generator": "torch.Generator for all noise, or one per picture: each picture is then what it "
    "would be alone.",
    "latents": "The start, (pictures, channels, height, width) in latent pixels, in place of drawn "
    "noise.",
    "prompt_embeds": "Embedded prompts (prompts, tokens, channels), in place of prompt.",
    "negative_prompt_embeds": "Embedded negative prompts, shaped as prompt_embeds.",
    "ip_adapter_image": "Not supported.",
    "ip_adapter_image_embeds": "Not supported.",
    "output_type": '"pil", "np" (B, H, W, 3) and "pt" (B, 3, H, W) in [0, 1], or "latent".',
    "return_dict": "Return an output with names; if False a tuple (images, None).",
    "cross_attention_kwargs": "Not supported.",
    "clip_skip": "Number of last layers of the text encoder to leave out.",
    "callback_on_step_end": "Called as callback(pipe, index, timestep, tensors) after each step; "
    "returns the tensors it wants changed. pipe._interrupt = True ends the loop there.",
    "callback_on_step_end_tensor_inputs": "Which tensors it sees: latents, denoised, "
    "prompt_embeds, negative_prompt_embeds, w_embedding.",
}
# Names that come from other programs -> what is called so here.
ELSEWHERE = {
    "seed": "generator=torch.Generator().manual_seed(seed)",
    "steps": "num_inference_steps",
    "num_steps": "num_inference_steps",
    "cfg_scale": "guidance_scale",
    "callback": "callback_on_step_end",
    "callback_steps": "callback_on_step_end",
    "denoising_strength": "strength",
    "n": "num_images_per_prompt",
}


def documented(task: TaskT) -> TaskT:
    """`task` with its arguments explained in its docstring, and a hint for an unknown keyword."""
    names = [name for name in inspect.signature(task).parameters if name != "self"]
    lines = [
        textwrap.fill(
            f"{name}: {MEANINGS[name]}", 96, initial_indent="    ", subsequent_indent=" " * 8
        )
        for name in names
    ]

    @functools.wraps(task)
    def call(self: Any, *args: Any, **kwargs: Any) -> Any:
        for name in kwargs:
            if name not in names:
                raise TypeError(
                    f"{type(self).__name__} got an unknown argument {name!r}{hint(name, names)}"
                )
        return task(self, *args, **kwargs)

    call.__doc__ = "\n".join(
        [
            inspect.cleandoc(task.__doc__ or ""),
            "",
            "Args:",
            *lines,
            "",
            "Raises RequestError, before any work, for a value that cannot be served.",
        ]
    )
    return call  # type: ignore[return-value]


def hint(name: str, names: list[str]) -> str:
    """What an unknown argument may have been meant for."""
    near = difflib.get_close_matches(name, names, n=1)
    if meant := ELSEWHERE.get(name) or (near[0] if near else None):
        return f"; did you mean {meant}?"
    return f" (known: {', '.join(names)})"
