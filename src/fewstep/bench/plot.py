"""Bars of seconds, one for each side of each work, with the range and the machine's limit."""

from __future__ import annotations

from collections.abc import Sequence

from PIL import Image, ImageDraw, ImageFont

from ..errors import RequestError
from .report import Measured, Result, seconds

SCALE = 2  # drawn so much larger and scaled down, which smooths the edges
WIDTH, ROW, TITLE, MARGIN = 860, 24, 34, 16  # pixels
NAMES, BARS, VALUES = 150, 470, 208  # widths of the columns
COLOURS = ("#0072B2", "#D55E00", "#E69F00", "#009E73", "#CC79A7", "#56B4E9", "#8C6D1F")
INK, GREY = "#202020", "#9A9A9A"


def bars(results: Sequence[Result]) -> Image.Image:
    """A picture of all results, one under the other, each on its own scale from 0.

    A bar ends at the median; the line through its end is the range; the dashed line is the limit.
    """
    shown = [result for result in results if result.able]
    if not shown:
        raise RequestError("plot: no side has figures to draw; leave --plot out")
    height = MARGIN + sum(TITLE + ROW * len(result.able) + MARGIN for result in shown)
    image = Image.new("RGB", (SCALE * WIDTH, SCALE * height), "white")
    colours = {name: COLOURS[i % len(COLOURS)] for i, name in enumerate(names(shown))}
    top = MARGIN
    for result in shown:
        top = block(ImageDraw.Draw(image), result, top, colours) + MARGIN
    return image.resize((WIDTH, height), Image.Resampling.LANCZOS)


def names(results: Sequence[Result]) -> list[str]:
    """All sides, each once."""
    return list(dict.fromkeys(name for result in results for name in result.able))


def block(pen: ImageDraw.ImageDraw, result: Result, top: int, colours: dict[str, str]) -> int:
    """Draws one result from `top` on; returns where it ends."""
    write(pen, (MARGIN, top + 8), result.work.title + ", cold start" * result.cold, 13)
    longest = max(max(side.seconds) for side in result.able.values())
    top += TITLE
    bottom = top + ROW * len(result.able)
    for index, (name, side) in enumerate(result.able.items()):
        bar(pen, name, side, longest, top + ROW * index, colours[name])
        found = result.ratio(name)
        more = "" if found is None or name == result.first else f"  ({found.median:.2f} x)"
        place = (MARGIN + NAMES + BARS + 10, top + ROW * index + ROW // 2)
        write(pen, place, seconds(side.median) + more, 12)
    if not result.cold:
        dashes(pen, across(result.limit_seconds, longest), top, bottom)
    return bottom


def bar(
    pen: ImageDraw.ImageDraw, name: str, side: Measured, longest: float, top: int, colour: str
) -> None:
    """One side's name, bar and range."""
    middle = top + ROW // 2
    write(pen, (MARGIN, middle), name, 12)
    box = (across(0, longest), top + 4, across(side.median, longest), top + ROW - 4)
    pen.rectangle([SCALE * v for v in box], colour)
    low, high = (across(v, longest) for v in (min(side.seconds), max(side.seconds)))
    pen.line([SCALE * v for v in (low, middle, high, middle)], INK, SCALE)
    for end in (low, high):
        pen.line([SCALE * v for v in (end, middle - 4, end, middle + 4)], INK, SCALE)


def across(value: float, longest: float) -> float:
    """Where a number of seconds lies, in pixels from the left."""
    return MARGIN + NAMES + BARS * value / longest


def dashes(pen: ImageDraw.ImageDraw, x: float, top: int, bottom: int) -> None:
    """A dashed line downwards."""
    for y in range(top, bottom, 6):
        pen.line([SCALE * v for v in (x, y, x, y + 3)], GREY, SCALE)


def write(pen: ImageDraw.ImageDraw, place: tuple[float, float], text: str, size: int) -> None:
    """Text whose left middle is at `place`."""
    x, y = place
    pen.text((SCALE * x, SCALE * y), text, INK, ImageFont.load_default(SCALE * size), "lm")
