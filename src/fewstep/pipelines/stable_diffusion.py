"""The Stable Diffusion pipelines under the module path that diffusers gives them."""

from .catalog import StableDiffusionImg2ImgPipeline, StableDiffusionPipeline
from .families import StableDiffusionPipelineOutput

__all__ = [
    "StableDiffusionImg2ImgPipeline",
    "StableDiffusionPipeline",
    "StableDiffusionPipelineOutput",
]
