"""The training benchmark: its options, its stopwatch, its arithmetic, and a step of each side."""

from __future__ import annotations

import dataclasses
import json
import sys
from pathlib import Path
from typing import Any

import pytest
import torch
from PIL import Image

FOLDER = Path(__file__).parents[1] / "benchmarks"
# A training script in the shape of the published one, in which every part occurs once a step.
SCRIPT = """
import argparse

import torch
from diffusers import UNet2DConditionModel

parser = argparse.ArgumentParser()
parser.add_argument("--steps", type=int)
steps = parser.parse_args().steps
config = {"block_out_channels": (8,), "layers_per_block": 1, "norm_num_groups": 2,
          "down_block_types": ("DownBlock2D",), "up_block_types": ("UpBlock2D",),
          "cross_attention_dim": 4, "attention_head_dim": 2, "sample_size": 8}
teacher = UNet2DConditionModel(**config).requires_grad_(False)
student = UNet2DConditionModel(**config)
optimizer = torch.optim.AdamW(student.parameters())
given = torch.zeros(1, 4, 8, 8), 1, torch.zeros(1, 2, 4)
for _ in range(steps):
    y = student(*given).sample
    with torch.no_grad():
        teacher(*given)
        student(*given)
    with torch.autocast("cpu"):
        half = torch.ones(2, 2) @ torch.ones(2, 2)
    (y.square().mean() + half.dtype.itemsize).backward()
    torch.nn.utils.clip_grad_norm_(student.parameters(), 1.0)
    optimizer.step()
    optimizer.zero_grad()
"""
PARTS = {"student forward", "teacher forward", "target forward", "backward", "clip", "optimizer"}


@pytest.fixture(autouse=True)
def on_path(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.syspath_prepend(str(FOLDER))


def measured(tmp_path: Path, **changes: Any) -> dict[str, Any]:
    """The result of three steps of SCRIPT."""
    from train_child import script

    file = tmp_path / "script.py"
    file.write_text(SCRIPT)
    spec = {"path": str(file), "arguments": ["--steps", "3"], "autocast": True, "parts": True}
    return script(spec | changes)


# ── the stopwatch ──


def test_every_step_of_a_script_and_its_parts_are_timed(tmp_path: Path) -> None:
    found = measured(tmp_path)
    assert len(found["stamps"]) == len(found["parts"]) == len(found["losses"]) == 3
    assert all(set(parts) == PARTS for parts in found["parts"])
    whole = found["stamps"][2] - found["stamps"][1]
    assert 0 < sum(found["parts"][2].values()) <= whole
    assert found["trained"] > 0 and found["peak"] > 2**20


def test_without_parts_only_the_steps_are_timed(tmp_path: Path) -> None:
    found = measured(tmp_path, parts=False)
    assert len(found["stamps"]) == 3 and found["parts"] == [{}, {}, {}]


def test_what_was_wrapped_is_as_before(tmp_path: Path) -> None:
    from diffusers import UNet2DConditionModel

    held = (UNet2DConditionModel.forward, torch.Tensor.backward, torch.autocast, sys.argv)
    measured(tmp_path, autocast=False)
    assert held == (UNet2DConditionModel.forward, torch.Tensor.backward, torch.autocast, sys.argv)
    assert "torchvision" not in sys.modules or sys.modules["torchvision"].__file__


def test_autocast_off_keeps_float32_where_the_script_names_no_dtype(tmp_path: Path) -> None:
    half, single = measured(tmp_path), measured(tmp_path, autocast=False)
    assert 2 < half["losses"][0] < 4 < single["losses"][0]


def test_training_is_timed_with_the_same_parts(sd_folder: Path, tmp_path: Path) -> None:
    from train import Benchmark, parsed
    from train_child import cache, fewstep
    from train_material import make_pictures

    own = ["--script", __file__, "--batch", "1", "--resolution", "64", "--rank", "2"]
    options = parsed([*own, "--steps", "1", "--warmup", "1", "--pictures", "2"])
    benchmark = Benchmark(options, tmp_path)
    benchmark.model = sd_folder
    make_pictures(benchmark.pictures, 2, 80)
    encoded = cache(benchmark.recipe())
    assert encoded["pictures"] == 2 and encoded["seconds"] > 0
    found = fewstep({**benchmark.recipe(), "parts": True})
    assert len(found["stamps"]) == 2
    assert set(found["parts"][1]) == PARTS | {"data", "average"}


# ── the figures ──


def result(seconds: float, **changes: Any) -> dict[str, Any]:
    """Five steps, the first two of them slower."""
    times = [9.0, 9.0, seconds, seconds, seconds]
    stamps = [sum(times[: i + 1]) for i in range(5)]
    parts = [{"backward": 0.5 * t} for t in times]
    made = {"stamps": stamps, "parts": parts, "losses": [1.0] * 5, "trained": 7, "peak": 2**31}
    return made | changes


def compared(**changes: Any) -> Any:
    from train_report import Comparison, side_of

    sides = (side_of([result(4.0)] * 2, 2, 8), side_of([result(2.0, **changes)] * 2, 2, 8))
    return Comparison(*sides, 6.0, 3, 1)


def test_ratios_leave_the_warm_up_out() -> None:
    found = compared(peak=2**30)
    assert len(found.script.seconds) == 6
    assert found.script.samples_per_second == 2.0 and found.fewstep.samples_per_second == 4.0
    assert found.speed == 2.0 and found.memory == 0.5
    assert found.caching_steps == 3.0 and found.paid_back == 3.0
    assert found.script.parts == {"backward": 2.0, "other": 2.0}


def test_the_tables_say_the_ratios_and_where_the_time_goes() -> None:
    from train_report import markdown

    text = markdown("tiny", compared())
    assert "| samples a second | 2 | 4 | **2.00** |" in text
    assert "| backward | 2.000 (50%) | 1.000 (50%) | -1.000 |" in text
    assert "is paid back after 3.0 steps" in text


def test_the_report_tells_options_machine_and_the_stand_in(tmp_path: Path) -> None:
    from train import Benchmark, parsed

    benchmark = Benchmark(parsed(["--script", __file__, "--batch", "8"]), tmp_path)
    run = result(4.0, threads=1, diffusers="0.0", stand_in=True)
    results = {"script": [run], "fewstep": [result(2.0)]}
    report = benchmark.report(results, {"seconds": 6.0, "pictures": 3})
    assert report["ratios"]["speed"] == 2.0 and report["machine"]["threads"] == 1
    assert report["options"]["script"] == Path(__file__).name
    assert "### tiny, 128 px, batch 8, fp32, rank 64" in report["markdown"]
    assert "torchvision is not installed" in report["markdown"]
    json.dumps(report)


def test_a_cache_that_saves_nothing_is_not_said_to_pay() -> None:
    found = compared()
    slower = dataclasses.replace(found, fewstep=found.script)
    assert slower.paid_back is None


def test_different_work_is_not_compared() -> None:
    with pytest.raises(SystemExit, match="trains 7 parameters and fewstep 8: this is not the same"):
        compared(trained=8)


# ── options and the stand-in ──


@pytest.mark.parametrize(
    ("options", "message"),
    [
        (["--script", "nowhere.py"], "there is no such file; it is examples/consistency"),
        (["--script", __file__, "--warmup", "0"], "--warmup 0 must be at least 1"),
        (["--script", __file__, "--resolution", "100"], "must be a multiple of 64"),
        (["--script", __file__, "--pictures", "2"], "must be at least --batch 4"),
        (
            ["--script", __file__, "--autocast", "off", "--precision", "bf16"],
            "goes with --precision fp32 only",
        ),
    ],
)
def test_options_that_cannot_be_served_are_named(
    options: list[str], message: str, capsys: pytest.CaptureFixture[str]
) -> None:
    from train import parsed

    with pytest.raises(SystemExit):
        parsed(options)
    assert message in capsys.readouterr().err


def test_a_job_that_fails_shows_the_end_of_what_it_said(tmp_path: Path) -> None:
    from train import Benchmark, parsed

    benchmark = Benchmark(parsed(["--script", __file__]), tmp_path)
    benchmark.passing = tmp_path
    with pytest.raises(SystemExit, match=r"KeyError: 'unheard'\n.*'unheard' failed with code 1"):
        benchmark.job("unheard")


def test_the_stand_in_reads_pictures_as_torchvision_does() -> None:
    import train_torchvision as tv

    image = Image.new("RGB", (40, 20), (255, 0, 0))
    small = tv.resize(image, 10, tv.InterpolationMode.BILINEAR)
    assert small.size == (20, 10)
    top, left, height, width = tv.RandomCrop.get_params(small, (10, 10))
    assert top == 0 and 0 <= left <= 10
    cut = tv.normalize(tv.to_tensor(tv.crop(small, top, left, height, width)), [0.5], [0.5])
    assert cut.shape == (3, 10, 10)
    assert cut[:, 0, 0].tolist() == [1.0, -1.0, -1.0]


def test_the_pictures_of_both_sides_are_the_same_bytes(tmp_path: Path) -> None:
    import tarfile

    from train_material import make_pictures

    shard = make_pictures(tmp_path / "p", 2, 32)
    with tarfile.open(shard) as tar:
        held = {m.name: tar.extractfile(m).read() for m in tar.getmembers()}  # type: ignore[union-attr]
    assert held == {path.name: path.read_bytes() for path in (tmp_path / "p").iterdir()}
    assert json.loads(json.dumps(sorted(held)))[0] == "000000.jpg"
