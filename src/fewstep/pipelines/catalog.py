"""The public pipelines. Each is one family with one task as its `__call__`:

            family: components, encode, decode  x  task: arguments, start  ->  public class

A class adds nothing else, so a new family or a new task is one line per class here.
"""

from __future__ import annotations

import os
from collections.abc import Collection
from typing import Any, ClassVar

from ..checkpoints.locate import Source
from ..errors import UnsupportedConfig
from .animate import AnimateDiff, VideoRequest, text_to_video
from .base import DiffusionPipeline
from .controlled import (
    StableDiffusionAdapter,
    StableDiffusionControlNet,
    StableDiffusionXLAdapter,
    StableDiffusionXLControlNet,
    steered,
)
from .families import StableDiffusion
from .loading import read_index
from .signatures import call
from .tasks import (
    image_to_image,
    inpaint,
    lcm_image_to_image,
    lcm_text_to_image,
    text_to_image,
)
from .xl import StableDiffusionXL

# ── arguments, in diffusers' order ──

_EMBEDS = "prompt_embeds negative_prompt_embeds"
_POOLED = "pooled_prompt_embeds negative_pooled_prompt_embeds"
_DRAWS = "num_images_per_prompt eta generator"
_OUT = "ip_adapter_image ip_adapter_image_embeds output_type return_dict cross_attention_kwargs"
_CALLBACK = "clip_skip callback_on_step_end callback_on_step_end_tensor_inputs"
_TIMES = "timesteps sigmas"
_SIZES = (
    "original_size crops_coords_top_left target_size negative_original_size "
    "negative_crops_coords_top_left negative_target_size"
)
_SCORES = "aesthetic_score negative_aesthetic_score"
_XL_TEXT = "negative_prompt negative_prompt_2"
_XL_TAIL = f"guidance_rescale {_SIZES}"
_PASTE = "* mask_blur paste_back"
_OURS = "* weighted_prompt"
_LCM = f"""timesteps guidance_scale=8.5 num_images_per_prompt generator latents prompt_embeds {_OUT}
    {_CALLBACK} * negative_prompt lcm_origin_steps weighted_prompt"""


class StableDiffusionPipeline(StableDiffusion):
    """Text to picture with Stable Diffusion, or with an LCM on it."""

    __call__ = call(
        text_to_image,
        f"""prompt height width num_inference_steps {_TIMES} guidance_scale negative_prompt {_DRAWS}
        latents {_EMBEDS} {_OUT} guidance_rescale {_CALLBACK} {_OURS}""",
    )


class StableDiffusionImg2ImgPipeline(StableDiffusion):
    """Picture to picture with Stable Diffusion, or with an LCM on it."""

    __call__ = call(
        image_to_image,
        f"""prompt image strength=0.8 num_inference_steps {_TIMES} guidance_scale negative_prompt
        {_DRAWS} {_EMBEDS} {_OUT} {_CALLBACK} {_OURS}""",
    )


class StableDiffusionInpaintPipeline(StableDiffusion):
    """Inpainting with Stable Diffusion, or with an LCM on it; UNets of 4 and of 9 channels."""

    __call__ = call(
        inpaint,
        f"""prompt image mask_image masked_image_latents height width padding_mask_crop strength=1.0
        num_inference_steps {_TIMES} guidance_scale negative_prompt {_DRAWS} latents {_EMBEDS}
        {_OUT} {_CALLBACK} {_PASTE} weighted_prompt""",
    )


class StableDiffusionXLPipeline(StableDiffusionXL):
    """Text to picture with SDXL or SSD-1B, or with an LCM on it."""

    __call__ = call(
        text_to_image,
        f"""prompt prompt_2 height width num_inference_steps {_TIMES} denoising_end
        guidance_scale=5.0 {_XL_TEXT} {_DRAWS} latents {_EMBEDS} {_POOLED} {_OUT} {_XL_TAIL}
        {_CALLBACK} {_OURS}""",
    )


class StableDiffusionXLImg2ImgPipeline(StableDiffusionXL):
    """Picture to picture with SDXL or SSD-1B, or with an LCM on it; the refiner too."""

    __call__ = call(
        image_to_image,
        f"""prompt prompt_2 image strength=0.3 num_inference_steps {_TIMES} denoising_start
        denoising_end guidance_scale=5.0 {_XL_TEXT} {_DRAWS} latents {_EMBEDS} {_POOLED} {_OUT}
        {_XL_TAIL} {_SCORES} {_CALLBACK} {_OURS}""",
    )


class StableDiffusionXLInpaintPipeline(StableDiffusionXL):
    """Inpainting with SDXL or SSD-1B, or with an LCM on it; UNets of 4 and of 9 channels."""

    __call__ = call(
        inpaint,
        f"""prompt prompt_2 image mask_image masked_image_latents height width padding_mask_crop
        strength=0.9999 num_inference_steps {_TIMES} denoising_start denoising_end guidance_scale
        {_XL_TEXT} {_DRAWS} latents {_EMBEDS} {_POOLED} {_OUT} {_XL_TAIL} {_SCORES} {_CALLBACK}
        {_PASTE} weighted_prompt""",
    )


_STEER = "controlnet_conditioning_scale{} guess_mode control_guidance_start control_guidance_end"
_CN_OUT = f"{_OUT} {_STEER}"


class StableDiffusionControlNetPipeline(StableDiffusionControlNet):
    """Text to picture with Stable Diffusion, or with an LCM on it, steered by ControlNets."""

    __call__ = call(
        steered(text_to_image),
        f"""prompt image height width num_inference_steps {_TIMES} guidance_scale negative_prompt
        {_DRAWS} latents {_EMBEDS} {_CN_OUT.format("")} {_CALLBACK}
        {_OURS}""",
    )


class StableDiffusionControlNetImg2ImgPipeline(StableDiffusionControlNet):
    """Picture to picture with Stable Diffusion, or with an LCM on it, steered by ControlNets."""

    __call__ = call(
        image_to_image,
        f"""prompt image control_image height width strength=0.8 num_inference_steps
        guidance_scale negative_prompt {_DRAWS} latents {_EMBEDS} {_CN_OUT.format("=0.8")}
        {_CALLBACK} {_OURS}""",
    )


class StableDiffusionControlNetInpaintPipeline(StableDiffusionControlNet):
    """Inpainting with Stable Diffusion, or with an LCM on it, steered by ControlNets."""

    __call__ = call(
        inpaint,
        f"""prompt image mask_image control_image height width padding_mask_crop strength=1.0
        num_inference_steps guidance_scale negative_prompt {_DRAWS} latents {_EMBEDS}
        {_CN_OUT.format("=0.5")} {_CALLBACK} {_PASTE} weighted_prompt""",
    )


class StableDiffusionXLControlNetPipeline(StableDiffusionXLControlNet):
    """Text to picture with SDXL, or with an LCM on it, steered by ControlNets."""

    __call__ = call(
        steered(text_to_image),
        f"""prompt prompt_2 image height width num_inference_steps {_TIMES} denoising_end
        guidance_scale=5.0 {_XL_TEXT} {_DRAWS} latents {_EMBEDS} {_POOLED} {_CN_OUT.format("")}
        {_SIZES} {_CALLBACK} {_OURS}""",
    )


class StableDiffusionXLControlNetImg2ImgPipeline(StableDiffusionXLControlNet):
    """Picture to picture with SDXL, or with an LCM on it, steered by ControlNets."""

    __call__ = call(
        image_to_image,
        f"""prompt prompt_2 image control_image height width strength=0.8 num_inference_steps
        guidance_scale=5.0 {_XL_TEXT} {_DRAWS} latents {_EMBEDS} {_POOLED}
        {_CN_OUT.format("=0.8")} {_SIZES} {_SCORES} {_CALLBACK} {_OURS}""",
    )


class StableDiffusionXLControlNetInpaintPipeline(StableDiffusionXLControlNet):
    """Inpainting with SDXL, or with an LCM on it, steered by ControlNets."""

    __call__ = call(
        inpaint,
        f"""prompt prompt_2 image mask_image control_image height width padding_mask_crop
        strength=0.9999 num_inference_steps denoising_start denoising_end guidance_scale=5.0
        {_XL_TEXT} {_DRAWS} latents {_EMBEDS} ip_adapter_image ip_adapter_image_embeds {_POOLED}
        output_type return_dict cross_attention_kwargs {_STEER.format("")} guidance_rescale
        original_size crops_coords_top_left target_size {_SCORES} {_CALLBACK} {_PASTE}
        weighted_prompt""",
    )


class StableDiffusionAdapterPipeline(StableDiffusionAdapter):
    """Text to picture with Stable Diffusion, or with an LCM on it, steered by T2I-Adapters."""

    __call__ = call(
        steered(text_to_image),
        f"""prompt image height width num_inference_steps {_TIMES} guidance_scale negative_prompt
        {_DRAWS} latents {_EMBEDS} output_type return_dict cross_attention_kwargs
        adapter_conditioning_scale clip_skip * adapter_conditioning_factor callback_on_step_end
        callback_on_step_end_tensor_inputs ip_adapter_image ip_adapter_image_embeds
        weighted_prompt""",
    )


class StableDiffusionXLAdapterPipeline(StableDiffusionXLAdapter):
    """Text to picture with SDXL, or with an LCM on it, steered by T2I-Adapters."""

    __call__ = call(
        steered(text_to_image),
        f"""prompt prompt_2 image height width num_inference_steps {_TIMES} denoising_end
        guidance_scale=5.0 {_XL_TEXT} {_DRAWS} latents {_EMBEDS} {_POOLED} {_OUT} {_XL_TAIL}
        adapter_conditioning_scale adapter_conditioning_factor clip_skip * callback_on_step_end
        callback_on_step_end_tensor_inputs weighted_prompt""",
    )


class LatentConsistencyModelPipeline(StableDiffusion):
    """Text to picture with a guidance-distilled latent consistency model."""

    __call__ = call(
        lcm_text_to_image,
        f"prompt height width num_inference_steps=4 original_inference_steps {_LCM}",
    )


class LatentConsistencyModelImg2ImgPipeline(StableDiffusion):
    """Picture to picture with a guidance-distilled latent consistency model."""

    __call__ = call(
        lcm_image_to_image,
        f"""prompt image num_inference_steps=4 strength=0.8 original_inference_steps
        {_LCM}""",
    )


class AnimateDiffPipeline(AnimateDiff):
    """Text to video with Stable Diffusion and motion modules, or with an LCM on it."""

    __call__ = call(
        text_to_video,
        f"""prompt num_frames height width num_inference_steps guidance_scale negative_prompt
        num_videos_per_prompt=1 eta generator latents {_EMBEDS} {_OUT} {_CALLBACK}
        decode_chunk_size * context_length context_overlap""",
        VideoRequest,
    )


# Family -> task -> class.
CATALOG: dict[str, dict[str, type[DiffusionPipeline]]] = {
    "StableDiffusion": {
        "text-to-image": StableDiffusionPipeline,
        "image-to-image": StableDiffusionImg2ImgPipeline,
        "inpainting": StableDiffusionInpaintPipeline,
    },
    "StableDiffusionXL": {
        "text-to-image": StableDiffusionXLPipeline,
        "image-to-image": StableDiffusionXLImg2ImgPipeline,
        "inpainting": StableDiffusionXLInpaintPipeline,
    },
    # An LCM paints into a mask by the Stable Diffusion task, guidance embedded.
    "LatentConsistencyModel": {
        "text-to-image": LatentConsistencyModelPipeline,
        "image-to-image": LatentConsistencyModelImg2ImgPipeline,
        "inpainting": StableDiffusionInpaintPipeline,
    },
    "StableDiffusionControlNet": {
        "text-to-image": StableDiffusionControlNetPipeline,
        "image-to-image": StableDiffusionControlNetImg2ImgPipeline,
        "inpainting": StableDiffusionControlNetInpaintPipeline,
    },
    "StableDiffusionXLControlNet": {
        "text-to-image": StableDiffusionXLControlNetPipeline,
        "image-to-image": StableDiffusionXLControlNetImg2ImgPipeline,
        "inpainting": StableDiffusionXLControlNetInpaintPipeline,
    },
    "StableDiffusionAdapter": {"text-to-image": StableDiffusionAdapterPipeline},
    "StableDiffusionXLAdapter": {"text-to-image": StableDiffusionXLAdapterPipeline},
    "AnimateDiff": {"text-to-video": AnimateDiffPipeline},
}


def pipeline_class(name: str) -> type[DiffusionPipeline]:
    """The public pipeline that a model_index.json names."""
    classes = {c.__name__: c for tasks in CATALOG.values() for c in tasks.values()}
    if name not in classes:
        raise UnsupportedConfig(
            f"the pipeline {name} is not implemented (supported: {', '.join(classes)})"
        )
    return classes[name]


# A component that, given, leads from a family to another.
EXTENSIONS = {"controlnet": "ControlNet", "adapter": "Adapter"}


def sibling(
    pipeline: type[DiffusionPipeline], task: str, components: Collection[str] = ()
) -> type[DiffusionPipeline]:
    """The class for `task` in the family of `pipeline`, or in that which has `components` too."""
    family = next((f for f, tasks in CATALOG.items() if pipeline in tasks.values()), None)
    if family is None:
        raise UnsupportedConfig(
            f"{pipeline.__name__} belongs to no family (known: {', '.join(CATALOG)})"
        )
    for component, suffix in EXTENSIONS.items():
        if component in components and not family.endswith(suffix):
            # An LCM with a ControlNet is a Stable Diffusion with guidance as an input.
            family = family.replace("LatentConsistencyModel", "StableDiffusion") + suffix
    found = CATALOG.get(family, {}).get(task)
    if found is None:
        have = ", ".join(CATALOG.get(family, {})) or "none"
        raise UnsupportedConfig(
            f"there is no pipeline for {task} in the family {family} (its tasks: {have})"
        )
    return found


class AutoPipeline:
    """Chooses the class of a task by the family of a checkpoint; not built itself."""

    task: ClassVar[str]

    def __init__(self) -> None:
        raise OSError(
            f"{type(self).__name__} is not built itself: use {type(self).__name__}.from_pretrained"
        )

    @classmethod
    def from_pretrained(
        cls, pretrained_model_name_or_path: str | os.PathLike[str], **arguments: Any
    ) -> Any:
        """The checkpoint's pipeline for this task; arguments as in DiffusionPipeline's."""
        reach = ("revision", "cache_dir", "force_download", "local_files_only", "token")
        root = Source(
            os.fspath(pretrained_model_name_or_path),
            **{name: arguments[name] for name in reach if name in arguments},
        )
        given = [name for name, value in arguments.items() if value is not None]
        pipeline = sibling(pipeline_class(read_index(root)[0]), cls.task, given)
        return pipeline.from_pretrained(pretrained_model_name_or_path, **arguments)

    @classmethod
    def from_pipe(cls, pipeline: DiffusionPipeline, **components: Any) -> Any:
        """The pipeline for this task that shares the components of `pipeline`."""
        given = [name for name, value in components.items() if value is not None]
        return sibling(type(pipeline), cls.task, given).from_pipe(pipeline, **components)


class AutoPipelineForText2Image(AutoPipeline):
    """The text-to-image pipeline of any supported checkpoint."""

    task = "text-to-image"


class AutoPipelineForImage2Image(AutoPipeline):
    """The image-to-image pipeline of any supported checkpoint."""

    task = "image-to-image"


class AutoPipelineForInpainting(AutoPipeline):
    """The inpainting pipeline of any supported checkpoint."""

    task = "inpainting"
