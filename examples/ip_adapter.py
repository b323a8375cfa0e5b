"""A picture of a text and of another picture, which an IP-Adapter reads as a prompt."""

import torch
from transformers import CLIPVisionConfig, CLIPVisionModelWithProjection

from fewstep import EMBEDDED, DiffusionPipeline

MODEL = EMBEDDED  # or any Stable Diffusion 1.5
TOKENS, SEEN = 4, 32  # of a picture; channels of what the vision encoder says of it


def untrained(unet):
    """Random weights that fit the small model, in the layout of the published files."""
    width = unet.config.cross_attention_dim
    layers = {n: m for n, m in unet.named_modules() if n.endswith("attn2.to_k")}
    ordered = sorted(layers, key=lambda name: ("down", "up", "mid").index(name.split("_")[0]))
    state = {
        "image_proj.proj.weight": torch.randn(TOKENS * width, SEEN),
        "image_proj.proj.bias": torch.zeros(TOKENS * width),
        "image_proj.norm.weight": torch.ones(width),
        "image_proj.norm.bias": torch.zeros(width),
    }
    for index, name in enumerate(ordered):
        for letter in "kv":
            key = f"ip_adapter.{2 * index + 1}.to_{letter}_ip.weight"
            state[key] = 0.05 * torch.randn(layers[name].out_features, width)
    return state


pipe = DiffusionPipeline.from_pretrained(MODEL)
picture = pipe("a red apple", guidance_scale=4.0, generator=torch.manual_seed(7)).images[0]

# For Stable Diffusion 1.5 both come from the hub:
# pipe.load_ip_adapter("h94/IP-Adapter", "models", "ip-adapter_sd15.safetensors")
config = CLIPVisionConfig(
    hidden_size=32,
    intermediate_size=64,
    num_hidden_layers=2,
    num_attention_heads=4,
    image_size=64,
    projection_dim=SEEN,
)
pipe.image_encoder = CLIPVisionModelWithProjection(config).eval()
pipe.load_ip_adapter(untrained(pipe.unet))
pipe.set_ip_adapter_scale(0.6)

image = pipe(
    "a green apple",
    ip_adapter_image=picture,
    num_inference_steps=4,
    guidance_scale=4.0,
    generator=torch.manual_seed(7),
).images[0]
image.save("ip_adapter.png")
