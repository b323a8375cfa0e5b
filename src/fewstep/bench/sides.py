"""Who does the work. A library is imported in the process of its side alone.

A side is a loader: a function of a Setting that returns what can be run. All of PyTorch's sides
speak diffusers' language, so they differ in the library and in what is changed after loading.
"""

from __future__ import annotations

import importlib
import importlib.util
from collections.abc import Callable, Mapping
from dataclasses import dataclass, replace
from functools import partial
from pathlib import Path
from types import MappingProxyType
from typing import Any

import numpy as np

from ..errors import RequestError
from .work import DTYPES, STRENGTH, Setting, Work

LORA = "pytorch_lora_weights.safetensors"
TIME = 499  # of the fixed inputs of a UNet


@dataclass(frozen=True)
class Loaded:
    """A side that is ready: `run(seed)` is timed, `output(seed)` (float32) is compared.

    `draws` is the dtype that its noise is drawn in: pictures of one seed differ where it differs.
    `converted` says that loading wrote files for the next time, so that this process is no measure.
    """

    run: Callable[[int], Any]
    output: Callable[[int], np.ndarray]
    device: str = "cpu"
    draws: str = "float32"
    converted: bool = False

    def wait(self) -> None:
        """Returns when the device has done all that it was told."""
        if self.device.startswith(("cuda", "mps")):
            getattr(importlib.import_module("torch"), self.device.partition(":")[0]).synchronize()


@dataclass(frozen=True)
class Side:
    """A name, `module:function` of its loader, the packages it needs, its dtype if not the work's.

    `only` are the dtypes that it can compute in, and `tasks` what it can do.
    """

    name: str
    loader: str
    packages: tuple[str, ...] = ()
    dtype: str | None = None
    only: tuple[str, ...] = DTYPES
    tasks: tuple[str, ...] = ("text-to-image", "image-to-image", "controlnet", "lora")
    devices: tuple[str, ...] = ("cpu", "cuda", "mps")

    def dtype_of(self, work: Work) -> str:
        """What it computes in."""
        return self.dtype or work.dtype

    def refusal(self, work: Work) -> str | None:
        """Why it cannot do a work here, None if it can."""
        missing = [p for p in self.packages if importlib.util.find_spec(p) is None]
        if missing:
            return f"not installed; pip install {' '.join(missing)}"
        if self.dtype_of(work) not in self.only:
            return f"does not compute in {self.dtype_of(work)} (only {', '.join(self.only)})"
        if work.task not in self.tasks:
            return f"does not do {work.task} here"
        if work.device.partition(":")[0] not in self.devices:
            return f"does not run on {work.device} here"
        return None


_HERE = __name__
_EXPORTED = "fewstep.bench.exported"
FEWSTEP = Side("fewstep", f"{_HERE}:fewstep")
SIDES = {
    side.name: side
    for side in (
        FEWSTEP,
        Side("diffusers", f"{_HERE}:diffusers", ("diffusers",)),
        Side("diffusers-compiled", f"{_HERE}:diffusers_compiled", ("diffusers",)),
        Side(
            "openvino",
            f"{_EXPORTED}:openvino",
            ("diffusers", "openvino"),
            only=("float32", "bfloat16"),
            tasks=("text-to-image", "image-to-image"),
            devices=("cpu",),
        ),
        Side(
            "onnxruntime",
            f"{_EXPORTED}:onnxruntime",
            ("diffusers", "onnxruntime", "onnxscript"),
            only=("float32",),
            tasks=("text-to-image", "image-to-image"),
            devices=("cpu",),
        ),
        Side("fewstep+int8", f"{_HERE}:fewstep_int8", only=DTYPES[:2], devices=("cpu",)),
        Side("fewstep+int8-weights", f"{_HERE}:fewstep_int8_weights"),
        Side("fewstep+tiny-vae", f"{_HERE}:fewstep_tiny_vae"),
        Side("fewstep+fp8", f"{_HERE}:fewstep_fp8", only=("bfloat16",), devices=("cuda",)),
    )
}


def side_of(text: str) -> Side:
    """The side of a name, or of NAME@DTYPE, which computes in another dtype than the work's."""
    name, _, dtype = text.partition("@")
    if name not in SIDES:
        raise RequestError(f"peer {name!r} is unknown; give one of {', '.join(SIDES)}")
    if not dtype:
        return SIDES[name]
    if dtype not in DTYPES:
        raise RequestError(f"peer {text!r}: give one of {', '.join(DTYPES)} behind the @")
    return replace(SIDES[name], name=text, dtype=dtype)


# ── the loaders ──


def fewstep(setting: Setting) -> Loaded:
    """This library."""
    return loaded(pipeline(importlib.import_module("fewstep"), setting), setting)


def fewstep_int8(setting: Setting) -> Loaded:
    """This library, the UNet in int8."""
    return quantized(setting, "int8")


def fewstep_int8_weights(setting: Setting) -> Loaded:
    """This library, the UNet's weights in int8."""
    return quantized(setting, "int8-weights")


def fewstep_fp8(setting: Setting) -> Loaded:
    """This library, the UNet in fp8."""
    return quantized(setting, "fp8")


def fewstep_tiny_vae(setting: Setting) -> Loaded:
    """This library, decoding by the tiny autoencoder in the model's folder."""
    from ..pipelines.approximations import FOLDER, tiny_beside

    library, beside = importlib.import_module("fewstep"), tiny_beside(setting.folder)
    if beside is None:
        raise RequestError(f"this model's folder has no {FOLDER}; put a tiny autoencoder there")
    pipe = pipeline(library, setting)
    tiny = library.AutoencoderTiny.from_pretrained(beside, torch_dtype=pipe.vae.dtype)
    pipe.vae = tiny.to(pipe.vae.device)
    return loaded(pipe, setting)


def quantized(setting: Setting, kind: str) -> Loaded:
    """This library with a UNet of fewer bits."""
    pipe = pipeline(importlib.import_module("fewstep"), setting)
    pipe.quantize(kind)
    return loaded(pipe, setting)


def diffusers(setting: Setting) -> Loaded:
    """diffusers as its documents begin: eager."""
    return loaded(peer_pipeline(setting), setting)


def diffusers_compiled(setting: Setting) -> Loaded:
    """diffusers as its documents tune it: channels last, fused projections, torch.compile."""
    import torch

    pipe = peer_pipeline(setting)
    pipe.fuse_qkv_projections()
    how: dict[str, Any] = {"fullgraph": True}
    if setting.work.device.startswith("cuda"):
        how["mode"] = "max-autotune"
        for network in (pipe.unet, pipe.vae):
            network.to(memory_format=torch.channels_last)
    pipe.unet = torch.compile(pipe.unet, **how)
    pipe.vae.decode = torch.compile(pipe.vae.decode, **how)
    return loaded(pipe, setting)


def peer_pipeline(setting: Setting, parts: Mapping[str, Any] = MappingProxyType({})) -> Any:
    """diffusers' pipeline, without its notices."""
    library = importlib.import_module("diffusers")
    library.utils.logging.set_verbosity_error()
    return pipeline(library, setting, parts)


def pipeline(
    library: Any, setting: Setting, given: Mapping[str, Any] = MappingProxyType({})
) -> Any:
    """The pipeline of a work's task from its folder, on its device; `given` replaces parts."""
    import torch

    work, dtype = setting.work, getattr(torch, setting.dtype)
    name, parts = "DiffusionPipeline", dict(given)
    if work.task == "image-to-image":
        name = "AutoPipelineForImage2Image"
    elif work.task == "controlnet":
        wide = (Path(setting.folder) / "text_encoder_2").exists()
        name = f"StableDiffusion{'XL' * wide}ControlNetPipeline"
        network = library.ControlNetModel
        parts["controlnet"] = network.from_pretrained(setting.beside, torch_dtype=dtype)
    made = getattr(library, name).from_pretrained(setting.folder, torch_dtype=dtype, **parts)
    if work.task == "lora":
        made.load_lora_weights(setting.beside, weight_name=LORA)
        made.fuse_lora()
    made.set_progress_bar_config(disable=True)
    return made.to(work.device)


def loaded(pipe: Any, setting: Setting) -> Loaded:
    """The part of a pipeline that a work measures."""
    work = setting.work
    if work.part == "picture":
        draw = partial(drawn, pipe, arguments(work))
        return Loaded(
            draw,
            lambda seed: np.asarray(draw(seed, "np"), np.float32),
            work.device,
            setting.dtype,
        )
    call = unet_call(pipe, setting) if work.part == "unet" else vae_call(pipe, setting)
    return Loaded(call, lambda seed: call(seed).float().cpu().numpy(), work.device, setting.dtype)


# ── what they are given ──


def drawn(pipe: Any, given: Mapping[str, Any], seed: int, output_type: str = "pil") -> Any:
    """The pictures of a seed."""
    import torch

    generator = torch.Generator("cpu").manual_seed(seed)
    return pipe(**given, generator=generator, output_type=output_type).images


def arguments(work: Work) -> dict[str, Any]:
    """A pipeline's arguments, all but the generator; guidance is the library's default."""
    assert work.size is not None
    width, height = work.size
    given: dict[str, Any] = {"prompt": [work.prompt] * work.batch}
    given["num_inference_steps"] = work.steps
    if work.task == "image-to-image":
        return given | {"image": [picture(work.size)] * work.batch, "strength": STRENGTH}
    given |= {"width": width, "height": height}
    if work.task == "controlnet":
        given["image"] = [picture(work.size)] * work.batch
    return given


def picture(size: tuple[int, int]) -> Any:
    """A picture of smooth random colours."""
    import PIL.Image

    coarse = np.random.default_rng(0).integers(0, 256, (8, 8, 3), dtype=np.uint8)
    return PIL.Image.fromarray(coarse).resize(size, PIL.Image.Resampling.BICUBIC)


def unet_call(pipe: Any, setting: Setting) -> Callable[[int], Any]:
    """One call of the UNet with inputs that are always the same; the output is (B, C, h, w)."""
    from .inputs import unet_inputs

    given = unet_inputs(setting)

    def call(seed: int) -> Any:
        return pipe.unet(**given, return_dict=False)[0]

    return call


def vae_call(pipe: Any, setting: Setting) -> Callable[[int], Any]:
    """One decoding of latents that are always the same; the output is (B, 3, H, W)."""
    from .inputs import latents

    z = latents(setting)

    def call(seed: int) -> Any:
        return pipe.vae.decode(z, return_dict=False)[0]

    return call
