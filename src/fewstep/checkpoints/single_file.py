"""Single files: a whole model in one safetensors file, in the layout of the original code."""

from __future__ import annotations

import os
import re
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any, TypeVar

import torch
from torch import Tensor, nn

from ..errors import CheckpointError, RequestError
from .known.names import Names, Piece
from .legacy_names import modern_shape
from .locate import HOW_TO_CONVERT, PICKLED, Source
from .weights import check_numbers, opened

ModuleT = TypeVar("ModuleT", bound=nn.Module)

SUFFIXES = (".safetensors", ".sft")
# Entries of network layouts that are no weights, or weights that nothing reads.
IGNORED = re.compile(r"(^|\.)(position_ids|logit_scale|attn_mask)$|^(model_ema|loss)\.")
# Names that some programs write -> the names of all others.
ALIASES = (
    (re.compile(r"(mid\.attn_1)\.to_([qkv])\."), r"\1.\2."),
    (re.compile(r"(mid\.attn_1)\.to_out\.0\."), r"\1.proj_out."),
    (
        re.compile(r"^(cond_stage_model\.transformer)\.(embeddings|encoder|final_layer_norm)\."),
        r"\1.text_model.\2.",
    ),
)
HUB_FILE = re.compile(
    r"(?:(?:https?://)?(?:www\.)?(?:huggingface\.co|hf\.co)/)?"
    r"(?P<repository>[\w.-]+/[\w.-]+)/"
    r"(?:(?:blob|resolve)/(?P<revision>[^/]+)/)?(?P<name>[^?]+)(?:\?.*)?"
)


@dataclass(frozen=True)
class SingleFile:
    """A safetensors file: the shapes of its tensors by name, and the names as they are written."""

    path: Path
    shapes: Mapping[str, tuple[int, ...]]
    written: Mapping[str, str]

    @classmethod
    def open(cls, path: Path) -> SingleFile:
        """The names and shapes of a file; its tensors stay on disk."""
        shapes, written = {}, {}
        with opened(path) as file:
            for key in file.keys():  # noqa: SIM118 -- not a mapping
                name = canonical(key)
                shapes[name] = tuple(file.get_slice(key).get_shape())
                written[name] = key
        return cls(path, shapes, written)

    def has(self, prefix: str) -> bool:
        """Whether any name begins with `prefix`."""
        return any(name.startswith(prefix) for name in self.shapes)

    def load(
        self,
        build: Callable[[], ModuleT],
        names: Names,
        prefix: str,
        dtype: torch.dtype | None = None,
        spare: str | None = None,
    ) -> ModuleT:
        """The module that `build` makes, in eval mode, with the file's tensors behind `prefix`.

        It is built without memory and takes the tensors as its own, mapped or converted one by one.
        Names that match the pattern `spare` may be left over.

        Raises CheckpointError for missing or surplus names and for shapes that differ.
        """
        with torch.device("meta"):
            module = build()
        wanted = {name: tuple(value.shape) for name, value in module.state_dict().items()}
        pieces = {name: names(name) for name in wanted}
        self._check(type(module).__name__, pieces, prefix, spare)
        state: dict[str, Tensor] = {}
        is_float = {name: v.is_floating_point() for name, v in module.state_dict().items()}
        with opened(self.path) as file:
            for name, piece in pieces.items():
                key = self.written[prefix + piece.key]
                value = modern_shape(piece.of(file.get_tensor(key)), wanted[name])
                if tuple(value.shape) != wanted[name]:
                    raise CheckpointError(
                        f"{key} gives {name} the shape {tuple(value.shape)} in {self.path}, but "
                        f"the config asks for {wanted[name]}; pass config= with the folder that "
                        "belongs to the file"
                    )
                check_numbers(key, value, is_float[name], self.path)
                state[name] = value.to(dtype) if dtype and value.is_floating_point() else value
        module.load_state_dict(state, strict=True, assign=True)
        return module.eval()

    def _check(
        self, title: str, pieces: Mapping[str, Piece], prefix: str, spare: str | None
    ) -> None:
        used = {piece.key for piece in pieces.values()}
        own = {key.removeprefix(prefix) for key in self.shapes if key.startswith(prefix)}
        missing = sorted(used - own)
        surplus = sorted(
            key
            for key in own - used
            if not IGNORED.search(key) and not (spare and re.match(spare, key))
        )
        if missing or surplus:
            parts = [
                f"{len(keys)} tensors {how} ({', '.join(keys[:5])}{', ...' if keys[5:] else ''})"
                for how, keys in (("missing", missing), ("surplus", surplus))
                if keys
            ]
            raise CheckpointError(
                f"{self.path} does not fit {title}: {' and '.join(parts)} behind {prefix!r}; "
                "pass config= with the folder that belongs to the file"
            )


def canonical(key: str) -> str:
    """The usual name of a tensor that a file calls `key`."""
    for pattern, name in ALIASES:
        key = pattern.sub(name, key)
    return key


def find_file(
    place: str | os.PathLike[str],
    *,
    revision: str | None = None,
    cache_dir: str | os.PathLike[str] | None = None,
    force_download: bool = False,
    local_files_only: bool | None = None,
    token: str | bool | None = None,
) -> Path:
    """The local path of a file: a path, `owner/repository/name`, or its address on the hub.

    Raises CheckpointError for what is not there, for folders and for pickled files.
    """
    given = os.fspath(place)
    local = Path(given)
    if os.path.isdir(local):
        raise CheckpointError(f"{given} is a folder; load it with from_pretrained")
    if given.split("?")[0].lower().endswith(PICKLED):
        raise CheckpointError(f"{given} is not a safetensors file: {HOW_TO_CONVERT}")
    if not given.split("?")[0].lower().endswith(SUFFIXES):
        raise CheckpointError(f"{given} must be the name of a .safetensors file")
    if os.path.isfile(local):
        return local
    match = HUB_FILE.fullmatch(given)
    if match is None or local.is_absolute():
        raise CheckpointError(
            f"there is no file {given}, and it is no file of the hub (owner/repository/name); "
            "download it first"
        )
    if revision and match["revision"] and revision != match["revision"]:
        raise RequestError(
            f"revision={revision!r} contradicts {match['revision']!r} in {given}; give one of them"
        )
    source = Source(
        match["repository"],
        revision=revision or match["revision"],
        cache_dir=cache_dir,
        force_download=force_download,
        local_files_only=local_files_only,
        token=token,
    )
    try:
        return source.fetch(match["name"])
    except CheckpointError as error:
        raise CheckpointError(f"there is no file {given} here; on the hub: {error}") from error


def unused(shapes: Mapping[str, Any], prefixes: Sequence[str]) -> list[str]:
    """Matrices of a file behind none of `prefixes`; schedules, marks and averages do not count."""
    return sorted(
        key
        for key, shape in shapes.items()
        if len(shape) > 1 and not key.startswith(tuple(prefixes)) and not IGNORED.search(key)
    )
