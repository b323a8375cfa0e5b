"""What each of four steps predicts, side by side; the last is the picture."""

import torch

from fewstep import EMBEDDED, LatentConsistencyModelPipeline
from fewstep.utils import PreviewCallback, make_image_grid

MODEL = EMBEDDED  # or "SimianLuo/LCM_Dreamshaper_v7"

steps = []
# Quicker, with models of Stable Diffusion's latents:
# PreviewCallback(show, vae=AutoencoderTiny.from_pretrained("madebyollin/taesd"))
callback = PreviewCallback(lambda index, pictures: steps.append(pictures[0]))

pipe = LatentConsistencyModelPipeline.from_pretrained(MODEL)
pipe(
    "a red apple",
    num_inference_steps=4,
    guidance_scale=4.0,
    generator=torch.Generator().manual_seed(7),
    callback_on_step_end=callback,
)
make_image_grid(steps, rows=1, cols=len(steps)).save("previews.png")
