"""A picture from one file of weights, as A1111 and ComfyUI have them.

    python single_file.py dreamshaper_8.safetensors [CONFIG]

CONFIG, a folder in diffusers' layout, is for models of unusual sizes only.
"""

import sys

import torch

from fewstep import DiffusionPipeline

FILE, *CONFIG = sys.argv[1:]

pipe = DiffusionPipeline.from_single_file(FILE, config=next(iter(CONFIG), None))
generator = torch.Generator().manual_seed(7)
image = pipe("a red apple", num_inference_steps=20, generator=generator).images[0]
image.save("single_file.png")
