"""fewstep: latent consistency models, pictures in one to eight steps.

Public names are imported when they are first used, so that `import fewstep` costs nothing.
"""

from __future__ import annotations

import importlib
from pathlib import Path
from typing import TYPE_CHECKING, Any

from .imports import first_import

__version__ = "0.1.0"

EMBEDDED = Path(__file__).parent / "embedded" / "fewstep-emoji"  # a small model for any pipeline

if TYPE_CHECKING:
    from .errors import CheckpointError, FewstepError, RequestError, UnsupportedConfig
    from .models.controlnet import ControlNetModel, MultiControlNetModel
    from .models.motion import MotionAdapter
    from .models.motion_unet import UNetMotionModel
    from .models.t2i_adapter import MultiAdapter, T2IAdapter
    from .models.unet import UNet2DConditionModel
    from .models.vae import AutoencoderKL
    from .models.vae_tiny import AutoencoderTiny
    from .pipelines.base import DiffusionPipeline
    from .pipelines.catalog import (
        AnimateDiffPipeline,
        AutoPipelineForImage2Image,
        AutoPipelineForInpainting,
        AutoPipelineForText2Image,
        LatentConsistencyModelImg2ImgPipeline,
        LatentConsistencyModelPipeline,
        StableDiffusionAdapterPipeline,
        StableDiffusionControlNetImg2ImgPipeline,
        StableDiffusionControlNetInpaintPipeline,
        StableDiffusionControlNetPipeline,
        StableDiffusionImg2ImgPipeline,
        StableDiffusionInpaintPipeline,
        StableDiffusionPipeline,
        StableDiffusionXLAdapterPipeline,
        StableDiffusionXLControlNetImg2ImgPipeline,
        StableDiffusionXLControlNetInpaintPipeline,
        StableDiffusionXLControlNetPipeline,
        StableDiffusionXLImg2ImgPipeline,
        StableDiffusionXLInpaintPipeline,
        StableDiffusionXLPipeline,
    )
    from .schedulers import (
        DDIMScheduler,
        DDPMScheduler,
        DPMSolverMultistepScheduler,
        EulerAncestralDiscreteScheduler,
        EulerDiscreteScheduler,
        LCMScheduler,
        PNDMScheduler,
        TCDScheduler,
    )

_MODULES = {
    "AnimateDiffPipeline": "pipelines.catalog",
    "AutoPipelineForImage2Image": "pipelines.catalog",
    "AutoPipelineForInpainting": "pipelines.catalog",
    "AutoPipelineForText2Image": "pipelines.catalog",
    "AutoencoderKL": "models.vae",
    "AutoencoderTiny": "models.vae_tiny",
    "CheckpointError": "errors",
    "ControlNetModel": "models.controlnet",
    "DDIMScheduler": "schedulers",
    "DDPMScheduler": "schedulers",
    "DPMSolverMultistepScheduler": "schedulers",
    "DiffusionPipeline": "pipelines.base",
    "EulerAncestralDiscreteScheduler": "schedulers",
    "EulerDiscreteScheduler": "schedulers",
    "FewstepError": "errors",
    "LCMScheduler": "schedulers",
    "LatentConsistencyModelImg2ImgPipeline": "pipelines.catalog",
    "LatentConsistencyModelPipeline": "pipelines.catalog",
    "MotionAdapter": "models.motion",
    "MultiAdapter": "models.t2i_adapter",
    "MultiControlNetModel": "models.controlnet",
    "PNDMScheduler": "schedulers",
    "RequestError": "errors",
    "StableDiffusionAdapterPipeline": "pipelines.catalog",
    "StableDiffusionControlNetImg2ImgPipeline": "pipelines.catalog",
    "StableDiffusionControlNetInpaintPipeline": "pipelines.catalog",
    "StableDiffusionControlNetPipeline": "pipelines.catalog",
    "StableDiffusionImg2ImgPipeline": "pipelines.catalog",
    "StableDiffusionInpaintPipeline": "pipelines.catalog",
    "StableDiffusionPipeline": "pipelines.catalog",
    "StableDiffusionXLAdapterPipeline": "pipelines.catalog",
    "StableDiffusionXLControlNetImg2ImgPipeline": "pipelines.catalog",
    "StableDiffusionXLControlNetInpaintPipeline": "pipelines.catalog",
    "StableDiffusionXLControlNetPipeline": "pipelines.catalog",
    "StableDiffusionXLImg2ImgPipeline": "pipelines.catalog",
    "StableDiffusionXLInpaintPipeline": "pipelines.catalog",
    "StableDiffusionXLPipeline": "pipelines.catalog",
    "T2IAdapter": "models.t2i_adapter",
    "TCDScheduler": "schedulers",
    "UNet2DConditionModel": "models.unet",
    "UNetMotionModel": "models.motion_unet",
    "UnsupportedConfig": "errors",
}

__all__ = [
    "EMBEDDED",
    "AnimateDiffPipeline",
    "AutoPipelineForImage2Image",
    "AutoPipelineForInpainting",
    "AutoPipelineForText2Image",
    "AutoencoderKL",
    "AutoencoderTiny",
    "CheckpointError",
    "ControlNetModel",
    "DDIMScheduler",
    "DDPMScheduler",
    "DPMSolverMultistepScheduler",
    "DiffusionPipeline",
    "EulerAncestralDiscreteScheduler",
    "EulerDiscreteScheduler",
    "FewstepError",
    "LCMScheduler",
    "LatentConsistencyModelImg2ImgPipeline",
    "LatentConsistencyModelPipeline",
    "MotionAdapter",
    "MultiAdapter",
    "MultiControlNetModel",
    "PNDMScheduler",
    "RequestError",
    "StableDiffusionAdapterPipeline",
    "StableDiffusionControlNetImg2ImgPipeline",
    "StableDiffusionControlNetInpaintPipeline",
    "StableDiffusionControlNetPipeline",
    "StableDiffusionImg2ImgPipeline",
    "StableDiffusionInpaintPipeline",
    "StableDiffusionPipeline",
    "StableDiffusionXLAdapterPipeline",
    "StableDiffusionXLControlNetImg2ImgPipeline",
    "StableDiffusionXLControlNetInpaintPipeline",
    "StableDiffusionXLControlNetPipeline",
    "StableDiffusionXLImg2ImgPipeline",
    "StableDiffusionXLInpaintPipeline",
    "StableDiffusionXLPipeline",
    "T2IAdapter",
    "TCDScheduler",
    "UNet2DConditionModel",
    "UNetMotionModel",
    "UnsupportedConfig",
    "__version__",
]


def __getattr__(name: str) -> Any:
    if name not in _MODULES:
        raise AttributeError(f"module 'fewstep' has no attribute {name!r}")
    with first_import("torch"):
        value = getattr(importlib.import_module(f".{_MODULES[name]}", __name__), name)
    globals()[name] = value
    return value


def __dir__() -> list[str]:
    return sorted({*globals(), *_MODULES})
