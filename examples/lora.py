"""A LoRA on the model, at two weights; and the model without it again."""

import torch

from fewstep import EMBEDDED, DiffusionPipeline
from fewstep.utils import make_image_grid

MODEL = EMBEDDED  # or "stabilityai/stable-diffusion-xl-base-1.0"
LORA = EMBEDDED.parent / "fewstep-emoji-blueprint"  # or a repository, or a .safetensors file

pipe = DiffusionPipeline.from_pretrained(MODEL)
pipe.load_lora_weights(LORA, adapter_name="blueprint")
pictures = []
for weight in (0.0, 0.5, 1.0):
    pipe.set_adapters("blueprint", adapter_weights=weight)
    generator = torch.Generator().manual_seed(7)
    result = pipe("a house", num_inference_steps=4, guidance_scale=4.0, generator=generator)
    pictures += result.images
pipe.unload_lora_weights()
make_image_grid(pictures, rows=1, cols=3).save("lora.png")
