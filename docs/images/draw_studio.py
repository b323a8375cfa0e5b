"""The pictures of the studio in this folder, drawn again: `python docs/images/draw_studio.py`.

Needs `pip install playwright pillow` and a Chromium, whose place may be given as an argument.
"""

from __future__ import annotations

import io
import shutil
import subprocess
import sys
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import PIL.Image
from playwright.sync_api import sync_playwright

from fewstep import EMBEDDED

HERE = Path(__file__).parent
PROMPTS = (
    *("a rocket", "a penguin", "a sunflower", "a lemon on a blue background", "a house"),
    *("a pear", "a strawberry", "a cactus"),
)


@contextmanager
def listening() -> Iterator[str]:
    """The address of a server of the embedded model, with a LoRA and a control."""
    lora, control = (
        str(EMBEDDED.parent / f"fewstep-emoji-{name}") for name in ("blueprint", "edges")
    )
    command = [sys.executable, "-m", "fewstep", "serve", "--port", "0"]
    command += ["--lora", f"blueprint={lora}", "--control", control]
    with subprocess.Popen(command, stdout=subprocess.PIPE, text=True) as server:
        assert server.stdout is not None
        yield server.stdout.readline().split()[-1]
        server.terminate()


def draw(page: Any, prompt: str) -> None:
    """Draw a picture and wait until it is stored."""
    page.fill("#prompt", prompt)
    page.click("#draw")
    page.wait_for_function("(p) => document.querySelector('#shelf img')?.alt === p", arg=prompt)
    page.wait_for_timeout(500)


def stroke(page: Any, colour: str, brush: int, *places: tuple[float, float]) -> None:
    """Paint through places of the canvas, in parts of its sides."""
    if page.locator("#colour").is_visible():
        page.fill("#colour", colour)
    page.fill("#brush", str(brush))
    box = page.locator("#board").bounding_box()
    points = [(box["x"] + x * box["width"], box["y"] + y * box["height"]) for x, y in places]
    page.mouse.move(*points[0])
    page.mouse.down()
    for point in points[1:]:
        page.mouse.move(*point, steps=6)
    page.mouse.up()


def choose(page: Any, mode: str) -> None:
    """Begin with words, a drawing, a part or edges."""
    page.check(f"input[name=mode][value={mode}]", force=True)


def apple(page: Any) -> None:
    """An apple on the canvas, as a child paints it."""
    choose(page, "drawing")
    page.fill("#prompt", "a red apple")
    page.fill("#strength", "0.7")
    stroke(page, "#d02a2a", 150, (0.36, 0.55), (0.64, 0.55), (0.6, 0.7), (0.4, 0.7), (0.4, 0.5))
    stroke(page, "#7b4a2b", 22, (0.5, 0.38), (0.53, 0.2))
    stroke(page, "#3a9d3a", 50, (0.6, 0.25), (0.7, 0.2))
    page.wait_for_timeout(2500)


def repaint(page: Any) -> None:
    """A lemon becomes a strawberry."""
    choose(page, "words")
    draw(page, "a lemon on a blue background")
    choose(page, "part")
    page.wait_for_timeout(300)
    page.fill("#prompt", "a strawberry on a blue background")
    stroke(page, "", 150, (0.25, 0.25), (0.5, 0.35), (0.75, 0.4), (0.4, 0.55), (0.7, 0.7))
    page.wait_for_timeout(2500)


def shoot(page: Any, name: str, colours: int = 200) -> None:
    """Write what the page shows to a small file."""
    page.evaluate("scrollTo(0, 0)")
    picture = PIL.Image.open(io.BytesIO(page.screenshot())).convert("RGB")
    few = picture.quantize(colours, method=PIL.Image.Quantize.MEDIANCUT, dither=0)
    few.save(HERE / f"studio-{name}.png", optimize=True)


def main() -> None:
    """Draw them all."""
    place = sys.argv[1] if len(sys.argv) > 1 else shutil.which("chromium")
    with listening() as address, sync_playwright() as runner:
        browser = runner.chromium.launch(executable_path=place, args=["--no-sandbox"])

        def opened(width: int, height: int, **options: Any) -> Any:
            page = browser.new_context(viewport={"width": width, "height": height}, **options)
            found = page.new_page()
            found.goto(address)
            found.wait_for_selector("#steps[max]")
            return found

        page = opened(1200, 1030, color_scheme="light")
        for prompt in PROMPTS:
            draw(page, prompt)
        shoot(page, "light")
        apple(page)
        shoot(page, "canvas")
        page.emulate_media(color_scheme="dark")
        repaint(page)
        shoot(page, "dark")
        phone = opened(390, 844, has_touch=True, is_mobile=True, device_scale_factor=2)
        draw(phone, "a penguin")
        shoot(phone, "phone")
        browser.close()


if __name__ == "__main__":
    main()
