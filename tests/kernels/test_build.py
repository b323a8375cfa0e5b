"""The kernels are compiled once, safely, and are never missed: without them PyTorch goes on."""

from __future__ import annotations

import os
import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path

import pytest
import torch

from fewstep import kernels
from fewstep.kernels import build

SOURCE = '#include "export.h"\nFEWSTEP_EXPORT int answer(void) { return %d; }\n'


@pytest.fixture
def fresh(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Iterator[Path]:
    """A folder with one small source, and a cache beside it; nothing loaded yet."""
    if missing := [flag for flag in build.REQUIRED if not build.has(flag)]:
        pytest.skip(f"this CPU or system lacks {', '.join(missing)}")
    try:
        build._compiler()
    except build._Off as error:
        pytest.skip(str(error))
    sources = tmp_path / "sources"
    sources.mkdir()
    (sources / "answer.c").write_text(SOURCE % 42)
    (sources / "export.h").write_bytes((build.SOURCES / "export.h").read_bytes())
    monkeypatch.setattr(build, "SOURCES", sources)
    monkeypatch.setenv("FEWSTEP_CACHE", str(tmp_path / "cache"))
    monkeypatch.delenv("FEWSTEP_KERNELS", raising=False)
    build._kernels.cache_clear()
    yield sources
    build._kernels.cache_clear()


def again() -> build.Kernels:
    """What a new process would find."""
    build._kernels.cache_clear()
    return build.kernels()


def answer() -> int:
    library = again().library
    assert library is not None
    return int(library.answer())


def objects(fresh: Path) -> list[Path]:
    return sorted((fresh.parent / "cache" / "kernels").iterdir())


def test_it_is_compiled_once_and_kept(fresh: Path) -> None:
    assert answer() == 42
    (made,) = objects(fresh)  # nothing but the object: no half-written file, no folder
    before = made.stat().st_mtime_ns
    assert answer() == 42
    assert made.stat().st_mtime_ns == before


def test_another_source_or_compiler_makes_another_object(
    fresh: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    assert answer() == 42
    (fresh / "answer.c").write_text(SOURCE % 43)
    assert answer() == 43
    monkeypatch.setenv("CC", "cc -g")
    assert answer() == 43
    assert len(objects(fresh)) == 3


@pytest.mark.parametrize("damage", ["cut", "changed", "empty", "writable"])
def test_a_damaged_or_open_object_is_made_again(fresh: Path, damage: str) -> None:
    assert answer() == 42
    (made,) = objects(fresh)
    whole = made.read_bytes()
    made.unlink()  # a loaded file must not change
    content = {
        "cut": whole[: len(whole) // 2],
        "changed": whole[:2000] + bytes([whole[2000] ^ 1]) + whole[2001:],
        "empty": b"",
        "writable": whole,
    }
    made.write_bytes(content[damage])
    made.chmod(0o777 if damage == "writable" else 0o755)
    before = made.stat().st_ino
    assert answer() == 42
    assert made.stat().st_ino != before and not made.stat().st_mode & 0o022


def test_processes_may_build_at_one_time(fresh: Path) -> None:
    code = (
        "import pathlib; from fewstep.kernels import build; "
        f"build.SOURCES = pathlib.Path({str(fresh)!r}); print(build.library().answer())"
    )
    path = os.pathsep.join([str(Path(kernels.__file__).parents[2]), *sys.path])
    command = [sys.executable, "-c", code]
    environment = os.environ | {"PYTHONPATH": path}
    children = [
        subprocess.Popen(command, stdout=subprocess.PIPE, text=True, env=environment)
        for _ in range(3)
    ]
    assert [child.communicate(timeout=60)[0].strip() for child in children] == ["42"] * 3
    assert len(objects(fresh)) == 1


def test_without_a_compiler_there_are_none_and_no_warning(
    fresh: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("CC", "no-such-compiler")
    assert again().library is None
    assert "'no-such-compiler'" in kernels.status() and "install gcc" in kernels.status()
    assert not kernels.available()


def test_they_can_be_switched_off(fresh: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("FEWSTEP_KERNELS", "0")
    build._kernels.cache_clear()
    assert kernels.status() == "off: switched off by FEWSTEP_KERNELS=0"
    x = torch.ones(1, 4, 32)
    assert kernels.attention(x, x, x, 2) is None
    assert not (fresh.parent / "cache").exists()


@pytest.mark.parametrize("flag", ["avx512f", "fma"])
def test_without_the_instructions_nothing_is_compiled(
    fresh: Path, monkeypatch: pytest.MonkeyPatch, flag: str
) -> None:
    monkeypatch.setattr(build, "flags", lambda: frozenset(build.REQUIRED) - {flag})
    assert again().library is None
    assert f"lacks {flag}" in kernels.status()
    assert not (fresh.parent / "cache").exists()


def test_other_systems_have_no_flags(monkeypatch: pytest.MonkeyPatch) -> None:
    build.flags.cache_clear()
    monkeypatch.setattr(sys, "platform", "darwin")
    try:
        assert build.flags() == frozenset()
    finally:
        build.flags.cache_clear()


def test_a_failed_compilation_says_so_once_and_goes_on(fresh: Path) -> None:
    (fresh / "broken.c").write_text("int broken(void) { return nothing_of_that_name; }\n")
    with pytest.warns(UserWarning, match="nothing_of_that_name.*FEWSTEP_KERNELS=0"):
        assert again().library is None
    assert build.library() is None  # a second warning would be an error here
    assert kernels.status().startswith("off: cc did not compile them")
    assert objects(fresh) == []


def test_a_cache_that_cannot_be_written_says_what_to_set(
    fresh: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("FEWSTEP_CACHE", str(fresh / "answer.c" / "cache"))
    with pytest.warns(UserWarning, match="cannot be made.*set FEWSTEP_CACHE"):
        assert again().library is None


def test_bfloat16_is_left_to_pytorch_where_it_has_tiles(monkeypatch: pytest.MonkeyPatch) -> None:
    x = torch.ones(1, 4, 32, dtype=torch.bfloat16)
    monkeypatch.setattr(
        build, "flags", lambda: frozenset((*build.REQUIRED, "avx512_bf16", "amx_bf16"))
    )
    assert kernels.attention(x, x, x, 2) is None


def test_importing_them_compiles_nothing(tmp_path: Path) -> None:
    code = "import fewstep.kernels"
    path = os.pathsep.join([str(Path(kernels.__file__).parents[2]), *sys.path])
    environment = os.environ | {"FEWSTEP_CACHE": str(tmp_path / "cache"), "PYTHONPATH": path}
    subprocess.run([sys.executable, "-c", code], check=True, env=environment)
    assert not (tmp_path / "cache").exists()


def test_one_openmp_runtime_serves_pytorch_and_the_kernels() -> None:
    if not kernels.available():
        pytest.skip(kernels.status())
    x = torch.ones(1, 200, 32)
    with torch.no_grad():
        assert kernels.attention(x, x, x, 2) is not None
    maps = Path("/proc/self/maps").read_text(encoding="utf-8").splitlines()
    runtimes = ("libgomp", "libomp", "libiomp")
    assert len({line.split()[-1] for line in maps if any(name in line for name in runtimes)}) == 1
