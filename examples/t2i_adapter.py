"""A picture of a text that follows edges, by an adapter that looks at them once."""

from fewstep import EMBEDDED, DiffusionPipeline, StableDiffusionAdapterPipeline, T2IAdapter
from fewstep.annotate import canny

MODEL = EMBEDDED  # or any Stable Diffusion 1.5; SDXL has StableDiffusionXLAdapterPipeline

pipe = DiffusionPipeline.from_pretrained(MODEL)
edges = canny(pipe("a red car", guidance_scale=4.0).images[0])
# Untrained, to fit the small model; for SDXL:
# T2IAdapter.from_pretrained("TencentARC/t2i-adapter-canny-sdxl-1.0")
adapter = T2IAdapter(
    channels=[64, 128, 192, 192], downscale_factor=8, adapter_type="full_adapter_xl"
)
steered = StableDiffusionAdapterPipeline(
    **pipe.components, adapter=adapter, requires_safety_checker=False
)
image = steered(
    "a blue car",
    image=edges,
    num_inference_steps=4,
    guidance_scale=4.0,
    adapter_conditioning_scale=0.1,
).images[0]
image.save("t2i_adapter.png")
