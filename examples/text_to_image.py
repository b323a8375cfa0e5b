"""A picture of a text, in four steps of a latent consistency model."""

import torch

from fewstep import EMBEDDED, LatentConsistencyModelPipeline

MODEL = EMBEDDED  # or "SimianLuo/LCM_Dreamshaper_v7"
PROMPT = "a red apple"

pipe = LatentConsistencyModelPipeline.from_pretrained(MODEL)
generator = torch.Generator().manual_seed(7)
image = pipe(PROMPT, num_inference_steps=4, guidance_scale=4.0, generator=generator).images[0]
image.save("text_to_image.png")
