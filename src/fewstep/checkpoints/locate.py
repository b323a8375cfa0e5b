"""Where the files of a checkpoint lie: a local folder first, then the hub and its cache.

Which files are wanted is decided on the list of those that are there, so that an error can say what
was looked for and what was found.
"""

from __future__ import annotations

import hashlib
import os
import re
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from functools import cached_property
from pathlib import Path, PurePosixPath
from typing import Any, NoReturn

from ..errors import CheckpointError
from .config import read_json

PICKLED = (".bin", ".ckpt", ".pt", ".pth")
HOW_TO_CONVERT = (
    "pickled weights run code when they are read, so they are refused; convert them to safetensors "
    "once, with https://huggingface.co/spaces/safetensors/convert or by loading and saving them "
    "with the library that wrote them"
)
HUB_TIMEOUT = 10.0  # seconds until a hub that does not answer counts as unreachable


@dataclass(frozen=True)
class Source:
    """A checkpoint by name: a local folder or `owner/repository`, and how to reach it.

    The hub's environment variables (HF_HOME, HF_HUB_OFFLINE, HF_TOKEN, HF_ENDPOINT) are honoured.
    """

    path: str
    subfolder: str | None = None
    variant: str | None = None
    revision: str | None = None
    cache_dir: str | os.PathLike[str] | None = None
    force_download: bool = False
    local_files_only: bool | None = None
    token: str | bool | None = None

    def names(self) -> list[str]:
        """The files below the subfolder, as sorted relative names with forward slashes."""
        folder = PurePosixPath((self.subfolder or "").replace(os.sep, "/"))
        paths = (PurePosixPath(name) for name in self._held[1])
        return sorted(str(p.relative_to(folder)) for p in paths if p.is_relative_to(folder))

    def fetch(self, name: str) -> Path:
        """The local path of the file `name` below the subfolder, downloaded if need be."""
        if name not in self.names():
            self._missing(name)
        folder = self._held[0]
        if folder is not None:
            return folder / (self.subfolder or "") / name
        from huggingface_hub import hf_hub_download

        path = str(PurePosixPath(self.subfolder or "") / name)
        try:
            with self._verified():
                return Path(
                    hf_hub_download(
                        self.path, path, force_download=self.force_download, **self._hub_arguments()
                    )
                )
        except CheckpointError:
            raise
        except Exception as error:  # the hub's clients raise errors of several libraries
            raise CheckpointError(
                f"{path} of {self.path!r} could not be fetched: {error}"
            ) from error

    def read_json(self, name: str) -> dict[str, Any]:
        """The object in the JSON file `name`."""
        return read_json(self.fetch(name))

    def weights(self, stem: str) -> list[Path]:
        """The file `stem.safetensors` of the variant, or the shards that its index lists."""
        names = self.names()
        for index in index_names(stem, self.variant):
            if index in names:
                return [self.fetch(shard) for shard in shards_of(self.read_json(index), index)]
        single = weights_name(stem, self.variant)
        if single not in names:
            self._missing(single)
        return [self.fetch(single)]

    def folder(self, patterns: Sequence[str] | None = None) -> Path:
        """A local folder with the files that match `patterns` (all if None), subfolder included."""
        folder = self._held[0]
        if folder is None:
            from huggingface_hub import snapshot_download

            prefix = f"{self.subfolder.strip('/')}/" if self.subfolder else ""
            wanted = None if patterns is None else [prefix + pattern for pattern in patterns]
            try:
                with self._verified():
                    folder = Path(
                        snapshot_download(
                            self.path,
                            allow_patterns=wanted,
                            force_download=self.force_download,
                            **self._hub_arguments(),
                        )
                    )
            except CheckpointError:
                raise
            except Exception as error:  # as in fetch
                raise CheckpointError(f"{self.path!r} could not be fetched: {error}") from error
        return folder / (self.subfolder or "")

    @cached_property
    def _held(self) -> tuple[Path | None, tuple[str, ...]]:
        """The folder if it is on this machine, and the names of all its files or of the hub's."""
        local = Path(self.path)
        if os.path.isdir(local):  # False too of names that no file can have
            return local, _walk(local, self.subfolder)
        if self.local_files_only:
            return self._cached("local_files_only=True")
        return self._listed()

    def _listed(self) -> tuple[Path | None, tuple[str, ...]]:
        from huggingface_hub import HfApi
        from huggingface_hub.errors import (
            GatedRepoError,
            HFValidationError,
            OfflineModeIsEnabled,
            RepositoryNotFoundError,
            RevisionNotFoundError,
        )

        here = f"there is no local folder {self.path!r}, and "
        try:
            # One request without retries: the hub's own downloads insist for half a minute.
            listed = HfApi().model_info(
                self.path, revision=self.revision, timeout=HUB_TIMEOUT, token=self.token
            )
            return None, tuple(file.rfilename for file in listed.siblings or ())
        except HFValidationError as error:
            raise CheckpointError(f"{here}it is not the name of a hub repository") from error
        except GatedRepoError as error:
            raise CheckpointError(
                f"{here}the hub repository asks to accept its terms first; do so on its page and "
                "pass token= or log in with `hf auth login`"
            ) from error
        except RevisionNotFoundError as error:
            raise CheckpointError(f"{self.path!r} has no revision {self.revision!r}") from error
        except RepositoryNotFoundError as error:
            raise CheckpointError(
                f"{here}the hub has no such repository (or it is private: pass token=)"
            ) from error
        except OfflineModeIsEnabled:
            return self._cached("HF_HUB_OFFLINE is set")
        except Exception as error:  # as in fetch
            reason = str(error).splitlines()[0] if str(error) else type(error).__name__
            return self._cached(f"the hub cannot be reached ({reason})")

    def _cached(self, reason: str) -> tuple[Path, tuple[str, ...]]:
        from huggingface_hub import snapshot_download
        from huggingface_hub.errors import HFValidationError, LocalEntryNotFoundError

        here = f"there is no local folder {self.path!r}, and "
        if self.force_download:
            raise CheckpointError(f"{self.path!r} cannot be downloaded anew: {reason}")
        arguments = self._hub_arguments() | {"local_files_only": True}
        try:
            folder = Path(snapshot_download(self.path, **arguments))
        except HFValidationError as error:
            raise CheckpointError(f"{here}it is not the name of a hub repository") from error
        except LocalEntryNotFoundError as error:
            # A snapshot that lacks some files of the repository may have all that are wanted.
            if (found := getattr(error, "snapshot_path", None)) is None:
                raise CheckpointError(
                    f"{here}it is not in the hub's cache either; {reason}"
                ) from error
            folder = Path(found)
        return folder, _walk(folder, self.subfolder)

    @contextmanager
    def _verified(self) -> Iterator[None]:
        """Files that come from the hub in the block have the sha256 that they are kept under.

        The hub's client compares sizes only. A file that differs is removed: a CheckpointError.
        """
        before = self._weights_kept()
        yield
        for path, _ in self._weights_kept().items() - before.items():
            if checksum(path) != path.name:
                path.unlink(missing_ok=True)
                raise CheckpointError(
                    f"a file of {self.path!r} came damaged and was removed; try again"
                )

    def _weights_kept(self) -> dict[Path, int]:
        """The large files of the repository in the hub's cache, and when they were written."""
        from huggingface_hub import constants

        cache = Path(self.cache_dir or constants.HF_HUB_CACHE)
        kept = (cache / f"models--{self.path.replace('/', '--')}" / "blobs").glob("?" * 64)
        return {path: path.stat().st_mtime_ns for path in kept}

    def _hub_arguments(self) -> dict[str, Any]:
        return {
            "revision": self.revision,
            "cache_dir": self.cache_dir,
            "token": self.token,
            "local_files_only": bool(self.local_files_only),
        }

    def _missing(self, name: str) -> NoReturn:
        names = self.names()
        stem = name.split(".")[0]
        place = "".join(
            f", {key} {value!r}"
            for key, value in (
                ("subfolder", self.subfolder),
                ("variant", self.variant),
                ("revision", self.revision),
            )
            if value
        )
        shown = ", ".join(names[:10]) + (f" and {len(names) - 10} more" if len(names) > 10 else "")
        remedy = ""
        if name.endswith(".safetensors"):
            if self.variant and weights_name(stem) in names:
                remedy = "; leave variant out to load the plain weights"
            elif any(n.startswith(stem) and n.endswith(".safetensors") for n in names):
                remedy = "; choose variant= by the names that are there"
            elif any(n.endswith(PICKLED) for n in names):
                remedy = f"; {HOW_TO_CONVERT}"
        raise CheckpointError(
            f"no file {name} in {self.path!r}{place}; there is: {shown or 'nothing'}{remedy}"
        )


def checksum(path: Path) -> str:
    """The sha256 of a file's bytes."""
    digest = hashlib.sha256()
    with path.open("rb") as stream:
        while block := stream.read(1 << 22):
            digest.update(block)
    return digest.hexdigest()


def weights_name(stem: str, variant: str | None = None) -> str:
    """`stem.safetensors` or `stem.fp16.safetensors`."""
    return f"{stem}.{variant}.safetensors" if variant else f"{stem}.safetensors"


def index_names(stem: str, variant: str | None = None) -> tuple[str, ...]:
    """The names that the index of a sharded file goes by; the one that is written first."""
    if not variant:
        return (f"{stem}.safetensors.index.json",)
    return f"{stem}.safetensors.index.{variant}.json", f"{stem}.{variant}.safetensors.index.json"


def shards_of(index: dict[str, Any], name: str) -> list[str]:
    """The shard names in an index, sorted. Raises CheckpointError for one outside its folder."""
    weight_map = index.get("weight_map")
    if not isinstance(weight_map, dict) or not weight_map:
        raise CheckpointError(f"{name} has no weight_map from parameters to shards")
    shards = sorted(set(map(str, weight_map.values())))
    for shard in shards:
        # An index comes from whoever made the checkpoint: "../../x" must not leave the folder.
        if not re.fullmatch(r"[\w-][\w.-]*\.safetensors", shard):
            raise CheckpointError(
                f"{name} lists the shard {shard!r}; shards must be safetensors beside their index"
            )
    return shards


def _walk(root: Path, subfolder: str | None) -> tuple[str, ...]:
    start = root / (subfolder or "")
    found = (
        Path(folder, name).relative_to(root)
        for folder, _, names in os.walk(start, followlinks=True)
        for name in names
    )
    return tuple(path.as_posix() for path in found)
