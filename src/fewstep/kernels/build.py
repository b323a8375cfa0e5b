"""Our C sources, compiled at first use by the system's compiler into the user's cache, and loaded.

To add a kernel: put `NAME.c` into this folder. All `*.c` go into one object, compiled with `FLAGS`:
AVX-512 F/BW/VL/DQ may be used anywhere (with FMA, F16C, BMI2). A function that uses more says so
itself, `__attribute__((target("avx512bf16")))` or "avx512vnni", and its Python caller asks
`has("avx512_bf16")` first. Exported functions are `FEWSTEP_EXPORT` of `export.h`, with names of
their own; everything else is hidden. Loops over threads: `parallel.h`;
memory that a thread keeps: `workspace.h`. In Python:

    library = build.library()           # ctypes.CDLL, or None: use PyTorch
    library.NAME(ctypes.c_void_p(tensor.data_ptr()), ctypes.c_int64(n), ...)   # GIL released
"""

from __future__ import annotations

import ctypes
import functools
import hashlib
import os
import platform
import shlex
import shutil
import subprocess
import sys
import tempfile
import threading
import warnings
from dataclasses import dataclass
from pathlib import Path

import torch  # noqa: F401 - loads the OpenMP runtime that the object's undefined names resolve to

SOURCES = Path(__file__).parent
REQUIRED = ("avx512f", "avx512bw", "avx512vl", "avx512dq", "fma", "avx2", "f16c", "bmi2")
OPTIONAL = ("avx512_bf16", "avx512_vnni")
# Never -march=native: a cache that machines share holds no instruction that was not asked for.
FLAGS = (
    *("-std=gnu11", "-O3", "-fPIC", "-shared", "-fvisibility=hidden", "-fno-math-errno"),
    *("-fno-trapping-math", "-mprefer-vector-width=512", "-mtune=generic"),
    *("-mavx512f", "-mavx512bw", "-mavx512vl", "-mavx512dq", "-mavx2", "-mfma", "-mf16c", "-mbmi2"),
)
SECONDS = 120  # for a compiler that hangs
DIGEST = hashlib.sha256().digest_size
_one_at_a_time = threading.Lock()


class _Off(Exception):
    """Why there are no kernels; `warn` where something that should work did not."""

    def __init__(self, reason: str, warn: bool = False) -> None:
        super().__init__(reason)
        self.warn = warn


@dataclass(frozen=True)
class Kernels:
    """The loaded object, or why there is none."""

    library: ctypes.CDLL | None
    reason: str


def library() -> ctypes.CDLL | None:
    """The object with all kernels, or None where PyTorch has to do; compiled if it must be."""
    return kernels().library


def kernels() -> Kernels:
    """The object or the reason that there is none; found out once per process."""
    with _one_at_a_time:
        return _kernels()


@functools.cache
def _kernels() -> Kernels:
    try:
        path = _object()
        return Kernels(ctypes.CDLL(str(path)), str(path))
    except (_Off, OSError) as error:
        if not isinstance(error, _Off) or error.warn:
            warnings.warn(
                f"fewstep goes on without its CPU kernels, slower: {error}. Set FEWSTEP_KERNELS=0 "
                "to do without them on purpose",
                stacklevel=2,
            )
        return Kernels(None, str(error))


@functools.cache
def flags() -> frozenset[str]:
    """The instruction sets of this CPU, by Linux' names; empty on other systems."""
    if sys.platform != "linux" or platform.machine() != "x86_64":
        return frozenset()
    try:
        lines = Path("/proc/cpuinfo").read_text(encoding="utf-8").splitlines()
    except OSError:
        return frozenset()
    return frozenset(next((line for line in lines if line.startswith("flags")), "").split())


def has(flag: str) -> bool:
    """Whether this CPU has an instruction set, such as "avx512_bf16"."""
    return flag in flags()


def _object() -> Path:
    """A sound object in the cache for these sources, this compiler and this CPU."""
    if os.environ.get("FEWSTEP_KERNELS") == "0":
        raise _Off("switched off by FEWSTEP_KERNELS=0")
    if missing := [flag for flag in REQUIRED if not has(flag)]:
        raise _Off(f"this CPU or system lacks {', '.join(missing)}")
    compiler = _compiler()
    folder = _folder()
    path = folder / f"kernels-{_key(compiler)}.so"
    if not _is_sound(path):
        _compile(compiler, path)
    return path


def _compiler() -> tuple[str, ...]:
    """The command of $CC, else `cc`."""
    words = shlex.split(os.environ.get("CC") or "cc")
    if not words or shutil.which(words[0]) is None:
        raise _Off(f"no C compiler {(words or ['cc'])[0]!r}: install gcc or clang, or set CC")
    return tuple(words)


def _folder() -> Path:
    """`kernels` under $FEWSTEP_CACHE or ~/.cache/fewstep, made if missing; only the user writes."""
    folder = Path(os.environ.get("FEWSTEP_CACHE") or "~/.cache/fewstep", "kernels")
    try:
        folder = folder.expanduser()
        folder.mkdir(mode=0o700, parents=True, exist_ok=True)
    except (OSError, RuntimeError) as error:  # the latter where nobody says where ~ is
        raise _Off(f"{folder} cannot be made ({error}): set FEWSTEP_CACHE", warn=True) from None
    return folder


def _key(compiler: tuple[str, ...]) -> str:
    """A hash of everything that the object depends on."""
    parts = [" ".join((*compiler, *FLAGS)), _run([*compiler, "--version"])]
    parts += [flag for flag in (*REQUIRED, *OPTIONAL) if has(flag)]
    state = hashlib.sha256("\n".join(parts).encode())
    for source in sorted((*SOURCES.glob("*.c"), *SOURCES.glob("*.h"))):
        state.update(source.name.encode() + b"\0" + source.read_bytes() + b"\0")
    return state.hexdigest()[:20]


def _run(command: list[str]) -> str:
    """What a command prints; its first complaint as the reason where it fails."""
    try:
        done = subprocess.run(
            command,
            capture_output=True,
            text=True,
            timeout=SECONDS,
            env=os.environ | {"LC_ALL": "C"},  # complaints in one language
        )
    except (OSError, subprocess.TimeoutExpired) as error:
        raise _Off(f"the compiler did not run ({error})", warn=True) from None
    if done.returncode:
        complaints = [line for line in done.stderr.splitlines() if "error" in line]
        said = (complaints or done.stderr.splitlines() or [f"exit code {done.returncode}"])[0]
        raise _Off(f"{command[0]} did not compile them: {said.strip()}", warn=True)
    return done.stdout


def _is_sound(path: Path) -> bool:
    """Whether a file is an object that this user or root wrote whole, which its last bytes prove.

    The loader would crash on a damaged one, and run whatever somebody else had put there.
    """
    try:
        about, content = path.stat(), path.read_bytes()
    except OSError:
        return False
    ours = about.st_uid in (0, os.getuid()) and not about.st_mode & 0o022
    return ours and hashlib.sha256(content[:-DIGEST]).digest() == content[-DIGEST:]


def _compile(compiler: tuple[str, ...], path: Path) -> None:
    """The object written beside and renamed, so that processes may build at one time."""
    try:
        with tempfile.TemporaryDirectory(dir=path.parent, prefix="build-") as folder:
            made = Path(folder) / path.name
            sources = [str(source) for source in sorted(SOURCES.glob("*.c"))]
            _run([*compiler, *FLAGS, *sources, "-o", str(made), "-lm"])
            content = made.read_bytes()
            made.write_bytes(content + hashlib.sha256(content).digest())
            made.chmod(0o755)
            made.replace(path)
    except OSError as error:
        raise _Off(f"{path} cannot be written ({error}): set FEWSTEP_CACHE", warn=True) from None
