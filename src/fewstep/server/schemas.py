"""What OpenAPI says of bodies that the routes read themselves."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

from fastapi import FastAPI
from fastapi.openapi.utils import get_openapi
from pydantic import BaseModel

PLACE = "#/components/schemas/{model}"


def takes(model: type[BaseModel], files: Mapping[str, bool] | None = None) -> dict[str, Any]:
    """The body of a route: JSON, or a form if it has files, by whose names stands who must be."""
    schema = model.model_json_schema(ref_template=PLACE)
    for name, must_be in (files or {}).items():
        schema["properties"][name] = {"type": "string", "format": "binary"}
        schema["required"] += [name] * must_be
    media = "application/json" if files is None else "multipart/form-data"
    return {"requestBody": {"required": True, "content": {media: {"schema": schema}}}}


def describe(app: FastAPI) -> dict[str, Any]:
    """The app's OpenAPI document, with the models of such bodies among its components."""
    if app.openapi_schema is None:
        found = get_openapi(
            title=app.title, version=app.version, description=app.description, routes=app.routes
        )
        parts = found["components"]
        for operations in found["paths"].values():
            for operation in operations.values():
                for body in operation.get("requestBody", {}).get("content", {}).values():
                    body["schema"] = moved(body["schema"], parts["schemas"])
        parts["securitySchemes"] = {"key": {"type": "http", "scheme": "bearer"}}
        found["security"] = [{}, {"key": []}]
        app.openapi_schema = found
    return app.openapi_schema


def moved(schema: dict[str, Any], schemas: dict[str, Any]) -> dict[str, Any]:
    """A reference to a schema, which is among `schemas` now, with those that it refers to."""
    if "$ref" in schema:
        return schema
    schemas |= schema.get("$defs", {})
    schemas[schema["title"]] = {key: part for key, part in schema.items() if key != "$defs"}
    return {"$ref": PLACE.format(model=schema["title"])}
