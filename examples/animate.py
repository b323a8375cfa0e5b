"""A short video whose text changes on the way."""

import torch

from fewstep import EMBEDDED, AnimateDiffPipeline, LCMScheduler, MotionAdapter
from fewstep.utils import export_to_gif

MODEL = EMBEDDED  # or any Stable Diffusion 1.5
# Untrained; for Stable Diffusion 1.5:
# MotionAdapter.from_pretrained("guoyww/animatediff-motion-adapter-v1-5-2")
adapter = MotionAdapter(block_out_channels=(64, 128, 192), motion_layers_per_block=1)

pipe = AnimateDiffPipeline.from_pretrained(MODEL, motion_adapter=adapter)
pipe.scheduler = LCMScheduler.from_config(pipe.scheduler.config)
frames = pipe(
    prompt={0: "a red apple", 7: "a green apple"},
    num_frames=8,
    num_inference_steps=4,
    guidance_scale=4.0,
    generator=torch.Generator().manual_seed(0),
).frames[0]
export_to_gif(frames, "animate.gif")
