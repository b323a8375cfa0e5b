"""A plain server of diffusers' pipelines: each picture waits for the one before.

    python benchmarks/serve_peer.py --model FOLDER --device cpu --dtype float32

FastAPI answers in its pool of threads, and a lock keeps the pipelines to one thread at a time, as
they must be: they change while they draw. Tasks share their networks. It takes the requests that
`benchmarks/serve.py` sends to fewstep.
"""

from __future__ import annotations

import argparse
import base64
import io
import socket
import threading
from typing import Any

import diffusers
import PIL.Image
import torch
import uvicorn
from fastapi import FastAPI, Response
from pydantic import BaseModel

NAME = "diffusers"


class Asked(BaseModel):
    """A picture."""

    prompt: str
    seed: int
    steps: int
    guidance_scale: float
    image: str | None = None
    mask: str | None = None
    strength: float | None = None


def pipelines(model: str, device: str, dtype: torch.dtype) -> dict[str, Any]:
    """Pipelines of one model by task.

    Without one that inpaints with the model's channels, a mask's picture is drawn from the image
    whole, which is less work.
    """
    text = diffusers.DiffusionPipeline.from_pretrained(model, torch_dtype=dtype).to(device)
    found = {"text": text, "image": diffusers.AutoPipelineForImage2Image.from_pipe(text)}
    if text.unet.config.in_channels not in (4, 9):
        found["inpaint"] = found["image"]
    elif isinstance(text, diffusers.LatentConsistencyModelPipeline):  # there is none of its own
        found["inpaint"] = diffusers.StableDiffusionInpaintPipeline(
            **text.components, requires_safety_checker=False
        )
    else:
        found["inpaint"] = diffusers.AutoPipelineForInpainting.from_pipe(text)
    for pipe in found.values():
        pipe.set_progress_bar_config(disable=True)
    return found


def drawn(pipes: dict[str, Any], asked: Asked) -> PIL.Image.Image:
    """The picture; what a mask leaves out is the image's."""
    given: dict[str, Any] = {
        "prompt": asked.prompt,
        "num_inference_steps": asked.steps,
        "guidance_scale": asked.guidance_scale,
        "generator": torch.Generator("cpu").manual_seed(asked.seed),
    }
    if asked.image is None:
        return pipes["text"](**given).images[0]
    image = unpacked(asked.image, "RGB")
    given |= {"image": image, "strength": asked.strength}
    if asked.mask is None:
        return pipes["image"](**given).images[0]
    mask = unpacked(asked.mask, "L")
    if pipes["inpaint"] is not pipes["image"]:
        given |= {"width": image.width, "height": image.height, "mask_image": mask}
    made = pipes["inpaint"](**given).images[0]
    return PIL.Image.composite(made, image, mask)


def unpacked(text: str, mode: str) -> PIL.Image.Image:
    """The picture of base64."""
    return PIL.Image.open(io.BytesIO(base64.b64decode(text))).convert(mode)


def served(pipes: dict[str, Any]) -> FastAPI:
    """The app."""
    app, lock = FastAPI(), threading.Lock()

    @app.post("/v1/generate")
    def generate(asked: Asked) -> Response:
        with lock:
            picture = drawn(pipes, asked)
        file = io.BytesIO()
        picture.save(file, "PNG")
        return Response(file.getvalue(), media_type="image/png")

    return app


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.partition("\n")[0])
    parser.add_argument("--model", required=True)
    parser.add_argument("--device", default="cpu")
    parser.add_argument("--dtype", default="float32")
    parser.add_argument("--port", type=int, default=0)
    parser.add_argument("--threads", type=int, default=0, help="0: torch's own choice")
    options = parser.parse_args()
    if options.threads:
        torch.set_num_threads(options.threads)
    diffusers.utils.logging.set_verbosity_error()
    pipes = pipelines(options.model, options.device, getattr(torch, options.dtype))
    with socket.create_server(("127.0.0.1", options.port), backlog=512) as at:
        print(f"{NAME} draws at http://127.0.0.1:{at.getsockname()[1]}", flush=True)
        config = uvicorn.Config(served(pipes), log_level="warning", access_log=False)
        uvicorn.Server(config).run(sockets=[at])


if __name__ == "__main__":
    main()
