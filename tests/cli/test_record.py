from __future__ import annotations

import json
import re
from dataclasses import replace
from pathlib import Path
from typing import Any

import PIL.Image
import pytest
from PIL.PngImagePlugin import PngInfo
from records import png_text

from fewstep.cli.record import (
    FORMAT,
    Addition,
    Model,
    Picture,
    Record,
    Source,
    parameters,
    read_record,
    told,
)
from fewstep.errors import RequestError

MODEL = Model(
    id="owner/model",
    pipeline="LatentConsistencyModelImg2ImgPipeline",
    weights="0123456789abcdef",
    scheduler={"_class_name": "LCMScheduler", "beta_start": 0.00085},
    variant="fp16",
)
PICTURE = Picture(
    prompt='a "red" apple,\nein Äpfel 🍎',
    seed=2**63 - 1,
    steps=4,
    guidance_scale=8.5,
    width=32,
    height=48,
    negative_prompt="worms",
    strength=0.6,
    image=Source("photo.jpg", "ff" * 32),
)
RECORD = Record(
    model=MODEL,
    pictures=(PICTURE, Picture("b", 1, 2, 3.0, 32, 48)),
    device="cpu",
    dtype="float32",
    threads=2,
    versions={"fewstep": "0.1.0", "torch": "2.13.0"},
    columns=2,
)


def save(file: Path, text: PngInfo | None) -> Path:
    PIL.Image.new("RGB", (4, 4)).save(file, pnginfo=text)
    return file


def test_a_record_survives_its_file(tmp_path: Path) -> None:
    assert read_record(save(tmp_path / "a.png", png_text(RECORD))) == RECORD


def test_what_stood_beside_the_model_survives_too(tmp_path: Path) -> None:
    additions = (Addition("lora", "style.safetensors", 0.8, "aa" * 32),)
    source = Source("mask.png", "ee" * 32)
    picture = replace(PICTURE, mask=source, controls=(source, source), prompts=(source,), frames=3)
    record = replace(RECORD, model=replace(MODEL, additions=additions), pictures=(picture,))
    assert read_record(save(tmp_path / "a.png", png_text(record))) == record
    assert "additions" not in RECORD.to_dict()["model"]


@pytest.mark.parametrize("suffix", [".png", ".gif", ".webp"])
def test_every_kind_of_file_holds_the_record(suffix: str, tmp_path: Path) -> None:
    file = tmp_path / f"a{suffix}"
    frames = [PIL.Image.new("RGB", (4, 4), colour) for colour in ("red", "blue")]
    frames[0].save(file, save_all=True, append_images=frames[1:], **told(RECORD, suffix))
    assert read_record(file) == RECORD


def test_other_programs_read_the_parameters_of_a_webp(tmp_path: Path) -> None:
    PIL.Image.new("RGB", (4, 4)).save(tmp_path / "a.webp", **told(RECORD, ".webp"))
    with PIL.Image.open(tmp_path / "a.webp") as picture:
        comment = picture.getexif().get_ifd(0x8769)[0x9286]
    assert comment == b"UNICODE\0" + parameters(RECORD).encode("utf-16-be")


@pytest.mark.parametrize(
    ("suffix", "said"),
    [(".gif", {"comment": b"made by hand"}), (".gif", {"comment": b"fewstep"}), (".webp", {})],
)
def test_the_comment_of_another_program_is_no_record(
    suffix: str, said: dict[str, Any], tmp_path: Path
) -> None:
    PIL.Image.new("RGB", (4, 4)).save(tmp_path / f"a{suffix}", **said)
    with pytest.raises(RequestError, match="does not say what it was drawn from"):
        read_record(tmp_path / f"a{suffix}")


def test_a_file_of_the_first_format_is_read(tmp_path: Path) -> None:
    assert read_record(save(tmp_path / "a.png", damaged(format=1))) == RECORD


@pytest.mark.parametrize(
    ("changes", "task"),
    [
        ({}, "image-to-image"),
        ({"image": None}, "text-to-image"),
        ({"mask": Source("m", "")}, "inpainting"),
        ({"image": None, "frames": 2}, "text-to-video"),
    ],
)
def test_a_picture_knows_its_task(changes: dict[str, object], task: str) -> None:
    assert replace(PICTURE, **changes).task == task  # type: ignore[arg-type]


def test_the_text_is_json_without_what_is_not_set(tmp_path: Path) -> None:
    file = save(tmp_path / "a.png", png_text(RECORD))
    with PIL.Image.open(file) as picture:
        stored = json.loads(picture.text["fewstep"])
    assert stored["format"] == FORMAT
    assert "strength" not in stored["pictures"][1]


def test_other_programs_read_the_parameters() -> None:
    alone = replace(RECORD, pictures=(replace(PICTURE, prompt="a red apple"),))
    assert parameters(alone) == (
        "a red apple\n"
        "Negative prompt: worms\n"
        f"Steps: 4, Sampler: LCM, CFG scale: 8.5, Seed: {2**63 - 1}, Size: 32x48, "
        "Model hash: 0123456789, Model: model, Denoising strength: 0.6, Version: fewstep 0.1.0"
    )


def text(**chunks: str) -> PngInfo:
    info = PngInfo()
    for key, value in chunks.items():
        info.add_itxt(key, value)
    return info


def damaged(**changes: object) -> PngInfo:
    return text(fewstep=json.dumps(RECORD.to_dict() | changes))


@pytest.mark.parametrize(
    ("info", "words"),
    [
        (None, "does not say what it was drawn from"),
        (text(parameters="Steps: 4"), "does not say what it was drawn from"),
        (text(fewstep="no json"), "its settings are damaged"),
        (text(fewstep="[]"), "its settings are damaged"),
        (damaged(pictures=[]), "its settings are damaged"),
        (damaged(pictures=[{"prompt": "x"}]), "its settings are damaged"),
        (damaged(pictures=[{**RECORD.to_dict()["pictures"][1], "seed": "7"}]), "damaged"),
        (damaged(surprise=1), "its settings are damaged"),
        (damaged(format=FORMAT + 1), "was drawn by a newer fewstep; update fewstep"),
    ],
)
def test_a_file_without_a_sound_record_is_refused(
    info: PngInfo | None, words: str, tmp_path: Path
) -> None:
    file = save(tmp_path / "a.png", info)
    with pytest.raises(RequestError, match=f"^PICTURE {re.escape(str(file))}: .*{words}"):
        read_record(file)


def test_a_file_that_is_missing_or_no_picture_is_refused(tmp_path: Path) -> None:
    with pytest.raises(RequestError, match="no such file"):
        read_record(tmp_path / "a.png")
    (tmp_path / "a.png").write_bytes(b"\x89PNG\r\n\x1a\nnot really")
    with pytest.raises(RequestError, match="cannot be read as a picture"):
        read_record(tmp_path / "a.png")
