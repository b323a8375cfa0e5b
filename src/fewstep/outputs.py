"""Results that can be read by name, by key and by position, as diffusers' outputs can."""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import fields
from typing import Any


class Output:
    """Base of result dataclasses: `out.images`, `out["images"]`, `out[0]`, `tuple(out)`.

    Fields that are None are skipped by position and in iteration.
    """

    def to_tuple(self) -> tuple[Any, ...]:
        """The values that are not None, in the order of the fields."""
        values = (getattr(self, field.name) for field in fields(self))  # type: ignore[arg-type]
        return tuple(value for value in values if value is not None)

    def keys(self) -> list[str]:
        """Names of the fields that are not None."""
        names = (field.name for field in fields(self))  # type: ignore[arg-type]
        return [name for name in names if getattr(self, name) is not None]

    def __getitem__(self, key: str | int | slice) -> Any:
        if isinstance(key, str):
            if key not in self.keys():
                raise KeyError(key)
            return getattr(self, key)
        return self.to_tuple()[key]

    def __iter__(self) -> Iterator[Any]:
        return iter(self.to_tuple())

    def __len__(self) -> int:
        return len(self.to_tuple())
