"""OpenAI's images API, asked by its own client over a real connection."""

from __future__ import annotations

import base64
import io
import socket
from collections.abc import Iterator
from typing import Any

import httpx
import openai
import PIL.Image
import pytest
from server.asked import asking, error_of, file, listening, square, unpacked, until
from server.fake import FACTS, FakeWorker, colour

from fewstep import metadata
from fewstep.server.files import Files

KEY = "correct-horse"


@pytest.fixture(scope="module")
def worker() -> FakeWorker:
    return FakeWorker(delay=0.002)


@pytest.fixture(scope="module")
def address(worker: FakeWorker) -> Iterator[str]:
    with listening(worker, api_key=KEY) as found:
        yield found


@pytest.fixture
def client(address: str, worker: FakeWorker) -> Iterator[openai.OpenAI]:
    worker.is_full, worker.delay = False, 0.002
    with openai.OpenAI(base_url=f"{address}/v1", api_key=KEY, max_retries=0) as found:
        yield found


def test_a_picture_is_the_prompts(client: openai.OpenAI) -> None:
    answer = client.images.generate(prompt="a cat", model="fake/squares", size="128x64")
    picture = unpacked(answer.data[0].b64_json)
    assert picture.format == "PNG" and picture.size == (128, 64)
    assert picture.getpixel((5, 5)) == colour("a cat")
    assert answer.size == "128x64" and answer.output_format == "png"
    assert metadata.stored_json(picture)


def test_n_pictures_have_seeds_that_count_on(client: openai.OpenAI, worker: FakeWorker) -> None:
    answer = client.images.generate(prompt="a", n=3, extra_body={"seed": 2**64 - 1})
    assert len(answer.data) == 3
    assert [order.seed for order in worker.orders[-3:]] == [2**64 - 1, 0, 1]


def test_pictures_without_a_seed_differ(client: openai.OpenAI, worker: FakeWorker) -> None:
    for _ in range(2):
        client.images.generate(prompt="a")
    assert worker.orders[-1].seed != worker.orders[-2].seed


def test_size_auto_and_quality_are_the_models(client: openai.OpenAI, worker: FakeWorker) -> None:
    client.images.generate(prompt="a", size="auto", quality="auto")
    assert (worker.orders[-1].width, worker.orders[-1].steps) == (None, None)
    client.images.generate(prompt="a", quality="low")
    client.images.generate(prompt="a", quality="high")
    assert [order.steps for order in worker.orders[-2:]] == [2, 8]


def test_extra_fields_reach_the_model(client: openai.OpenAI, worker: FakeWorker) -> None:
    more: dict[str, Any] = {
        "steps": 2,
        "guidance_scale": 3,
        "negative_prompt": "dogs",
        "loras": [{"id": "ink", "weight": 0.5}],
    }
    client.images.generate(prompt="a", extra_body=more)
    order = worker.orders[-1]
    assert (order.steps, order.guidance_scale, order.negative_prompt) == (2, 3, "dogs")
    assert order.loras == (("ink", 0.5),)


@pytest.mark.parametrize("format", ["jpeg", "webp"])
def test_other_formats_are_smaller_at_a_lower_quality(client: openai.OpenAI, format: Any) -> None:
    answer = client.images.generate(prompt="a", output_format=format, output_compression=50)
    assert unpacked(answer.data[0].b64_json).format == format.upper()


def test_a_picture_by_its_address_is_there_for_those_with_the_key(client: openai.OpenAI) -> None:
    url = client.images.generate(prompt="a cat", response_format="url").data[0].url
    assert url and "/v1/images/files/" in url
    assert httpx.get(url).status_code == 401
    answer = httpx.get(url, headers={"Authorization": f"Bearer {KEY}"})
    assert answer.headers["content-type"] == "image/png"
    assert PIL.Image.open(io.BytesIO(answer.content)).size == (64, 64)


def test_addresses_are_forgotten_by_size_and_by_time() -> None:
    files = Files(100, 60)
    names = [files.put(b"a" * 40, "image/png") for _ in range(3)]
    assert [files.get(name) is None for name in names] == [True, False, False]
    assert files.size == 80
    assert files.put(b"a" * 200, "image/png") and files.size == 0
    brief = Files(100, -1)
    assert brief.get(brief.put(b"a", "image/png")) is None
    assert files.get("../../etc/passwd") is None


def test_a_stream_has_partial_pictures_and_then_the_whole(client: openai.OpenAI) -> None:
    stream = client.images.generate(
        prompt="a cat", stream=True, partial_images=2, extra_body={"steps": 8}
    )
    events = list(stream)
    assert [event.type for event in events] == [
        "image_generation.partial_image",
        "image_generation.partial_image",
        "image_generation.completed",
    ]
    assert [event.partial_image_index for event in events[:2]] == [0, 1]
    assert unpacked(events[-1].b64_json).getpixel((5, 5)) == colour("a cat")
    assert events[-1].usage.total_tokens == 0


def test_a_stream_without_partial_pictures_has_one_event(client: openai.OpenAI) -> None:
    (event,) = client.images.generate(prompt="a", stream=True)
    assert event.type == "image_generation.completed"


def test_an_error_in_a_stream_is_raised_by_the_client(
    client: openai.OpenAI, worker: FakeWorker
) -> None:
    worker.failure_of = RuntimeError("secret")
    try:
        with pytest.raises(openai.APIError, match="something went wrong") as found:
            list(client.images.generate(prompt="a", stream=True))
        assert "secret" not in str(found.value.body)
    finally:
        worker.failure_of = None


def test_an_edit_draws_where_the_mask_is_transparent(client: openai.OpenAI) -> None:
    mask = PIL.Image.new("RGBA", (64, 64), (0, 0, 0, 255))
    mask.paste((0, 0, 0, 0), (0, 0, 32, 64))
    answer = client.images.edit(
        image=("a.png", file(square("blue"))), mask=("m.png", file(mask)), prompt="a cat", n=1
    )
    picture = unpacked(answer.data[0].b64_json)
    assert picture.getpixel((5, 5)) == colour("a cat")
    assert picture.getpixel((60, 5)) == (0, 0, 255)


def test_an_edit_takes_the_pictures_own_transparency(
    client: openai.OpenAI, worker: FakeWorker
) -> None:
    image = PIL.Image.new("RGBA", (64, 64), (0, 0, 255, 255))
    image.paste((0, 0, 0, 0), (0, 0, 32, 64))
    client.images.edit(image=[("a.png", file(image))], prompt="a", extra_body={"strength": 0.5})
    order = worker.orders[-1]
    assert order.mask is not None and order.strength == 0.5
    assert (order.mask.getpixel((0, 0)), order.mask.getpixel((40, 0))) == (255, 0)


def test_an_edit_without_any_transparency_starts_from_all_of_it(
    client: openai.OpenAI, worker: FakeWorker
) -> None:
    client.images.edit(image=("a.jpg", file(square(), "JPEG")), prompt="a")
    assert worker.orders[-1].task == "image"


def test_an_edit_is_streamed_by_its_own_names(client: openai.OpenAI) -> None:
    image = ("a.png", file(square()))
    stream = client.images.edit(image=image, prompt="a", stream=True, partial_images=1)
    assert [event.type for event in stream] == ["image_edit.partial_image", "image_edit.completed"]


@pytest.mark.parametrize(
    ("files", "param"),
    [
        ({"image": b""}, "image"),
        ({"image": b"no picture"}, "image"),
        ({"image": file(square()), "mask": file(square())}, "mask"),
        ({}, "image"),
    ],
)
def test_edits_of_what_cannot_be_edited_name_the_file(files: dict[str, bytes], param: str) -> None:
    with asking() as client:
        sent = {name: ("a.png", data) for name, data in files.items()}
        answer = client.post("/v1/images/edits", data={"prompt": "a"}, files=sent or {"x": b"a"})
        told = error_of(answer, answer.status_code)
        assert answer.status_code in (415, 422) and told["type"] == "invalid_request_error"
        if files:
            assert told["param"] == param


def test_a_form_with_endless_fields_or_a_large_field_is_refused() -> None:
    with asking() as client:
        many = {f"f{number}": "a" for number in range(100)}
        large = {"prompt": "a" * (2 << 20)}
        for data in (many, large):
            answer = client.post("/v1/images/edits", data=data, files={"image": file(square())})
            assert error_of(answer, 400)["code"] == "invalid_request"


def test_models_are_listed_and_found(client: openai.OpenAI) -> None:
    assert [model.id for model in client.models.list()] == ["fake/squares"]
    assert client.models.retrieve("fake/squares").owned_by == "fewstep"
    with pytest.raises(openai.NotFoundError, match="not here"):
        client.models.retrieve("dall-e-3")


def test_the_clients_errors_are_those_of_its_kind(
    client: openai.OpenAI, worker: FakeWorker, address: str
) -> None:
    with pytest.raises(openai.NotFoundError, match="model"):
        client.images.generate(prompt="a", model="dall-e-3")
    with pytest.raises(openai.UnprocessableEntityError, match="size"):
        client.images.generate(prompt="a", size="512X512")  # type: ignore[call-overload]
    with openai.OpenAI(base_url=f"{address}/v1", api_key="wrong-wrong") as other:
        with pytest.raises(openai.AuthenticationError) as refused:
            other.images.generate(prompt="a")
        assert refused.value.body["type"] == "authentication_error"  # type: ignore[index]
    worker.is_full = True
    with pytest.raises(openai.RateLimitError) as full:
        client.images.generate(prompt="a")
    assert full.value.response.headers["retry-after"] == "3"
    assert full.value.code == "queue_full"


@pytest.mark.parametrize(
    ("fields", "param"),
    [
        ({"n": 0}, "n"),
        ({"n": 11}, "n"),
        ({"n": "2"}, "n"),
        ({"size": "513x512"}, "width"),
        ({"size": "100000x8"}, "size"),
        ({"size": "99999x64"}, "width"),
        ({"seed": -1}, "seed"),
        ({"seed": 2**64}, "seed"),
        ({"seed": 1.5}, "seed"),
        ({"seed": True}, "seed"),
        ({"steps": 0}, "steps"),
        ({"steps": "4"}, "steps"),
        ({"guidance_scale": -5}, "guidance_scale"),
        ({"guidance_scale": 1e30}, "guidance_scale"),
        ({"prompt": "a\0b"}, "prompt"),
        ({"prompt": "a" * 9000}, "prompt"),
        ({"prompt": ""}, "prompt"),
        ({"prompt": None}, "prompt"),
        ({"background": "transparent"}, "background"),
        ({"output_compression": 50}, "output_compression"),
        ({"partial_images": 4}, "partial_images"),
        ({"partial_images": 2}, "partial_images"),
        ({"stream": True, "n": 2}, "n"),
        ({"stream": True, "response_format": "url"}, "response_format"),
        ({"style": "vivid"}, "style"),
    ],
)
def test_fields_out_of_range_are_named(fields: dict[str, Any], param: str) -> None:
    with asking() as client:
        answer = client.post("/v1/images/generations", json={"prompt": "a", **fields})
        told = error_of(answer, 422)
        assert told["code"] == "invalid_request" and told["param"] in (param, "size", "width")


def test_a_mistyped_field_is_asked_after() -> None:
    with asking() as client:
        answer = client.post("/v1/images/generations", json={"prompt": "a", "guidence_scale": 2})
        told = error_of(answer, 422)
        assert told["hint"] == "did you mean 'guidance_scale'?"
        assert told["message"] == f"there is no field 'guidence_scale'; {told['hint']}"


def test_the_message_holds_the_hint_since_clients_print_it_alone(client: openai.OpenAI) -> None:
    with pytest.raises(openai.NotFoundError, match=f"not here; there is {FACTS.id}"):
        client.images.generate(prompt="a", model="dall-e-3")


def raw_post(address: str, body: bytes) -> socket.socket:
    """A connection that sent a request and has not read."""
    host, _, port = address.removeprefix("http://").partition(":")
    connection = socket.create_connection((host, int(port)))
    head = (
        f"POST /v1/images/generations HTTP/1.1\r\nHost: {host}\r\nAuthorization: Bearer {KEY}\r\n"
        f"Content-Type: application/json\r\nContent-Length: {len(body)}\r\n\r\n"
    )
    connection.sendall(head.encode() + body)
    return connection


@pytest.mark.parametrize("more", [b"", b', "stream": true', b', "n": 3'])
def test_a_client_that_leaves_gives_its_pictures_up(
    address: str, worker: FakeWorker, more: bytes
) -> None:
    worker.delay, worker.is_full = 0.05, False
    before, cancelled = len(worker.tickets), worker.cancelled
    connection = raw_post(address, b'{"prompt": "left", "steps": 40' + more + b"}")
    until(lambda: len(worker.tickets) > before)
    connection.close()
    count = 3 if b"n" in more and b"stream" not in more else 1
    until(lambda: worker.cancelled == cancelled + count, 2)


def test_the_answers_base64_is_of_the_whole_file(client: openai.OpenAI) -> None:
    text = client.images.generate(prompt="a").data[0].b64_json
    assert base64.b64decode(text).endswith(b"IEND\xaeB`\x82")
