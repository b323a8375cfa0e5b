"""What a run of the consistency phase will take: bytes on each device, and operations.

Weights are counted by their shapes, activations and operations by a step on the meta device
(`traces`), so nothing is computed and no file but configs is read.
"""

from __future__ import annotations

from collections.abc import Iterable, Mapping
from dataclasses import dataclass
from typing import Any

import torch
from torch import nn

from ..errors import RequestError
from ..models.unet import UNet2DConditionModel
from ..models.vae import AutoencoderKL
from .bases import ENCODERS, Base
from .config import ConsistencyPhase, Recipe, Scenes
from .loop import DTYPES
from .lora_layers import adapters_off, attach
from .networks import save_memory, store_as, student_of
from .traces import Trace, as_on_device, call

FLOAT = 4  # bytes: what is trained, its gradients and averages are float32
MOMENTS = {"adamw": 8.0, "adamw8bit": 2.1}  # bytes of a trained parameter; 8 bits have scales
GIB = 2**30
# Not counted but allowed for: the device's context and libraries, and what its allocator wastes.
ALLOWANCE, WASTE = 1.0 * GIB, 0.3
WORKING, SPARE = "activations", "allowance"


@dataclass(frozen=True)
class Estimate:
    """Bytes on each device by what they hold, and floating-point operations of a step of all."""

    memory: Mapping[str, float]
    operations: float
    parameters: int  # of the network that is made
    trained: int

    @property
    def total(self) -> float:
        """Bytes on each device."""
        return sum(self.memory.values())

    @property
    def least(self) -> float:
        """Bytes that no smaller batch saves."""
        return sum(size for name, size in self.memory.items() if name not in (WORKING, SPARE))


def estimate(recipe: Recipe, base: Base, device: str, devices: int = 1) -> Estimate:
    """The estimate of a recipe on `devices` devices of a kind: "cuda" or "cpu"."""
    settings, run = recipe.settings, recipe.run
    assert isinstance(settings, ConsistencyPhase)
    teacher, student = networks_of(recipe, base)
    trained = size_of(p for p in student.parameters() if p.requires_grad)
    samples = max(1, run.batch // (devices * run.accumulate))
    trace, sheet = traced(recipe, base, teacher, student, device, samples)
    share = devices if run.shard else 1
    gradients = FLOAT * trained
    held = {
        "teacher" if settings.lora is None else "base": bytes_of(teacher.parameters()),
        "student": FLOAT * trained,
        "target": FLOAT * size_of(student.parameters()) if settings.target == "ema" else 0,
        "gradients": gradients,
        "moments": MOMENTS[recipe.optimizer.kind] * trained,
        "average": FLOAT * trained,
    }
    if settings.lora is not None:  # the adapters lie within the base
        held["base"] -= FLOAT * trained
    elif settings.method != "distillation":
        held["teacher"] = 0
    working = max(trace.peak - gradients, sheet)
    memory = {name: bytes_ / share for name, bytes_ in held.items() if bytes_}
    memory["autoencoder and text encoders"] = FLOAT * others(base)
    memory[WORKING] = working
    memory[SPARE] = ALLOWANCE + WASTE * working
    operations = trace.operations * run.accumulate * devices
    return Estimate(memory, operations, size_of(student.parameters()), trained)


def size_of(parameters: Iterable[nn.Parameter]) -> int:
    """The number of numbers."""
    return sum(parameter.numel() for parameter in parameters)


def bytes_of(parameters: Iterable[nn.Parameter]) -> int:
    """The bytes of the numbers, in the precisions that they are held in."""
    return sum(parameter.numel() * parameter.element_size() for parameter in parameters)


def networks_of(recipe: Recipe, base: Base) -> tuple[UNet2DConditionModel, UNet2DConditionModel]:
    """Teacher and student as the phase makes them, on the meta device; one network with a LoRA."""
    settings = recipe.settings
    assert isinstance(settings, ConsistencyPhase)
    lora = settings.lora
    with torch.device("meta"):
        teacher = unet_of(base)
        if lora is None:
            student = student_of(teacher, settings.guidance_dim)
        else:
            attach(teacher, lora.targets, lora.rank, lora.alpha, recipe.seed)
            student = teacher
    if recipe.run.precision in DTYPES:
        store_as(teacher, DTYPES[recipe.run.precision])
    if recipe.run.gradient_checkpointing:
        save_memory(student)
    return teacher, student


def unet_of(base: Base) -> UNet2DConditionModel:
    """The base's UNet on the meta device, frozen."""
    with torch.device("meta"):
        return UNet2DConditionModel.from_config(base.configs["unet"]).requires_grad_(False)


def traced(
    recipe: Recipe,
    base: Base,
    teacher: UNet2DConditionModel,
    student: UNet2DConditionModel,
    device: str,
    samples: int,
) -> tuple[Trace, int]:
    """The trace of `samples` through a step, and the most bytes that a sheet takes."""
    settings, run = recipe.settings, recipe.run
    assert isinstance(settings, ConsistencyPhase)
    side, tokens = latent_side(recipe, base), token_count(base)
    for network in {id(n): n for n in (teacher, student)}.values():
        as_on_device(network, device, run.precision)
    with Trace() as trace:
        if run.accumulate > 1:  # the part before left its gradients
            for parameter in student.parameters():
                parameter.grad = torch.zeros_like(parameter) if parameter.requires_grad else None
        output = call(student, samples, side, tokens)
        with torch.no_grad():
            if settings.method == "distillation":
                rows = samples * (2 if settings.solver_guidance else 1)
                with adapters_off(teacher):
                    for _ in range(1 if settings.solver == "ddim" else 2):
                        call(teacher, rows, side, tokens)
            call(student, samples, side, tokens)  # the target
        torch.autograd.backward(output.square().mean())
    return trace, sheet_bytes(recipe, base, device, side) if run.sheet_steps else 0


def sheet_bytes(recipe: Recipe, base: Base, device: str, side: int) -> int:
    """The most bytes alive while the pictures of a sheet's prompts are decoded."""
    assert isinstance(recipe.settings, ConsistencyPhase)
    vae = autoencoder(base)
    if vae is None:
        return 0
    as_on_device(vae, device, recipe.run.precision)
    shape = (len(recipe.settings.sheet.prompts), vae.config.latent_channels, side, side)
    with Trace() as trace, torch.no_grad():
        vae.decode(torch.empty(shape, device="meta"))
    return trace.peak


def autoencoder(base: Base) -> AutoencoderKL | None:
    """The base's autoencoder on the meta device; None if its config is not known."""
    config = base.configs.get("vae")
    if config is None or config.get("_class_name", "AutoencoderKL") != "AutoencoderKL":
        return None
    with torch.device("meta"):
        return AutoencoderKL.from_config(config)


def others(base: Base) -> int:
    """The parameters of autoencoder and text encoders."""
    vae = autoencoder(base)
    texts = (clip_size(base.configs[part]) for part in ENCODERS if part in base.configs)
    return sum(texts) + (0 if vae is None else size_of(vae.parameters()))


def clip_size(config: Mapping[str, Any]) -> int:
    """The parameters of a CLIP text model, without its projection, by its config."""
    width, hidden = int(config.get("hidden_size", 512)), int(config.get("intermediate_size", 2048))
    layers, words = config.get("num_hidden_layers", 12), config.get("vocab_size", 49408)
    attention, norms = 4 * (width * width + width), 2 * 2 * width
    forward = width * hidden + hidden + hidden * width + width
    places = int(config.get("max_position_embeddings", 77))
    return (int(words) + places) * width + int(layers) * (attention + norms + forward) + 2 * width


def latent_side(recipe: Recipe, base: Base) -> int:
    """The side of a square latent. Raises RequestError if the autoencoder cannot make it."""
    if recipe.size < base.factor or recipe.size % base.factor:
        name = "size" if isinstance(recipe.data, Scenes) else "resolution"
        raise RequestError(
            f"data.{name}={recipe.size} must be a multiple of {base.factor}, the base's pixels a "
            "latent"
        )
    return recipe.size // base.factor


def token_count(base: Base) -> int:
    """The tokens of a text."""
    return int(base.configs.get("text_encoder", {}).get("max_position_embeddings", 77))
