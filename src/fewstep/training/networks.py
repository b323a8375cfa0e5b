"""The networks of a distillation: the base, and the student that is made from it."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor, nn
from torch.utils.checkpoint import checkpoint

from ..diffusion import NoiseSchedule
from ..errors import RequestError
from ..models.layers import ResnetBlock, TransformerBlock
from ..models.unet import UNet2DConditionModel
from ..models.vae import AutoencoderKL
from ..pipelines.base import DiffusionPipeline
from ..pipelines.embedded import embedded_teacher
from ..pipelines.families import StableDiffusion
from ..schedulers import DDIMScheduler
from .batch import Batch
from .config import EMBEDDED_TEACHER, FromBase, place_of
from .draws import Draws


def load_base(settings: FromBase, folder: str) -> StableDiffusion:
    """The teacher's pipeline, in float32 on the CPU, with DDIM for drawing beside the student.

    "{folder}" in the settings' paths stands for `folder`, where the other phases of a model are.
    """
    pipe = embedded_teacher() if settings.base == EMBEDDED_TEACHER else read_base(settings, folder)
    changes = {"prediction_type": settings.prediction_type} if settings.prediction_type else {}
    pipe.scheduler = DDIMScheduler.from_config(pipe.scheduler.config, **changes)
    for part in pipe.modules:
        part.requires_grad_(False).eval()
    pipe.set_progress_bar_config(disable=True)
    return pipe


def schedule_of(pipe: StableDiffusion) -> NoiseSchedule:
    """The noise schedule of a base, on its device."""
    assert isinstance(pipe.scheduler, DDIMScheduler)  # as `load_base` made it
    return pipe.scheduler.noise_schedule.to(pipe.unet.device)


def read_base(settings: FromBase, folder: str) -> StableDiffusion:
    """The pipeline of a folder, a repository or a file, with the parts that replace its own."""
    options: dict[str, Any] = {"torch_dtype": torch.float32}
    parts: dict[str, Any] = {"unet": UNet2DConditionModel, "vae": AutoencoderKL}
    for name, kind in parts.items():
        if place := place_of(getattr(settings, name), folder):
            options[name] = kind.from_pretrained(place, torch_dtype=torch.float32)
    options |= {n: getattr(settings, n) for n in ("variant", "revision") if getattr(settings, n)}
    base = place_of(settings.base, folder)
    load = "from_single_file" if base.endswith(".safetensors") else "from_pretrained"
    pipe: Any = getattr(DiffusionPipeline, load)(base, **options)
    if not isinstance(pipe, StableDiffusion):
        raise RequestError(
            f"base={base!r} is a {type(pipe).__name__}; give a pipeline of Stable Diffusion, SDXL "
            "or SSD-1B"
        )
    return pipe


def student_of(teacher: UNet2DConditionModel, guidance_dim: int) -> UNet2DConditionModel:
    """A copy of the teacher that trains, with a guidance input whose projection is zero.

    Zero, so that at the start the student is the teacher for every omega (LCM, section 4.1). A
    teacher that has such an input already, and `guidance_dim` 0, leave the layers as they are.
    """
    config = {k: v for k, v in dict(teacher.config).items() if not k.startswith("_")}
    added = guidance_dim if teacher.config.time_cond_proj_dim is None else 0
    if added:
        config["time_cond_proj_dim"] = guidance_dim
    student = UNet2DConditionModel(**config)
    state = {name: tensor.detach() for name, tensor in teacher.state_dict().items()}
    if added:
        projection = student.time_embedding.cond_proj
        assert projection is not None
        nn.init.zeros_(projection.weight)
        state["time_embedding.cond_proj.weight"] = projection.weight.data
    student.load_state_dict(state)
    return student.to(teacher.device).train()


def save_memory(network: nn.Module) -> None:
    """Let residual and transformer blocks compute their activations again on the way back."""
    for module in network.modules():
        if isinstance(module, (ResnetBlock, TransformerBlock)):
            module.forward = _again(module.forward)  # type: ignore[method-assign]


def _again(forward: Any) -> Any:
    def recomputed(*args: Any) -> Any:
        if not torch.is_grad_enabled():
            return forward(*args)
        return checkpoint(forward, *args, use_reentrant=False)

    return recomputed


def store_as(network: nn.Module, dtype: torch.dtype) -> None:
    """Hold the frozen weights of linear layers and convolutions in autocast's dtype.

    Autocast would round them so at every call; the results are the same, in half the memory.
    """
    for module in network.modules():
        if isinstance(module, (nn.Linear, nn.Conv2d)):
            for parameter in module.parameters(recurse=False):
                if not parameter.requires_grad:
                    parameter.data = parameter.data.to(dtype)


def compile_blocks(network: nn.Module) -> None:
    """Compile every residual and transformer block: quicker to compile than the whole."""
    for module in network.modules():
        if isinstance(module, (ResnetBlock, TransformerBlock)):
            module.compile()


@torch.no_grad()
def check_prediction_type(pipe: StableDiffusion, batch: Batch) -> None:
    """Raises RequestError if the base's outputs are plainly of another prediction type.

    At three quarters of the noise a trained network's output goes with the noise, or with the
    velocity; the one that it is said to put out must not be the worse by far.
    """
    schedule = schedule_of(pipe)
    noise = Draws(0, 0, range(len(batch.z)), batch.z.device).normal(batch.z.shape[1:])
    t = torch.full((len(noise),), len(schedule) * 3 // 4, device=noise.device)
    z_t = schedule.add_noise(batch.z, noise, t)
    embeds = {}
    if pipe.unet.config.time_cond_proj_dim is not None:
        width = pipe.unet.config.time_cond_proj_dim
        embeds["timestep_cond"] = noise.new_zeros(len(noise), width, dtype=pipe.unet.dtype)
    output = pipe.unet(
        z_t.to(pipe.unet.dtype), t, **batch.condition.to(pipe.unet.dtype).arguments, **embeds
    ).sample.float()
    likeness = {
        "epsilon": correlation(output, noise),
        "v_prediction": correlation(output, schedule.velocity(batch.z, noise, t)),
    }
    declared = schedule.prediction_type
    best = max(likeness, key=lambda kind: likeness[kind])
    # Pictures unlike those that it was trained on leave both low, and prove nothing.
    plain = likeness[best] > 0.6 and declared in likeness
    if plain and likeness[best] > likeness[declared] + 0.2:
        raise RequestError(
            f"prediction_type is {declared!r}, but the network's output goes with {best!r} "
            f"(correlation {likeness[best]:.2f} against {likeness[declared]:.2f}); "
            f"set consistency.prediction_type={best!r}"
        )


def correlation(a: Tensor, b: Tensor) -> float:
    """Pearson's correlation of all values of two tensors."""
    return torch.corrcoef(torch.stack([a.flatten(), b.flatten()]))[0, 1].item()
