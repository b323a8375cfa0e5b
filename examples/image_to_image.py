"""A picture of a text, made from another picture."""

import torch

from fewstep import EMBEDDED, AutoPipelineForImage2Image, AutoPipelineForText2Image

MODEL = EMBEDDED  # or "SimianLuo/LCM_Dreamshaper_v7"

draw = AutoPipelineForText2Image.from_pretrained(MODEL)
first = draw("a red apple", guidance_scale=4.0, generator=torch.manual_seed(7)).images[0]

change = AutoPipelineForImage2Image.from_pipe(draw)
image = change(
    "a green apple",
    image=first,
    strength=0.7,
    num_inference_steps=4,
    guidance_scale=4.0,
    generator=torch.manual_seed(7),
).images[0]
image.save("image_to_image.png")
