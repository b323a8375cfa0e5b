"""The studio in a real browser: what a person sees and does, against a live server."""

from __future__ import annotations

import base64
import json
import shutil
import subprocess
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any
from urllib.parse import urlsplit

import numpy as np
import PIL.Image
import PIL.ImageDraw
import pytest
from PIL.PngImagePlugin import PngInfo
from server.asked import file, listening, square, until
from server.fake import colour
from server.painter import Painter

from fewstep import metadata
from fewstep.annotate import canny
from fewstep.server.orders import Limits, ServerError
from fewstep.server.settings import Settings

playwright = pytest.importorskip("playwright.sync_api", reason="playwright is not installed")
CHROMIUM = shutil.which("chromium") or shutil.which("chromium-browser")
pytestmark = [
    pytest.mark.browser,
    pytest.mark.skipif(CHROMIUM is None, reason="chromium is not installed"),
]
Page = Any
Opened = Callable[..., Page]
RECORD = {
    "prompt": 'a <b>"fox"</b>, ünïcödé 🦊\nsecond line',
    "negative_prompt": "blur",
    "seed": 2**63 + 1,
    "steps": 3,
    "guidance_scale": 5.5,
    "width": 64,
    "height": 128,
    "strength": None,
}


@pytest.fixture(scope="module")
def browser() -> Iterator[Any]:
    with playwright.sync_playwright() as runner:
        found = runner.chromium.launch(executable_path=CHROMIUM, args=["--no-sandbox"])
        yield found
        found.close()


@pytest.fixture(scope="module")
def worker() -> Painter:
    return Painter()


@pytest.fixture(scope="module")
def address(worker: Painter) -> Iterator[str]:
    with listening(worker) as found:
        yield found


@pytest.fixture
def painter(worker: Painter) -> Painter:
    """The module's worker as it was at the start."""
    worker.begin_anew()
    return worker


@pytest.fixture
def opened(browser: Any, address: str, painter: Painter) -> Iterator[Opened]:
    """Opens pages of the studio that are ready; none may complain or ask another host."""
    contexts: list[Any] = []
    complaints: list[str] = []
    hosts: set[str] = set()

    def watch(page: Page) -> None:
        page.on("console", lambda m: m.type in ("error", "warning") and complaints.append(m.text))
        page.on("pageerror", lambda error: complaints.append(str(error)))
        page.on("request", lambda request: hosts.add(urlsplit(request.url).hostname or ""))
        page.on("websocket", lambda socket: hosts.add(urlsplit(socket.url).hostname or ""))

    def call(context: Any = None, *, at: str = address, **options: Any) -> Page:
        if context is None:
            context = browser.new_context(**{"viewport": {"width": 1200, "height": 900}, **options})
            contexts.append(context)
        page = context.new_page()
        page.set_default_timeout(8000)
        watch(page)
        page.goto(at)
        page.wait_for_selector("#steps[max]")
        return page

    yield call
    for context in contexts:
        context.close()
    assert complaints == []
    assert hosts <= {"127.0.0.1", ""}  # blobs have none


# ── what a person does ──


def write(page: Page, prompt: str) -> None:
    page.fill("#prompt", prompt)


def choose(page: Page, mode: str) -> None:
    page.check(f"input[name=mode][value={mode}]", force=True)


def stroke(page: Page, start: tuple[float, float], end: tuple[float, float]) -> None:
    """Paint from one place of the canvas to another, in parts of its sides."""
    box = page.locator("#board").bounding_box()
    points = [(box["x"] + x * box["width"], box["y"] + y * box["height"]) for x, y in (start, end)]
    page.mouse.move(*points[0])
    page.mouse.down()
    page.mouse.move(*points[1], steps=5)
    page.mouse.up()


def drop(page: Page, data: bytes, place: str, name: str = "picture.png") -> None:
    """Let a file fall on a place of the page."""
    page.evaluate(
        """([data, place, name]) => {
            const bytes = Uint8Array.from(atob(data), (c) => c.charCodeAt(0));
            const transfer = new DataTransfer();
            transfer.items.add(new File([bytes], name, { type: "image/png" }));
            const options = { dataTransfer: transfer, bubbles: true, cancelable: true };
            document.querySelector(place).dispatchEvent(new DragEvent("drop", options));
        }""",
        [base64.b64encode(data).decode(), place, name],
    )


# ── what a person sees ──

PIXEL = """([x, y]) => {
    const image = document.getElementById("picture");
    if (image.hidden || !image.naturalWidth) return null;
    const canvas = Object.assign(document.createElement("canvas"),
        { width: image.naturalWidth, height: image.naturalHeight });
    const layer = canvas.getContext("2d");
    layer.drawImage(image, 0, 0);
    return [...layer.getImageData(x * canvas.width, y * canvas.height, 1, 1).data].slice(0, 3);
}"""


def pixel(page: Page, x: float = 0.5, y: float = 0.5) -> list[int] | None:
    """The colour of a place of the picture, if there is one."""
    found = page.evaluate(PIXEL, [x, y])
    assert found is None or isinstance(found, list)
    return found


def is_near(one: Any, other: Any, most: int = 14) -> bool:
    return one is not None and all(abs(a - b) <= most for a, b in zip(one, other, strict=True))


def wait_for_colour(
    page: Page, wanted: Any, x: float = 0.5, y: float = 0.5, seconds: float = 8
) -> None:
    """Wait until a place of the picture has a colour."""
    for _ in range(int(seconds * 20)):
        if is_near(pixel(page, x, y), wanted):
            return
        page.wait_for_timeout(50)
    raise AssertionError(f"{pixel(page, x, y)} is not {tuple(wanted)}")


def value(page: Page, name: str) -> str:
    return str(page.input_value(f"#{name}"))


def status(page: Page, text: str) -> None:
    playwright.expect(page.locator("#status")).to_contain_text(text)


def with_record(record: dict[str, Any]) -> bytes:
    """A picture as this project writes it."""
    return file(square("teal"), **metadata.kept(record, "", ".png"))


# ── typing ──


def test_typing_shows_a_picture_that_follows_the_words(opened: Opened) -> None:
    page = opened()
    page.locator("#prompt").press_sequentially("a red apple", delay=5)
    wait_for_colour(page, colour("a red apple"))
    write(page, "a rocket")
    wait_for_colour(page, colour("a rocket"))
    assert page.get_attribute("#picture", "alt") == "a rocket"


def test_a_picture_comes_in_one_step_and_is_refined_when_one_pauses(
    opened: Opened, painter: Painter
) -> None:
    page = opened()
    write(page, "a boat")
    page.wait_for_selector("#about:has-text('4 steps')")
    assert (painter.orders[0].steps, painter.orders[-1].steps) == (1, 4)
    page.locator("#quick").evaluate("one => { one.value = 2 }")
    painter.orders.clear()
    write(page, "a ship")
    page.wait_for_selector("#picture[alt='a ship']")
    page.wait_for_selector("#about:has-text('4 steps')")
    assert painter.orders[0].steps == 2


def is_busy(page: Page) -> bool:
    return page.get_attribute("#frame", "aria-busy") == "true"


def test_a_picture_that_takes_long_is_told_to_be_under_way(
    opened: Opened, painter: Painter
) -> None:
    page = opened()
    page.uncheck("#live")
    write(page, "a snail")
    painter.delay = 0.2
    page.click("#draw")
    assert not is_busy(page)
    page.wait_for_selector("#frame[aria-busy=true]")
    status(page, "Drawing …")
    page.wait_for_selector("#about:has-text('4 steps')")
    page.wait_for_selector("#frame:not([aria-busy])")
    status(page, "Drawn: a snail")


def test_a_quick_picture_never_shows_that_it_is_under_way(opened: Opened) -> None:
    page = opened()
    page.evaluate(
        """() => new MutationObserver(() => (window.wasBusy = true))
            .observe(document.getElementById("frame"), { attributeFilter: ["aria-busy"] })"""
    )
    write(page, "a hare")
    page.wait_for_selector("#shelf img")
    page.wait_for_timeout(400)
    assert page.evaluate("window.wasBusy") is None


def test_nothing_is_under_way_after_an_error_or_where_nothing_is_awaited(
    opened: Opened, painter: Painter, monkeypatch: pytest.MonkeyPatch
) -> None:
    page = opened()
    drawn(page, "a snail")
    page.uncheck("#live")
    painter.delay = 0.4
    page.click("#draw")
    page.wait_for_selector("#frame[aria-busy=true]")
    page.click("#shelf button")  # an earlier one is shown in its place
    status(page, "Settings restored.")
    assert not is_busy(page)
    monkeypatch.setattr(painter, "failure_of", ServerError("internal", "out of paint"))
    write(page, "a slug")
    page.click("#draw")
    page.wait_for_selector("#frame[aria-busy=true]")
    page.wait_for_selector("#status.wrong")
    assert not is_busy(page)


def test_the_badge_tells_what_was_measured_here_and_in_the_server(
    opened: Opened, painter: Painter
) -> None:
    page = opened()
    painter.delay = 0.05
    write(page, "a clock")
    page.wait_for_selector("#about:has-text('4 steps')")
    words = page.inner_text("#latency b").split()
    total, server = float(words[0]), float(words[4])
    assert 200 <= server <= total < 4000
    assert "waiting in line" in page.get_attribute("#latency", "title")


def test_without_live_nothing_is_drawn_until_the_button(opened: Opened, painter: Painter) -> None:
    page = opened()
    page.uncheck("#live")
    write(page, "a cat")
    page.wait_for_timeout(600)
    assert painter.orders == []
    page.click("#draw")
    wait_for_colour(page, colour("a cat"))


def test_steps_and_guidance_have_the_range_of_the_model(opened: Opened) -> None:
    page = opened()
    for name, ends in {"steps": ("1", "8", "4"), "guidance": ("1", "20", "4")}.items():
        found = (page.get_attribute(f"#{name}", "min"), page.get_attribute(f"#{name}", "max"))
        assert (*found, value(page, name)) == ends
    assert "1 to 8" in page.inner_text("#steps-range")


def test_the_seed_changes_with_each_drawing_unless_it_is_locked(opened: Opened) -> None:
    page = opened()
    write(page, "a cup")
    page.wait_for_selector("#about:has-text('4 steps')")
    before = value(page, "seed")
    page.click("#draw")
    assert value(page, "seed") != before
    page.check("#lock")
    before = value(page, "seed")
    page.click("#draw")
    assert value(page, "seed") == before


def test_lora_sliders_are_named_by_text_and_sent(opened: Opened, painter: Painter) -> None:
    page = opened()
    slider = page.get_by_label("Ink <img src=x onerror=alert(1)>")
    slider.fill("0.5")
    write(page, "a hat")
    page.wait_for_selector("#about:has-text('4 steps')")
    assert painter.orders[-1].loras == (("ink", 0.5),)
    assert page.locator("#loras img").count() == 0


# ── canvas ──


def test_the_canvas_updates_the_picture(opened: Opened, painter: Painter) -> None:
    page = opened()
    choose(page, "drawing")
    write(page, "a tree")
    half = [(255 + part) // 2 for part in colour("a tree")]
    wait_for_colour(page, half)
    page.fill("#colour", "#000000")
    page.fill("#brush", "120")
    stroke(page, (0.3, 0.5), (0.7, 0.5))
    wait_for_colour(page, [part // 2 for part in colour("a tree")])
    assert is_near(pixel(page, 0.5, 0.05), half)
    page.fill("#strength", "0.3")
    page.wait_for_selector("#strength-value:has-text('0.30')")
    until(lambda: painter.orders[-1].strength == 0.3)
    page.click("#undo")
    wait_for_colour(page, half)


def test_a_dropped_picture_is_what_is_begun_with(opened: Opened, painter: Painter) -> None:
    page = opened()
    choose(page, "drawing")
    write(page, "a sea")
    drop(page, file(square("blue")), "#board")
    wait_for_colour(page, [(a + b) // 2 for a, b in zip((0, 0, 255), colour("a sea"), strict=True)])


def test_repainting_takes_the_newest_picture_and_leaves_the_drawing_alone(
    opened: Opened, painter: Painter
) -> None:
    page = opened()
    choose(page, "drawing")
    drop(page, file(square("blue")), "#board")
    write(page, "a sea")
    page.wait_for_selector("#about:has-text('4 steps')")
    choose(page, "part")  # of what was given, not of what was made of it
    stroke(page, (0.2, 0.3), (0.2, 0.7))
    wait_for_colour(page, (0, 0, 255), 0.9, 0.5)
    choose(page, "words")
    write(page, "a hill")
    wait_for_colour(page, colour("a hill"))
    page.wait_for_selector("#about:has-text('4 steps')")
    until(lambda: painter.drawn[-1].steps == 4 and painter.drawn[-1].prompt == "a hill")
    page.wait_for_selector("#download:enabled")
    choose(page, "part")
    status(page, "on the canvas")
    stroke(page, (0.2, 0.3), (0.2, 0.7))
    until(lambda: painter.orders[-1].mask is not None)
    assert painter.orders[-1].image is not None
    assert is_near(painter.orders[-1].image.getpixel((60, 32)), colour("a hill"))
    choose(page, "drawing")
    wait_for_colour(
        page, [(a + b) // 2 for a, b in zip((0, 0, 255), colour("a hill"), strict=True)]
    )


def test_a_mask_repaints_only_its_inside(opened: Opened) -> None:
    page = opened()
    choose(page, "part")
    drop(page, file(square("lime")), "#board")
    write(page, "a door")
    page.fill("#brush", "100")
    stroke(page, (0.2, 0.3), (0.2, 0.7))
    wait_for_colour(page, colour("a door"), 0.2, 0.5)
    for x in (0.6, 0.95):
        assert is_near(pixel(page, x, 0.5), (0, 255, 0))


def test_repainting_begins_with_the_picture_that_is_shown(opened: Opened) -> None:
    page = opened()
    write(page, "a hill")
    page.wait_for_selector("#about:has-text('4 steps')")
    choose(page, "part")
    status(page, "on the canvas")
    write(page, "a well")
    stroke(page, (0.2, 0.3), (0.2, 0.7))
    wait_for_colour(page, colour("a well"), 0.2, 0.5)
    assert is_near(pixel(page, 0.9, 0.5), colour("a hill"))


def test_what_is_drawn_is_put_on_the_canvas_to_the_pixel(opened: Opened, painter: Painter) -> None:
    page = opened()
    rng = np.random.default_rng(0)
    picture = PIL.Image.fromarray(rng.integers(0, 256, (64, 64, 3), dtype=np.uint8))
    choose(page, "drawing")
    drop(page, file(picture), "#board")
    write(page, "a sea")
    page.wait_for_selector("#about:has-text('4 steps')")
    assert painter.orders[-1].image is not None
    assert painter.orders[-1].image.tobytes() == picture.tobytes()


def test_lines_and_the_edges_of_a_picture_steer(opened: Opened, painter: Painter) -> None:
    page = opened()
    choose(page, "edges")
    write(page, "a key")
    stroke(page, (0.1, 0.5), (0.9, 0.5))
    page.wait_for_selector("#about:has-text('4 steps')")
    control = painter.orders[-1].control
    assert control is not None and control.size == (64, 64)
    assert control.getpixel((32, 32)) > (100, 100, 100) > control.getpixel((32, 5))


def test_the_edges_of_a_dropped_picture_steer_at_the_models_size(
    opened: Opened, painter: Painter
) -> None:
    page = opened()
    choose(page, "edges")
    picture = square("black")
    picture.paste((255, 255, 255), (20, 20, 44, 44))
    drop(page, file(picture), "#board")
    write(page, "a box")
    page.wait_for_selector("#about:has-text('4 steps')")
    control = painter.orders[-1].control
    assert control is not None
    given, wanted = np.asarray(control), np.asarray(canny(picture, 60, 120))
    assert wanted.any()
    assert (given == wanted).mean() > 0.99


def test_edges_are_those_of_the_library(opened: Opened) -> None:
    picture = PIL.Image.new("RGB", (48, 40), (30, 90, 160))
    pen = PIL.ImageDraw.Draw(picture)
    pen.ellipse((6, 5, 40, 33), fill=(230, 200, 40))
    pen.line((0, 39, 47, 0), fill=(90, 10, 10), width=2)
    pixels = np.asarray(picture.convert("RGBA"))
    found = opened().evaluate(
        """async ([data, width, height]) => {
            const { canny } = await import("/studio/edges.js");
            return [...canny(new ImageData(Uint8ClampedArray.from(data), width, height)).data];
        }""",
        [pixels.ravel().tolist(), 48, 40],
    )
    ours = np.asarray(canny(picture, 60, 120))
    assert ours.any()
    assert (np.array(found).reshape(40, 48, 4)[:, :, :3] == ours).mean() > 0.995


# ── files ──


@pytest.mark.parametrize("packed", [False, True])
def test_a_dropped_png_of_ours_restores_its_settings(opened: Opened, packed: bool) -> None:
    page, text = opened(), PngInfo()
    text.add_itxt("fewstep", json.dumps(RECORD, ensure_ascii=False), zip=packed)
    drop(page, file(square("teal"), pnginfo=text), "body")
    status(page, "Settings restored.")
    assert value(page, "prompt") == RECORD["prompt"]
    assert (value(page, "seed"), value(page, "negative")) == (str(2**63 + 1), "blur")
    assert (value(page, "steps"), value(page, "guidance")) == ("3", "5.5")
    assert (value(page, "width"), value(page, "height")) == ("64", "128")
    assert page.is_checked("#lock")
    assert is_near(pixel(page), (0, 128, 128))


def test_a_restored_seed_is_sent_to_the_last_digit(opened: Opened, painter: Painter) -> None:
    page = opened()
    drop(page, with_record(RECORD), "body")
    status(page, "Settings restored.")
    page.click("#draw")
    wait_for_colour(page, colour(str(RECORD["prompt"])))
    assert painter.orders[-1].seed == 2**63 + 1


def test_a_file_of_the_command_restores_its_settings(opened: Opened) -> None:
    page = opened()
    picture = {"prompt": "a pear", "seed": 5, "steps": 2, "guidance_scale": 2.0, "width": 64}
    addition = {"kind": "lora", "id": "gold", "weight": 0.5, "weights": ""}
    record = {"format": 3, "pictures": [picture], "model": {"additions": [addition]}}
    drop(page, with_record(record), "body")
    status(page, "Settings restored.")
    assert (value(page, "prompt"), value(page, "steps")) == ("a pear", "2")
    assert page.get_by_label("Gold leaf").input_value() == "0.5"


def test_a_png_of_the_web_ui_restores_what_this_model_takes_and_says_what_not(
    opened: Opened,
) -> None:
    page, text = opened(), PngInfo()
    words = "a café, (ink:1.2)\nat night\nNegative prompt: fog,\nrain\n"
    words += (
        'Steps: 30, Sampler: Euler a, CFG scale: 7, Seed: 77, Size: 128x64, Hashes: "a: b, c: d"'
    )
    text.add_text("parameters", words.encode("latin-1"))
    drop(page, file(PIL.Image.new("RGB", (8, 8)), pnginfo=text), "body")
    status(page, "steps 30 became 8: this model takes 1 to 8")
    assert value(page, "prompt") == "a café, (ink:1.2)\nat night"
    assert value(page, "negative") == "fog,\nrain"
    assert (value(page, "seed"), value(page, "guidance")) == ("77", "7")
    assert (value(page, "width"), value(page, "height")) == ("128", "64")


def from_web_ui(words: str, line: str) -> bytes:
    """A picture as AUTOMATIC1111's web UI writes it."""
    text = PngInfo()
    text.add_text("parameters", f"{words}\nSteps: 4, CFG scale: 4, Seed: 7, Size: 64x64{line}")
    return file(square("teal"), pnginfo=text)


WORDS = {"prompt": "a pear", "seed": 7, "steps": 4, "width": 64, "height": 64}
GIVEN = {"sha256": "0"}


@pytest.mark.parametrize(
    "dropped",
    [
        with_record({**WORDS, "task": "text", "strength": None}),
        with_record({"pictures": [WORDS], "model": {"pipeline": "StableDiffusionPipeline"}}),
        from_web_ui("a pear", ""),
        from_web_ui("a pear", ", Denoising strength: 0.4, Hires upscale: 2"),
    ],
)
def test_a_dropped_png_made_of_words_alone_is_drawn_from_words_again(
    opened: Opened, painter: Painter, dropped: bytes
) -> None:
    page = opened()
    choose(page, "drawing")
    drop(page, dropped, "body")
    status(page, "Settings restored.")
    assert page.is_checked("input[name=mode][value=words]")
    page.click("#draw")
    wait_for_colour(page, colour("a pear"))
    assert (painter.orders[-1].task, painter.orders[-1].seed) == ("text", 7)


@pytest.mark.parametrize(
    ("dropped", "told"),
    [
        (with_record({**WORDS, "task": "image", "image": GIVEN}), "starting picture is not in"),
        (with_record({"pictures": [{**WORDS, "image": GIVEN, "mask": GIVEN}]}), "its mask are not"),
        (with_record({**WORDS, "task": "text", "control": GIVEN}), "steered it is not in"),
        (with_record({"pictures": [{**WORDS, "controls": [GIVEN]}]}), "steered it is not in"),
        (from_web_ui("a pear", ", Denoising strength: 0.4"), "starting picture is not in"),
        (from_web_ui("a pear", ", Denoising strength: 1, Mask blur: 4"), "its mask are not"),
        (from_web_ui("a pear", ', ControlNet 0: "Module: canny"'), "steered it is not in"),
    ],
)
def test_what_a_dropped_png_was_made_from_is_told_to_be_absent(
    opened: Opened, dropped: bytes, told: str
) -> None:
    page = opened()
    choose(page, "edges")
    drop(page, dropped, "body")
    status(page, told)
    assert page.is_checked("input[name=mode][value=edges]")


def test_loras_in_a_prompt_of_the_web_ui_move_their_sliders(opened: Opened) -> None:
    page = opened()
    page.get_by_label("Gold leaf").fill("1")
    prompt = "a pear <lora:Ink:0.5>, ripe<lora:gold LEAF:3:1><lora:neon_v2>"
    drop(page, from_web_ui(prompt, ""), "body")
    status(page, "the LoRA neon_v2 is not loaded here")
    status(page, "the LoRA gold LEAF of 3 became 1.5: its slider takes -1 to 1.5")
    assert value(page, "prompt") == "a pear , ripe"  # the words that the web UI encodes
    assert (value(page, "lora-0"), value(page, "lora-1")) == ("0.5", "1.5")


def test_what_was_changed_to_fit_the_model_is_told(opened: Opened) -> None:
    page = opened()
    record = {**WORDS, "width": 9000, "height": 100, "steps": 30, "guidance_scale": 0.0}
    drop(page, with_record({**record, "seed": 2**64}), "body")
    for change in (
        *("width 9000 became 2048", "height 100 became 104: it is from 64 to 2048 in steps of 8"),
        *("steps 30 became 8", "guidance 0 became 1", "became 0: it is a whole number below"),
    ):
        status(page, change)


def test_a_picture_without_settings_goes_to_the_canvas_and_garbage_nowhere(opened: Opened) -> None:
    page = opened()
    drop(page, file(square("red")), "body")
    status(page, "No settings in that picture")
    assert page.is_checked("input[name=mode][value=drawing]")
    drop(page, b"\x89PNG\r\n\x1a\n garbage", "body")
    status(page, "damaged")


def test_the_downloaded_png_restores_the_settings(opened: Opened, tmp_path: Path) -> None:
    page = opened()
    write(page, "a bell")
    page.wait_for_selector("#download:enabled")
    with page.expect_download() as download:
        page.click("#download")
    download.value.save_as(tmp_path / "bell.png")
    assert download.value.suggested_filename.startswith("a-bell-")
    seed = value(page, "seed")
    other = opened()
    drop(other, (tmp_path / "bell.png").read_bytes(), "body")
    status(other, "Settings restored.")
    assert (value(other, "prompt"), value(other, "seed")) == ("a bell", seed)


PROMPT = 'it\'s "quoted" $(rm) `x` \\ ünï 🦊'


def copied(page: Page, button: str) -> str:
    page.click(button)
    status(page, "Copied")
    return str(page.evaluate("navigator.clipboard.readText()"))


@pytest.mark.parametrize("mode", ["words", "part", "edges"])
@pytest.mark.parametrize("language", ["python", "curl"])
def test_the_copied_program_draws_the_same(
    opened: Opened, painter: Painter, tmp_path: Path, language: str, mode: str
) -> None:
    page = opened(permissions=["clipboard-read", "clipboard-write"])
    files: list[Any] = []
    page.on("download", lambda one: files.append(one))
    choose(page, mode)
    write(page, PROMPT)
    if mode != "words":
        stroke(page, (0.2, 0.3), (0.2, 0.7))
    page.wait_for_selector(f"#{language}:enabled")
    wanted = painter.orders[-1]
    program = copied(page, f"#{language}")
    for found in files:
        found.save_as(tmp_path / found.suggested_filename)
    shell = {"python": ["python3", "-c"], "curl": ["bash", "-c"]}[language]
    subprocess.run([*shell, program], cwd=tmp_path, check=True, timeout=20)
    order = painter.orders[-1]
    for name in ("prompt", "seed", "steps", "guidance_scale", "strength"):
        assert getattr(order, name) == getattr(wanted, name)
    assert order.task == wanted.task == ("inpaint" if mode == "part" else "text")
    if mode == "edges":
        assert order.control is not None and wanted.control is not None
        assert order.control.tobytes() == wanted.control.tobytes()
    picture = PIL.Image.open(tmp_path / "picture.png")
    assert picture.getpixel((12, 32)) == colour(PROMPT)


# ── earlier pictures ──


def shelf(page: Page) -> list[str]:
    return [str(image.get_attribute("alt")) for image in page.locator("#shelf img").all()]


def drawn(page: Page, prompt: str) -> None:
    """Draw a picture and see it on the shelf."""
    write(page, prompt)
    page.click("#draw")
    page.wait_for_function("(p) => document.querySelector('#shelf img')?.alt === p", arg=prompt)


def test_a_reload_keeps_history_and_gallery(opened: Opened) -> None:
    page = opened()
    for prompt in ("<img src=x onerror=alert(1)>", "a goat"):
        drawn(page, prompt)
    page.click("#keep")
    status(page, "Kept.")
    page.reload()
    page.wait_for_selector("#shelf img")
    assert shelf(page) == ["a goat (kept)", "<img src=x onerror=alert(1)>"]
    page.click("#shelf li:last-child button")
    wait_for_colour(page, colour("<img src=x onerror=alert(1)>"))
    assert value(page, "prompt") == "<img src=x onerror=alert(1)>"
    page.click("#forget")
    status(page, "history is empty")
    assert shelf(page) == ["a goat (kept)"]


def test_an_earlier_picture_comes_back_with_what_was_painted(
    opened: Opened, painter: Painter
) -> None:
    page = opened()
    choose(page, "part")
    drop(page, file(square("lime")), "#board")
    write(page, "a door")
    page.fill("#brush", "100")
    stroke(page, (0.2, 0.3), (0.2, 0.7))
    page.wait_for_selector("#shelf img")
    wanted = painter.orders[-1]
    page.reload()
    page.wait_for_selector("#steps[max]")
    page.click("#shelf button")
    status(page, "Settings restored.")
    assert page.is_checked("input[name=mode][value=part]")
    page.wait_for_selector("#download:enabled")
    page.click("#draw")
    page.wait_for_selector("#shelf li:nth-child(2) img")
    order = painter.orders[-1]
    assert order.image is not None and order.mask is not None
    assert order.mask.tobytes() == wanted.mask.tobytes()  # type: ignore[union-attr]
    assert order.image.tobytes() == wanted.image.tobytes()  # type: ignore[union-attr]
    assert order.seed == wanted.seed


def test_a_full_disk_costs_the_older_history_and_then_the_reload(opened: Opened) -> None:
    page = opened()
    found = page.evaluate(
        """async () => {
            const { Store, isStored } = await import("/studio/store.js");
            const put = IDBObjectStore.prototype.put;
            let room = 4;
            IDBObjectStore.prototype.put = function (one) {
                if (room-- <= 0) throw new DOMException("full", "QuotaExceededError");
                return put.call(this, one);
            };
            const drop = IDBObjectStore.prototype.delete;
            IDBObjectStore.prototype.delete = function (id) { room++; return drop.call(this, id); };
            const store = new Store(), blob = new Blob(["x"]), ids = [];
            const add = (prompt, kept) => store.put({ kept, settings: { prompt }, blob });
            for (let i = 0; i < 5; i++) ids.push(await add(`${i}`, i === 0));
            const older = (await store.all()).map((one) => one.settings.prompt);
            room = -1000;
            await store.clearHistory();
            const last = await add("last", false);
            const now = (await store.all()).map((one) => one.settings.prompt);
            await store.delete(last);
            return [older, now, ids.every(isStored), isStored(last), (await store.all()).length];
        }"""
    )
    assert found == [["4", "3", "0"], ["last", "0"], True, False, 1]


def test_a_picture_that_cannot_be_stored_is_shown_and_one_is_told(opened: Opened) -> None:
    page = opened()
    page.evaluate(
        """() => { IDBObjectStore.prototype.put = () => {
            throw new DOMException("full", "QuotaExceededError");
        }; }"""
    )
    drawn(page, "a moon")
    status(page, "no room")
    page.click("#keep")
    status(page, "Kept.")
    assert shelf(page) == ["a moon (kept)"]
    page.click("#delete")
    status(page, "Deleted.")
    assert shelf(page) == []


def test_a_picture_settles_into_the_history_and_can_be_deleted(opened: Opened) -> None:
    page = opened()
    write(page, "a moth")
    page.wait_for_selector("#shelf img")
    assert shelf(page) == ["a moth"]
    page.click("#delete")
    status(page, "Deleted.")
    assert shelf(page) == []


def test_the_history_is_bounded(opened: Opened) -> None:
    page = opened()
    count = page.evaluate(
        """async () => {
            const { Store } = await import("/studio/store.js");
            const store = new Store();
            const blob = new Blob(["x"]);
            await store.put({ kept: true, settings: { prompt: "kept" }, blob });
            for (let i = 0; i < 110; i++) {
                await store.put({ kept: false, settings: { prompt: `${i}` }, blob });
            }
            const all = await store.all();
            return [all.length, all[0].settings.prompt, all.at(-1).settings.prompt];
        }"""
    )
    assert count == [101, "109", "kept"]


# ── two tabs, a key, keys, screens ──


def test_two_tabs_never_get_each_others_pictures(opened: Opened, painter: Painter) -> None:
    first = opened()
    pages = {"one": first, "two": opened(first.context)}
    painter.delay = 0.02
    for n in range(8):
        for name, page in pages.items():
            write(page, f"{name} {n}")
    for name, page in pages.items():
        wait_for_colour(page, colour(f"{name} 7"))
        page.wait_for_selector("#about:has-text('4 steps')")
        assert is_near(pixel(page), colour(f"{name} 7"))


def test_the_key_is_asked_for_and_forgotten_with_the_tab(browser: Any) -> None:
    with listening(Painter(), api_key="open-sesame") as address:
        context = browser.new_context()
        page = context.new_page()
        page.goto(address)
        for key in ("wrong key", "open-sesame"):
            page.fill("#key-value", key)
            page.click("#key button")
            if key == "wrong key":
                playwright.expect(page.locator("#key-wrong")).to_have_text("That key was refused.")
        write(page, "a lamp")
        wait_for_colour(page, colour("a lamp"))
        assert page.evaluate("sessionStorage.length") == 1
        assert "sesame" not in page.evaluate("JSON.stringify(localStorage)")
        context.close()


def test_a_lost_connection_comes_back_by_itself(opened: Opened, painter: Painter) -> None:
    page = opened()
    page.evaluate(LOSE)
    write(page, "a bridge")
    status(page, "Connected again.")
    wait_for_colour(page, colour("a bridge"))


LOSE = """() => {
    const send = WebSocket.prototype.send;
    WebSocket.prototype.send = function (data) {
        WebSocket.prototype.send = send;
        this.close(4000);
    };
}"""


def test_a_server_that_is_gone_is_told_and_found_again(
    browser: Any, monkeypatch: pytest.MonkeyPatch
) -> None:
    context = browser.new_context()
    page = context.new_page()
    with listening(Painter()) as address:
        page.goto(address)
        page.wait_for_selector("#steps[max]")
    write(page, "a bridge")
    status(page, "does not answer; trying again")
    port = urlsplit(address).port
    monkeypatch.setattr(
        "server.asked.Settings", lambda **given: Settings(**{**given, "port": port})
    )
    with listening(Painter()) as again:
        assert again == address
        wait_for_colour(page, colour("a bridge"), seconds=12)
        assert value(page, "prompt") == "a bridge"
        context.close()


def test_who_has_too_many_tabs_open_is_told_so(browser: Any) -> None:
    with listening(Painter(Limits(sockets_per_client=1))) as address:
        context = browser.new_context()
        for prompt in ("a bridge", "a lamp"):
            page = context.new_page()
            page.goto(address)
            page.wait_for_selector("#steps[max]")
            write(page, prompt)
            if prompt == "a bridge":
                wait_for_colour(page, colour(prompt))
        status(page, "too many sockets open; trying again")
        context.pages[0].close()
        wait_for_colour(page, colour("a lamp"), seconds=12)
        context.close()


def test_a_key_that_is_no_longer_right_is_asked_for_again(browser: Any) -> None:
    with listening(Painter(), api_key="open-sesame") as address:
        context = browser.new_context()
        page = context.new_page()
        page.goto(address)
        page.fill("#key-value", "open-sesame")
        page.click("#key button")
        page.wait_for_selector("#steps[max]")
        page.evaluate("sessionStorage.setItem('fewstep-key', 'as it was once')")
        page.evaluate(LOSE)
        write(page, "a lamp")
        page.wait_for_selector("#key[open]")
        page.wait_for_timeout(700)  # meanwhile it goes on trying
        page.fill("#key-value", "open-sesame")
        page.click("#key button")
        wait_for_colour(page, colour("a lamp"))
        context.close()


@pytest.mark.parametrize(
    ("name", "typed", "becomes"),
    [("width", "100", "104"), ("height", "9000", "2048"), ("seed", "twelve", "0")],
)
def test_numbers_that_cannot_be_are_marked_and_then_corrected_where_one_sees_it(
    opened: Opened, name: str, typed: str, becomes: str
) -> None:
    page = opened()
    page.click("summary")
    field, hint = page.locator(f"#{name}"), page.locator(f"#{name}-hint")
    assert field.get_attribute("aria-describedby") == f"{name}-hint"
    field.fill(typed)
    assert field.get_attribute("aria-invalid") == "true"
    playwright.expect(hint).to_contain_text(f"{typed} becomes {becomes}: it is")
    field.blur()
    assert (value(page, name), field.get_attribute("aria-invalid")) == (becomes, "false")
    status(page, f"{name.capitalize()} {typed} became {becomes}: it is")
    field.fill("128")
    playwright.expect(hint).to_be_empty()
    assert field.get_attribute("aria-invalid") == "false"


def test_a_seed_is_sent_without_the_zeros_before_it(opened: Opened, painter: Painter) -> None:
    page = opened()
    page.fill("#seed", "007")
    write(page, "a pea")
    wait_for_colour(page, colour("a pea"))
    assert painter.orders[-1].seed == 7


def test_a_size_can_be_read_whole(opened: Opened) -> None:
    page = opened()
    page.click("summary")
    for name in ("width", "height"):
        page.fill(f"#{name}", "2048")
        field = page.locator(f"#{name}")
        assert field.evaluate("one => one.scrollWidth <= one.clientWidth")
        assert field.bounding_box()["width"] > 90


def test_the_keyboard_does_it_all(opened: Opened) -> None:
    page = opened()
    page.keyboard.press("/")
    page.keyboard.type("a nut")
    page.keyboard.press("Control+Enter")
    page.wait_for_selector("#shelf img")
    page.keyboard.press("Escape")
    page.keyboard.press("k")
    status(page, "Kept.")
    page.keyboard.press("?")
    assert page.is_visible("#help")
    page.keyboard.press("Escape")
    page.keyboard.press("2")
    assert page.is_checked("input[name=mode][value=drawing]")
    page.fill("#colour", "#000000")
    page.focus("#board")
    page.keyboard.press("Space")
    for _ in range(5):
        page.keyboard.press("ArrowRight")
    wait_for_colour(page, [part // 2 for part in colour("a nut")])


def test_every_control_has_a_name_and_news_are_read_out(opened: Opened) -> None:
    page = opened()
    nameless = page.evaluate(
        """() => [...document.querySelectorAll("button, input, textarea, img, canvas, [role]")]
            .filter((one) => !(one.textContent.trim() || one.ariaLabel || one.labels?.length
                || one.closest("[aria-label]") || one.hasAttribute("alt")
                || ["status", "alert"].includes(one.role)))
            .map((one) => one.id || one.outerHTML)"""
    )
    assert nameless == []
    assert page.get_attribute("#status", "aria-live") == "polite"
    assert page.get_attribute("html", "lang") == "en"
    page.keyboard.press("Tab")
    assert page.evaluate("document.activeElement.textContent") == "Skip to the prompt"


@pytest.mark.parametrize("scheme", ["light", "dark"])
def test_it_is_light_or_dark_as_the_system_is_until_the_switch(opened: Opened, scheme: str) -> None:
    page = opened(color_scheme=scheme)
    brightness = "getComputedStyle(document.body).backgroundColor.match(/\\d+/g).map(Number)[0]"
    assert (page.evaluate(brightness) > 128) is (scheme == "light")
    for _ in range(2 if scheme == "light" else 1):
        page.click("#theme")
    assert (page.evaluate(brightness) > 128) is (scheme == "dark")
    page.reload()
    assert (page.evaluate(brightness) > 128) is (scheme == "dark")


OUTSIDE = """() => {
    const out = [];
    for (const box of document.querySelectorAll("header, .ask, .settings, figcaption, .gallery")) {
        const { left, right } = box.getBoundingClientRect();
        for (const one of box.querySelectorAll(":is(input, button, output, label, p)")) {
            const here = one.getBoundingClientRect();
            if (!here.width || one.closest(".hidden, .ideas, .modes, [hidden]")) continue;
            if (here.left < left - 1 || here.right > right + 1) out.push(one.id || one.outerHTML);
        }
    }
    return out;
}"""


@pytest.mark.parametrize("width", [360, 700, 900, 1200])
@pytest.mark.parametrize("mode", ["drawing", "edges"])
def test_nothing_sticks_out_of_its_box(opened: Opened, mode: str, width: int) -> None:
    page = opened(viewport={"width": width, "height": 900})
    choose(page, mode)
    page.click("summary")
    assert page.evaluate(OUTSIDE) == []
    assert page.evaluate("document.documentElement.scrollWidth") == width


@pytest.mark.parametrize("mode", ["words", "drawing"])
def test_a_laptop_shows_all_tools_in_a_line_and_where_earlier_pictures_begin(
    opened: Opened, mode: str
) -> None:
    page = opened(viewport={"width": 1280, "height": 900})
    choose(page, mode)
    drawn(page, "a fig")
    boxes = {id: page.locator(f"#{id}").bounding_box() for id in ("keep", "delete", "status")}
    assert boxes["keep"]["y"] == boxes["delete"]["y"]
    heading = page.locator("h2:has-text('Earlier')").bounding_box()
    assert heading["y"] + heading["height"] < boxes["status"]["y"]


@pytest.mark.parametrize("mode", ["words", "drawing", "part", "edges"])
def test_a_phone_never_scrolls_sideways(opened: Opened, mode: str) -> None:
    page = opened(viewport={"width": 360, "height": 740}, has_touch=True, is_mobile=True)
    choose(page, mode)
    write(page, "word" * 40)
    page.wait_for_timeout(100)
    assert page.evaluate("document.documentElement.scrollWidth") == 360
    assert page.evaluate("visualViewport.width") == 360


def test_the_page_may_load_nothing_from_elsewhere(opened: Opened, address: str) -> None:
    page = opened()
    answer = page.request.get(address)
    assert answer.headers["content-security-policy"].startswith("default-src 'self'; img-src")
    assert answer.headers["x-content-type-options"] == "nosniff"
    tag = answer.headers["etag"]
    again = page.request.get(address, headers={"If-None-Match": tag})
    assert (again.status, again.body()) == (304, b"")
    for path in ("/studio/../live.py", "/studio/%2e%2e/live.py", "/studio/", "/studio/none.js"):
        assert page.request.get(f"{address}{path}").status == 404


# ── with the model inside the package ──


@pytest.fixture(scope="module")
def embedded() -> Iterator[str]:
    """The address of a server that draws with it."""
    from fewstep import EMBEDDED
    from fewstep.server.worker import PipelineWorker

    worker = PipelineWorker(str(EMBEDDED))
    with listening(worker) as found:
        until(lambda: worker.is_ready, 60)
        yield found


def mean_colour(page: Page) -> list[float]:
    """Of the middle of the picture."""
    places = [pixel(page, x, y) for x in (0.4, 0.5, 0.6) for y in (0.45, 0.55, 0.65)]
    return [float(part) for part in np.mean([place for place in places if place], axis=0)]


def test_the_embedded_model_draws_while_one_types(opened: Opened, embedded: str) -> None:
    page = opened(at=embedded)
    page.locator("#prompt").press_sequentially("a red apple", delay=10)
    page.wait_for_selector("#about:has-text('4 steps')")
    red, green, blue = mean_colour(page)
    assert red > green + 40 and red > blue + 40
    write(page, "a lemon")
    page.wait_for_selector("#picture[alt='a lemon']")
    until(lambda: mean_colour(page)[1] > green + 40, 8)


def test_the_embedded_model_repaints_only_the_inside_of_a_mask(
    opened: Opened, embedded: str
) -> None:
    page = opened(at=embedded)
    write(page, "a lemon on a blue background")
    page.wait_for_selector("#download:enabled")
    before = [pixel(page, 0.9, y) for y in (0.1, 0.5, 0.9)]
    choose(page, "part")
    status(page, "on the canvas")
    write(page, "a strawberry on a blue background")
    page.fill("#brush", "100")
    stroke(page, (0.3, 0.4), (0.3, 0.6))
    page.wait_for_selector("#picture[alt^='a strawberry']")
    page.wait_for_timeout(1000)
    for now, then in zip([pixel(page, 0.9, y) for y in (0.1, 0.5, 0.9)], before, strict=True):
        assert is_near(now, then, 20)
