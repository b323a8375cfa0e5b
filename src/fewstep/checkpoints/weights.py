"""safetensors <-> modules: one copy in memory, every name accounted for, no half-written files."""

from __future__ import annotations

import os
import re
import threading
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from contextlib import ExitStack, contextmanager, suppress
from pathlib import Path
from typing import Any, TypeVar

import torch
from safetensors import SafetensorError, safe_open
from safetensors.torch import save_file
from torch import Tensor, nn
from torch.overrides import TorchFunctionMode

from ..errors import CheckpointError, RequestError
from .config import replacing, write_json
from .legacy_names import modern_name, modern_shape
from .locate import HOW_TO_CONVERT, index_names, weights_name

ModuleT = TypeVar("ModuleT", bound=nn.Module)

# What constructors fill parameters with, by functions of nn.init or by tensors' own methods.
FILLS = frozenset(
    f"{name}_"
    for name in [
        "constant",
        "fill",
        "kaiming_normal",
        "kaiming_uniform",
        "normal",
        "ones",
        "trunc_normal",
        "uniform",
        "xavier_normal",
        "xavier_uniform",
        "zero",
        "zeros",
    ]
)

# Bytes of a file's list of tensors; those of large models have one or two hundred thousand.
LARGEST_HEADER = 16 << 20
MOST_TENSORS = 50_000  # of a file; the largest models have some thousands
OFFSETS = re.compile(rb'"data_offsets"\s*:\s*\[')  # each tensor of the list has one


class Unfilled(TorchFunctionMode):
    """Leaves tensors on the meta device as they are, which have no numbers to be filled with.

    torch computes their shapes in Python otherwise, in modules that it imports for that.
    """

    def __torch_function__(
        self, function: Any, types: Any, args: Any = (), kwargs: Any = None
    ) -> Any:
        kwargs = kwargs or {}
        if function.__name__ in FILLS:
            tensor = args[0] if args else kwargs["tensor"]
            if tensor.is_meta:
                return tensor
        return function(*args, **kwargs)


def load_weights(
    build: Callable[[], ModuleT],
    files: Sequence[Path],
    dtype: torch.dtype | None = None,
) -> ModuleT:
    """The module that `build` makes, holding exactly the tensors of the safetensors `files`.

    The module is built without memory (on the meta device) and takes the files' tensors as its
    own: they stay mapped to the files, or with `dtype` are converted one by one, so there is never
    a second copy. A buffer that is not in the files (persistent=False) must be created by `build`
    with an explicit device="cpu": the meta device does not reach it, and it keeps its values.

    Raises CheckpointError for missing or surplus names and for shapes that differ.
    """
    with torch.device("meta"), Unfilled():
        module = build()
    wanted = {key: tuple(value.shape) for key, value in module.state_dict().items()}
    is_float = {key: value.is_floating_point() for key, value in module.state_dict().items()}
    state: dict[str, Tensor] = {}
    surplus = []
    for key, value in read_tensors(files):
        name = key if key in wanted else modern_name(key)
        if name not in wanted:
            surplus.append(key)
            continue
        value = modern_shape(value, wanted[name])
        if tuple(value.shape) != wanted[name]:
            raise CheckpointError(
                f"{key} has shape {tuple(value.shape)} in {files[0].parent}, "
                f"but the config asks for {wanted[name]}"
            )
        check_numbers(key, value, is_float[name], files[0].parent)
        state[name] = value.to(dtype) if dtype and value.is_floating_point() else value
    missing = [key for key in wanted if key not in state]
    if missing or surplus:
        raise CheckpointError(
            f"the weights in {files[0].parent} do not fit {type(module).__name__}: "
            f"{_summary(missing)} missing, {_summary(surplus)} surplus; "
            "does config.json belong to them?"
        )
    module.load_state_dict(state, strict=True, assign=True)
    left = [name for name, buffer in module.named_buffers() if buffer.is_meta]
    assert not left, f"buffers {left} are in no file; create them with an explicit device"
    return module


def read_ahead(files: Iterable[Path]) -> None:
    """Asks the system to bring `files` from the disk into memory, while this process works on."""

    def ask() -> None:
        for path in wanted:
            # A file that cannot be read is told of by its reader.
            with suppress(OSError), path.open("rb") as file:
                os.posix_fadvise(file.fileno(), 0, 0, os.POSIX_FADV_WILLNEED)

    wanted = list(files)
    if wanted and hasattr(os, "posix_fadvise"):
        threading.Thread(target=ask, name="read ahead", daemon=True).start()


def read_tensors(files: Iterable[Path]) -> Iterator[tuple[str, Tensor]]:
    """Each name and tensor of the safetensors `files`, mapped: read from disk when first used."""
    for path in files:
        with opened(path) as file:
            for key in file.keys():  # noqa: SIM118 -- not a mapping
                yield key, file.get_tensor(key)


@contextmanager
def opened(path: Path) -> Iterator[Any]:
    """A safetensors file, its list of tensors checked, to read from within the block.

    Raises CheckpointError for any other file, and for a list that is too long to be a model's or
    names a tensor twice, of which readers would take different ones.
    """
    try:
        named = sum(1 for _ in OFFSETS.finditer(read_header(path)))
        if named > MOST_TENSORS:
            raise CheckpointError(f"{path} names {named} tensors, which is no model's number")
        with safe_open(path, framework="pt", device="cpu") as file:
            if named != len(file.keys()):
                raise CheckpointError(f"{path} names a tensor more than once; it is damaged")
            yield file
    except (SafetensorError, IsADirectoryError) as error:
        raise CheckpointError(f"{path} is not a whole safetensors file: {error}") from error


def read_header(path: Path) -> bytes:
    """The list of tensors of a file, or what stands in its place."""
    with path.open("rb") as stream:
        start = stream.read(8)
        size = int.from_bytes(start, "little")
        if size <= LARGEST_HEADER:
            return stream.read(size)
    reason = f"its list of tensors would have {size} bytes (at most {LARGEST_HEADER} are read)"
    if start.startswith((b"PK", b"\x80")):
        reason = f"it is a zip file or a pickle; {HOW_TO_CONVERT}"
    raise CheckpointError(f"{path} is not a whole safetensors file: {reason}")


def check_numbers(key: str, value: Tensor, is_float: bool, place: Path) -> None:
    """Raises CheckpointError for a tensor whose numbers are of another kind than its network's."""
    if value.is_floating_point() != is_float:
        raise CheckpointError(f"{key} holds {value.dtype} in {place}, which no network computes in")


def save_weights(
    state: Mapping[str, Tensor],
    folder: Path,
    stem: str,
    variant: str | None = None,
    max_shard_size: int | str = "10GB",
) -> list[Path]:
    """Writes `state` as `stem.safetensors`, or as shards with an index if larger than a shard.

    All files are written beside their places and renamed together at the end, and files of an
    earlier save under other names are then removed. Returns the files written.
    """
    shards = _shards(state, parse_size(max_shard_size))
    middle = f"{stem}.{variant}" if variant else stem
    names = (
        [weights_name(stem, variant)]
        if len(shards) == 1
        else [f"{middle}-{i:05}-of-{len(shards):05}.safetensors" for i in range(1, len(shards) + 1)]
    )
    written = [folder / name for name in names]
    try:
        with ExitStack() as pending:
            # Entered in order, left in reverse; each place is replaced only after all are written.
            beside = [pending.enter_context(replacing(path)) for path in written]
            for path, keys in zip(beside, shards, strict=True):
                tensors = {key: state[key].detach().cpu().contiguous() for key in keys}
                save_file(tensors, path, metadata={"format": "pt"})
    except SafetensorError as error:  # a full disk, among others
        raise CheckpointError(f"{folder} could not be written: {error}") from error
    if len(shards) > 1:
        total = sum(value.numel() * value.element_size() for value in state.values())
        weight_map = {key: name for name, keys in zip(names, shards, strict=True) for key in keys}
        written.append(folder / index_names(stem, variant)[0])
        write_json({"metadata": {"total_size": total}, "weight_map": weight_map}, written[-1])
    whole = {weights_name(stem, variant), *index_names(stem, variant)}
    _remove_earlier(folder, middle, whole, written)
    return written


def save_tensors(tensors: Mapping[str, Tensor], path: Path, metadata: Mapping[str, str]) -> None:
    """Writes tensors as one safetensors file: all of it, or on failure nothing."""
    plain = {name: tensor.detach().cpu().contiguous() for name, tensor in tensors.items()}
    try:
        with replacing(path) as beside:
            save_file(plain, beside, dict(metadata))
    except SafetensorError as error:  # a full disk, among others
        raise CheckpointError(f"{path} could not be written: {error}") from error


def parse_size(size: int | str) -> int:
    """Bytes of 5_000_000, "500MB", "10GB" or "2GiB"."""
    if isinstance(size, int):
        number, unit = float(size), ""
    else:
        match = re.fullmatch(r"\s*(\d+(?:\.\d+)?)\s*([KMGT]?I?B)\s*", size, re.IGNORECASE)
        if not match:
            raise RequestError(f"max_shard_size must be bytes or a text like '5GB', got {size!r}")
        number, unit = float(match[1]), match[2].upper()
    base = 1024 if "I" in unit else 1000
    exponent = " KMGT".index(unit[0]) if len(unit) > 1 else 0
    parsed = int(number * base**exponent)
    if parsed <= 0:
        raise RequestError(f"max_shard_size must be positive, got {size!r}")
    return parsed


def _shards(state: Mapping[str, Tensor], limit: int) -> list[list[str]]:
    """Names in their order, parted: no part is larger than `limit` bytes unless one tensor is."""
    shards: list[list[str]] = [[]]
    room = limit
    for key, value in state.items():
        size = value.numel() * value.element_size()
        if size > room and shards[-1]:
            shards.append([])
            room = limit
        shards[-1].append(key)
        room -= size
    return shards


def _remove_earlier(folder: Path, middle: str, whole: set[str], written: Sequence[Path]) -> None:
    # A plain file beside an index, or shards of another count, would be read in place of the new.
    shard = re.compile(rf"{re.escape(middle)}-\d{{5}}-of-\d{{5}}\.safetensors")
    for name in os.listdir(folder):
        if (name in whole or shard.fullmatch(name)) and folder / name not in written:
            (folder / name).unlink()


def _summary(keys: Sequence[str]) -> str:
    if not keys:
        return "none"
    return f"{len(keys)} ({', '.join(keys[:10])}{', ...' if len(keys) > 10 else ''})"
