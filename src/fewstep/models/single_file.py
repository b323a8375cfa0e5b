"""Networks out of single files in the layout of the original code."""

from __future__ import annotations

import os
import warnings
from collections.abc import Mapping
from typing import TYPE_CHECKING, Any, TypeVar, cast

import torch

from ..checkpoints.known import FAMILIES
from ..checkpoints.known.detect import adjusted, family_of, kind_of, require_kind, unet_prefix
from ..checkpoints.known.names import unet_names, vae_names
from ..checkpoints.locate import HOW_TO_CONVERT, Source
from ..checkpoints.single_file import SingleFile, find_file
from ..errors import RequestError

if TYPE_CHECKING:
    from .base import Model

SelfT = TypeVar("SelfT", bound="FromSingleFile")
NetworkT = TypeVar("NetworkT", bound="Model")

# Class -> the part of a model that it is, and the kinds of files that hold it.
PARTS = {
    "UNet2DConditionModel": ("unet", ("checkpoint",)),
    "AutoencoderKL": ("vae", ("checkpoint", "vae")),
    "ControlNetModel": ("controlnet", ("controlnet",)),
}


class FromSingleFile:
    """Gives a network `from_single_file`."""

    @classmethod
    def from_single_file(
        cls: type[SelfT],
        pretrained_model_link_or_path_or_dict: str | os.PathLike[str],
        *,
        config: str | os.PathLike[str] | None = None,
        subfolder: str | None = None,
        original_config: None = None,
        torch_dtype: torch.dtype | str | None = None,
        dtype: torch.dtype | str | None = None,
        revision: str | None = None,
        use_safetensors: bool | None = None,
        cache_dir: str | os.PathLike[str] | None = None,
        force_download: bool = False,
        local_files_only: bool | None = None,
        token: str | bool | None = None,
        **config_overrides: Any,
    ) -> SelfT:
        """The network that a safetensors file of the original layout holds, perhaps among others.

        The file is a path, `owner/repository/name` or its address on the hub. Its config is
        recognised by its tensors; `config` names another one: of the known ("sd1", "sdxl", ...), or
        a folder or a hub repository (with `subfolder`). Further keywords replace entries of it.
        """
        refuse(original_config=original_config, use_safetensors=use_safetensors)
        part, kinds = part_of(cls)
        reach: dict[str, Any] = {
            "cache_dir": cache_dir,
            "local_files_only": local_files_only,
            "token": token,
        }
        path = find_file(
            pretrained_model_link_or_path_or_dict,
            revision=revision,
            force_download=force_download,
            **reach,
        )
        file = SingleFile.open(path)
        require_kind(file.shapes, kinds, str(path))
        if config is None or os.fspath(config) in FAMILIES:
            if config is None and "scaling_factor" not in config_overrides:
                warn_of_bare_vae(file)
            stored = known_config(file, part, config)
        else:
            stored = Source(os.fspath(config), subfolder, **reach).read_json("config.json")
        stored = {**stored, **config_overrides}
        kind = cast("type[Model]", cls)
        return cast(SelfT, load_network(kind, file, part, stored, dtype, torch_dtype))


def refuse(*, original_config: Any, use_safetensors: bool | None) -> None:
    """Raises RequestError for arguments of diffusers' from_single_file that cannot be served."""
    if original_config is not None:
        raise RequestError(
            f"original_config={original_config!r} is not supported: configs are recognised by the "
            "file's tensors; for an unusual file pass config= with a folder in diffusers' layout"
        )
    if use_safetensors is False:
        raise RequestError(f"use_safetensors=False cannot be served: {HOW_TO_CONVERT}")


def part_of(cls: type) -> tuple[str, tuple[str, ...]]:
    """The part that a class of networks is, and the kinds of files that hold it."""
    for base in cls.__mro__:
        if base.__name__ in PARTS:
            return PARTS[base.__name__]
    raise RequestError(
        f"{cls.__name__} cannot be read from single files (only {', '.join(PARTS)}); "
        "use from_pretrained"
    )


def known_config(file: SingleFile, part: str, name: str | os.PathLike[str] | None) -> Any:
    """The config of a part, from the family of that name or else from the file's own."""
    if name is None:
        name = recognised(file, "controlnet" if part == "controlnet" else "unet")
    family = FAMILIES[os.fspath(name)]
    if part not in family.configs:
        raise RequestError(
            f"config={name!r} knows no {part}; pass config= with the folder of its config.json"
        )
    return adjusted(family, file.shapes).configs[part]


def recognised(file: SingleFile, part: str = "unet") -> str:
    """The name of the family that a file is of. A VAE alone fits all of them: the first."""
    if kind_of(file.shapes) == "vae":
        return next(iter(FAMILIES))
    return family_of(file.shapes, str(file.path), part)


def warn_of_bare_vae(file: SingleFile) -> None:
    """Warn that nothing in a VAE's file says how its latents are scaled."""
    if kind_of(file.shapes) == "vae":
        name, family = next(iter(FAMILIES.items()))
        warnings.warn(
            f"{file.path.name} does not say which model it belongs to; it gets the scaling_factor "
            f"{family.configs['vae']['scaling_factor']} of {name!r}. Pass config={name!r} to "
            "confirm that, or config='sdxl'",
            stacklevel=3,
        )


def load_network(
    cls: type[NetworkT],
    file: SingleFile,
    part: str,
    stored: Mapping[str, Any],
    dtype: torch.dtype | str | None = None,
    torch_dtype: torch.dtype | str | None = None,
) -> NetworkT:
    """The network of a file with a config; both spellings of the dtype as in from_pretrained."""
    from .base import resolve_dtype

    config = cls.config_class.from_dict(stored)
    names = vae_names(config) if part == "vae" else unet_names(config)
    return file.load(
        lambda: cls(**config), names, network_prefix(file, part), resolve_dtype(dtype, torch_dtype)
    )


def network_prefix(file: SingleFile, part: str) -> str:
    """What the names of a part begin with in a file, whether it is there or not."""
    if part != "vae":
        return unet_prefix(file.shapes)
    return "" if kind_of(file.shapes) == "vae" and file.has("decoder.") else "first_stage_model."
