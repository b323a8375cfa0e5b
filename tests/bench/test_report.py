"""The arithmetic of ratios and limits, the table, the JSON, the bars."""

from __future__ import annotations

import dataclasses
import json
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from fewstep.bench.machine import machine, processor
from fewstep.bench.plot import bars
from fewstep.bench.report import (
    Difference,
    Measured,
    Result,
    difference,
    ratio,
    report,
    seconds,
    text,
    write_report,
)
from fewstep.bench.work import Work
from fewstep.errors import CheckpointError, RequestError

CEILINGS = {"product": 80e9, "convolution": 100e9, "copy": 20e9, "threads": 2, "gpu": None}


def side(*times: float, **changes: Any) -> Measured:
    given: dict[str, Any] = {"cpu_seconds": times, "peak_bytes": 10**9, "threads": 2}
    return Measured(times, **given | changes)


def result(**changes: Any) -> Result:
    """fewstep twice as quick as diffusers, and a peer that is not there."""
    sides = {
        "fewstep": side(1.0, 2.0, 4.0),
        "diffusers": side(3.0, 4.0, 4.0, peak_bytes=2 * 10**9),
        "openvino": Measured(failed="not installed; pip install openvino"),
    }
    given = {
        "work": Work(size=(64, 32)),
        "cold": False,
        "runs": 3,
        "warmup": 2,
        "sides": sides,
        "operations": {"unet": 90e9, "text": 10e9, "total": 100e9},
        "ceilings": CEILINGS,
        "differences": {"diffusers": Difference(0.5, 0.25)},
        "errors": {"fewstep@float32": {"fewstep": Difference(0.1, 0.01)}},
        "load": (0.1, 0.2),
    }
    return Result(**given | changes)


def test_a_ratio_is_of_the_medians_and_its_range_of_the_pairs() -> None:
    found = ratio([1.0, 2.0, 4.0], [3.0, 4.0, 4.0])
    assert (found.median, found.low, found.high) == (2.0, 1.0, 3.0)


def test_the_limit_is_the_operations_at_the_higher_ceiling() -> None:
    found = result()
    assert found.ceiling == ("convolution", 100e9)
    assert found.limit_seconds == 1.0
    assert found.fraction("fewstep") == 0.5 and found.fraction("diffusers") == 0.25
    assert result(ceilings=CEILINGS | {"product": 200e9}).ceiling[0] == "product"


def test_cold_starts_have_no_fraction() -> None:
    assert result(cold=True).fraction("fewstep") is None
    assert "of this machine's limit" not in text(result(cold=True))


def test_memory_is_compared_and_what_failed_has_no_ratio() -> None:
    found = result()
    assert found.memory_ratio("diffusers") == 0.5
    assert found.ratio("openvino") is None and found.fraction("openvino") is None
    broken = {**found.sides, "fewstep": side(1.0, failed="it broke")}
    assert result(sides=broken).ratio("diffusers") is None


def test_a_difference_is_of_norms() -> None:
    found = difference(np.array([3.0, 0.0]), np.array([3.0, 4.0]))
    assert found == Difference(4.0, 0.8)
    assert difference(np.zeros(2), np.zeros(3)).relative == float("inf")


def test_the_table_says_all() -> None:
    shown = text(result())
    assert "embedded, text-to-image, 64x32, 4 steps, batch 1, float32, cpu; 2 threads" in shown
    assert "fewstep reaches 50% of this machine's limit" in shown
    assert "openvino: not installed; pip install openvino" in shown
    assert "100 GFLOP at 100 GFLOP/s (best convolution) take 1 s" in shown
    assert "error against fewstep@float32: fewstep 1.0e-02" in shown
    (row,) = [line for line in shown.splitlines() if line.startswith("diffusers ")]
    cells = "diffusers 4 s 3 s to 4 s 2.00 1.00 to 3.00 2000 MB 25% 5.0e-01 2.5e-01"
    assert row.split() == cells.split()
    assert "not quiet" not in shown


def test_noise_is_told() -> None:
    found = result()
    loud = dataclasses.replace(found.sides["fewstep"], others=(1.0, 1.0), waiting_seconds=3.0)
    shown = text(result(sides={**found.sides, "fewstep": loud}))
    assert "not quiet: other processes used 1.0 cores meanwhile" in shown
    assert "fewstep worked 3 s between its turns" in shown


def test_seconds_have_three_digits() -> None:
    assert [seconds(t) for t in (0.01234, 0.25, 12.34, 123.4)] == [
        "12.3 ms",
        "0.25 s",
        "12.3 s",
        "123 s",
    ]


def test_json_holds_everything_and_is_read_back(tmp_path: Path) -> None:
    told = report([result()], machine(), "fewstep bench", "2026-01-01T00:00:00+00:00")
    write_report(told, tmp_path / "deep" / "bench.json")
    stored = json.loads((tmp_path / "deep" / "bench.json").read_text())
    assert set(stored) == {"format", "command", "date", "machine", "results"}
    assert {"processor", "flags", "cores", "memory_bytes", "versions"} <= set(stored["machine"])
    assert stored["machine"]["versions"]["torch"]
    (inner,) = stored["results"]
    assert inner["sides"]["fewstep"]["seconds"] == [1.0, 2.0, 4.0]
    assert inner["figures"]["diffusers"]["ratio"] == {"median": 2.0, "low": 1.0, "high": 3.0}
    assert "openvino" not in inner["figures"] and inner["limit_seconds"] == 1.0
    assert Result.from_dict(inner) == result()


def test_other_json_is_refused() -> None:
    with pytest.raises(CheckpointError, match="not a result of `fewstep bench`"):
        Result.from_dict({"work": {}})


def test_bars_end_at_the_median() -> None:
    picture = np.asarray(bars([result()])).astype(int)
    blue = np.abs(picture - (0, 114, 178)).sum(-1) < 30
    orange = np.abs(picture - (213, 94, 0)).sum(-1) < 30
    short, long = (np.argwhere(colour)[:, 1].max() for colour in (blue, orange))
    left = np.argwhere(blue)[:, 1].min()
    assert (long - left) == pytest.approx(2 * (short - left), abs=4)
    with pytest.raises(RequestError, match="no side has figures"):
        bars([result(sides={"fewstep": Measured(failed="x")})])


def test_the_processor_is_named() -> None:
    assert processor()[0]


# ── works ──


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"task": "inpainting"}, "task 'inpainting' is unknown; give one of text-to-image"),
        ({"part": "text"}, "part 'text' is unknown; give one of picture, unet, vae"),
        ({"dtype": "auto"}, "dtype 'auto' is unknown; give one of float32"),
        ({"device": "tpu"}, "device 'tpu' is unknown; give cpu"),
        ({"steps": 51}, "steps 51: must be from 1 to 50"),
        ({"batch": 0}, "batch 0: must be from 1 to 256"),
        ({"part": "unet", "task": "controlnet"}, "part 'unet' goes with the tasks text-to-image"),
    ],
)
def test_works_that_cannot_be_are_refused(changes: dict[str, Any], message: str) -> None:
    with pytest.raises(RequestError, match=message):
        Work(**changes)


def test_a_work_survives_json() -> None:
    work = Work(size=(64, 32), batch=2)
    assert Work.from_dict(json.loads(json.dumps(dataclasses.asdict(work)))) == work
    assert Work(part="vae", size=(8, 8)).title == (
        "embedded, VAE decoding, 8x8, batch 1, float32, cpu"
    )
