"""The LCM pipelines under the module path that diffusers gives them."""

from .catalog import LatentConsistencyModelImg2ImgPipeline, LatentConsistencyModelPipeline

__all__ = ["LatentConsistencyModelImg2ImgPipeline", "LatentConsistencyModelPipeline"]
