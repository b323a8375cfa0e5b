"""Words with weights, words learnt from pictures, and prompts of any length."""

import torch

from fewstep import EMBEDDED, DiffusionPipeline

MODEL = EMBEDDED  # or any Stable Diffusion

pipe = DiffusionPipeline.from_pretrained(MODEL)
vectors = 0.02 * torch.randn(2, pipe.text_encoder.config.hidden_size)  # or a .safetensors file
pipe.load_textual_inversion({"<my-style>": vectors})
image = pipe(
    "a (red:1.2) apple, <my-style> BREAK [a tree]",
    weighted_prompt=True,
    num_inference_steps=4,
    guidance_scale=4.0,
    generator=torch.Generator().manual_seed(7),
).images[0]
image.save("prompts.png")
