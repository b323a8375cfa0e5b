"""Case 10: numbers beyond their range, or of another kind, are refused by name."""

from __future__ import annotations

import json

import httpx
import numpy as np
import PIL.Image
import pytest
from faults.wires import INTERFACES, drawn, refusal
from server.asked import Served, error_of, file, packed, square
from server.fake import FakeWorker

from fewstep.server.worker import PipelineWorker

# Whole numbers that nothing takes, as JSON; then what a field's own range leaves out.
NEVER = ("1e6", '"4"', "4.5", "NaN", "Infinity", "1e999", "true", "[4]", "{}", '""', "1e30")
WHOLE = {
    "steps": ("0", "-1", "51", "1000000", str(10**30)),
    "seed": (str(2**64), "-2", '"abc"', "1.5"),
    "width": ("0", "-8", "56", "513", "100000"),
    "height": ("0", "8", "2056", "100"),
}
REAL = {
    "guidance_scale": ("NaN", "Infinity", "-Infinity", "1e999", "-5", "1e30", '"7"', "true", "[]"),
    "strength": ("-1", "1.5", "NaN", '"0.5"', "false", "1e999", "-1e-9"),
    "control_scale": ("-1", "2.5", "NaN", "null", "true"),
    "seconds": ("0", "-1", "NaN", '"1"'),
}
NAMES = {  # what else a field is called
    ("web ui", "guidance_scale"): "cfg_scale",
    ("web ui", "strength"): "denoising_strength",
}
ABSENT = {("openai", "width"), ("openai", "height"), ("openai", "strength"), ("web ui", "strength")}
NATIVE_ALONE = ("control_scale", "seconds")
CASES = [
    (interface, field, text)
    for field, texts in {**{k: NEVER + v for k, v in WHOLE.items()}, **REAL}.items()
    for interface in INTERFACES
    if (interface, field) not in ABSENT
    if field not in NATIVE_ALONE or interface in ("native", "live")
    for text in texts
]


@pytest.mark.parametrize("interface", INTERFACES)
def test_a_number_that_cannot_be_is_refused_by_the_name_of_its_field(
    pretending: Served, fake: FakeWorker, interface: str
) -> None:
    """Case 10: texts, fractions, NaN and true are no numbers; nothing is drawn."""
    image = f', "image": "{packed(square())}"'
    for _, field, text in (case for case in CASES if case[0] == interface):
        name = NAMES.get((interface, field), field)
        more = image if field == "strength" else ""
        fields = f'{{"prompt": "a", "{name}": {text}{more}}}'
        told = refusal(pretending, interface, fields, (400, 422))
        if text in ("NaN", "Infinity", "-Infinity") or len(text) > 4000:
            assert "JSON" in told["message"], (field, text)  # it is none with those
        else:
            assert told["param"] in (field, name), (field, text, told)
    assert not fake.orders


SIZES = ("512X512", "513x512", "0x0", "0x512", "100000x8", "64x56", "512x512x512", "512x", " ", "")
COUNTS = ("0", "11", "-1", "1000000000", '"2"', "true", "1.5", "NaN", "null")


def test_sizes_and_counts_that_cannot_be_are_refused(pretending: Served, fake: FakeWorker) -> None:
    """Case 10: by the names that each interface has for them."""
    for text in (*map(json.dumps, (*SIZES, "\u0665\u0661\u0662x64")), "512", "null", "true"):
        told = refusal(pretending, "openai", f'{{"prompt": "a", "size": {text}}}', (422,))
        assert told["param"] in ("size", "width", "height"), text
    for interface, fields in (("openai", ("n",)), ("web ui", ("batch_size", "n_iter"))):
        for field in fields:
            for text in COUNTS:
                told = refusal(
                    pretending, interface, f'{{"prompt": "a", "{field}": {text}}}', (400, 422)
                )
                assert text == "NaN" or told["param"] == field, (field, text)
    both = '{"prompt": "a", "batch_size": 4, "n_iter": 3}'
    assert refusal(pretending, "web ui", both, (422,))["param"] == "batch_size"
    assert not fake.orders


def test_null_is_the_models_own_and_a_whole_number_will_do_for_a_real_one(
    pretending: Served, fake: FakeWorker
) -> None:
    """Case 10: the only coercions that there are, but for forms, whose fields are texts."""
    fields = {"prompt": "a", "steps": None, "guidance_scale": 7, "seed": None}
    headers = {"Accept": "image/png"}
    answer = httpx.post(f"{pretending.address}/v1/generate", json=fields, headers=headers)
    assert answer.status_code == 200
    order = fake.orders[-1]
    assert (order.steps, order.guidance_scale) == (None, 7.0)
    form = {"prompt": "a", "steps": "3", "strength": "0.5"}
    url, files = f"{pretending.address}/v1/images/edits", {"image": file(square())}
    assert httpx.post(url, data=form, files=files).status_code == 200
    assert (fake.orders[-1].steps, fake.orders[-1].strength) == (3, 0.5)


@pytest.mark.parametrize(
    ("field", "text"),
    [
        *(("steps", text) for text in ("4.5", "NaN", "0", "1e6")),
        *(("strength", text) for text in ("nan", "inf", "-1", "1.5")),
        *(("n", text) for text in ("0", "11", "1e9", "1.5")),
        *(("seed", text) for text in ("-1", "1.5", "abc", str(2**64))),
        ("guidance_scale", "x"),
        ("size", "512X512"),
    ],
)
def test_fields_of_a_form_are_as_bounded_as_those_of_json(
    pretending: Served, fake: FakeWorker, field: str, text: str
) -> None:
    """Case 10."""
    answer = httpx.post(
        f"{pretending.address}/v1/images/edits",
        data={"prompt": "a", field: text},
        files={"image": file(square())},
    )
    assert error_of(answer, 422)["param"] == field
    assert not fake.orders


@pytest.mark.parametrize("strength", [0, 1e-9, 1e-3, 0.5, 1])
@pytest.mark.parametrize("steps", [1, 4])
def test_any_strength_takes_a_step_at_least(
    real: Served, worker: PipelineWorker, strength: float, steps: int
) -> None:
    """Case 10: with a mask and without."""
    image = PIL.Image.effect_noise((64, 64), 60).convert("RGB")
    mask = PIL.Image.new("L", (64, 64), 255)
    fields = {"prompt": "a cat", "image": packed(image), "strength": strength, "steps": steps}
    for more in ({}, {"mask": packed(mask)}):
        before = worker.load().rows
        data, record = drawn(real, **fields, **more, seed=1)
        assert 1 <= len(record["timesteps"]) <= steps
        assert worker.load().rows - before == len(record["timesteps"])
        assert np.frombuffer(data, np.uint8).size > 100
