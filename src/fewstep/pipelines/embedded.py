"""The teacher of the embedded model, which comes as what turns the one into the other."""

from __future__ import annotations

import torch

from .. import EMBEDDED
from ..models.unet import UNet2DConditionModel
from ..schedulers import DDIMScheduler
from .catalog import LatentConsistencyModelPipeline, StableDiffusionPipeline

TEACHER = EMBEDDED.parent / "fewstep-emoji-teacher"


def embedded_teacher(torch_dtype: torch.dtype = torch.float32) -> StableDiffusionPipeline:
    """The diffusion model that the embedded model was distilled from, to one per cent.

    It is the embedded model without its guidance input, and a LoRA (tools/export_teacher.py).
    """
    lcm = LatentConsistencyModelPipeline.from_pretrained(EMBEDDED, torch_dtype=torch_dtype)
    config = {key: value for key, value in dict(lcm.unet.config).items() if key[0] != "_"}
    unet = UNet2DConditionModel(**config | {"time_cond_proj_dim": None})
    state = lcm.unet.state_dict()
    del state["time_embedding.cond_proj.weight"]
    unet.load_state_dict(state)
    scheduler = DDIMScheduler.from_config(lcm.scheduler.config)
    parts = lcm.components | {"unet": unet.to(torch_dtype), "scheduler": scheduler}
    pipe = StableDiffusionPipeline(**parts, **lcm.options)
    pipe.load_lora_weights(TEACHER, adapter_name="teacher")
    pipe.fuse_lora()
    pipe.unload_lora_weights()
    return pipe
