"""The same model with another sampler; few-step kin of LCMs bring their own."""

import torch

from fewstep import EMBEDDED, StableDiffusionPipeline, TCDScheduler

MODEL = EMBEDDED  # or a checkpoint of TCD or Hyper-SD

pipe = StableDiffusionPipeline.from_pretrained(MODEL)
pipe.scheduler = TCDScheduler.from_config(pipe.scheduler.config)
image = pipe(
    "a red apple",
    num_inference_steps=4,
    guidance_scale=4.0,
    eta=0.3,
    generator=torch.Generator().manual_seed(7),
).images[0]
image.save("other_samplers.png")
