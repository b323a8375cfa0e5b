"""Pictures of strangers: what is read, what is refused, and what ours say of themselves."""

from __future__ import annotations

import base64
import io
import json
import resource
import socket
import struct
import threading
import time
import zlib
from pathlib import Path
from typing import Any

import numpy as np
import PIL.Image
import pytest
from server.asked import file, square

from fewstep import metadata
from fewstep.cli.record import read_record
from fewstep.errors import RequestError
from fewstep.server import fetching, pictures
from fewstep.server.a1111_fields import loras_of
from fewstep.server.orders import Limits, ServerError

LIMITS = Limits(decoded_pixels=64 * 1024)


def refused(data: bytes, limits: Limits = LIMITS) -> ServerError:
    with pytest.raises(ServerError) as found:
        pictures.decode(data, "image", limits)
    assert found.value.param == "image"
    return found.value


def png_of(width: int, height: int, *chunks: tuple[bytes, bytes]) -> bytes:
    """The head of a PNG of any size, and some chunks."""
    head = struct.pack(">IIBBBBB", width, height, 8, 2, 0, 0, 0)
    parts = [(b"IHDR", head), *chunks, (b"IEND", b"")]
    return b"\x89PNG\r\n\x1a\n" + b"".join(
        struct.pack(">I", len(data)) + kind + data + struct.pack(">I", zlib.crc32(kind + data))
        for kind, data in parts
    )


@pytest.mark.parametrize("size", [(50_000, 50_000), (300, 300), (2**31 - 1, 1)])
def test_a_picture_of_many_pixels_is_refused_before_they_are_decoded(size: tuple[int, int]) -> None:
    data = png_of(*size, (b"IDAT", zlib.compress(b"\0" * 1000)))
    before = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
    began = time.perf_counter()
    assert refused(data).code == "too_large"
    assert time.perf_counter() - began < 0.2
    assert resource.getrusage(resource.RUSAGE_SELF).ru_maxrss - before < 50 << 10  # kB


def webp_head(width: int, height: int) -> bytes:
    sides = (width - 1).to_bytes(3, "little") + (height - 1).to_bytes(3, "little")
    body = b"WEBPVP8X" + (10).to_bytes(4, "little") + b"\0\0\0\0" + sides
    return b"RIFF" + len(body).to_bytes(4, "little") + body + b"\0" * 8


def test_a_webp_of_many_pixels_is_refused_by_its_head() -> None:
    assert refused(webp_head(16_000, 16_000)).code == "too_large"


@pytest.mark.parametrize("options", [{"lossless": True}, {"quality": 50}, {"exif": b"Exif\0\0MM"}])
def test_the_size_of_a_webp_is_read_from_each_kind_of_head(options: dict[str, Any]) -> None:
    data = file(PIL.Image.new("RGB", (33, 77)), "WEBP", **options)
    assert pictures.webp_size(data) == (33, 77)


@pytest.mark.parametrize("format", ["GIF", "BMP", "TIFF", "ICO", "PPM"])
def test_other_formats_are_refused_whatever_their_name(format: str) -> None:
    assert refused(file(square(), format)).code == "unsupported_media"


@pytest.mark.parametrize(
    "data",
    [
        b"<svg xmlns='http://www.w3.org/2000/svg'/>",
        b"<html>",
        b"%PDF-1.4",
        b"%!PS-Adobe-3.0 EPSF-3.0",
        b"SIMPLE  =                    T",
        b"\x89PNG\r\n\x1a\n",
        png_of(8, 8),
        b"\0" * 100,
    ],
)
def test_what_is_no_picture_is_refused_without_a_word_of_pillow(data: bytes) -> None:
    error = refused(data)
    assert error.code == "unsupported_media"
    assert str(error) == "image cannot be read as a picture"


def test_an_empty_file_and_broken_ones_are_refused() -> None:
    assert refused(b"").code == "invalid_request"
    whole = file(PIL.Image.effect_noise((64, 64), 50).convert("RGB"), "JPEG")
    for length in (10, 200, len(whole) // 2):
        assert refused(whole[:length]).code == "unsupported_media"


def test_animations_are_refused() -> None:
    frames = [square("red"), square("blue")]
    for format in ("PNG", "WEBP"):
        data = file(frames[0], format, save_all=True, append_images=frames[1:], duration=10)
        assert "animated" in str(refused(data))


def test_a_photo_with_others_beside_it_is_no_animation() -> None:
    data = file(square("red"), "MPO", save_all=True, append_images=[square("blue")])
    red, green, blue = pictures.decode_rgb(data, "image", LIMITS).getpixel((9, 9))
    assert red > 200 and green < 50 and blue < 50


def test_texts_that_grow_large_are_refused() -> None:
    pixels = (b"IDAT", zlib.compress(b"\0" * 25 * 8))
    for size, is_read in ((1000, True), (9 << 20, False)):
        chunk = (b"zTXt", b"parameters\0\0" + zlib.compress(b"a" * size, 9))
        data = png_of(8, 8, chunk, pixels)
        if is_read:
            assert pictures.decode(data, "image", LIMITS).size == (8, 8)
        else:
            assert refused(data).code == "unsupported_media"


def test_deep_grey_keeps_its_levels() -> None:
    levels = np.linspace(0, 65535, 64, dtype=np.uint16).reshape(8, 8)
    data = file(PIL.Image.fromarray(levels))
    read = np.asarray(pictures.decode(data, "image", LIMITS))
    assert read.dtype == np.uint8
    assert np.abs(read.astype(float) - levels / 257).max() <= 1


def test_cmyk_palettes_and_two_levels_are_converted() -> None:
    red = square("red")
    cmyk = pictures.decode(file(red.convert("CMYK"), "JPEG", quality=100), "image", LIMITS)
    assert cmyk.mode == "RGB" and cmyk.getpixel((9, 9))[0] > 200
    assert pictures.decode(file(red.convert("P")), "image", LIMITS).getpixel((9, 9))[0] > 250
    assert pictures.decode(file(red.convert("1")), "image", LIMITS).mode == "L"


def test_alpha_is_kept_for_masks_and_lies_on_white_otherwise() -> None:
    clear = PIL.Image.new("RGBA", (8, 8), (255, 0, 0, 0))
    assert pictures.decode(file(clear), "image", LIMITS).mode == "RGBA"
    assert pictures.decode_rgb(file(clear), "image", LIMITS).getpixel((0, 0)) == (255, 255, 255)
    grey = PIL.Image.new("LA", (8, 8), (100, 255))
    assert pictures.decode_rgb(file(grey), "image", LIMITS).getpixel((0, 0)) == (100, 100, 100)
    palette = file(square("red").convert("P"), transparency=0)
    assert pictures.decode(palette, "image", LIMITS).mode == "RGBA"


def test_a_picture_that_lies_on_its_side_is_put_upright() -> None:
    exif = PIL.Image.Exif()
    exif[0x0112] = 6
    data = file(PIL.Image.new("RGB", (40, 20), "red"), "JPEG", exif=exif.tobytes())
    assert pictures.decode(data, "image", LIMITS).size == (20, 40)


@pytest.mark.parametrize("size", [(1, 1), (1, 4000), (4000, 1)])
def test_tiny_and_narrow_pictures_are_read(size: tuple[int, int]) -> None:
    assert pictures.decode(file(PIL.Image.new("RGB", size)), "image", LIMITS).size == size


def test_base64_and_data_urls_are_unpacked_and_other_texts_refused() -> None:
    text = base64.b64encode(b"abcd").decode()
    assert pictures.unpack(text, "image") == b"abcd"
    assert pictures.unpack(f"data:image/png;base64,{text[:4]}\n{text[4:]}", "image") == b"abcd"
    for wrong in ("a", "äöü=", "data:image/png,abc", "ab-_", "\x00"):
        with pytest.raises(ServerError) as found:
            pictures.unpack(wrong, "image")
        assert found.value.param == "image"


# ── ours ──

RECORD = {
    "prompt": 'a "cat",\n<b>Äpfel</b> 🍎\nSteps: 9, Seed: 1',
    "negative_prompt": "dogs",
    "steps": 4,
    "seed": 2**64 - 1,
    "guidance_scale": 4.5,
    "width": 64,
    "height": 64,
    "model": "fake/squares",
    "scheduler": "LCMScheduler",
    "versions": {"fewstep": "0.1"},
}


@pytest.mark.parametrize("format", ["png", "jpeg", "webp"])
def test_a_file_of_ours_holds_its_record_and_the_web_uis_words(format: Any) -> None:
    data = pictures.encode(square(), format, RECORD)
    with PIL.Image.open(io.BytesIO(data)) as picture:
        assert picture.format == format.upper()
        assert json.loads(metadata.stored_json(picture) or "") == RECORD
        told = metadata.stored_parameters(picture)
    assert told == pictures.infotext(RECORD)
    read = metadata.parsed_parameters(told)
    assert read["Prompt"] == RECORD["prompt"] and read["Negative prompt"] == "dogs"
    assert (read["Steps"], read["Seed"], read["Sampler"]) == ("4", str(2**64 - 1), "LCM")


def test_loras_stand_behind_the_prompt_in_the_web_uis_words() -> None:
    loras = [{"name": "ink", "weight": 0.8}, {"name": "a/b", "weight": -1e-5}]
    tags = "<lora:ink:0.8> <lora:a/b:-0.00001>"
    read = metadata.parsed_parameters(pictures.infotext({**RECORD, "loras": loras}))
    assert read["Prompt"] == f"{RECORD['prompt']} {tags}" and read["Steps"] == "4"
    assert loras_of(tags) == ("", [("ink", 0.8), ("a/b", -1e-5)])
    assert pictures.infotext({**RECORD, "prompt": "", "loras": loras}).startswith(tags)


def test_a_jpeg_of_a_prompt_that_it_has_no_room_for_is_drawn_without_it() -> None:
    record = {**RECORD, "prompt": "🍎" * 8000}
    with PIL.Image.open(io.BytesIO(pictures.encode(square(), "jpeg", record))) as picture:
        assert metadata.stored_json(picture) is None
    with PIL.Image.open(io.BytesIO(pictures.encode(square(), "webp", record))) as picture:
        assert json.loads(metadata.stored_json(picture) or "") == record


def test_repro_says_what_can_be_done_with_a_picture_of_an_older_server(tmp_path: Path) -> None:
    (tmp_path / "a.png").write_bytes(pictures.encode(square(), "png", {**RECORD, "pipeline": "x"}))
    with pytest.raises(RequestError, match="drawn by fewstep serve"):
        read_record(tmp_path / "a.png")


def test_a_file_without_a_record_holds_none() -> None:
    with PIL.Image.open(io.BytesIO(pictures.encode(square()))) as picture:
        assert metadata.stored_json(picture) is None
        assert metadata.stored_parameters(picture) is None


def test_settings_of_other_programs_are_read_in_linear_time() -> None:
    text = 'a fox\nNegative prompt: bad\nSteps: 20, Sampler: Euler a, Hashes: "a, b: c", Size: 8x8'
    read = metadata.parsed_parameters(text)
    assert read["Prompt"] == "a fox" and read["Hashes"] == '"a, b: c"' and read["Size"] == "8x8"
    assert metadata.parsed_parameters("only words")["Prompt"] == "only words"
    began = time.perf_counter()
    metadata.parsed_parameters("a: " * 50_000 + '"' * 50_000)
    assert time.perf_counter() - began < 2


# ── addresses ──


@pytest.mark.parametrize(
    "url",
    [
        "file:///etc/passwd",
        "gopher://example.com/",
        "http://127.0.0.1/a.png",
        "http://169.254.169.254/latest/meta-data",
        "http://[::1]/",
        "http://[::ffff:127.0.0.1]/",
        "http://[64:ff9b::7f00:1]/",
        "http://10.0.0.1/",
        "http://0x7f.1/",
        "http://2130706433/",
        "http://127.1/",
        "http://0/",
        "http://localhost/",
        "http://good.example@127.0.0.1/",
        "http://good.example\\@127.0.0.1/",
        "http://example.com:22/",
        "http://example.com\r\nX: y/",
        "http:///a",
        "http://[/",
    ],
)
def test_addresses_that_are_not_public_are_refused_without_a_connection(
    url: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    def never(*_: Any, **__: Any) -> None:
        raise AssertionError("connected")

    monkeypatch.setattr(socket, "create_connection", never)
    with pytest.raises(ServerError) as found:
        fetching.fetch(url, "image", 1000)
    assert (found.value.code, found.value.param) == ("url_not_allowed", "image")


def test_a_name_with_one_private_address_among_public_ones_is_refused() -> None:
    assert fetching.all_public(["93.184.216.34", "2606:2800:220:1::1"])
    assert not fetching.all_public(["93.184.216.34", "192.168.0.1"])
    assert not fetching.all_public(["2002:7f00:1::"])
    for address in ("ff02::1", "::7f00:1", "fec0::1"):
        assert not fetching.all_public([address])


@pytest.fixture
def answering(monkeypatch: pytest.MonkeyPatch) -> Any:
    """Lets example.com be a socket here that answers anything slowly or not; counts connections."""
    listener = socket.create_server(("127.0.0.1", 0))
    made: list[tuple[str, int]] = []

    def lookup(host: str, port: int, **_: Any) -> Any:
        return [(0, 0, 0, "", ("93.184.216.34", port))]

    def connect(address: tuple[str, int], timeout: float) -> socket.socket:
        made.append(address)
        found = socket.socket()
        found.settimeout(timeout)
        found.connect(listener.getsockname())
        return found

    monkeypatch.setattr(socket, "getaddrinfo", lookup)
    monkeypatch.setattr(socket, "create_connection", connect)

    def start(parts: list[bytes], pause: float = 0.0) -> list[tuple[str, int]]:
        def serve() -> None:
            connection, _ = listener.accept()
            with connection:
                connection.recv(4096)
                try:
                    for part in parts:
                        connection.sendall(part)
                        time.sleep(pause)
                except OSError:
                    pass

        threading.Thread(target=serve, daemon=True).start()
        return made

    yield start
    listener.close()


HEAD = b"HTTP/1.1 200 OK\r\nContent-Length: 4\r\n\r\n"


def test_a_public_picture_is_fetched_from_the_address_that_was_checked(answering: Any) -> None:
    made = answering([HEAD + b"abcd"])
    assert fetching.fetch("http://example.com/a.png?x=1", "image", 1000) == b"abcd"
    assert made == [("93.184.216.34", 80)]


def test_redirects_are_not_followed(answering: Any) -> None:
    answering([b"HTTP/1.1 302 Found\r\nLocation: http://127.0.0.1/\r\nContent-Length: 0\r\n\r\n"])
    with pytest.raises(ServerError, match="status 302"):
        fetching.fetch("http://example.com/", "image", 1000)


def test_a_large_answer_is_cut_off(answering: Any) -> None:
    answering([b"HTTP/1.1 200 OK\r\n\r\n" + b"a" * 5000])
    with pytest.raises(ServerError) as found:
        fetching.fetch("http://example.com/", "image", 1000)
    assert found.value.code == "too_large"


@pytest.mark.parametrize("head", [b"HTTP/1.1 200 OK\r\n\r\n", b"HTTP/1.1 200 OK\r\nX: "])
def test_an_answer_that_comes_drop_by_drop_is_cut_off(answering: Any, head: bytes) -> None:
    answering([head] + [b"a"] * 100, pause=0.05)
    began = time.perf_counter()
    with pytest.raises(ServerError) as found:
        fetching.fetch("http://example.com/", "image", 1000, seconds=0.3)
    assert found.value.code == "url_not_allowed"
    assert time.perf_counter() - began < 2
