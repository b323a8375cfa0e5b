"""The configs of the models that single files come from, so that loading one needs no network.

A single file holds weights only. What diffusers' folders say beside them stands here, once per
family of models; keys that have their default are left out.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, field
from typing import Any

ConfigDict = Mapping[str, Any]


@dataclass(frozen=True)
class Family:
    """What a model's folder would say: its pipeline, the configs of its components, its options.

    The config of a tokenizer is {"pad_token": ...} for CLIP's own words, or {"folder": ...}. That
    of a ControlNet stands here too, though it comes in a file of its own.
    """

    pipeline: str
    configs: Mapping[str, ConfigDict]
    options: Mapping[str, Any] = field(default_factory=dict)

    def replaced(self, pipeline: str | None = None, **changes: ConfigDict) -> Family:
        """This family with entries of some configs replaced, and perhaps another pipeline."""
        configs = {n: {**config, **changes.get(n, {})} for n, config in self.configs.items()}
        return Family(pipeline or self.pipeline, configs, self.options)


NOISE: ConfigDict = {
    "beta_start": 0.00085,
    "beta_end": 0.012,
    "beta_schedule": "scaled_linear",
    "num_train_timesteps": 1000,
    "clip_sample": False,
    "set_alpha_to_one": False,
    "skip_prk_steps": True,
    "steps_offset": 1,
    "trained_betas": None,
}
PNDM = {"_class_name": "PNDMScheduler", **NOISE}
EULER: ConfigDict = {
    "_class_name": "EulerDiscreteScheduler",
    **NOISE,
    "interpolation_type": "linear",
    "prediction_type": "epsilon",
    "sample_max_value": 1.0,
    "timestep_spacing": "leading",
    "use_karras_sigmas": False,
}
# What the scheduler of a guidance-distilled LCM says differently.
LCM_SCHEDULER: ConfigDict = {
    "_class_name": "LCMScheduler",
    "set_alpha_to_one": True,
    "original_inference_steps": 50,
}

UNET: ConfigDict = {
    "sample_size": 64,
    "in_channels": 4,
    "block_out_channels": (320, 640, 1280, 1280),
    "layers_per_block": 2,
    "cross_attention_dim": 768,
    "attention_head_dim": 8,
}
UNET_2: ConfigDict = {
    **UNET,
    "cross_attention_dim": 1024,
    "attention_head_dim": (5, 10, 20, 20),
    "use_linear_projection": True,
}
UNET_XL: ConfigDict = {
    "sample_size": 128,
    "in_channels": 4,
    "down_block_types": ("DownBlock2D", "CrossAttnDownBlock2D", "CrossAttnDownBlock2D"),
    "up_block_types": ("CrossAttnUpBlock2D", "CrossAttnUpBlock2D", "UpBlock2D"),
    "block_out_channels": (320, 640, 1280),
    "layers_per_block": 2,
    "cross_attention_dim": 2048,
    "transformer_layers_per_block": (1, 2, 10),
    "attention_head_dim": (5, 10, 20),
    "use_linear_projection": True,
    "addition_embed_type": "text_time",
    "addition_time_embed_dim": 256,
    "projection_class_embeddings_input_dim": 2816,
}
UNET_SSD_1B: ConfigDict = {
    **UNET_XL,
    "mid_block_type": "UNetMidBlock2D",
    "transformer_layers_per_block": (0, (2, 2), (4, 4)),
    "reverse_transformer_layers_per_block": ((4, 4, 10), (2, 1, 1), 1),
}
UNET_REFINER: ConfigDict = {
    **UNET_XL,
    "down_block_types": ("DownBlock2D", *("CrossAttnDownBlock2D",) * 2, "DownBlock2D"),
    "up_block_types": ("UpBlock2D", *("CrossAttnUpBlock2D",) * 2, "UpBlock2D"),
    "block_out_channels": (384, 768, 1536, 1536),
    "cross_attention_dim": 1280,
    "transformer_layers_per_block": 4,
    "attention_head_dim": (6, 12, 24, 24),
    "projection_class_embeddings_input_dim": 2560,
}

VAE: ConfigDict = {
    "block_out_channels": (128, 256, 512, 512),
    "down_block_types": ("DownEncoderBlock2D",) * 4,
    "up_block_types": ("UpDecoderBlock2D",) * 4,
    "layers_per_block": 2,
    "latent_channels": 4,
    "sample_size": 512,
    "scaling_factor": 0.18215,
}
VAE_XL = {**VAE, "sample_size": 1024, "scaling_factor": 0.13025}

CONTROLNET: ConfigDict = {
    "block_out_channels": UNET["block_out_channels"],
    "layers_per_block": 2,
    "cross_attention_dim": 768,
    "attention_head_dim": 8,
    "conditioning_embedding_out_channels": (16, 32, 96, 256),
}
CONTROLNET_2 = {
    **CONTROLNET,
    "cross_attention_dim": 1024,
    "attention_head_dim": UNET_2["attention_head_dim"],
    "use_linear_projection": True,
}

TEXT: ConfigDict = {  # CLIP ViT-L/14
    "hidden_size": 768,
    "intermediate_size": 3072,
    "num_hidden_layers": 12,
    "num_attention_heads": 12,
    "hidden_act": "quick_gelu",
    "projection_dim": 768,
    "vocab_size": 49408,
    "max_position_embeddings": 77,
    "bos_token_id": 0,
    "eos_token_id": 2,  # by an old misnomer; read as: the largest id
    "pad_token_id": 1,
}
TEXT_2: ConfigDict = {  # OpenCLIP ViT-H/14 without its last layer
    **TEXT,
    "hidden_size": 1024,
    "intermediate_size": 4096,
    "num_hidden_layers": 23,
    "num_attention_heads": 16,
    "hidden_act": "gelu",
    "projection_dim": 512,
}
TEXT_XL_2: ConfigDict = {  # OpenCLIP ViT-bigG/14
    **TEXT,
    "hidden_size": 1280,
    "intermediate_size": 5120,
    "num_hidden_layers": 32,
    "num_attention_heads": 20,
    "hidden_act": "gelu",
    "projection_dim": 1280,
}
END_PADS: ConfigDict = {"pad_token": "<|endoftext|>"}
BANG_PADS: ConfigDict = {"pad_token": "!"}

SD_1 = Family(
    "StableDiffusionPipeline",
    {
        "vae": VAE,
        "text_encoder": TEXT,
        "tokenizer": END_PADS,
        "unet": UNET,
        "scheduler": PNDM,
        "controlnet": CONTROLNET,
    },
    {"requires_safety_checker": False},
)
SD_2_BASE = Family(
    "StableDiffusionPipeline",
    {
        "vae": {**VAE, "sample_size": 768},
        "text_encoder": TEXT_2,
        "tokenizer": BANG_PADS,
        "unet": UNET_2,
        "scheduler": PNDM,
        "controlnet": CONTROLNET_2,
    },
    {"requires_safety_checker": False},
)
SDXL = Family(
    "StableDiffusionXLPipeline",
    {
        "vae": VAE_XL,
        "text_encoder": TEXT,
        "text_encoder_2": TEXT_XL_2,
        "tokenizer": END_PADS,
        "tokenizer_2": BANG_PADS,
        "unet": UNET_XL,
        "scheduler": EULER,
    },
    {"force_zeros_for_empty_prompt": True},
)
REFINER = Family(
    "StableDiffusionXLImg2ImgPipeline",
    {
        "vae": VAE_XL,
        "text_encoder_2": TEXT_XL_2,
        "tokenizer_2": BANG_PADS,
        "unet": UNET_REFINER,
        "scheduler": EULER,
    },
    {
        "text_encoder": None,
        "tokenizer": None,
        "force_zeros_for_empty_prompt": False,
        "requires_aesthetics_score": True,
    },
)

# Name -> family. Of several that fit a file, the first is taken.
FAMILIES: dict[str, Family] = {
    "sd1": SD_1,
    "sd1-inpainting": SD_1.replaced("StableDiffusionInpaintPipeline", unet={"in_channels": 9}),
    "sd2": SD_2_BASE.replaced(
        unet={"sample_size": 96}, scheduler={"prediction_type": "v_prediction"}
    ),
    "sd2-base": SD_2_BASE,
    "sd2-inpainting": SD_2_BASE.replaced("StableDiffusionInpaintPipeline", unet={"in_channels": 9}),
    "sdxl": SDXL,
    "sdxl-inpainting": SDXL.replaced("StableDiffusionXLInpaintPipeline", unet={"in_channels": 9}),
    "sdxl-refiner": REFINER,
    "ssd-1b": SDXL.replaced(unet=UNET_SSD_1B),
}
