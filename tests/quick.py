"""A tiny pipeline's loop and decoding without text or pictures, for what makes them quick."""

from __future__ import annotations

from types import SimpleNamespace
from typing import Any

import torch
from conftest import LCM_UNET, UNET, VAE
from torch import Tensor

from fewstep import AutoencoderKL, UNet2DConditionModel
from fewstep.diffusion import guidance_embedding
from fewstep.pipelines.denoise import Conditioning, Job, denoise
from fewstep.pipelines.speed import Speed
from fewstep.random import randn

ROWS = 2
SMALL = {  # one level, with attention
    "block_out_channels": (8,),
    "down_block_types": ("CrossAttnDownBlock2D",),
    "up_block_types": ("CrossAttnUpBlock2D",),
}


class Quick(Speed):
    """A UNet, a VAE and a scheduler; `draw` is a call of a pipeline."""

    def __init__(self, scheduler: Any, embedded: bool = False, graphs: Any = None) -> None:
        torch.manual_seed(0)
        self.unet = UNet2DConditionModel(**(LCM_UNET if embedded else UNET) | SMALL).eval()
        self.vae = AutoencoderKL(**VAE).eval()
        self.scheduler = scheduler
        self.embedded = embedded
        self._graphs = graphs
        self.advanced = 0

    def job(
        self,
        steps: int = 3,
        guidance: float = 1.0,
        seed: int = 0,
        rows: int = ROWS,
        device: str | torch.device = "cpu",
        eta: float = 0.0,
        dtype: torch.dtype = torch.float32,
    ) -> Job:
        """A job whose text and noise are drawn by `seed`, row by row."""
        g = [torch.Generator().manual_seed(seed + row) for row in range(rows)]
        plan = self.scheduler.plan(steps)
        update = self.scheduler.updater(plan)
        if self.scheduler.takes_eta:
            from functools import partial

            update = partial(update, eta=eta)
        text = randn((rows, 7, 32), g, device, dtype)
        w = guidance_embedding(torch.full((rows,), guidance - 1, device=device), 32)
        doubles = guidance > 1 and not self.embedded
        job = Job(
            cond=Conditioning(text, w=w.to(dtype) if self.embedded else None),
            uncond=Conditioning(torch.zeros_like(text)) if doubles else None,
            guidance_scale=guidance,
            plan=plan,
            update=update,
            shape=(rows, self.unet.config.in_channels, 8, 8),
            dtype=dtype,
            generator=g,
            start_scale=self.scheduler.start_scale(plan),
        )
        return job.from_noise()

    def draw(self, job: Job, callback: Any = None, eta: float = 0.0) -> Tensor:
        """z_0 by the quick way."""
        request: Any = SimpleNamespace(callback_on_step_end=callback, eta=eta)

        def advance(steps: int) -> None:
            self.advanced += steps

        return self.loop(self.unet, job, request, lambda step: step, advance)

    def plainly(self, job: Job) -> Tensor:
        """z_0 by the loop alone."""
        return denoise(self.unet, job)

    def on(self, device: torch.device) -> Quick:
        """Itself on a device."""
        self.unet.to(device)
        self.vae.to(device)
        return self
