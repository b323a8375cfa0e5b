"""What clients send, read strictly: JSON and forms into checked fields, fields into orders."""

from __future__ import annotations

import asyncio
import json
import secrets
from collections import Counter
from collections.abc import Mapping
from dataclasses import replace
from typing import Any, TypeVar

from fastapi import Request
from pydantic import BaseModel, ConfigDict, Field, ValidationError
from python_multipart.multipart import parse_options_header
from starlette.datastructures import UploadFile
from starlette.exceptions import HTTPException

from .orders import Limits, Order, ServerError
from .problems import Refused, did_you_mean, invalid

Model = TypeVar("Model", bound=BaseModel)
DEPTH = 16  # of JSON
SEEDS = 2**32  # of those that are drawn for whoever gives none
VALUES = 1 << 15  # of JSON: more would take much memory and long
PATIENT = 1 << 18  # bytes of JSON beyond which it is read beside the event loop


class Fields(BaseModel):
    """Fields that are all known, and of the very type."""

    model_config = ConfigDict(extra="forbid", strict=True, allow_inf_nan=False)


class Lora(Fields):
    """A LoRA that the server has loaded, and how much of it."""

    id: str
    weight: float = 1.0


class OrderFields(Fields):
    """What one picture is drawn from; None stands for the model's own default."""

    prompt: str
    negative_prompt: str | None = None
    seed: int | None = Field(None, description="0 to 2^64-1; None: drawn, and told.")
    steps: int | None = None
    guidance_scale: float | None = None
    width: int | None = Field(None, description="Pixels, a multiple of 8.")
    height: int | None = None
    image: str | None = Field(None, description="To start from: base64 or a data URL.")
    mask: str | None = Field(None, description="Of the image's size; white is drawn anew.")
    strength: float | None = Field(None, description="0 to 1: how much of the image changes.")
    control: str | None = Field(None, description="For the control that the server has loaded.")
    control_scale: float = 1.0
    loras: list[Lora] = Field([], max_length=16)
    previews: bool = Field(False, description="Whether steps come with a picture.")
    seconds: float | None = Field(None, gt=0, description="Until it is given up.")


def some_seed() -> int:
    """A seed for who gave none."""
    return secrets.randbelow(SEEDS)


# ── JSON ──


async def read_json(request: Request) -> dict[str, Any]:
    """The object of a body. Raises ServerError if it is not JSON, or JSON that means two things."""
    kind = request.headers.get("content-type", "").partition(";")[0].strip().lower()
    if kind != "application/json":
        raise ServerError(
            "unsupported_media", "the body must be JSON", hint="Content-Type: application/json"
        )
    data = await request.body()
    if len(data) > PATIENT:
        return await asyncio.to_thread(strict_json, data)
    return strict_json(data)


def strict_json(data: bytes | str) -> dict[str, Any]:
    """The object of a JSON text: no NaN, no name twice, neither deep nor of many values, UTF-8."""
    try:
        text = data if isinstance(data, str) else data.decode()
        if sum(map(text.count, ",[{")) > VALUES:
            raise malformed("the body has too many values")
        found = json.loads(text, object_pairs_hook=_unique, parse_constant=_no_constant)
    except ServerError:
        raise
    except (ValueError, RecursionError):  # UnicodeDecodeError is a ValueError
        raise malformed("the body is not JSON") from None
    if not isinstance(found, dict):
        raise malformed("the body must be a JSON object")
    _check(found, DEPTH)
    return found


def malformed(message: str, param: str | None = None) -> ServerError:
    """The refusal of a body that cannot be read."""
    return Refused("invalid_request", message, param=param, status=400)


def _unique(pairs: list[tuple[str, Any]]) -> dict[str, Any]:
    found = dict(pairs)
    if len(found) < len(pairs):
        counted = Counter(name for name, _ in pairs)  # in linear time
        twice = next(name for name, count in counted.items() if count > 1)
        raise malformed(f"the body has {twice[:64]!a} twice", twice[:64])
    return found


def _no_constant(name: str) -> None:
    raise ValueError(name)


def _check(value: Any, depth: int) -> None:
    """Raises ServerError for what is too deep, or is no text."""
    if depth == 0:
        raise malformed(f"the body is deeper than {DEPTH}")
    if isinstance(value, str):
        try:
            value.encode()
        except UnicodeEncodeError:
            raise malformed("the body holds half a surrogate pair") from None
    elif isinstance(value, list):
        for entry in value:
            _check(entry, depth - 1)
    elif isinstance(value, dict):
        for name, entry in value.items():
            _check(name, depth)
            _check(entry, depth - 1)


# ── forms ──


async def read_form(request: Request, most: int, pictures: tuple[str, ...]) -> dict[str, Any]:
    """The fields of a multipart form: texts, and bytes of the files that `pictures` names.

    Raises ServerError for a field that is there twice, unless its name ends on [].
    """
    kind, about = parse_options_header(request.headers.get("content-type"))
    # Some of Python's other charsets take quadratic time, or make texts that cannot be sent.
    if kind != b"multipart/form-data" or about.get(b"charset", b"utf-8").lower() != b"utf-8":
        hint = "Content-Type: multipart/form-data, in UTF-8"
        raise ServerError("unsupported_media", "the body must be a form", hint=hint)
    found: dict[str, Any] = {}
    try:
        async with request.form(max_files=20, max_fields=64, max_part_size=1 << 20) as form:
            for name, value in form.multi_items():
                _take(found, name, value if isinstance(value, str) else await _bytes(value, most))
    except ServerError:
        raise
    except HTTPException:
        raise malformed("the form cannot be read") from None
    for name, value in found.items():
        _check(name, 1)
        if isinstance(value, str) is (name in pictures):
            raise invalid(f"{name} must be {'a file' if name in pictures else 'a text'}", name)
    return found


async def _bytes(file: UploadFile, most: int) -> bytes:
    """The bytes of a file of a form."""
    return await file.read(most)


def _take(found: dict[str, Any], name: str, value: str | bytes) -> None:
    """Put a field among those that were found."""
    if name.endswith("[]"):
        found.setdefault(name, []).append(value)
    elif name in found:
        raise malformed(f"the form has {name[:64]!a} twice", name[:64])
    else:
        found[name] = value


# ── fields ──


def validated(model: type[Model], fields: Mapping[str, Any], *, strict: bool = True) -> Model:
    """The fields of a request. Raises ServerError that names the first one at fault."""
    try:
        return model.model_validate(fields, strict=strict)
    except ValidationError as error:
        entries = error.errors(include_url=False, include_input=False, include_context=False)
    # A mistyped field may be the one that is missing.
    entry = next((e for e in entries if e["type"] == "extra_forbidden"), entries[0])
    name = ".".join(str(part)[:64] for part in entry["loc"])
    if entry["type"] == "extra_forbidden":
        hint = did_you_mean(str(entry["loc"][-1]), known_at(model, entry["loc"][:-1]))
        raise invalid(f"there is no field {name!r}", name, hint)
    if entry["type"] == "missing":
        raise invalid(f"{name} is missing", name)
    raise invalid(f"{name}: {entry['msg']}", name)


def known_at(model: type[BaseModel], place: tuple[int | str, ...]) -> list[str]:
    """The names of the fields at a place; of a part, those of its own model."""
    inner = {"loras": Lora}.get(str(place[0])) if place else model
    return list((inner or model).model_fields)


def order_of(fields: OrderFields, client: str, **pictures: Any) -> Order:
    """The order that fields and decoded pictures make."""
    plain = fields.model_dump(
        include=set(OrderFields.model_fields) - {"image", "mask", "control", "loras", "seed"}
    )
    loras = tuple((lora.id, lora.weight) for lora in fields.loras)
    seed = some_seed() if fields.seed is None else fields.seed
    return Order(**plain, **pictures, seed=seed, loras=loras, client=client)


def copies(first: Order, count: int, limits: Limits) -> list[Order]:
    """Orders of the same with seeds that count on. Raises ServerError for what cannot be drawn."""
    first = first.checked(limits)
    return [replace(first, seed=(first.seed + number) % 2**64) for number in range(count)]
