"""config.json <-> frozen dataclasses that read as mappings, as diffusers' configs do.

A key of a file is one of three things: known, as a field of the dataclass or as a further key that
is implemented for certain values only; carried along so that saving gives it back, if it is unknown
to a scheduler or begins with an underscore; or an error.
"""

from __future__ import annotations

import difflib
import json
import os
import uuid
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from dataclasses import dataclass, fields
from pathlib import Path
from typing import Any, ClassVar, TypeVar

from ..errors import CheckpointError, FewstepError, UnsupportedConfig

# The layout of the files written. Readers of diffusers adjust configs of versions before 0.9.
LAYOUT_VERSION = "0.40.0"

DEFAULTED = "_use_default_values"  # diffusers' name for: these keys were given by nobody

# Words in the names of sizes -> more than any model has; such a file would fill the memory, or keep
# a constructor busy for ever. All other numbers are at most the last.
LARGEST_OF = {"layers": 256, "blocks": 256, "length": 4096, "timesteps": 100_000}
LARGEST = 1 << 20

ConfigT = TypeVar("ConfigT", bound="Config")


@dataclass(frozen=True)
class Config(Mapping[str, Any]):
    """Base of the frozen configs: `cfg.key`, `cfg["key"]`, `cfg.get`, `in`, `keys()`, `dict(cfg)`.

    Subclasses are frozen dataclasses whose fields have defaults. As a mapping a config also holds
    its further and its carried keys, and which keys nobody has set.
    """

    # Field or further key -> the values that are implemented; any other is refused. A further key
    # that nobody has set reads as the first of them.
    INERT: ClassVar[Mapping[str, tuple[Any, ...]]] = {}
    # Whether a key that is neither is an error (networks) or carried (schedulers).
    STRICT: ClassVar[bool] = True

    @classmethod
    def from_dict(cls: type[ConfigT], stored: Mapping[str, Any], **overrides: Any) -> ConfigT:
        """The config of a file's keys; `overrides` win. Lists become tuples.

        Keys that `stored` lists as defaults of another class give way to this class's defaults.
        Raises UnsupportedConfig for a key that is unknown, or whose value is not implemented.
        """
        defaulted = set(stored.get(DEFAULTED, ()))
        given = {k: _frozen(v) for k, v in stored.items() if k not in defaulted and k != DEFAULTED}
        given |= {key: _frozen(value) for key, value in overrides.items()}
        known = {field.name for field in fields(cls)}
        for key, value in given.items():
            cls._require_supported(key, value, known)
        check_sizes({key: value for key, value in given.items() if key in known})
        config = cls(**{key: value for key, value in given.items() if key in known})
        carried = {key: value for key, value in given.items() if key not in known}
        object.__setattr__(config, "_carried", carried)
        object.__setattr__(config, "_given", frozenset(given))
        return config

    @classmethod
    def _require_supported(cls, key: str, value: Any, known: set[str]) -> None:
        if key in cls.INERT:
            supported = cls.INERT[key]
            if value not in supported:
                raise UnsupportedConfig(
                    f"{key}={value!r} is not implemented "
                    f"(supported: {', '.join(map(repr, supported))})"
                )
        elif key not in known and cls.STRICT and not key.startswith("_"):
            near = difflib.get_close_matches(key, [*known, *cls.INERT], n=1)
            hint = f"; did you mean {near[0]!r}?" if near else ""
            raise UnsupportedConfig(f"{cls.__name__} does not know {key}={repr(value)[:80]}{hint}")

    @classmethod
    def knows(cls, key: str) -> bool:
        """Whether `key` is a field or a further key of this config."""
        return key in cls.INERT or key in {field.name for field in fields(cls)}

    def to_dict(self, class_name: str | None = None) -> dict[str, Any]:
        """Every key and value for a JSON file, defaults too; with a header if `class_name`."""
        plain = {key: value for key, value in self.items() if not key.startswith("_")}
        header = {"_class_name": class_name, "_diffusers_version": LAYOUT_VERSION}
        return plain | header if class_name else plain

    def _values(self) -> dict[str, Any]:
        own = {field.name: self.__dict__[field.name] for field in fields(self)}
        further = {key: supported[0] for key, supported in self.INERT.items() if key not in own}
        carried = self.__dict__.get("_carried", {})
        given = self.__dict__.get("_given")
        if given is None:  # built by its constructor: what differs from the default was meant
            given = {field.name for field in fields(self) if own[field.name] != field.default}
        defaulted = [key for key in own | further if key not in given]
        return own | further | carried | ({DEFAULTED: defaulted} if defaulted else {})

    def __getattr__(self, name: str) -> Any:
        # Reached for further and carried keys only; fields are found before.
        if not name.startswith("__") and name in (values := self._values()):
            return values[name]
        raise AttributeError(f"{type(self).__name__} has no key {name!r}")

    def __getitem__(self, key: str) -> Any:
        return self._values()[key]

    def __iter__(self) -> Iterator[str]:
        return iter(self._values())

    def __len__(self) -> int:
        return len(self._values())


def _frozen(value: Any) -> Any:
    return tuple(map(_frozen, value)) if isinstance(value, (list, tuple)) else value


def check_sizes(stored: Mapping[str, Any]) -> None:
    """Raises UnsupportedConfig for an integer, also within lists, that no size can be."""
    for key, value in stored.items():
        most = next((most for word, most in LARGEST_OF.items() if word in key), LARGEST)
        if isinstance(value, Mapping):
            check_sizes(value)
        for number in flat(value):
            if isinstance(number, int) and not -most <= number <= most:
                raise UnsupportedConfig(f"{key} holds {number}, which is more than {most}")


def flat(value: Any) -> Iterator[Any]:
    """What a value holds, within lists of lists."""
    if not isinstance(value, (list, tuple)):
        yield value
        return
    for each in value:
        yield from flat(each)


@contextmanager
def understood(place: str) -> Iterator[None]:
    """Whatever goes wrong in the block for what files hold is a CheckpointError about `place`.

    Files come from anywhere, and their values need not be what constructors expect.
    """
    try:
        yield
    except (FewstepError, ImportError, MemoryError):
        raise
    except Exception as error:
        if isinstance(error, RuntimeError) and "memory" in str(error).lower():
            raise
        said = next(iter(str(error).splitlines()), "")[:200]
        raise CheckpointError(
            f"{place} cannot be loaded: {type(error).__name__}: {said}; is it damaged?"
        ) from error


def read_json(path: Path) -> dict[str, Any]:
    """The object of a JSON file. Raises CheckpointError if it holds anything else."""
    try:
        content = json.loads(path.read_text(encoding="utf-8"))
    except (ValueError, RecursionError) as error:  # not JSON, not text, or too deep
        raise CheckpointError(f"{path} is not valid JSON: {error}") from error
    if not isinstance(content, dict):
        raise CheckpointError(f"{path} holds a {type(content).__name__}, expected an object")
    return content


def write_json(content: Mapping[str, Any], path: Path) -> None:
    """Writes a JSON file as diffusers lays it out: all of it, or on failure nothing."""
    with replacing(path) as beside:
        text = json.dumps(content, indent=2, sort_keys=True, default=_jsonable) + "\n"
        beside.write_text(text, encoding="utf-8")


def _jsonable(value: Any) -> Any:
    return value.tolist()  # a numpy or torch value, such as trained_betas


@contextmanager
def replacing(path: Path) -> Iterator[Path]:
    """A new path beside `path`, renamed to it if the block ends well and removed if not."""
    path.parent.mkdir(parents=True, exist_ok=True)
    beside = path.with_name(f".{path.name}.{uuid.uuid4().hex}.partial")
    try:
        beside.touch()
        mode = beside.stat().st_mode  # a new file's, which safetensors would make private
        yield beside
        beside.chmod(mode)
        os.replace(beside, path)
    finally:
        beside.unlink(missing_ok=True)
