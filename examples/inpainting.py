"""The right half of a picture drawn anew; the left half stays as it is, to the pixel."""

import torch
from PIL import Image, ImageDraw

from fewstep import EMBEDDED, AutoPipelineForInpainting, AutoPipelineForText2Image

MODEL = EMBEDDED  # or "SimianLuo/LCM_Dreamshaper_v7"

draw = AutoPipelineForText2Image.from_pretrained(MODEL)
picture = draw("a red apple", guidance_scale=4.0, generator=torch.manual_seed(7)).images[0]
mask = Image.new("L", picture.size)  # white is drawn anew
ImageDraw.Draw(mask).rectangle((picture.width // 2, 0, picture.width, picture.height), fill=255)

paint = AutoPipelineForInpainting.from_pipe(draw)
image = paint(
    "a green apple",
    image=picture,
    mask_image=mask,
    num_inference_steps=4,
    guidance_scale=4.0,
    paste_back=True,
    generator=torch.manual_seed(7),
).images[0]
image.save("inpainting.png")
