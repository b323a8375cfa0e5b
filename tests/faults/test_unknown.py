"""Case 12: what is unknown is never taken for something else, and the error knows better."""

from __future__ import annotations

import json

import pytest
from faults.wires import INTERFACES, refusal
from server.asked import Served
from server.fake import FakeWorker

MISTYPED = [
    ("native", {"guidence_scale": 7.0}, "guidence_scale", "guidance_scale"),
    ("openai", {"guidence_scale": 7.0}, "guidence_scale", "guidance_scale"),
    ("web ui", {"cfg_scal": 7.0}, "cfg_scal", "cfg_scale"),
    ("live", {"guidence_scale": 7.0}, "guidence_scale", "guidance_scale"),
    ("native", {"negativ_prompt": "a"}, "negativ_prompt", "negative_prompt"),
    ("native", {"loras": [{"id": "ink", "wieght": 1.0}]}, "loras.0.wieght", "weight"),
    ("openai", {"model": "fake/sqares"}, "model", "fake/squares"),
    ("web ui", {"override_settings": {"sd_model_checkpiont": "x"}}, "sd_model_checkpiont", "sd_mo"),
    ("web ui", {"override_settings": {"sd_model_checkpoint": "fake/sqares"}}, None, "fake/squares"),
    ("web ui", {"prompt": "a <lora:inkk:1>"}, "prompt", "ink"),
    ("web ui", {"stpes": 4}, "stpes", "steps"),
]


@pytest.mark.parametrize(("interface", "fields", "param", "meant"), MISTYPED)
def test_a_mistyped_name_is_asked_after(
    pretending: Served,
    fake: FakeWorker,
    interface: str,
    fields: dict[str, object],
    param: str | None,
    meant: str,
) -> None:
    """Case 12: fields, models and LoRAs."""
    told = refusal(pretending, interface, json.dumps({"prompt": "a", **fields}), (404, 422))
    assert "did you mean" in told["hint"] and meant in told["hint"], told
    assert param is None or told["param"] == param
    assert not fake.orders


@pytest.mark.parametrize("interface", INTERFACES)
@pytest.mark.parametrize("name", ["xyzzy", "__class__", "", "a" * 5000, "prompt\u0000", "<b>"])
def test_a_field_that_nobody_knows_is_refused_with_those_that_there_are(
    pretending: Served, fake: FakeWorker, interface: str, name: str
) -> None:
    """Case 12."""
    told = refusal(pretending, interface, json.dumps({"prompt": "a", name: 1}), (400, 422))
    assert told["hint"] is not None and "prompt" in told["hint"]
    assert len(json.dumps(told)) < 3000
    assert not fake.orders


@pytest.mark.parametrize(
    ("interface", "fields", "param"),
    [
        ("openai", {"model": "dall-e-3"}, "model"),
        ("openai", {"model": ""}, "model"),
        ("openai", {"size": "huge"}, "size"),
        ("openai", {"size": "1024*1024"}, "size"),
        ("openai", {"quality": "ultra"}, "quality"),
        ("openai", {"output_format": "gif"}, "output_format"),
        ("openai", {"response_format": "file"}, "response_format"),
        ("openai", {"style": "vivid"}, "style"),
        ("web ui", {"sampler_name": "Euler a"}, "sampler_name"),
        ("web ui", {"override_settings": {"sd_model_checkpoint": "v1-5"}}, "sd_model_checkpoint"),
        ("native", {"format": "gif"}, "format"),
        ("native", {"model": "fake/squares"}, "model"),
    ],
)
def test_a_value_that_nobody_knows_is_no_default(
    pretending: Served, fake: FakeWorker, interface: str, fields: dict[str, object], param: str
) -> None:
    """Case 12: an unknown model or size least of all."""
    told = refusal(pretending, interface, json.dumps({"prompt": "a", **fields}), (404, 422))
    assert told["param"] == param
    assert not fake.orders


def test_a_lora_that_is_not_loaded_is_refused_with_those_that_are(real: Served) -> None:
    """Case 12: by the model itself."""
    for interface in ("native", "openai", "live"):
        fields = json.dumps({"prompt": "a", "loras": [{"id": "blueprint"}]})
        told = refusal(real, interface, fields, (422,))
        assert told["param"] == "loras" and "fewstep-emoji-blueprint" in told["hint"]
