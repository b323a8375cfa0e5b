"""`fewstep evaluate`: what it writes for each way of judging, and how it refuses."""

from __future__ import annotations

import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import PIL.Image
import pytest
from safetensors.numpy import save_file

from fewstep.evaluation import judges

Run = Callable[..., tuple[int, str, str]]


class Corner:
    """A feature network: the pixels of a corner."""

    size, label, origin = 12, "Corner", "none"

    def __call__(self, pictures: np.ndarray) -> np.ndarray:
        return pictures[:, :2, :2].reshape(len(pictures), -1).astype(np.float32)


@pytest.fixture
def reference(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """Six captioned pictures, and a small network that judges."""

    def load(name: str, folder: object = None, *, device: Any = None) -> Corner:
        return Corner()

    monkeypatch.setattr(judges, "load_feature_net", load)
    monkeypatch.setenv("FEWSTEP_CACHE", str(tmp_path / "cache"))
    folder = tmp_path / "reference"
    folder.mkdir()
    lines = []
    for i in range(6):
        pixels = np.random.default_rng(i).integers(0, 256, (40, 48, 3)).astype(np.uint8)
        PIL.Image.fromarray(pixels).save(folder / f"{i}.png")
        lines.append(json.dumps({"file_name": f"{i}.png", "text": f"a red cat {i}"}))
    (folder / "metadata.jsonl").write_text("\n".join(lines))
    return folder


def test_a_model_and_its_teacher_against_reference_pictures(
    reference: Path, run: Run, lcm_folder: Path, sd_folder: Path, tmp_path: Path
) -> None:
    command = (
        f"evaluate {lcm_folder} --reference {reference} --teacher {sd_folder} --compare ddim,dpm++ "
        "--steps 1,2 --teacher-steps 3 --guidance 2,6 --prompts 5 --batch 3 --size 32 "
        "--extractors efficientnet-lite0 --output out"
    ).split()
    code, out, _ = run(*command)
    assert code == 0
    report = json.loads(Path("out/evaluation.json").read_text())
    assert [(r["method"], r["steps"], r["guidance"]) for r in report["rows"]] == [
        ("real pictures, half against half", None, None),
        *(("LCM", n, scale) for scale in (2.0, 6.0) for n in (1, 2)),
        *(("teacher, DDIM", n, 7.5) for n in (3, 1, 2)),
        *(("teacher, DPM++", n, 7.5) for n in (1, 2)),
    ]
    assert all(set(r["scores"]) >= {"fid/efficientnet-lite0"} for r in report["rows"])
    assert report["settings"]["prompts"] == 5 and report["settings"]["picture size"] == "32x32"
    assert Path("out/evaluation.md").read_text() in out
    names = {file.name for file in Path("out").iterdir()}
    assert names == {"evaluation.json", "evaluation.md"} | {
        f"{name}.png" for name in ("sheet", "steps", "guidance", "seconds")
    }
    assert (tmp_path / "cache" / "evaluation" / "pictures").is_dir()
    assert run(*command)[1] == out  # nothing is drawn again, so the seconds are the same


def test_stored_features(run: Run, tmp_path: Path) -> None:
    random = np.random.default_rng(0)
    for name in ("reference", "mine"):
        save_file(
            {"features": random.normal(size=(9, 3))},
            tmp_path / f"{name}.safetensors",
            metadata={"extractor": "Inception"},
        )
    code, out, error = run("evaluate", "--features", tmp_path, "--output", "out")
    assert (code, error) == (0, "")
    assert "FID-Inception" in out and "mine (9)" in out
    assert sorted(f.name for f in Path("out").iterdir()) == ["evaluation.json", "evaluation.md"]


@pytest.mark.parametrize(
    ("options", "words"),
    [
        ("", "needs one of --reference, --sprites and --features, got none of them"),
        ("--sprites x --reference REF", "got --reference and --sprites"),
        ("--sprites x --steps 1,none", "--steps 1,none: must be numbers"),
        ("SD --sprites x", "is no guidance-distilled LCM; give one"),
        ("--sprites x --clip y", "--clip: has a meaning only with --reference; leave it out"),
        ("SD --features x", "MODEL: has a meaning only with --reference or --sprites"),
        ("--reference REF --selection y", "--selection: has a meaning only with --sprites"),
        ("--reference REF --compare ddim", "--compare: needs a --teacher"),
        ("--reference REF --guidance 2,x", "--guidance 2,x: x is not from 0 to 100"),
        (
            "--reference REF --teacher SD --compare heun",
            "--compare: 'heun' is unknown (have: ddim, dpm, dpm++)",
        ),
        ("--reference none", "--reference none: is no folder"),
        ("--reference REF --prompts 7", "--prompts must be in [1, 6]"),
        ("--reference REF --kid-subset 7", "--kid-subset must be in [2, 6]"),
        ("--reference REF --prompts 3", "KID needs 4 pictures in each set"),
        ("no/model --reference REF", "MODEL no/model: "),
        ("LCM --teacher no/model --reference REF", "--teacher no/model: "),
        ("LCM --reference REF --steps 2000", "LCM at 2000 steps: "),
        ("LCM --reference REF --size 33", "--size 33x33: this model needs multiples of"),
        ("LCM --reference REF --clip no/clip", "--clip no/clip: "),
    ],
)
def test_bad_input_ends_in_one_line_before_drawing(
    options: str,
    words: str,
    reference: Path,
    run: Run,
    lcm_folder: Path,
    sd_folder: Path,
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    monkeypatch.setenv("HF_HUB_OFFLINE", "1")
    places = {"REF": str(reference), "SD": str(sd_folder), "LCM": str(lcm_folder)}
    given = [places.get(word, word) for word in options.split()]
    code, out, error = run("evaluate", *given, "--output", "out")
    assert (code, out) == (2, "")
    assert error.startswith("error: ") and error.count("\n") == 1
    assert words in error
    assert list(Path().iterdir()) == []


def test_a_missing_caption_and_a_corrupt_picture_are_told_before_drawing(
    reference: Path, run: Run
) -> None:
    (reference / "3.png").write_bytes(b"no picture")
    error = run("evaluate", "--reference", reference, "--output", "out")[2]
    assert f"error: --reference {reference / '3.png'}: cannot be read as a picture" in error
    (reference / "metadata.jsonl").unlink()
    error = run("evaluate", "--reference", reference, "--output", "out")[2]
    assert f"error: --reference {reference / '0.png'}: has no caption; write 0.txt" in error


def test_what_one_process_judges_is_refused_under_torchrun(
    run: Run, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("WORLD_SIZE", "2")
    code, _, error = run("evaluate", "--sprites", "x", "--output", "out")
    assert code == 2
    assert "--sprites: is judged by one process; run it without torchrun" in error
