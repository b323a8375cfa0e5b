"""What a server tells of itself, and its own interface for one picture."""

from __future__ import annotations

import io
import json
import sys
import threading
from concurrent.futures import ThreadPoolExecutor
from dataclasses import replace
from typing import Any

import httpx
import PIL.Image
import pytest
from server.asked import asking, error_of, packed, serving, square, unpacked, until
from server.fake import FakeWorker, colour
from starlette.testclient import TestClient

from fewstep.server import desk
from fewstep.server.orders import Limits, ServerError

APPROXIMATIONS = "X-Approximations"


def test_ready_is_told_apart_from_alive() -> None:
    worker = FakeWorker()
    with asking(worker) as client:
        assert client.get("/ready").json()["status"] == "ready"
        worker.is_ready = False
        assert client.get("/health").status_code == 200
        answer = client.get("/ready")
        assert error_of(answer, 503)["code"] == "not_ready"
        assert answer.headers["retry-after"] == "2"
        for path in ("/v1/limits", "/v1/models", "/sdapi/v1/samplers"):
            assert error_of(client.get(path), 503)["code"] == "not_ready"
        drawn = client.post("/v1/generate", json={"prompt": "a"})
        assert error_of(drawn, 503)["code"] == "not_ready"


def test_the_end_of_the_app_drains_the_worker() -> None:
    worker = FakeWorker()
    with asking(worker):
        assert not worker.drained
    assert worker.drained


def test_limits_tell_what_is_taken_and_the_models_facts() -> None:
    with asking(FakeWorker(Limits(steps=9))) as client:
        told = client.get("/v1/limits").json()
    assert "." not in str(told["limits"]["steps"])
    assert told["limits"]["steps"] == 9 and told["limits"]["body_bytes"] == 32 << 20
    assert told["model"]["steps"] == {"min": 1, "max": 8, "default": 4}
    assert told["model"]["loras"][0] == {"id": "ink", "name": "Ink drawing"}


def test_metrics_count_steps_pictures_errors_and_seconds() -> None:
    with asking() as client:
        client.post("/v1/images/generations", json={"prompt": "a", "n": 2})
        client.post("/v1/images/generations", json={"prompt": 5})
        client.get("/no/such/thing")
        client.get("/v1/limits", headers={"Host": "evil.example"})
        text = client.get("/metrics").text
    figures = dict(line.rsplit(" ", 1) for line in text.splitlines() if line[0] != "#")
    assert figures["fewstep_steps_total"] == "8.0"
    assert figures["fewstep_drawn_total"] == "2.0"
    assert figures["fewstep_waiting"] == "0.0" and figures["fewstep_running"] == "1.0"
    assert figures["fewstep_queue_seconds_count"] == "2.0"
    assert figures["fewstep_picture_seconds_count"] == "2.0"
    assert figures['fewstep_errors_total{code="invalid_request"}'] == "1.0"
    assert figures['fewstep_errors_total{code="not_found"}'] == "1.0"
    assert figures['fewstep_errors_total{code="forbidden_host"}'] == "1.0"
    labels = '{route="/v1/images/generations",status="200"}'
    assert figures[f"fewstep_request_seconds_count{labels}"] == "1.0"
    assert figures['fewstep_worker_count{stage="step_seconds"}'] == "1.0"
    assert "no/such" not in text


# ── /v1/generate ──


def events_of(text: str) -> list[tuple[str, dict[str, Any]]]:
    """The events of a stream."""
    blocks = [block.split("\n") for block in text.strip().split("\n\n") if block[0] != ":"]
    return [(name[7:], json.loads(data[6:])) for name, data in blocks]


def test_a_picture_is_drawn_as_events() -> None:
    with asking() as client:
        answer = client.post(
            "/v1/generate", json={"prompt": "a cat", "steps": 3, "previews": True, "seed": 9}
        )
    assert answer.headers["content-type"].startswith("text/event-stream")
    events = events_of(answer.text)
    assert [name for name, _ in events] == ["queued", "step", "step", "step", "picture"]
    assert events[0][1]["id"]
    assert unpacked(events[1][1]["preview"]).format == "JPEG"
    last = events[-1][1]
    assert last["seed"] == 9 and last["record"]["prompt"] == "a cat"
    assert unpacked(last["image"]).getpixel((3, 3)) == colour("a cat")


@pytest.mark.parametrize(
    ("accept", "format"), [("image/*", "PNG"), ("image/webp", "WEBP"), ("image/jpeg;q=1", "JPEG")]
)
def test_a_picture_is_drawn_as_a_file_alone(accept: str, format: str) -> None:
    with asking() as client:
        answer = client.post("/v1/generate", json={"prompt": "a"}, headers={"Accept": accept})
    assert PIL.Image.open(io.BytesIO(answer.content)).format == format
    assert answer.headers["content-type"] == f"image/{format.lower()}"


def test_an_order_takes_pictures_and_loras() -> None:
    worker = FakeWorker()
    asked = {
        "prompt": "a",
        "image": packed(square("blue")),
        "mask": packed(square("white", mode="L")),
        "strength": 0.5,
        "loras": [{"id": "ink"}, {"id": "gold", "weight": -1}],
        "seconds": 100,
    }
    with asking(worker) as client:
        assert client.post("/v1/generate", json=asked).status_code == 200
    order = worker.orders[0]
    assert order.task == "inpaint" and order.loras == (("ink", 1.0), ("gold", -1.0))
    assert order.mask is not None and order.mask.mode == "L"
    assert order.seconds == 100 and order.client == "testclient"


@pytest.mark.parametrize(
    ("fields", "param", "hint"),
    [
        ({"guidence_scale": 2}, "guidence_scale", "did you mean 'guidance_scale'?"),
        ({"loras": [{"id": "ink", "wieght": 2}]}, "loras.0.wieght", "did you mean 'weight'?"),
        ({"loras": [{}]}, "loras.0.id", None),
        ({"promt": "a", "prompt": 5}, "promt", "did you mean 'prompt'?"),
        ({"strength": 0.5}, "strength", "leave it out, or send an image"),
        ({"mask": "aaaa"}, "mask", None),
        ({"seconds": 0}, "seconds", None),
        ({"control_scale": "1"}, "control_scale", None),
        ({"width": 65}, "width", "the nearest are 64 and 72"),
    ],
)
def test_fields_that_cannot_be_are_named(
    fields: dict[str, Any], param: str, hint: str | None
) -> None:
    with asking() as client:
        answer = client.post("/v1/generate", json={"prompt": "a", **fields})
    told = error_of(answer, answer.status_code)
    assert answer.status_code in (415, 422) and told["param"] == param
    assert hint is None or told["hint"] == hint


def test_pictures_of_those_who_wait_are_bounded_together() -> None:
    held = desk.Held(3 * 64 * 64 * 2)
    first, second = square(), square()
    held.keep(first)
    held.keep(second)
    with pytest.raises(ServerError, match="too much memory"):
        held.keep(square("red", 8))
    del first
    held.keep(square("red", 8))
    assert held.size() == 3 * 64 * 64


def test_threads_may_count_pictures_in_at_once() -> None:
    held, kept, before = desk.Held(1 << 30), [square() for _ in range(600)], sys.getswitchinterval()
    sys.setswitchinterval(1e-5)
    try:
        with ThreadPoolExecutor(4) as pool:
            list(pool.map(held.keep, kept))
    finally:
        sys.setswitchinterval(before)
    assert held.size() == 600 * 3 * 64 * 64


def test_more_pictures_than_the_line_has_places_are_no_matter_of_waiting() -> None:
    with asking(FakeWorker(Limits(waiting=4))) as client:
        answer = client.post("/v1/images/generations", json={"prompt": "a", "n": 5})
        assert error_of(answer, 422)["param"] == "n"


def test_a_worker_that_hangs_is_not_waited_for(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(desk, "GRACE", 0.05)
    worker = FakeWorker(delay=30)
    with asking(worker) as client:
        asked = {"prompt": "a", "seconds": 0.05}
        answer = client.post("/v1/generate", json=asked, headers={"Accept": "image/png"})
    assert error_of(answer, 504)["code"] == "timeout"
    assert worker.cancelled == 1


def test_answers_name_what_the_picture_is_approximated_by() -> None:
    worker = FakeWorker()
    with asking(worker) as client:
        assert client.post("/v1/generate", json={"prompt": "a"}).headers[APPROXIMATIONS] == "none"
        worker.facts = replace(worker.facts, extra={"approximations": ["int8", "tiny-vae"]})
        native = {"json": {"prompt": "a"}, "headers": {"Accept": "image/png"}}
        openai = {"json": {"prompt": "a", "stream": True}}
        for path, asked in (
            ("/v1/generate", native),
            ("/v1/images/generations", openai),
            ("/v1/images/generations", {"json": {"prompt": "a"}}),
            ("/sdapi/v1/txt2img", {"json": {"prompt": "a"}}),
        ):
            assert client.post(path, **asked).headers[APPROXIMATIONS] == "int8, tiny-vae"
        assert client.get("/v1/limits").json()["model"]["approximations"] == ["int8", "tiny-vae"]


def test_a_job_is_given_up_by_its_id_by_its_own_client_alone() -> None:
    worker = FakeWorker(delay=0.03)
    found: dict[str, Any] = {}
    with serving(worker) as served:
        address = served.address

        def draw() -> None:
            asked = {"prompt": "a", "steps": 50}
            with httpx.stream("POST", f"{address}/v1/generate", json=asked) as answer:
                text = ""
                for part in answer.iter_text():
                    text += part
                    if "id" not in found and "\n\n" in text:
                        found["id"] = events_of(text.partition("\n\n")[0])[0][1]["id"]
            found["events"] = events_of(text)

        thread = threading.Thread(target=draw)
        thread.start()
        until(lambda: "id" in found)
        stranger = TestClient(served.app, base_url=address, client=("10.0.0.9", 1))
        assert error_of(stranger.delete(f"/v1/jobs/{found['id']}"), 404)
        assert httpx.delete(f"{address}/v1/jobs/{found['id']}").status_code == 204
        thread.join(5)
        assert error_of(httpx.delete(f"{address}/v1/jobs/{found['id']}"), 404)
    name, told = found["events"][-1]
    assert name == "error" and told["error"]["code"] == "cancelled"
    assert worker.cancelled == 1
