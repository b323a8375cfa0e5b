"""What all pipelines share: named components, loading, saving, device and dtype."""

from __future__ import annotations

import difflib
import inspect
import os
from collections.abc import Iterable, Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any, ClassVar, TypeVar

import numpy as np
import PIL.Image
import torch
from torch import nn

from ..checkpoints.locate import Source
from ..errors import RequestError, UnsupportedConfig
from ..models.base import resolve_dtype
from ..ops.layers import held
from .images import to_pil
from .loading import load_parts, read_index, save_parts
from .notices import warn_caller
from .single_file import FromSingleFile

PipelineT = TypeVar("PipelineT", bound="DiffusionPipeline")

# Keywords of diffusers' from_pretrained that cannot be served -> what to do instead.
UNSERVED = {
    "custom_pipeline": "code from elsewhere is never run; leave it out",
    "custom_revision": "code from elsewhere is never run; leave it out",
    "trust_remote_code": "code from elsewhere is never run; leave it out",
    "device_map": "call .to(device) on the loaded pipeline",
    "max_memory": "call .to(device) on the loaded pipeline",
    "offload_folder": "leave it out",
    "offload_state_dict": "leave it out",
    "quantization_config": "choose a torch_dtype instead",
    "proxies": "set the environment variable HTTPS_PROXY",
    "use_onnx": "leave it out",
    "dduf_file": "load a folder or a hub repository",
}


class DiffusionPipeline(FromSingleFile):
    """The components of a model under diffusers' names; `from_pretrained` finds the right class.

    `components` are attributes too and may be replaced: `pipe.scheduler = LCMScheduler.from_config(
    pipe.scheduler.config)`.
    """

    name_or_path: str = ""
    leaves_out: ClassVar[tuple[str, ...]] = ()  # components of checkpoints that are not loaded

    def __init__(self) -> None:
        self._names: tuple[str, ...] = ()
        self._progress_bar_config: dict[str, Any] = {}

    def register_modules(self, **modules: Any) -> None:
        """Make `modules` components of this pipeline."""
        self._names = (*self._names, *(name for name in modules if name not in self._names))
        for name, module in modules.items():
            setattr(self, name, module)

    @property
    def components(self) -> dict[str, Any]:
        """The components by name; one that is left out is None."""
        return {name: getattr(self, name) for name in self._names}

    @property
    def options(self) -> dict[str, Any]:
        """The entries of model_index.json that are no components."""
        return {}

    @property
    def modules(self) -> Iterator[nn.Module]:
        """The components that are networks."""
        return (c for c in self.components.values() if isinstance(c, nn.Module))

    # ── loading and saving ──

    @classmethod
    def from_pretrained(
        cls: type[PipelineT],
        pretrained_model_name_or_path: str | os.PathLike[str],
        *,
        torch_dtype: torch.dtype | str | None = None,
        dtype: torch.dtype | str | None = None,
        variant: str | None = None,
        revision: str | None = None,
        use_safetensors: bool | None = None,
        cache_dir: str | os.PathLike[str] | None = None,
        force_download: bool = False,
        local_files_only: bool | None = None,
        token: str | bool | None = None,
        low_cpu_mem_usage: bool | None = None,
        **components: Any,
    ) -> PipelineT:
        """The pipeline of a local folder or a hub repository, on the CPU.

        `DiffusionPipeline` itself gives the class that model_index.json names; any other class is
        used as it is. Networks are float32 unless `torch_dtype` (or `dtype`) says otherwise;
        `variant="fp16"` reads those files where there are any. Further keywords replace
        components (`unet=...`) or, with None, leave them out. `low_cpu_mem_usage` changes nothing:
        loading always holds one copy.

        Raises CheckpointError for missing, pickled or mismatching files, UnsupportedConfig for a
        pipeline or component that is not implemented, TypeError for an unknown keyword.
        """
        if use_safetensors is False:
            raise RequestError(
                "use_safetensors=False cannot be served: pickled weights run code when they are "
                "read; leave it out"
            )
        root = Source(
            os.fspath(pretrained_model_name_or_path),
            revision=revision,
            cache_dir=cache_dir,
            force_download=force_download,
            local_files_only=local_files_only,
            token=token,
        )
        stored_class, parts, options = read_index(root)
        pipeline = cls.implementation(stored_class)
        accepted = pipeline.arguments()
        loading = [
            name
            for name, parameter in inspect.signature(cls.from_pretrained).parameters.items()
            if parameter.kind is parameter.KEYWORD_ONLY
        ]
        given = check_keywords(pipeline, components, accepted, loading)
        needless = [part for part in parts if part.name not in accepted]
        if needless:
            raise UnsupportedConfig(
                f"{root.path!r} is a {stored_class}; {pipeline.__name__} has no use for its "
                f"{', '.join(part.name for part in needless)}"
            )
        wanted = [p for p in parts if p.name not in given and p.name not in pipeline.leaves_out]
        loaded = load_parts(root, wanted, resolve_dtype(dtype, torch_dtype), variant)
        kept = {name: value for name, value in options.items() if name in accepted}
        arguments = kept | loaded | given
        missing = [n for n, p in accepted.items() if p.default is p.empty and n not in arguments]
        if missing:
            raise RequestError(
                f"{root.path!r} has no {', '.join(missing)}; pass {missing[0]}= to from_pretrained"
            )
        pipe = pipeline(**arguments)
        pipe.name_or_path = root.path
        return pipe

    @classmethod
    def from_pipe(
        cls: type[PipelineT], pipeline: DiffusionPipeline, **components: Any
    ) -> PipelineT:
        """A pipeline of this class that shares the components of another one.

        Keywords replace components. Raises UnsupportedConfig if a component has no place in it.
        """
        accepted = cls.arguments()
        given = check_keywords(cls, components, accepted)
        shared = {
            n: c for n, c in (pipeline.components | pipeline.options).items() if n not in given
        }
        needless = [n for n, c in shared.items() if n not in accepted and c is not None]
        if needless:
            raise UnsupportedConfig(
                f"{cls.__name__} has no use for the {', '.join(needless)} of a "
                f"{type(pipeline).__name__}"
            )
        arguments = {name: value for name, value in shared.items() if name in accepted}
        new = cls(**arguments, **given)
        new.name_or_path = pipeline.name_or_path
        return new

    @classmethod
    def implementation(cls: type[PipelineT], stored_class: str) -> type[PipelineT]:
        """The class to build for a checkpoint of `stored_class`: this one, if it has a task."""
        from .catalog import pipeline_class

        if any("__call__" in vars(base) for base in cls.__mro__):
            return cls
        found = pipeline_class(stored_class)
        assert issubclass(found, cls)
        return found

    @classmethod
    def arguments(cls) -> Mapping[str, inspect.Parameter]:
        """The constructor's parameters: components and options."""
        parameters = inspect.signature(cls.__init__).parameters
        return {name: p for name, p in parameters.items() if name != "self"}

    def save_pretrained(
        self,
        save_directory: str | os.PathLike[str],
        *,
        safe_serialization: bool = True,
        variant: str | None = None,
        max_shard_size: int | str = "10GB",
    ) -> None:
        """Write the pipeline into a folder that this library and diffusers load."""
        if not safe_serialization:
            raise RequestError(
                "safe_serialization=False cannot be served: only safetensors are written; "
                "leave it out"
            )
        save_parts(
            Path(save_directory),
            type(self).__name__,
            self.components,
            self.options,
            variant=variant,
            max_shard_size=max_shard_size,
        )

    # ── device and dtype ──

    def to(
        self: PipelineT,
        *args: torch.device | torch.dtype | str | int,
        device: torch.device | str | int | None = None,
        dtype: torch.dtype | None = None,
        torch_device: torch.device | str | int | None = None,
        torch_dtype: torch.dtype | None = None,
    ) -> PipelineT:
        """Move all networks to a device, a dtype or both: `to("cuda")`, `to(dtype=torch.float16)`.

        `torch_device` and `torch_dtype` are the names that early LCM scripts use.
        """
        asked: dict[str, list[Any]] = {
            "device": [v for v in (device, torch_device) if v is not None],
            "dtype": [v for v in (dtype, torch_dtype) if v is not None],
        }
        for value in args:
            asked["dtype" if isinstance(value, torch.dtype) else "device"].append(value)
        for name, values in asked.items():
            if len(values) > 1:
                raise RequestError(f"to() got more than one {name}: {values}; give one")
        target = {name: values[0] for name, values in asked.items() if values}
        if not target:
            raise RequestError('to() needs a device or a dtype: to("cuda"), to(torch.float16)')
        for module in self.modules:
            module.to(**target)
        return self

    @property
    def device(self) -> torch.device:
        """The device of the first network."""
        return next((p.device for m in self.modules for p in held(m)), torch.device("cpu"))

    @property
    def dtype(self) -> torch.dtype:
        """The dtype of the first network."""
        numbers = (p for m in self.modules for p in held(m) if p.is_floating_point())
        return next((p.dtype for p in numbers), torch.float32)

    # ── conveniences ──

    def progress_bar(self, iterable: Iterable[Any] | None = None, total: int | None = None) -> Any:
        """A tqdm bar over `iterable` or up to `total`, as `set_progress_bar_config` set it."""
        from tqdm.auto import tqdm

        return tqdm(iterable, total=total, **self._progress_bar_config)

    def set_progress_bar_config(self, **config: Any) -> None:
        """Arguments of tqdm for the bar; `disable=True` turns it off."""
        self._progress_bar_config = config

    @staticmethod
    def numpy_to_pil(images: np.ndarray) -> list[PIL.Image.Image]:
        """PIL pictures from floats (B, H, W, C) in [0, 1]."""
        return to_pil(images)


def check_keywords(
    pipeline: type[DiffusionPipeline],
    given: Mapping[str, Any],
    accepted: Mapping[str, inspect.Parameter],
    loading: Sequence[str] = (),
) -> dict[str, Any]:
    """The keywords that name components or options of `pipeline`.

    A near miss of one of the `loading` arguments is warned of and left out, since published samples
    hold `varient="fp16"`; any other unknown keyword is a TypeError.
    """
    known = {}
    for name, value in given.items():
        near = difflib.get_close_matches(name, [*loading, *accepted], n=1)
        if name in accepted:
            known[name] = value
        elif name in UNSERVED:
            if value is not None and value is not False:
                raise RequestError(f"{name}={value!r} is not supported: {UNSERVED[name]}")
        elif difflib.get_close_matches(name, loading, n=1, cutoff=0.8):
            warn_caller(f"unknown argument {name!r}; did you mean {near[0]!r}? It is ignored")
        else:
            hint = (
                f"; did you mean {near[0]!r}?" if near else f" (components: {', '.join(accepted)})"
            )
            raise TypeError(f"{pipeline.__name__} got an unknown argument {name!r}{hint}")
    return known
