"""What every network shares: building from a config, loading and saving in diffusers' layout."""

from __future__ import annotations

import difflib
import inspect
import os
import warnings
from collections.abc import Iterator, Mapping
from pathlib import Path
from typing import Any, ClassVar, TypeVar

import torch
from torch import nn

from ..checkpoints.config import Config, understood, write_json
from ..checkpoints.locate import HOW_TO_CONVERT, Source
from ..checkpoints.weights import load_weights, save_weights
from ..errors import RequestError
from ..ops.layers import held, unpack
from .single_file import FromSingleFile

CONFIG_NAME = "config.json"
WEIGHTS_STEM = "diffusion_pytorch_model"

ModelT = TypeVar("ModelT", bound="Model")


class Model(FromSingleFile, nn.Module):
    """Base of the networks. A subclass names its `config_class`, and its constructor sets `config`.

    A subclass is built by keyword arguments, the keys of its config:
    `UNet2DConditionModel(sample_size=64, cross_attention_dim=768)`.
    """

    config_class: ClassVar[type[Config]] = Config
    config: Any  # an instance of config_class

    @classmethod
    def from_config(cls: type[ModelT], config: Mapping[str, Any], **overrides: Any) -> ModelT:
        """A freshly initialised network of a config (ours or any mapping); `overrides` win."""
        return cls(**cls.config_class.from_dict(config, **overrides))

    @classmethod
    def from_pretrained(
        cls: type[ModelT],
        pretrained_model_name_or_path: str | os.PathLike[str],
        *,
        subfolder: str | None = None,
        variant: str | None = None,
        revision: str | None = None,
        torch_dtype: torch.dtype | str | None = None,
        dtype: torch.dtype | str | None = None,
        use_safetensors: bool | None = None,
        cache_dir: str | os.PathLike[str] | None = None,
        force_download: bool = False,
        local_files_only: bool | None = None,
        token: str | bool | None = None,
        low_cpu_mem_usage: bool | None = None,
        proxies: Mapping[str, str] | None = None,
        device_map: None = None,
        max_memory: None = None,
        offload_folder: None = None,
        offload_state_dict: None = None,
        quantization_config: None = None,
        ignore_mismatched_sizes: bool = False,
        output_loading_info: bool = False,
        disable_mmap: bool = False,
        **config_overrides: Any,
    ) -> ModelT:
        """The network of a local folder or a hub repository, in eval mode on the CPU.

        Its numbers are float32 unless `dtype` (or `torch_dtype`) says otherwise; "auto" keeps the
        file's. Loading always holds one copy in memory, whatever `low_cpu_mem_usage` says. Other
        keywords replace entries of the config.

        Raises CheckpointError for missing or mismatching files, UnsupportedConfig for a config that
        is not implemented, RequestError for arguments that cannot be served.
        """
        if use_safetensors is False:
            raise RequestError(f"use_safetensors=False cannot be served: {HOW_TO_CONVERT}")
        _refuse_unserved(
            {
                "proxies": (proxies, "set the environment variable HTTPS_PROXY"),
                "device_map": (device_map, "call .to(device) on the loaded model"),
                "max_memory": (max_memory, "call .to(device) on the loaded model"),
                "offload_folder": (offload_folder, "leave it out"),
                "offload_state_dict": (offload_state_dict, "leave it out"),
                "quantization_config": (quantization_config, "choose a dtype instead"),
                "ignore_mismatched_sizes": (
                    ignore_mismatched_sizes,
                    "override the config entry whose size differs",
                ),
                "output_loading_info": (
                    output_loading_info,
                    "leave it out: missing or surplus weights are always an error",
                ),
                "disable_mmap": (disable_mmap, "copy the files to a local disk"),
            }
        )
        overrides = _config_overrides(cls, config_overrides)
        source = Source(
            os.fspath(pretrained_model_name_or_path),
            subfolder=subfolder,
            variant=variant,
            revision=revision,
            cache_dir=cache_dir,
            force_download=force_download,
            local_files_only=local_files_only,
            token=token,
        )
        numbers = resolve_dtype(dtype, torch_dtype)
        with understood(f"the {cls.__name__} of {Path(source.path, subfolder or '')}"):
            config = cls.config_class.from_dict(source.read_json(CONFIG_NAME), **overrides)
            model = load_weights(lambda: cls(**config), source.weights(WEIGHTS_STEM), numbers)
        return model.eval()

    def save_pretrained(
        self,
        save_directory: str | os.PathLike[str],
        *,
        is_main_process: bool = True,
        save_function: None = None,
        safe_serialization: bool = True,
        variant: str | None = None,
        max_shard_size: int | str = "10GB",
        push_to_hub: bool = False,
    ) -> None:
        """Writes config.json and safetensors that `from_pretrained`, ours and diffusers', reads.

        Each file replaces its predecessor only when it is complete. Does nothing unless
        `is_main_process`.
        """
        if not safe_serialization:
            raise RequestError(
                "safe_serialization=False cannot be served: only safetensors are written"
            )
        _refuse_unserved(
            {
                "save_function": (save_function, "leave it out"),
                "push_to_hub": (push_to_hub, "upload the folder with `hf upload`"),
            }
        )
        if not is_main_process:
            return
        folder = Path(save_directory)
        save_weights(self.state_dict(), folder, WEIGHTS_STEM, variant, max_shard_size)
        write_json(self.config.to_dict(type(self).__name__), folder / CONFIG_NAME)

    # ── weights that inference keeps packed (ops/layers.py) come back for whoever looks at them ──

    def named_parameters(self, *args: Any, **kwargs: Any) -> Iterator[tuple[str, nn.Parameter]]:
        """As in nn.Module."""
        unpack(self)
        return super().named_parameters(*args, **kwargs)

    def train(self: ModelT, mode: bool = True) -> ModelT:
        """As in nn.Module."""
        if mode:
            unpack(self)
        return super().train(mode)

    @property
    def dtype(self) -> torch.dtype:
        """The dtype of the first floating-point parameter."""
        return next(p.dtype for p in held(self) if p.is_floating_point())

    @property
    def device(self) -> torch.device:
        """The device of the first parameter."""
        return next(held(self)).device

    def num_parameters(self, only_trainable: bool = False) -> int:
        """The number of numbers in the parameters, or in those that require a gradient."""
        return sum(p.numel() for p in held(self) if p.requires_grad or not only_trainable)


def resolve_dtype(
    dtype: torch.dtype | str | None, torch_dtype: torch.dtype | str | None = None
) -> torch.dtype | None:
    """The dtype that two spellings of one argument ask for; None keeps the file's.

    Neither given means float32, as in diffusers. A name ("float16") stands for its dtype, "auto"
    for the file's.
    """
    if dtype is not None and torch_dtype is not None:
        raise RequestError("dtype and torch_dtype are one argument; give only one of them")
    wanted: Any = torch_dtype if dtype is None else dtype
    if wanted is None:
        return torch.float32
    if wanted == "auto":
        return None
    named = wanted
    if isinstance(wanted, str):
        named = getattr(torch, wanted.removeprefix("torch."), None)
    if not isinstance(named, torch.dtype) or not named.is_floating_point:
        raise RequestError(f"dtype must be a floating-point torch.dtype or 'auto', got {wanted!r}")
    return named


def _refuse_unserved(arguments: Mapping[str, tuple[Any, str]]) -> None:
    for name, (value, remedy) in arguments.items():
        if value:
            raise RequestError(f"{name}={value!r} is not supported; {remedy}")


def _config_overrides(cls: type[Model], given: Mapping[str, Any]) -> dict[str, Any]:
    arguments = [
        name
        for name, parameter in inspect.signature(cls.from_pretrained).parameters.items()
        if parameter.kind is parameter.KEYWORD_ONLY
    ]
    overrides = {}
    for name, value in given.items():
        if cls.config_class.knows(name):
            overrides[name] = value
        elif near := difflib.get_close_matches(name, arguments, n=1, cutoff=0.8):
            # diffusers ignores unknown keywords, and published samples hold `varient="fp16"`.
            warnings.warn(
                f"unknown argument {name!r}; did you mean {near[0]!r}? It is ignored", stacklevel=3
            )
        else:
            keys = [key for key in cls.config_class.from_dict({}) if not key.startswith("_")]
            near = difflib.get_close_matches(name, [*arguments, *keys], n=1, cutoff=0.0)
            raise TypeError(
                f"{cls.__name__}.from_pretrained got an unknown argument {name!r}; "
                f"the nearest is {near[0]!r}"
            )
    return overrides
