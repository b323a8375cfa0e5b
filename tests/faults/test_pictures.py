"""Cases 7 and 8: pictures that are bombs, broken, odd or something else."""

from __future__ import annotations

import base64
import struct
import time
import zlib
from collections.abc import Iterator
from typing import Any

import httpx
import numpy as np
import PIL.Image
import pytest
from faults.wires import MEBI, drawn, resident
from server.asked import Served, asking, error_of, file, packed, square, unpacked
from starlette.testclient import TestClient

PIXELS = (b"IDAT", zlib.compress(b"\0" * 25 * 8))


def png(width: int, height: int, *chunks: tuple[bytes, bytes]) -> bytes:
    """A PNG of a size with some chunks."""
    about = struct.pack(">IIBBBBB", width, height, 8, 2, 0, 0, 0)
    return b"\x89PNG\r\n\x1a\n" + b"".join(
        struct.pack(">I", len(data)) + kind + data + struct.pack(">I", zlib.crc32(kind + data))
        for kind, data in ((b"IHDR", about), *chunks, (b"IEND", b""))
    )


def gif(frames: int) -> bytes:
    """A GIF of many frames of one pixel."""
    screen = b"GIF89a" + struct.pack("<HHBBB", 1, 1, 0x80, 0, 0) + b"\0\0\0\xff\xff\xff"
    one = b"\x2c" + struct.pack("<HHHHB", 0, 0, 1, 1, 0) + b"\x02\x02\x44\x01\0"
    return screen + one * frames + b"\x3b"


def bomb() -> bytes:
    """64 MB of zeros in 64 kB."""
    return zlib.compress(b"\0" * (64 * MEBI), 9)


BOMBS = {
    "50 000 x 50 000": lambda: png(50_000, 50_000, (b"IDAT", zlib.compress(b"\0" * 1000))),
    "APNG of 10 000 frames": lambda: png(8, 8, (b"acTL", struct.pack(">II", 10_000, 0)), PIXELS),
    "GIF of 10 000 frames": lambda: gif(10_000),
    "zTXt": lambda: png(8, 8, (b"zTXt", b"parameters\0\0" + bomb()), PIXELS),
    "iTXt": lambda: png(8, 8, (b"iTXt", b"a\0\1\0\0\0" + bomb()), PIXELS),
    "iCCP": lambda: png(8, 8, (b"iCCP", b"icc\0\0" + bomb()), PIXELS),
    "IDAT": lambda: png(8, 8, (b"IDAT", bomb()), (b"IDAT", b"")),
    "FITS": lambda: b"SIMPLE  =                    T / conforms".ljust(2880),
    "EPS": lambda: b"%!PS-Adobe-3.0 EPSF-3.0\n%%BoundingBox: 0 0 99999 99999\n",
    "PDF": lambda: b"%PDF-1.7\n1 0 obj <<>> endobj",
    "SVG": lambda: b"<svg xmlns='http://www.w3.org/2000/svg'><script>alert(1)</script></svg>",
    "HTML": lambda: b"<!doctype html><script>alert(1)</script>",
}
TAKEN = ("IDAT",)  # the pixels that a header promises are read, and no more


@pytest.fixture(scope="module")
def client() -> Iterator[TestClient]:
    with asking() as found:
        yield found


@pytest.mark.parametrize("name", BOMBS)
def test_a_bomb_that_is_named_a_png_is_refused_quickly_and_takes_no_memory(
    client: TestClient, name: str
) -> None:
    """Case 7: as an upload, and in base64."""
    data = BOMBS[name]()
    text = base64.b64encode(data).decode()
    before, begin = resident(), time.perf_counter()
    upload = {"image": ("a.png", data, "image/png")}
    form = client.post("/v1/images/edits", data={"prompt": "a"}, files=upload)
    told = client.post("/v1/generate", json={"prompt": "a", "image": text})
    assert time.perf_counter() - begin < 5 * 0.2 * 2
    assert resident() - before < 100 * MEBI
    for answer in (form, told):
        if name in TAKEN and answer.status_code == 200:
            continue
        assert error_of(answer, answer.status_code)["param"] == "image"
        assert answer.status_code in (413, 415)


# ── odd ones ──


def scene(width: int = 64, height: int = 64) -> PIL.Image.Image:
    """A picture of soft colours, with no symmetry."""
    numbers = np.random.default_rng(1).integers(0, 255, (4, 4, 3), dtype=np.uint8)
    large = PIL.Image.fromarray(numbers).resize((64, 64), PIL.Image.Resampling.BICUBIC)
    return large.resize((width, height))


def deep() -> PIL.Image.Image:
    """16 bits of grey."""
    return PIL.Image.fromarray(np.linspace(0, 65535, 64 * 64, dtype=np.uint16).reshape(64, 64))


def clear() -> PIL.Image.Image:
    """Half of it is transparent."""
    picture = scene().convert("RGBA")
    picture.paste((0, 0, 0, 0), (0, 0, 32, 64))
    return picture


ODD: dict[str, bytes] = {
    "1 x 1": file(scene(1, 1)),
    "1 x 8192": file(scene(1, 8192)),
    "8192 x 1": file(scene(8192, 1)),
    "16 bits": file(deep()),
    "CMYK": file(scene().convert("CMYK"), "JPEG"),
    "palette": file(scene().convert("P")),
    "palette with alpha": file(scene().convert("P"), transparency=0),
    "LA": file(clear().convert("LA")),
    "RGBA": file(clear()),
    "1 bit": file(scene().convert("1")),
    "WebP with alpha": file(clear(), "WEBP"),
    "on its side": file(
        scene(),
        "JPEG",
        exif=b"Exif\0\0MM\0*\0\0\0\x08\0\x01\x01\x12\0\x03\0\0\0\x01\0\x06\0\0\0\0\0\0",
    ),
}


def text_of(data: bytes) -> str:
    """Bytes as base64."""
    return base64.b64encode(data).decode()


@pytest.mark.parametrize("name", ODD)
def test_an_odd_picture_is_drawn_from(real: Served, name: str) -> None:
    """Case 8: by the pipeline too, whatever the mode and the shape."""
    data = ODD[name]
    for more in ({}, {"mask": text_of(data), "strength": 0.6}, {"steps": 1, "strength": 1e-9}):
        drawing, record = drawn(real, prompt="a cat", image=text_of(data), seed=1, **more)
        assert unpacked(text_of(drawing)).size == (record["width"], record["height"])
    steered, _ = drawn(real, prompt="a cat", control=text_of(data), seed=1, steps=1)
    assert steered


@pytest.mark.parametrize("name", ["1 x 1", "1 x 8192", "LA", "16 bits", "RGBA"])
def test_an_odd_picture_is_edited_by_openais_interface_or_refused_by_name(
    real: Served, name: str
) -> None:
    """Case 8."""
    for files in ({"image": ODD[name]}, {"image": file(scene()), "mask": ODD[name]}):
        answer = httpx.post(
            f"{real.address}/v1/images/edits", data={"prompt": "a"}, files=files, timeout=30
        )
        if answer.status_code != 200:
            assert error_of(answer, 422)["param"] in ("image", "mask")


BROKEN: dict[str, bytes] = {
    "cut JPEG": file(scene(), "JPEG")[:300],
    "cut PNG": file(scene())[:300],
    "cut WebP": file(scene(), "WEBP")[:100],
    "nothing": b"",
    "a head": b"\x89PNG\r\n\x1a\n",
}


@pytest.mark.parametrize("name", BROKEN)
@pytest.mark.parametrize("field", ["image", "mask", "control"])
def test_a_broken_picture_is_refused_by_the_name_of_its_field(
    client: TestClient, name: str, field: str
) -> None:
    """Case 8."""
    fields = {"prompt": "a", "image": packed(square()), field: text_of(BROKEN[name])}
    answer = client.post("/v1/generate", json=fields)
    assert error_of(answer, answer.status_code)["param"] == field
    assert answer.status_code in (415, 422)


def test_a_mask_of_another_size_is_refused_by_name(real: Served) -> None:
    """Case 8."""
    fields = {"prompt": "a", "image": packed(scene()), "mask": packed(scene(32, 64))}
    answer = httpx.post(f"{real.address}/v1/generate", json=fields)
    assert error_of(answer, 422)["param"] == "mask"


def pixels(data: bytes) -> Any:
    return np.asarray(unpacked(text_of(data)).convert("RGB"), dtype=np.int16)


def test_a_black_mask_changes_nothing_and_a_white_one_everything(real: Served) -> None:
    """Case 8."""
    image = scene()
    fields = {"prompt": "a cat", "seed": 1, "image": packed(image)}
    for colour, share in (("black", 0.0), ("white", 0.9)):
        mask = packed(square(colour, mode="L"))
        made, _ = drawn(real, **fields, mask=mask)
        changed = (pixels(made) != np.asarray(image, dtype=np.int16)).any(axis=2)
        assert changed.mean() >= share
        assert colour == "white" or not changed.any()


def test_a_picture_on_its_side_is_drawn_from_as_if_it_were_upright(real: Served) -> None:
    """Case 8: EXIF is honoured."""
    upright = unpacked(text_of(ODD["on its side"])).transpose(PIL.Image.Transpose.ROTATE_270)
    fields = {"prompt": "a cat", "seed": 1, "strength": 0.4}
    sideways, _ = drawn(real, **fields, image=text_of(ODD["on its side"]))
    expected, _ = drawn(real, **fields, image=packed(upright))
    unturned, _ = drawn(real, **fields, image=packed(unpacked(text_of(ODD["on its side"]))))
    assert np.abs(pixels(sideways) - pixels(expected)).max() <= 1
    assert np.abs(pixels(sideways) - pixels(unturned)).max() > 20
