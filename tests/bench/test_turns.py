"""Turns of fake sides, what becomes of those that fail, and one real comparison."""

from __future__ import annotations

import json
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from fewstep.bench.process import Child, SideFailed
from fewstep.bench.sides import SIDES, Side, side_of
from fewstep.bench.turns import How, Measurement, measure
from fewstep.bench.work import Setting, Work
from fewstep.errors import RequestError

FAKES = """
import os, sys, time
import numpy as np
from fewstep.bench.sides import Loaded

def made(run, value=1.0):
    return Loaded(run, lambda seed: np.full((2, 3), value, np.float32))

def quick(setting):
    print("this must not disturb the answers")
    return made(lambda seed: time.sleep(0.01))

def slow(setting):
    return made(lambda seed: time.sleep(0.05), 1.5)

def other_noise(setting):
    return Loaded(lambda seed: None, lambda seed: np.zeros((2, 3)), draws="bfloat16")

def broken(setting):
    raise ValueError("no\\nluck")

def nan(setting):
    return made(lambda seed: None, float("nan"))

def dies(setting):
    def run(seed):
        print("a last word", file=sys.stderr)
        os._exit(3)
    return made(run)

def dies_later(setting):
    return made(lambda seed: os._exit(4) if seed == 2 else None)

def converting(setting):
    file = setting.cache + "/converted"
    known = os.path.exists(file)
    open(file, "a").write("x")
    return Loaded(lambda seed: None, lambda seed: np.zeros(1), converted=not known)

def always_converting(setting):
    return Loaded(None, None, converted=True)

def noting(setting):
    def run(seed):
        with open(setting.cache + "/order", "a") as file:
            file.write(setting.dtype + " ")
    return made(run)
"""


@pytest.fixture
def fakes(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Callable[..., Side]:
    """Makes a side of a function of FAKES."""
    (tmp_path / "fakes.py").write_text(FAKES)
    monkeypatch.setenv("PYTHONPATH", str(tmp_path))
    return lambda name, **more: Side(name, f"fakes:{name}", **more)


def measured(sides: list[Side], folder: Path, work: Work | None = None, **how: Any) -> Measurement:
    """Sides that were measured, without a model and a machine."""
    found = Measurement(work or Work(part="unet"), sides, How(**how), folder)
    found.setting = Setting(found.work, "", None, found.work.dtype, str(folder))
    (found.cold if found.how.cold else found.warm)()
    return found


def test_sides_take_turns_and_the_output_is_compared(
    fakes: Callable[..., Side], tmp_path: Path
) -> None:
    found = measured([fakes("quick"), fakes("slow")], tmp_path, runs=3)
    quick, slow = found.found["quick"], found.found["slow"]
    assert len(quick.seconds) == len(slow.seconds) == len(quick.cpu_seconds) == 3
    assert all(0.01 <= t < 0.05 <= u for t, u in zip(quick.seconds, slow.seconds, strict=True))
    assert quick.peak_bytes > 2**20 and quick.running_bytes and quick.threads == 1
    gap = found.differences()["slow"]
    assert gap.largest == 0.5 and gap.relative == pytest.approx(0.5)


def test_the_order_is_a_b_a_b(fakes: Callable[..., Side], tmp_path: Path) -> None:
    both = [
        Side("a", "fakes:noting"),
        Side("b", "fakes:noting", dtype="bfloat16"),
    ]
    measured(both, tmp_path, runs=2, warmup=2)
    # One of the two runs before the turns is that whose output is kept.
    order = (tmp_path / "order").read_text().split()
    assert order == ["float32", "bfloat16"] * 3


def test_a_side_that_fails_is_told_and_the_others_go_on(
    fakes: Callable[..., Side], tmp_path: Path
) -> None:
    names = ["quick", "broken", "nan", "dies", "dies_later"]
    found = measured([fakes(name) for name in names], tmp_path, runs=3, warmup=2).found
    assert len(found["quick"].seconds) == 3 and found["quick"].failed is None
    assert found["broken"].failed == "ValueError: no luck"
    assert found["nan"].failed == "its output holds NaN or infinity"
    assert found["dies"].failed == "its process ended with code 3: a last word"
    assert str(found["dies_later"].failed).startswith("its process ended with code 4")


def test_a_process_that_converted_is_not_the_one_that_is_measured(
    fakes: Callable[..., Side], tmp_path: Path
) -> None:
    sides = [fakes("converting"), fakes("always_converting")]
    found = measured(sides, tmp_path, runs=1, warmup=1).found
    assert (tmp_path / "converted").read_text() == "xx"
    assert found["converting"].failed is None and len(found["converting"].seconds) == 1
    assert str(found["always_converting"].failed).startswith("it converts its networks each time")


def test_pictures_of_different_noise_are_not_compared(
    fakes: Callable[..., Side], tmp_path: Path
) -> None:
    sides = [fakes("quick"), fakes("other_noise")]
    assert measured(sides, tmp_path, Work(), runs=1, warmup=1).differences() == {}
    assert measured(sides, tmp_path, Work(part="vae"), runs=1, warmup=1).differences()


def test_cold_starts_are_new_processes(fakes: Callable[..., Side], tmp_path: Path) -> None:
    found = measured([fakes("quick"), fakes("broken")], tmp_path, runs=2, cold=True).found
    quick = found["quick"]
    assert len(quick.seconds) == len(quick.load_seconds) == 2
    assert all(t > 0.01 + load for t, load in zip(quick.seconds, quick.load_seconds, strict=True))
    assert found["broken"].failed == "ValueError: no luck"


def test_a_process_ends_with_its_block(fakes: Callable[..., Side], tmp_path: Path) -> None:
    with Child("x", tmp_path) as child:
        with pytest.raises(SideFailed, match="AttributeError"):
            child.ask("unheard")
        began = time.perf_counter()
    assert child.process.poll() is not None and time.perf_counter() - began < 5


# ── who cannot ──


def test_a_peer_that_is_missing_or_cannot_do_a_work_is_told() -> None:
    absent = Side("absent", "nowhere:side", ("no_such_package", "json"))
    assert absent.refusal(Work()) == "not installed; pip install no_such_package"
    fp32 = Side("x", "y:z", only=SIDES["onnxruntime"].only)
    half = Work(dtype="bfloat16")
    assert fp32.refusal(half) == "does not compute in bfloat16 (only float32)"
    assert Side("x", "y:z", tasks=("lora",)).refusal(Work()) == "does not do text-to-image here"
    assert Side("x", "y:z", devices=("cpu",)).refusal(Work(device="cuda")) == (
        "does not run on cuda here"
    )


def test_a_side_may_compute_in_another_dtype() -> None:
    side = side_of("diffusers@float32")
    assert side.name == "diffusers@float32" and side.dtype_of(Work(dtype="bfloat16")) == "float32"
    assert side_of("diffusers").dtype_of(Work(dtype="bfloat16")) == "bfloat16"


@pytest.mark.parametrize("name", ["pytorch", "diffusers@float8"])
def test_unknown_sides_are_refused(name: str) -> None:
    with pytest.raises(RequestError, match=f"peer '{name}'.*give one of"):
        side_of(name)


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"runs": 0}, "runs 0: must be at least 1"),
        ({"warmup": 0}, "warmup 0: must be at least 1"),
        ({"threads": -1}, "threads -1: must be at least 0"),
    ],
)
def test_numbers_that_mean_nothing_are_refused(changes: dict[str, int], message: str) -> None:
    with pytest.raises(RequestError, match=message):
        How(**changes)


def test_an_error_needs_a_part_in_sixteen_bits() -> None:
    with pytest.raises(RequestError, match="error: compares part unet or vae"):
        measure(Work(part="unet"), [SIDES["fewstep"]], How(error=True))


def test_a_side_is_named_once() -> None:
    with pytest.raises(RequestError, match="peer: one is named twice"):
        measure(Work(), [SIDES["fewstep"]] * 2, How())


def test_sides_that_do_not_fit_into_memory_are_refused(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("fewstep.bench.turns.available_memory", lambda: 10**9)
    sides = [Side("a", "x:y"), Side("b", "x:y", dtype="float32")]
    found = Measurement(Work(dtype="bfloat16"), sides, How(), tmp_path)
    found.check_memory(2 * 10**8)
    with pytest.raises(RequestError, match=r"peer: 2 sides need about 1\.4 GB of memory at once"):
        found.check_memory(4 * 10**8)


# ── the real thing ──


def test_the_embedded_model_beside_diffusers(
    run: Callable[..., tuple[int, str, str]], tmp_path: Path
) -> None:
    file, plot = tmp_path / "bench.json", tmp_path / "bench.png"
    options = ["--steps", 1, "--runs", 1, "--warmup", 1, "--threads", 1, "--cache", tmp_path / "c"]
    code, out, err = run("bench", *options, "--json", file, "--plot", plot)
    assert code == 0, err
    assert "fewstep reaches" in out and "of this machine's limit" in out
    told = json.loads(file.read_text())
    (result,) = told["results"]
    assert set(result["sides"]) == {"fewstep", "diffusers"}
    assert result["sides"]["diffusers"]["versions"]["diffusers"]
    assert result["differences"]["diffusers"]["largest"] < 1e-4
    assert result["figures"]["diffusers"]["ratio"]["median"] > 0
    assert plot.read_bytes().startswith(b"\x89PNG")
    assert np.isfinite(result["limit_seconds"])


def test_approximations_are_sides_of_their_own() -> None:
    assert side_of("fewstep+int8@bfloat16").dtype_of(Work()) == "bfloat16"
    assert "only float32, bfloat16" in str(side_of("fewstep+int8").refusal(Work(dtype="float16")))
    assert "does not run on cuda" in str(side_of("fewstep+int8").refusal(Work(device="cuda")))
    assert side_of("fewstep+int8-weights").refusal(Work(dtype="float16", device="cuda")) is None
    assert "does not run on cpu" in str(side_of("fewstep+fp8").refusal(Work(dtype="bfloat16")))
