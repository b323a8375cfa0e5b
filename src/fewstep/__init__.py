"""fewstep: latent consistency models, pictures in one to eight steps.

Public names are imported when they are first used, so that `import fewstep` costs nothing.
"""

from __future__ import annotations

import importlib
from pathlib import Path
from typing import TYPE_CHECKING, Any

__version__ = "0.1.0"

EMBEDDED = Path(__file__).parent / "embedded" / "fewstep-emoji"  # a small model for any pipeline

if TYPE_CHECKING:
    from .errors import CheckpointError, FewstepError, RequestError, UnsupportedConfig
    from .models.unet import UNet2DConditionModel
    from .models.vae import AutoencoderKL
    from .pipelines.base import DiffusionPipeline
    from .pipelines.catalog import (
        AutoPipelineForImage2Image,
        AutoPipelineForInpainting,
        AutoPipelineForText2Image,
        LatentConsistencyModelImg2ImgPipeline,
        LatentConsistencyModelPipeline,
        StableDiffusionImg2ImgPipeline,
        StableDiffusionInpaintPipeline,
        StableDiffusionPipeline,
        StableDiffusionXLImg2ImgPipeline,
        StableDiffusionXLInpaintPipeline,
        StableDiffusionXLPipeline,
    )
    from .schedulers import DDIMScheduler, LCMScheduler

_MODULES = {
    "AutoPipelineForImage2Image": "pipelines.catalog",
    "AutoPipelineForInpainting": "pipelines.catalog",
    "AutoPipelineForText2Image": "pipelines.catalog",
    "AutoencoderKL": "models.vae",
    "CheckpointError": "errors",
    "DDIMScheduler": "schedulers",
    "DiffusionPipeline": "pipelines.base",
    "FewstepError": "errors",
    "LCMScheduler": "schedulers",
    "LatentConsistencyModelImg2ImgPipeline": "pipelines.catalog",
    "LatentConsistencyModelPipeline": "pipelines.catalog",
    "RequestError": "errors",
    "StableDiffusionImg2ImgPipeline": "pipelines.catalog",
    "StableDiffusionInpaintPipeline": "pipelines.catalog",
    "StableDiffusionPipeline": "pipelines.catalog",
    "StableDiffusionXLImg2ImgPipeline": "pipelines.catalog",
    "StableDiffusionXLInpaintPipeline": "pipelines.catalog",
    "StableDiffusionXLPipeline": "pipelines.catalog",
    "UNet2DConditionModel": "models.unet",
    "UnsupportedConfig": "errors",
}

__all__ = [
    "EMBEDDED",
    "AutoPipelineForImage2Image",
    "AutoPipelineForInpainting",
    "AutoPipelineForText2Image",
    "AutoencoderKL",
    "CheckpointError",
    "DDIMScheduler",
    "DiffusionPipeline",
    "FewstepError",
    "LCMScheduler",
    "LatentConsistencyModelImg2ImgPipeline",
    "LatentConsistencyModelPipeline",
    "RequestError",
    "StableDiffusionImg2ImgPipeline",
    "StableDiffusionInpaintPipeline",
    "StableDiffusionPipeline",
    "StableDiffusionXLImg2ImgPipeline",
    "StableDiffusionXLInpaintPipeline",
    "StableDiffusionXLPipeline",
    "UNet2DConditionModel",
    "UnsupportedConfig",
    "__version__",
]


def __getattr__(name: str) -> Any:
    if name not in _MODULES:
        raise AttributeError(f"module 'fewstep' has no attribute {name!r}")
    value = getattr(importlib.import_module(f".{_MODULES[name]}", __name__), name)
    globals()[name] = value
    return value


def __dir__() -> list[str]:
    return sorted({*globals(), *_MODULES})
