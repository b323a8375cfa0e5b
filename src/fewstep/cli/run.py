"""`fewstep run`: a script written for diffusers, with fewstep in its place.

The name is lent for one process: a finder at the head of `sys.meta_path` answers each import of
`diffusers` and of its parts with a module that looks its names up in fewstep. No file is written or
changed, and a diffusers that is installed is not touched.
"""

from __future__ import annotations

import importlib
import runpy
import sys
import traceback
import warnings
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from importlib.abc import Loader, MetaPathFinder
from importlib.machinery import ModuleSpec
from pathlib import Path
from types import ModuleType, TracebackType
from typing import Any

from .. import __version__
from ..checkpoints.config import LAYOUT_VERSION
from ..errors import RequestError

NAME = "diffusers"
PARTS = ("loaders", "models", "pipelines", "schedulers", "utils")
# Folders and files below those parts that scripts import from; their names are the part's.
BELOW = [
    "adapter",
    "animatediff",
    "auto_pipeline",
    "autoencoder_kl",
    "autoencoder_tiny",
    "autoencoders",
    "controlnet",
    "controlnets",
    "latent_consistency_models",
    "lora_pipeline",
    "stable_diffusion",
    "stable_diffusion_xl",
    "t2i_adapter",
    "unet_2d_condition",
    "unet_motion_model",
    "unets",
]


class Stand(ModuleType):
    """A module that has the names of a part of fewstep, and the public ones."""

    def __getattr__(self, name: str) -> Any:
        if name == "__version__":
            return LAYOUT_VERSION
        if not name.startswith("_"):
            for module in places(self.__name__):
                if hasattr(module, name):
                    return getattr(module, name)
        raise AttributeError(lacking(f"{self.__name__}.{name}"))


def places(module: str) -> Iterator[ModuleType]:
    """Where the names of a module of diffusers are looked up, in order."""
    _, *below = module.split(".")
    if below:
        yield importlib.import_module(f"fewstep.{below[0]}")
    yield importlib.import_module("fewstep")


def lacking(name: str) -> str:
    """What to say of a name that is not there."""
    return f"{name} is not in fewstep {__version__}, which stands for {NAME} here"


class Finder(MetaPathFinder, Loader):
    """Finds `diffusers` and its known modules; any other below it is an ImportError."""

    def find_spec(self, fullname: str, path: Any, target: Any = None) -> ModuleSpec | None:
        top, *below = fullname.split(".")
        if top != NAME:
            return None
        if below and (below[0] not in PARTS or not all(map(is_module, below[1:]))):
            raise ImportError(lacking(fullname), name=fullname)
        return ModuleSpec(fullname, self, is_package=True)

    def create_module(self, spec: ModuleSpec) -> ModuleType:
        return Stand(spec.name)

    def exec_module(self, module: ModuleType) -> None: ...


def is_module(name: str) -> bool:
    """Whether a name below a part of diffusers is a module's, and not a function's."""
    return name in BELOW or name.startswith(("scheduling_", "pipeline_")) or name.endswith("_utils")


@contextmanager
def standing_in() -> Iterator[None]:
    """fewstep under the name of diffusers, in the block."""
    hidden = {n: sys.modules.pop(n) for n in list(sys.modules) if n.split(".")[0] == NAME}
    finder = Finder()
    sys.meta_path.insert(0, finder)
    try:
        yield
    finally:
        sys.meta_path.remove(finder)
        for name in [n for n in sys.modules if n.split(".")[0] == NAME]:
            del sys.modules[name]
        sys.modules.update(hidden)


def run_script(script: Path, arguments: Sequence[str]) -> int:
    """Runs a script as Python does, with fewstep for diffusers; returns its exit code."""
    if not script.is_file():
        raise RequestError(f"SCRIPT {script}: no such file; give a Python script")
    before = sys.argv, list(sys.path)
    sys.argv = [str(script), *arguments]
    sys.path.insert(0, str(script.absolute().parent))
    try:
        with standing_in(), warnings.catch_warnings():
            warnings.filterwarnings("default", category=UserWarning, module="__main__$")
            runpy.run_path(str(script), run_name="__main__")
    except SystemExit as leaving:
        return exit_code(leaving.code)
    except Exception as error:
        show(error, script)
        return 1
    finally:
        sys.argv, sys.path[:] = before
    return 0


def exit_code(given: Any) -> int:
    """The exit code that Python makes of `sys.exit(given)`."""
    if given is None or isinstance(given, int):
        return int(given or 0)
    print(given, file=sys.stderr)
    return 1


def show(error: Exception, script: Path) -> None:
    """Prints a script's error as Python does, from the script's own first line on."""
    first: TracebackType | None = error.__traceback__
    while first is not None and first.tb_frame.f_code.co_filename != str(script):
        first = first.tb_next
    traceback.print_exception(type(error), error, first or error.__traceback__)
