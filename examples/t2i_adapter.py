"""A picture of a text that follows edges, by an adapter that looks at them once."""

import torch
from PIL import Image, ImageOps

from fewstep import EMBEDDED, DiffusionPipeline, StableDiffusionAdapterPipeline, T2IAdapter
from fewstep.annotate import canny
from fewstep.utils import make_image_grid

MODEL = EMBEDDED  # or any Stable Diffusion 1.5; SDXL has StableDiffusionXLAdapterPipeline
ADAPTER = EMBEDDED.parent / "fewstep-emoji-edges"  # or "TencentARC/t2iadapter_canny_sd15v2"


def drawn(pipe, prompt, **arguments):
    generator = torch.Generator().manual_seed(7)
    arguments |= {"num_inference_steps": 4, "guidance_scale": 4.0, "generator": generator}
    return pipe(prompt, **arguments).images[0]


pipe = DiffusionPipeline.from_pretrained(MODEL)
small = ImageOps.mirror(drawn(pipe, "a penguin")).resize((44, 44))
sketch = Image.new("RGB", (64, 64), "white")
sketch.paste(small, (16, 16))
edges = canny(sketch, 60, 120)

adapter = T2IAdapter.from_pretrained(ADAPTER)
steered = StableDiffusionAdapterPipeline(
    **pipe.components, adapter=adapter, requires_safety_checker=False
)
pictures = [drawn(pipe, "a penguin"), edges, drawn(steered, "a penguin", image=edges)]
make_image_grid(pictures, rows=1, cols=3).save("t2i_adapter.png")
