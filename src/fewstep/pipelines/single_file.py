"""Pipelines out of single files in the layout of the original code: weights here, configs known."""

from __future__ import annotations

import importlib
import inspect
import os
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any, TypeVar, cast

import torch
from torch import nn

from ..checkpoints.known import FAMILIES, Family
from ..checkpoints.known.clip_tokenizer import clip_tokenizer
from ..checkpoints.known.detect import adjusted, require_kind
from ..checkpoints.known.names import Names, clip_name, open_clip_name
from ..checkpoints.locate import Source
from ..checkpoints.single_file import SingleFile, find_file, unused
from ..errors import CheckpointError, RequestError, UnsupportedConfig
from ..models.base import resolve_dtype
from ..models.single_file import load_network, network_prefix, recognised, refuse
from ..models.unet import UNet2DConditionModel
from ..models.vae import AutoencoderKL
from ..schedulers import SCHEDULER_CONFIG_NAME, scheduler_from_config
from .loading import EXTRACTOR, SMALL_FILES, Part, load_part, read_index
from .notices import warn_caller

if TYPE_CHECKING:
    from .base import DiffusionPipeline

SelfT = TypeVar("SelfT", bound="FromSingleFile")

# Components of folders that no single file holds, and that pipelines do without.
ABSENT = ("safety_checker", "image_encoder", EXTRACTOR)

NETWORKS: Mapping[str, Any] = {"unet": UNet2DConditionModel, "vae": AutoencoderKL}
TEXT_ENCODERS = {
    "text_encoder": "CLIPTextModel",
    "text_encoder_2": "CLIPTextModelWithProjection",
}
TOKENIZERS = ("tokenizer", "tokenizer_2")
# Where text encoders lie, and by whose names.
TEXT_PLACES: Mapping[str, Mapping[str, Names]] = {
    "text_encoder": {
        "cond_stage_model.transformer.": clip_name,
        "cond_stage_model.model.": open_clip_name,
        "conditioner.embedders.0.transformer.": clip_name,
    },
    "text_encoder_2": {
        "conditioner.embedders.1.model.": open_clip_name,
        "conditioner.embedders.0.model.": open_clip_name,  # the refiner's only one
    },
}
# Keywords of diffusers' from_single_file that cannot be served -> what to do instead.
OTHER_WAYS = {
    "extract_ema": "the file's main weights are taken",
    "image_size": "pass height= and width= when drawing",
    "load_safety_checker": "single files hold none; pass safety_checker= if you have one",
    "num_in_channels": "it is read from the file; leave it out",
    "original_config_file": "pass config= with a folder in diffusers' layout",
    "prediction_type": "pass scheduler= with the prediction_type in its config",
    "scheduler_type": "pass scheduler=",
    "upcast_attention": "leave it out",
}


class FromSingleFile:
    """Gives a pipeline `from_single_file`."""

    @classmethod
    def from_single_file(
        cls: type[SelfT],
        pretrained_model_link_or_path: str | os.PathLike[str],
        *,
        torch_dtype: torch.dtype | str | None = None,
        dtype: torch.dtype | str | None = None,
        config: str | os.PathLike[str] | None = None,
        original_config: None = None,
        revision: str | None = None,
        use_safetensors: bool | None = None,
        cache_dir: str | os.PathLike[str] | None = None,
        force_download: bool = False,
        local_files_only: bool | None = None,
        token: str | bool | None = None,
        **components: Any,
    ) -> SelfT:
        """The pipeline of one safetensors file, as A1111 and ComfyUI use them, on the CPU.

        The file is a path, `owner/repository/name` or its address on the hub. Which model it is
        shows in its tensors, and the configs and the tokenizer of Stable Diffusion 1 and 2, SDXL,
        SSD-1B and LCMs on them are part of this package. `config` names another source: one of
        those ("sd1", "sd2-base", ...), or a folder or a hub repository in diffusers' layout, whose
        weights are not read. `DiffusionPipeline` itself gives the class that fits the model; dtype
        and further keywords are those of `from_pretrained`.

        Raises CheckpointError for files that are pickled, something else or incomplete.
        """
        refuse(original_config=original_config, use_safetensors=use_safetensors)
        reach: dict[str, Any] = {
            "cache_dir": cache_dir,
            "local_files_only": local_files_only,
            "token": token,
        }
        path = find_file(
            pretrained_model_link_or_path,
            revision=revision,
            force_download=force_download,
            **reach,
        )
        file = SingleFile.open(path)
        require_kind(file.shapes, ("checkpoint",), str(path))
        family = choose_family(file, config, reach, warn="scheduler" not in components)
        pipeline = cast("type[DiffusionPipeline]", cls).implementation(family.pipeline)
        given = accepted_keywords(pipeline, family, components, path)
        pipe = pipeline(**load_components(pipeline, family, file, given, dtype, torch_dtype))
        pipe.name_or_path = os.fspath(pretrained_model_link_or_path)
        return cast(SelfT, pipe)


def choose_family(
    file: SingleFile,
    config: str | os.PathLike[str] | None,
    reach: Mapping[str, Any],
    warn: bool = True,
) -> Family:
    """The family of a file: of the name or from the folder that `config` gives, or its own."""
    name = None if config is None else os.fspath(config)
    if name is not None and name not in FAMILIES:
        return read_family(Source(name, **reach))
    if name is None:
        name = recognised(file)
        if name == "sd2" and warn and "v_pred" not in file.shapes:
            warn_caller(
                f"{file.path.name} does not say whether it is of Stable Diffusion 2's 768-pixel "
                "models, which predict velocities, or of its base models; the former is assumed. "
                "Pass config='sd2' to confirm that, or config='sd2-base'"
            )
    return adjusted(FAMILIES[name], file.shapes)


def read_family(root: Source) -> Family:
    """The family that a folder in diffusers' layout describes; of its files only the small ones."""
    class_name, parts, options = read_index(root)
    wanted = [part for part in parts if part.name not in ABSENT]
    for part in wanted:
        if part.name not in (*NETWORKS, *TEXT_ENCODERS, *TOKENIZERS, "scheduler"):
            raise UnsupportedConfig(
                f"config={root.path!r} has a {part.name}, which no single file holds; "
                "pass config= with the folder of a Stable Diffusion or SDXL model"
            )
    local = root.folder([f"*{suffix}" for suffix in SMALL_FILES])
    configs: dict[str, Any] = {}
    for part in wanted:
        if part.name in TOKENIZERS:
            configs[part.name] = {"folder": str(local / part.name)}
        else:
            name = SCHEDULER_CONFIG_NAME if part.name == "scheduler" else "config.json"
            configs[part.name] = Source(str(local), subfolder=part.name).read_json(name)
    return Family(class_name, configs, options)


def accepted_keywords(
    pipeline: type[DiffusionPipeline], family: Family, components: Mapping[str, Any], path: Path
) -> dict[str, Any]:
    """The keywords that name components of `pipeline`; refuses others, and files of others."""
    from .base import check_keywords

    for name in OTHER_WAYS.keys() & components.keys():
        if components[name] is not None and components[name] is not False:
            raise RequestError(f"{name}={components[name]!r} is not supported: {OTHER_WAYS[name]}")
    accepted = pipeline.arguments()
    if needless := [name for name in parts_of(family) if name not in accepted]:
        raise UnsupportedConfig(
            f"{path} holds a model for {family.pipeline}; {pipeline.__name__} has no use for its "
            f"{', '.join(needless)}"
        )
    loading = inspect.signature(FromSingleFile.from_single_file).parameters
    rest = {name: value for name, value in components.items() if name not in OTHER_WAYS}
    return check_keywords(pipeline, rest, accepted, list(loading)[1:-1])


def parts_of(family: Family) -> list[str]:
    """The components that a checkpoint of a family has."""
    return [name for name in family.configs if name != "controlnet"]


def load_components(
    pipeline: type[DiffusionPipeline],
    family: Family,
    file: SingleFile,
    given: Mapping[str, Any],
    dtype: torch.dtype | str | None,
    torch_dtype: torch.dtype | str | None,
) -> dict[str, Any]:
    """The constructor's arguments: what is `given`, and all else from the file and its family."""
    accepted = pipeline.arguments()
    wanted = [name for name in parts_of(family) if name not in given]
    check_held(wanted, file)
    known = {**{n: v for n, v in family.options.items() if n in accepted}, **given}
    for name, parameter in accepted.items():
        if parameter.default is parameter.empty and name not in (*known, *wanted):
            raise RequestError(
                f"{file.path} has no {name}; pass {name}= to {pipeline.__name__}.from_single_file"
            )
    number = resolve_dtype(dtype, torch_dtype)
    return known | {name: load_component(name, family, file, number) for name in wanted}


def check_held(wanted: Sequence[str], file: SingleFile) -> None:
    """Raises CheckpointError for a component that a file lacks; warns of what nothing reads."""
    prefixes = {name: prefix_of(name, file) for name in (*NETWORKS, *TEXT_ENCODERS)}
    for name in wanted:
        if name in prefixes and not file.has(prefixes[name]):
            kind = NETWORKS[name].__name__ if name in NETWORKS else TEXT_ENCODERS[name]
            raise CheckpointError(
                f"{file.path} holds no {name}; pass {name}=, such as "
                f"{name}={kind}.from_pretrained(...)"
            )
    if left := unused(file.shapes, list(prefixes.values())):
        warn_caller(
            f"{len(left)} tensors of {file.path.name} belong to no component and were left out, "
            f"the first {left[0]}"
        )


def prefix_of(name: str, file: SingleFile) -> str:
    """What the names of a network or a text encoder begin with in a file."""
    return network_prefix(file, name) if name in NETWORKS else text_place(name, file)[0]


def text_place(name: str, file: SingleFile) -> tuple[str, Names]:
    """Where a file holds a text encoder, and by whose names; the first place if it holds none."""
    places = TEXT_PLACES[name]
    found = next((prefix for prefix in places if file.has(prefix)), next(iter(places)))
    return found, places[found]


def load_component(name: str, family: Family, file: SingleFile, dtype: torch.dtype | None) -> Any:
    """One component; `dtype` None keeps the file's."""
    config = family.configs[name]
    if name == "scheduler":
        return scheduler_from_config(config)
    if name in NETWORKS:
        return load_network(NETWORKS[name], file, name, config, dtype or "auto")
    if name in TEXT_ENCODERS:
        return load_text_encoder(name, config, file, dtype)
    if "folder" in config:
        return load_part(Part(name, "CLIPTokenizer"), Source(config["folder"]), dtype)
    return clip_tokenizer(config["pad_token"])


def load_text_encoder(
    name: str, config: Mapping[str, Any], file: SingleFile, dtype: torch.dtype | None
) -> nn.Module:
    """A text encoder of transformers, with the file's tensors."""
    transformers = importlib.import_module("transformers")
    network = getattr(transformers, TEXT_ENCODERS[name])
    settings = transformers.CLIPTextConfig.from_dict(dict(config))
    prefix, names = text_place(name, file)
    # OpenCLIP's last layer and its projection, where the model reads the last but one.
    spare = rf"transformer\.resblocks\.{settings.num_hidden_layers}\.|text_projection$"
    return file.load(with_positions(lambda: network(settings)), names, prefix, dtype, spare)


def with_positions(build: Callable[[], nn.Module]) -> Callable[[], nn.Module]:
    """`build`, but with the numbers of the positions, which are in no file, on the CPU."""

    def built() -> nn.Module:
        module = build()
        for name, buffer in list(module.named_buffers()):
            path, _, last = name.rpartition(".")
            assert last == "position_ids", name
            positions = torch.arange(buffer.numel(), device="cpu").reshape(buffer.shape)
            module.get_submodule(path).register_buffer(last, positions, persistent=False)
        return module

    return built
