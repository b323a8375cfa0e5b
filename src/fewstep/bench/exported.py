"""OpenVINO and ONNX Runtime: the UNet and the decoder in their formats, in diffusers' loop.

Both convert the modules of diffusers, since that is what their users do. A converted network is
kept in the cache; once it is there, PyTorch's weights are not even read.
"""

from __future__ import annotations

import importlib
from collections.abc import Callable, Sequence
from dataclasses import replace
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import numpy as np
import torch
from torch import Tensor, nn

from .checkpoints import finished
from .inputs import config, latents, unet_inputs
from .sides import Loaded, loaded, peer_pipeline
from .work import Setting

Call = Callable[[Sequence[np.ndarray]], np.ndarray]
CLASSES = {"unet": "UNet2DConditionModel", "vae": "AutoencoderKL"}


class Unet(nn.Module):
    """A UNet of plain tensors: z, time, text, then what is there of guidance, pooled and sizes."""

    def __init__(self, inner: nn.Module, names: Sequence[str]) -> None:
        super().__init__()
        self.inner, self.names = inner, list(names)

    def forward(self, sample: Tensor, timestep: Tensor, text: Tensor, *rest: Tensor) -> Tensor:
        more = dict(zip(self.names, rest, strict=True))
        given: dict[str, Any] = {"timestep_cond": more.pop("timestep_cond", None)}
        if more:
            given["added_cond_kwargs"] = more
        output: Tensor = self.inner(sample, timestep, text, **given, return_dict=False)[0]
        return output


class Decoder(nn.Module):
    """A decoder from tensor to tensor."""

    def __init__(self, vae: Any) -> None:
        super().__init__()
        self.vae = vae

    def forward(self, z: Tensor) -> Tensor:
        output: Tensor = self.vae.decode(z, return_dict=False)[0]
        return output


# ── the runtimes ──


class OpenVino:
    """OpenVINO at the latency hint, its inference precision the setting's."""

    def __init__(self, setting: Setting) -> None:
        self.library = importlib.import_module("openvino")
        self.core = self.library.Core()
        # 16-bit weights are the usual form; random bfloat16 ones fit into float16 almost exactly.
        self.is_small = setting.work.dtype != "float32"
        self.hints = {
            "PERFORMANCE_HINT": "LATENCY",
            "INFERENCE_PRECISION_HINT": {"float32": "f32", "bfloat16": "bf16"}[setting.dtype],
            "INFERENCE_NUM_THREADS": str(torch.get_num_threads()),
        }

    def name(self, inputs: Sequence[Tensor]) -> str:
        """What a converted network depends on beside its checkpoint: it serves all shapes."""
        return f"openvino-{self.library.__version__.split('-')[0]}.xml"

    def convert(self, network: nn.Module, inputs: Sequence[Tensor], file: Path) -> None:
        """Writes the network."""
        made = self.library.convert_model(network, example_input=tuple(inputs))
        self.library.save_model(made, file, compress_to_fp16=self.is_small)

    def compiled(self, file: Path, inputs: Sequence[Tensor]) -> Call:
        """The network for the shapes of the inputs."""
        model = self.core.read_model(file)
        ports = zip(model.inputs, inputs, strict=True)
        model.reshape({port: list(tensor.shape) for port, tensor in ports})
        run = self.core.compile_model(model, "CPU", self.hints)
        return lambda arrays: run(list(arrays))[0]


class OnnxRuntime:
    """ONNX Runtime's CPU provider on what torch.onnx exports."""

    def __init__(self, setting: Setting) -> None:
        self.library = importlib.import_module("onnxruntime")

    def name(self, inputs: Sequence[Tensor]) -> str:
        """What a converted network depends on beside its checkpoint: the shapes, too."""
        shapes = "-".join("x".join(map(str, t.shape)) for t in inputs if t.ndim)
        return f"torch-{torch.__version__}-{shapes}.onnx"

    def convert(self, network: nn.Module, inputs: Sequence[Tensor], file: Path) -> None:
        """Writes the network."""
        torch.onnx.export(network, tuple(inputs), file, dynamo=True)

    def compiled(self, file: Path, inputs: Sequence[Tensor]) -> Call:
        """The network in a session."""
        options = self.library.SessionOptions()
        options.intra_op_num_threads = torch.get_num_threads()
        session = self.library.InferenceSession(file, options, providers=["CPUExecutionProvider"])
        names = [port.name for port in session.get_inputs()]
        return lambda arrays: session.run(None, dict(zip(names, arrays, strict=True)))[0]


def openvino(setting: Setting) -> Loaded:
    """diffusers' loop around OpenVINO."""
    return replaced(setting, OpenVino(setting))


def onnxruntime(setting: Setting) -> Loaded:
    """diffusers' loop around ONNX Runtime."""
    return replaced(setting, OnnxRuntime(setting))


# ── putting them into the loop ──


def replaced(setting: Setting, runtime: OpenVino | OnnxRuntime) -> Loaded:
    """diffusers' pipeline with its UNet and its decoder compiled, as far as the work needs them."""
    # Around them is float32; the runtime chooses what it computes in.
    plain = replace(setting, dtype="float32")
    more = conditions(plain)
    inputs = {"unet": unet_tensors(plain, more), "vae": [latents(plain)]}
    unmeasured = {"unet": "vae", "vae": "unet"}.get(setting.work.part)
    inputs.pop(unmeasured or "", None)
    files = {name: place_of(plain, name, runtime.name(given)) for name, given in inputs.items()}
    missing = [name for name, file in files.items() if not file.exists()]
    useless = [name for name in files if replaces_all(plain, name, missing)]
    pipe = peer_pipeline(plain, {name: hollow(plain, name) for name in useless})
    wrapped = {"unet": Unet(pipe.unet, list(more)).eval(), "vae": Decoder(pipe.vae).eval()}
    for name in missing:
        with finished(files[name].parent) as beside, torch.no_grad():
            runtime.convert(wrapped[name], inputs[name], beside / files[name].name)
    runs = {name: runtime.compiled(file, inputs[name]) for name, file in files.items()}
    if "unet" in runs:
        pipe.unet.forward = unet_forward(runs["unet"], inputs["unet"], list(more))
    if "vae" in runs:
        pipe.vae.decode = decoding(runs["vae"])
    return replace(loaded(pipe, plain), converted=bool(missing))


def place_of(setting: Setting, part: str, name: str) -> Path:
    """Where a converted network of a checkpoint is kept: a folder, as weights lie beside it."""
    known = f"{Path(setting.folder).name}-{part}-{Path(name).stem}"
    return Path(setting.cache) / "exported" / known / f"model{Path(name).suffix}"


def replaces_all(setting: Setting, part: str, missing: Sequence[str]) -> bool:
    """Whether PyTorch's weights of a part are of no use."""
    reads = part == "vae" and setting.work.task == "image-to-image"  # by the encoder
    return part not in missing and not reads


def hollow(setting: Setting, part: str) -> nn.Module:
    """diffusers' network without weights: it says what it is, and holds nothing."""
    library = importlib.import_module("diffusers")
    with torch.device("meta"):
        made = getattr(library, CLASSES[part]).from_config(config(setting, part))
    made = made.to_empty(device="cpu").eval()
    for parameter in made.parameters():
        parameter.data = torch.empty(0)
    return made


def conditions(setting: Setting) -> dict[str, Tensor]:
    """What a UNet reads beside z, time and text: guidance, pooled text, sizes."""
    given = unet_inputs(setting)
    guidance = {"timestep_cond": given["timestep_cond"]} if "timestep_cond" in given else {}
    return {**guidance, **given.get("added_cond_kwargs", {})}


def unet_tensors(setting: Setting, more: dict[str, Tensor]) -> list[Tensor]:
    """A UNet's inputs in a row, twice as many rows where guidance takes two network calls."""
    given = unet_inputs(setting)
    doubles = setting.work.part == "picture" and "timestep_cond" not in more
    tensors = [given["sample"], given["encoder_hidden_states"], *more.values()]
    tensors = [torch.cat([t] * (1 + doubles)) for t in tensors]
    return [tensors[0], given["timestep"], *tensors[1:]]


def unet_forward(run: Call, inputs: Sequence[Tensor], names: Sequence[str]) -> Callable[..., Any]:
    """`forward` of diffusers' UNet by a compiled network."""

    def forward(
        sample: Tensor,
        timestep: Tensor,
        encoder_hidden_states: Tensor,
        timestep_cond: Tensor | None = None,
        added_cond_kwargs: dict[str, Tensor] | None = None,
        return_dict: bool = True,
        **_: Any,
    ) -> Any:
        known = {"timestep_cond": timestep_cond, **(added_cond_kwargs or {})}
        tensors = [sample, timestep, encoder_hidden_states, *(known[name] for name in names)]
        arrays = [array(t, like) for t, like in zip(tensors, inputs, strict=True)]
        return answer(run(arrays), return_dict)

    return forward


def decoding(run: Call) -> Callable[..., Any]:
    """`decode` of diffusers' autoencoder by a compiled network."""

    def decode(z: Tensor, return_dict: bool = True, **_: Any) -> Any:
        return answer(run([z.float().numpy()]), return_dict)

    return decode


def array(tensor: Any, like: Tensor) -> np.ndarray:
    """A tensor as the compiled network takes it."""
    return np.asarray(torch.as_tensor(tensor).to(like.dtype).reshape(like.shape))


def answer(output: np.ndarray, return_dict: bool) -> Any:
    """What diffusers' network would return."""
    tensor = torch.from_numpy(output)
    return SimpleNamespace(sample=tensor) if return_dict else (tensor,)
