"""A picture of a text that follows the edges of another picture."""

from fewstep import (
    EMBEDDED,
    ControlNetModel,
    DiffusionPipeline,
    StableDiffusionControlNetPipeline,
)
from fewstep.annotate import canny

MODEL = EMBEDDED  # or "SimianLuo/LCM_Dreamshaper_v7"

pipe = DiffusionPipeline.from_pretrained(MODEL)
edges = canny(pipe("a red car", guidance_scale=4.0).images[0])
# Untrained, so it steers nothing yet; for Stable Diffusion 1.5:
# ControlNetModel.from_pretrained("lllyasviel/sd-controlnet-canny")
net = ControlNetModel.from_unet(pipe.unet, conditioning_embedding_out_channels=(16, 32, 64))
steered = StableDiffusionControlNetPipeline(
    **pipe.components, controlnet=net, requires_safety_checker=False
)
image = steered("a blue car", image=edges, num_inference_steps=4, guidance_scale=4.0).images[0]
image.save("controlnet.png")
