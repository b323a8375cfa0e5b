"""Case 11: prompts of any kind are drawn and kept as they are, or refused by name."""

from __future__ import annotations

import io
import json
import re
import time
from pathlib import Path
from typing import Any

import PIL.Image
import pytest
from faults.wires import INTERFACES, drawn, refusal
from server.asked import Served
from server.fake import FakeWorker

import fewstep.server
from fewstep import metadata

TEXTS = {
    "empty": "",
    "blanks": "  a  cat  ",
    "control characters": "a\tcat\x07\x1b[31m\x7f\x85",
    "lines": "a\r\ncat\n\nand\rdog\n",
    "right to left": "\u202e\u05d7\u05ea\u05d5\u05dc\u202c \u0642\u0637\u0629",
    "joined emoji": "a 👩‍👩‍👧‍👦 and a 🏳️‍🌈",
    "beyond the plane": "\U0010ffff\U00020000\ufffe",
    "brackets": "(" * 8000,
    "a LoRA's path": "a cat <lora:../../x:1>",
    "other settings": "a cat\nNegative prompt: dogs\nSteps: 4, Seed: 1, Size: 8x8",
    "settings alone": "Steps: 4, Seed: 1",
    "quotes": '"a", \\"b\\": {"seed": 1}',
    "markup": "<script>alert(1)</script><img src=x onerror=alert(1)>",
}


@pytest.mark.parametrize("name", TEXTS)
@pytest.mark.parametrize("format", ["png", "jpeg", "webp"])
def test_a_file_holds_the_prompt_as_it_was_and_no_setting_out_of_it(
    real: Served, name: str, format: str
) -> None:
    """Case 11: the record to the letter; the web UI's words too, as far as they can tell it."""
    prompt = TEXTS[name]
    data, record = drawn(real, prompt=prompt, seed=987, steps=2, format=format)
    assert record["prompt"] == prompt
    with PIL.Image.open(io.BytesIO(data)) as picture:
        kept = json.loads(metadata.stored_json(picture) or "")
        told = metadata.parsed_parameters(metadata.stored_parameters(picture) or "")
    assert (kept["prompt"], kept["seed"], kept["steps"]) == (prompt, 987, 2)
    assert (told["Steps"], told["Seed"], told["Size"]) == ("2", "987", "64x64")
    # Those words hold neither lines that look like their own nor blanks at the ends.
    wanted = "a cat" if name == "other settings" else prompt
    assert told["Prompt"].strip() == wanted.strip()


def test_what_is_longer_than_the_model_reads_is_cut_alike_each_time_and_said(real: Served) -> None:
    """Case 11: deterministic, with a warning in the record."""
    long = "a red cat " * 800
    first, record = drawn(real, prompt=long, seed=3, steps=1)
    again, _ = drawn(real, prompt=long, seed=3, steps=1)
    shorter, _ = drawn(real, prompt=long[:4000], seed=3, steps=1)
    assert "cut off" in record["warnings"][0]
    kept = [PIL.Image.open(io.BytesIO(data)).tobytes() for data in (first, again, shorter)]
    assert kept[0] == kept[1] == kept[2]


REFUSED = {
    "100 000 words": json.dumps("cat " * 100_000),
    "100 000 brackets": json.dumps("(" * 100_000),
    "100 000 LoRAs": json.dumps("<lora:" * 100_000),
    "one too many": json.dumps("a" * 8001),
    "NUL": '"a\\u0000b"',
    "half a pair": '"a\\ud800b"',
    "the other half": '"\\udc00"',
    "number": "5",
    "list": '["a"]',
}


@pytest.mark.parametrize("name", REFUSED)
@pytest.mark.parametrize("field", ["prompt", "negative_prompt"])
def test_a_text_that_cannot_be_is_refused_in_no_time(
    pretending: Served, fake: FakeWorker, name: str, field: str
) -> None:
    """Case 11: by each interface."""
    begin = time.perf_counter()
    fields = f'{{"prompt": "a", "negative_prompt": {REFUSED[name]}}}'
    if field == "prompt":
        fields = f'{{"prompt": {REFUSED[name]}}}'
    for interface in INTERFACES:
        told = refusal(pretending, interface, fields, (400, 422))
        assert told["param"] == field or "surrogate" in told["message"], (interface, told)
        assert len(told["message"]) < 1000
    assert time.perf_counter() - begin < 2
    assert not fake.orders


def test_a_lora_of_the_prompt_is_one_that_is_loaded_or_refused(real: Served) -> None:
    """Case 11: a name is looked up, and leads to no file."""
    for name in ("../../x", "/etc/passwd", "nobody"):
        told = refusal(real, "web ui", json.dumps({"prompt": f"a <lora:{name}:1>"}), (422,))
        assert told["param"] == "prompt"


def test_the_studio_makes_no_markup_of_texts_and_runs_none() -> None:
    """Case 11: no sink for markup in its scripts, no script in its page."""
    folder = Path(fewstep.server.__file__).parent / "studio"
    sinks = r"innerHTML|outerHTML|insertAdjacentHTML|document\.write|\beval\(|new Function|srcdoc"
    for script in folder.glob("*.js"):
        assert not re.search(sinks, script.read_text(encoding="utf-8")), script.name
    page: Any = (folder / "index.html").read_text(encoding="utf-8")
    assert not re.search(r"<script(?![^>]*\ssrc=)|\son\w+=|javascript:", page)
