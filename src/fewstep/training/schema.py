"""TOML tables as frozen dataclasses, checked key by key; unknown keys are errors."""

from __future__ import annotations

import difflib
import inspect
import sys
import types
from collections.abc import Mapping
from dataclasses import is_dataclass
from pathlib import Path
from typing import Any, Literal, TypeVar, Union, get_args, get_origin, get_type_hints

from ..errors import RequestError

if sys.version_info >= (3, 11):
    import tomllib
else:
    import tomli as tomllib

T = TypeVar("T")


def read_table(path: Path) -> dict[str, Any]:
    """The table of a TOML file. Raises RequestError, with the line, if it is none."""
    try:
        return tomllib.loads(path.read_text(encoding="utf-8"))
    except (tomllib.TOMLDecodeError, UnicodeDecodeError) as error:
        raise RequestError(f"recipe {path}: {error}") from None


def toml_value(text: str) -> Any:
    """`text` as a TOML value, or as a string where it is none."""
    try:
        return tomllib.loads(f"value = {text}")["value"]
    except tomllib.TOMLDecodeError:
        return text


def place(table: dict[str, Any], path: list[str], value: Any) -> None:
    """Set the entry at a dotted path."""
    for name in path[:-1]:
        table = table.setdefault(name, {})
        if not isinstance(table, dict):
            raise RequestError(f"override {'.'.join(path)}: {name!r} is not a section")
    table[path[-1]] = value


def parse(kind: type[T], table: Mapping[str, Any], source: str) -> T:
    """`table` as a dataclass, checked key by key and type by type."""
    hints = get_type_hints(kind)
    for key in table:
        if key not in hints:
            near = difflib.get_close_matches(key, hints, 1)
            hint = f"; did you mean {near[0]!r}?" if near else f" (known: {sorted(hints)})"
            raise RequestError(f"{source}: unknown key {key!r}{hint}")
    parameters = inspect.signature(kind).parameters.values()
    required = {p.name for p in parameters if p.default is p.empty}
    if missing := sorted(required - set(table)):
        raise RequestError(f"{source}: missing {missing}")
    return kind(
        **{key: convert(hints[key], value, f"{source}: {key}") for key, value in table.items()}
    )


def convert(hint: Any, value: Any, source: str) -> Any:
    """`value` as the type `hint`, or RequestError."""
    if is_dataclass(value):  # parsed before
        return value
    if get_origin(hint) in (Union, types.UnionType):  # a section that may be left out
        hint = next((kind for kind in get_args(hint) if is_dataclass(kind)), hint)
    if is_dataclass(hint):
        if not isinstance(value, Mapping):
            raise RequestError(f"{source} must be a section, got {value!r}")
        return parse(hint, value, source)  # type: ignore[arg-type]
    if get_origin(hint) is Literal:
        if value not in get_args(hint):
            raise RequestError(f"{source} must be one of {list(get_args(hint))}, got {value!r}")
        return value
    if get_origin(hint) is tuple:
        if not isinstance(value, (list, tuple)):
            raise RequestError(f"{source} must be a list, got {value!r}")
        kinds = get_args(hint)
        if kinds[-1] is Ellipsis:
            kinds = (kinds[0],) * len(value)
        if len(kinds) != len(value):
            raise RequestError(f"{source} must hold {len(kinds)} values, got {value!r}")
        pairs = zip(kinds, value, strict=True)
        return tuple(convert(kind, item, source) for kind, item in pairs)
    if hint is float and isinstance(value, int) and not isinstance(value, bool):
        return float(value)
    plain = {int: int, float: float, str: str, bool: bool}.get(hint)
    if plain is not None and (not isinstance(value, plain) or (plain is int and value is True)):
        raise RequestError(f"{source} must be a {plain.__name__}, got {value!r}")
    return value
