"""A LoRA on the model, with a weight; and the model without it again."""

import torch

from fewstep import EMBEDDED, DiffusionPipeline

MODEL = EMBEDDED  # or "stabilityai/stable-diffusion-xl-base-1.0"
LAYER = "down_blocks.1.attentions.0.transformer_blocks.0.attn2.to_k"

pipe = DiffusionPipeline.from_pretrained(MODEL)
outputs, inputs = pipe.unet.get_submodule(LAYER).weight.shape
lora = {  # random; or a file: pipe.load_lora_weights("latent-consistency/lcm-lora-sdxl")
    f"unet.{LAYER}.lora_A.weight": torch.randn(4, inputs),
    f"unet.{LAYER}.lora_B.weight": torch.randn(outputs, 4),
}
pipe.load_lora_weights(lora, adapter_name="mine")
pipe.set_adapters("mine", adapter_weights=0.5)
pipe("a red apple", guidance_scale=4.0).images[0].save("lora.png")
pipe.unload_lora_weights()
