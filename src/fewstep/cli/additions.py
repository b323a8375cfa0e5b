"""What stands beside a model: LoRAs, ControlNets, autoencoders. From options, into pipelines."""

from __future__ import annotations

import hashlib
import math
import os
import re
import warnings
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import replace
from pathlib import Path, PurePosixPath
from typing import Any

import torch

from .. import EMBEDDED
from ..checkpoints.locate import Source
from ..checkpoints.lora_formats import find_lora
from ..errors import CheckpointError, FewstepError, RequestError, UnsupportedConfig
from ..models.base import WEIGHTS_STEM
from ..models.controlnet import ControlNetModel
from ..models.motion import MotionAdapter
from ..models.t2i_adapter import T2IAdapter
from ..models.vae import AutoencoderKL
from ..models.vae_tiny import AutoencoderTiny
from ..pipelines.previews import check_vae
from .record import Addition


def load_autoencoder(name: str, torch_dtype: torch.dtype) -> Any:
    """The autoencoder of a folder or a hub repository, of the class that its config names."""
    kinds = {kind.__name__: kind for kind in (AutoencoderKL, AutoencoderTiny)}
    stored = Source(name).read_json("config.json").get("_class_name")
    if stored not in kinds:
        raise UnsupportedConfig(
            f"its config.json names the class {stored}; give the folder or the repository of "
            f"an {' or an '.join(kinds)}"
        )
    return kinds[stored].from_pretrained(name, torch_dtype=torch_dtype)


# Kind of an addition, which is its option's name -> (component of the pipeline, what loads it).
NETWORKS: dict[str, tuple[str, Callable[..., Any]]] = {
    "vae": ("vae", load_autoencoder),
    "controlnet": ("controlnet", ControlNetModel.from_pretrained),
    "adapter": ("adapter", T2IAdapter.from_pretrained),
    "motion-adapter": ("motion_adapter", MotionAdapter.from_pretrained),
}
WEIGHTLESS = ("vae", "motion-adapter")


def named(kind: str, text: str) -> Addition:
    """What `--kind NAME[:WEIGHT]` asks for; the weight is 1 if there is none."""
    if kind in WEIGHTLESS:
        return Addition(kind, text)
    name, colon, weight = text.rpartition(":")
    try:
        value = float(weight)
    except ValueError:
        return Addition(kind, text)
    if not colon:  # a folder may be called 7
        return Addition(kind, text)
    if not name or not math.isfinite(value):
        raise RequestError(f"--{kind} {text}: must be NAME or NAME:WEIGHT, such as style:0.8")
    return Addition(kind, name, value)


def of_kind(additions: Sequence[Addition], kind: str) -> list[Addition]:
    """Those of one kind, in their order."""
    return [addition for addition in additions if addition.kind == kind]


def load_networks(additions: Sequence[Addition], dtype: torch.dtype) -> dict[str, Any]:
    """The networks among the additions, as components of a pipeline: one, or a list."""
    found: dict[str, Any] = {}
    for kind, (component, load) in NETWORKS.items():
        loaded = []
        for addition in of_kind(additions, kind):
            with blamed(addition):
                loaded.append(load(shipped(addition.id), torch_dtype=dtype))
        if loaded:
            found[component] = loaded if len(loaded) > 1 else loaded[0]
    return found


def attach(pipe: Any, additions: Sequence[Addition]) -> None:
    """Loads the LoRAs and the IP-Adapters among the additions into a pipeline.

    Raises an error that names the option, also of an autoencoder that is another model's.
    """
    for addition in of_kind(additions, "vae"):
        with blamed(addition):
            check_vae(pipe.vae, pipe.unet)
    loras = of_kind(additions, "lora")
    names = [f"lora_{number}" for number in range(1, len(loras) + 1)]
    for name, addition in zip(names, loras, strict=True):
        place, file = parts_of(addition.id)
        with blamed(addition), warnings.catch_warnings():
            warnings.simplefilter("ignore")  # that the one before is not active any more
            pipe.load_lora_weights(place, adapter_name=name, weight_name=file)
    if loras:
        pipe.set_adapters(names, [addition.weight for addition in loras])
    adapters = of_kind(additions, "ip-adapter")
    for addition in adapters[:1]:
        places = [ip_adapter_place(each) for each in adapters]
        with blamed(addition):
            pipe.load_ip_adapter(
                [place for place, _, _ in places],
                subfolder=[folder for _, folder, _ in places],
                weight_name=[file for _, _, file in places],
            )
        pipe.set_ip_adapter_scale([each.weight for each in adapters])


def call_arguments(additions: Sequence[Addition]) -> dict[str, Any]:
    """The weights that pipelines take with each call."""
    found: dict[str, Any] = {}
    for kind, argument in (
        ("controlnet", "controlnet_conditioning_scale"),
        ("adapter", "adapter_conditioning_scale"),
    ):
        weights = [addition.weight for addition in of_kind(additions, kind)]
        if weights:
            found[argument] = weights if len(weights) > 1 else weights[0]
    return found


def with_fingerprints(additions: Sequence[Addition]) -> tuple[Addition, ...]:
    """The additions with the sha256 of their files."""
    return tuple(replace(each, weights=fingerprint(files_of(each))) for each in additions)


def files_of(addition: Addition) -> list[Path]:
    """The files that hold an addition's weights."""
    with blamed(addition):
        if addition.kind in NETWORKS:
            return Source(shipped(addition.id)).weights(WEIGHTS_STEM)
        if addition.kind == "ip-adapter":
            place, folder, file = ip_adapter_place(addition)
            return [Source(place, subfolder=folder or None).fetch(file)]
        place, name = parts_of(addition.id)
        return [find_lora(Source(place), name)]


def shipped(name: str) -> str:
    """The folder of what comes with the embedded model under this name; any other name as it is."""
    folder = EMBEDDED.parent / name
    return str(folder) if name == folder.name and os.path.isdir(folder) else name


def parts_of(name: str) -> tuple[str, str | None]:
    """`owner/repository/file.safetensors` as the repository and the file; anything else whole."""
    found = re.fullmatch(r"(\w[\w.-]*/\w[\w.-]*)/(.+\.safetensors)", name)
    if found is None or os.path.exists(name):
        return shipped(name), None
    return found[1], found[2]


def ip_adapter_place(addition: Addition) -> tuple[str, str, str]:
    """(folder or hub repository, folder in it, file) of an IP-Adapter's name."""
    path = Path(addition.id)
    if os.path.isfile(path):
        return str(path.parent), "", path.name
    repository, file = parts_of(addition.id)
    if file is None:
        raise RequestError(
            f"--ip-adapter {addition.id}: must name a file, such as "
            "h94/IP-Adapter/models/ip-adapter_sd15.safetensors"
        )
    inner = PurePosixPath(file)
    return repository, "" if len(inner.parts) == 1 else str(inner.parent), inner.name


@contextmanager
def blamed(addition: Addition) -> Iterator[None]:
    """Errors in the block name the option that they are about."""
    try:
        yield
    except UnsupportedConfig as error:
        raise UnsupportedConfig(f"--{addition.kind} {addition.id}: {error}") from error
    except (FewstepError, OSError) as error:
        raise CheckpointError(f"--{addition.kind} {addition.id}: {error}") from error


def fingerprint(files: Sequence[Path]) -> str:
    """sha256 of the files' bytes, one after another.

    A file in the hub's cache is a link to a blob that is named by its sha256: that name is
    believed, as reading gigabytes takes seconds.
    """
    targets = [file.resolve() for file in files]
    if (
        len(targets) == 1
        and files[0].is_symlink()
        and re.fullmatch("[0-9a-f]{64}", targets[0].name)
    ):
        return targets[0].name
    digest = hashlib.sha256()
    for target in targets:
        with target.open("rb") as stream:
            while block := stream.read(1 << 20):
                digest.update(block)
    return digest.hexdigest()
