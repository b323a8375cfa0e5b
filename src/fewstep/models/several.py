"""Several networks of one class as one component: each in its own folder, `dir`, `dir_1`, ..."""

from __future__ import annotations

import os
from collections.abc import Sequence
from pathlib import Path
from typing import Any, ClassVar, TypeVar

from ..checkpoints.locate import Source
from ..errors import CheckpointError, RequestError
from .base import CONFIG_NAME, Model

SeveralT = TypeVar("SeveralT", bound="Several")

# What a source takes of from_pretrained's arguments.
PLACE = ("revision", "cache_dir", "force_download", "local_files_only", "token")


class Several(Model):
    """Base of networks that consist of `members` of one class, `each`."""

    each: ClassVar[type[Model]]

    def __init__(self, members: Sequence[Model]) -> None:
        super().__init__()
        self.config = self.config_class()
        if not members or not all(isinstance(member, self.each) for member in members):
            names = ", ".join(type(member).__name__ for member in members) or "nothing"
            raise RequestError(
                f"{type(self).__name__} takes a list of {self.each.__name__}, got {names}"
            )

    @property
    def members(self) -> list[Any]:
        """The networks, in order."""
        raise NotImplementedError

    @classmethod
    def from_pretrained(
        cls: type[SeveralT],
        pretrained_model_name_or_path: str | os.PathLike[str],
        *,
        subfolder: str | None = None,
        **arguments: Any,
    ) -> SeveralT:
        """The networks of a folder and of those beside it: `dir`, `dir_1`, `dir_2`, ...

        Of a hub repository `subfolder` names the first. Other arguments are those of one network.
        """
        root, first = _place(os.fspath(pretrained_model_name_or_path), subfolder)
        place = {name: arguments[name] for name in PLACE if name in arguments}
        members: list[Model] = []
        while not members or Source(root, _numbered(first, len(members)), **place).names():
            folder = _numbered(first, len(members))
            members.append(cls.each.from_pretrained(root, subfolder=folder, **arguments))
        return cls(members).eval()

    def save_pretrained(self, save_directory: str | os.PathLike[str], **arguments: Any) -> None:
        """Writes each network to a folder, the first to `save_directory` itself.

        Raises CheckpointError if one folder more is there, which would be read as one of these.
        """
        first = Path(os.path.abspath(save_directory))
        folders = [first.with_name(_numbered(first.name, i)) for i in range(len(self.members) + 1)]
        beyond = folders.pop()
        if (beyond / CONFIG_NAME).exists():
            raise CheckpointError(
                f"{beyond} holds a network of an earlier save, which would be loaded with these "
                f"{len(self.members)}; remove it"
            )
        for folder, member in zip(folders, self.members, strict=True):
            member.save_pretrained(folder, **arguments)


def _numbered(name: str, index: int) -> str:
    return f"{name}_{index}" if index else name


def _place(path: str, subfolder: str | None) -> tuple[str, str]:
    """The root and the first folder below it."""
    if subfolder is not None:
        return path, subfolder
    if not os.path.isdir(path):
        raise CheckpointError(
            f"{path!r} is not a folder; several networks lie in a folder and those beside it "
            f"(name, name_1, ...); give subfolder= if they are in a hub repository"
        )
    folder = Path(os.path.abspath(path))
    return str(folder.parent), folder.name
