"""The table of the documents: targets, rows, markers, and going on where it was."""

from __future__ import annotations

import dataclasses
import json
from pathlib import Path
from typing import Any

import pytest

from fewstep.bench.report import Difference, Measured, Result
from fewstep.bench.work import Work
from fewstep.errors import RequestError

ROOT = Path(__file__).parents[2]
CEILINGS = {"product": 1e9, "convolution": 2e9, "copy": 1e9, "gpu": None}


@pytest.fixture
def speed(monkeypatch: pytest.MonkeyPatch) -> Any:
    monkeypatch.syspath_prepend(str(ROOT / "benchmarks"))
    import speed as module

    return module


def result(work: Work | None = None) -> Result:
    """fewstep 1.5 times as quick as diffusers, with half its memory, at a quarter of the limit."""
    side = Measured((2.0,), (2.0,), peak_bytes=10**9, threads=1)
    peer = dataclasses.replace(side, seconds=(3.0,), peak_bytes=2 * 10**9)
    return Result(
        work or Work(batch=2, size=(64, 64)),
        False,
        1,
        2,
        {"fewstep": side, "diffusers": peer, "openvino": Measured(failed="not | installed")},
        {"total": 1e9},
        CEILINGS,
        {"diffusers": Difference(2e-4, 1e-5)},
        {"fewstep@float32": {"fewstep": Difference(1.0, 0.02)}},
    )


@pytest.mark.parametrize(
    ("kind", "bound", "side", "verdict"),
    [
        ("ratio", 1.5, "diffusers", "ratio ≥ 1.50: met"),
        ("ratio", 2.0, "diffusers", "ratio ≥ 2.00: **0.50 short**"),
        ("memory", 1.0, "diffusers", "memory ≤ 1.00: met"),
        ("memory", 0.25, "diffusers", "memory ≤ 0.25: **0.25 short**"),
        ("fraction", 0.75, "fewstep", "fraction ≥ 75%: **50% short**"),
        ("error", 1.5e-2, "fewstep", "error ≤ 1.5e-02: **5.0e-03 short**"),
        ("largest", 1e-4, "diffusers", "largest ≤ 1.0e-04: **1.0e-04 short**"),
        ("seconds", 2.0, "fewstep", "seconds ≤ 2 s: met"),
        ("seconds a picture", 0.015, "fewstep", "seconds a picture ≤ 15 ms: **0.985 s short**"),
        ("ratio", 1.0, "openvino", "ratio ≥ 1.00: not measured"),
    ],
)
def test_a_target_is_met_or_it_is_told_by_how_much_not(
    speed: Any, kind: str, bound: float, side: str, verdict: str
) -> None:
    assert speed.Target(kind, bound, side).verdict(result()) == verdict


def test_the_table_has_a_row_for_each_side_and_leaves_nothing_out(speed: Any) -> None:
    first, second, third = speed.CPU[:3]
    on = {"processor": "P", "flags": ["avx2"], "cores": 2, "memory_bytes": 2**34, "python": "3"}
    on["versions"] = {"torch": "2"}
    stored = {
        first.name: {"result": json.loads(json.dumps(result().to_dict())), "machine": on},
        second.name: {"failed": "needs memory"},
    }
    made = speed.table((first, second, third), stored)
    rows = [line for line in made.splitlines() if line.startswith("|")][2:]
    assert len(rows) == 3 + 1 + 1 and len({row.count("|") for row in rows}) == 1
    assert rows[0].startswith("| embedded | fewstep | 2 s (2 s to 2 s) |  | 1.00 | 25% |")
    assert "1.50 (1.50 to 1.50)" in rows[1] and "ratio ≥ 2.00: **0.50 short**" in rows[1]
    assert "not / installed" in rows[2] and "needs memory" in rows[3]
    assert "not measured yet" in rows[4]
    assert "P (avx2), 2 cores, 16 GiB; Python 3, torch 2." in made
    assert "- embedded: `fewstep bench --runs 30`" in made


def test_every_work_has_a_command_that_means_it(speed: Any) -> None:
    entries = (*speed.CPU, *speed.ON_GPU)
    assert len({entry.name for entry in entries}) == len(entries)
    by_name = {entry.name: entry.command() for entry in entries}
    assert by_name["unet-512-bf16"] == (
        "fewstep bench --model sd15 --part unet --dtype bfloat16 --size 512x512 "
        "--peer diffusers,openvino --runs 5 --error"
    )
    assert all(t.side in ("fewstep", *e.peers) for e in entries for t in e.targets)


@pytest.fixture
def document(tmp_path: Path) -> Path:
    file = tmp_path / "page.md"
    file.write_text("before\n<!-- speed: begin -->\nold\n<!-- speed: end -->\nafter\n")
    return file


def test_a_run_goes_on_where_it_was(
    speed: Any, document: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    seen: list[Work] = []

    def measure(work: Work, *_: Any) -> Result:
        seen.append(work)
        if work.part == "unet":
            raise RequestError("peer: too much memory")
        return result(work)

    monkeypatch.setattr(speed, "measure", measure)
    file = tmp_path / "speed.json"
    options = ["--json", str(file), "--document", str(document)]
    speed.main([*options, "--only", "embedded,unet-256-fp32"])
    text = document.read_text()
    assert text.startswith("before\n<!-- speed: begin -->\n| work") and text.endswith("\nafter\n")
    assert "\nold\n" not in text and "peer: too much memory" in text
    assert {
        name: set(kept) - {"machine"} for name, kept in json.loads(file.read_text()).items()
    } == {"embedded": {"command", "date", "result"}, "unet-256-fp32": {"command", "date", "failed"}}
    speed.main([*options, "--only", "embedded,unet-256-fp32"])
    assert [work.part for work in seen] == ["picture", "unet", "unet"]
    speed.main([*options, "--only", "embedded", "--again"])
    assert len(seen) == 4


def test_a_document_without_markers_is_refused_before_anything_runs(
    speed: Any, tmp_path: Path
) -> None:
    page = tmp_path / "page.md"
    page.write_text("no markers")
    with pytest.raises(SystemExit, match="must hold one line <!-- speed: begin -->"):
        speed.main(["--json", str(tmp_path / "x.json"), "--document", str(page)])


def test_the_document_has_the_markers_and_names_are_checked(
    speed: Any, capsys: pytest.CaptureFixture[str]
) -> None:
    page = (ROOT / "docs" / "performance.md").read_text()
    for mark in ("speed", "speed-gpu"):
        assert page.count(f"<!-- {mark}: begin -->\n") == page.count(f"<!-- {mark}: end -->") == 1
    with pytest.raises(SystemExit):
        speed.parsed(["--only", "x"])
    assert "--only x: is no such work; give some of embedded" in capsys.readouterr().err
