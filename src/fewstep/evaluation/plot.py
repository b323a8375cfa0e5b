"""Line plots of reports, drawn with Pillow: each metric over steps, guidance and seconds.

One figure has a panel for each metric and one legend. Everything is drawn at twice its size and
scaled down, which smooths the lines.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Sequence
from dataclasses import dataclass

from PIL import Image, ImageDraw, ImageFont

from fewstep.errors import RequestError
from fewstep.evaluation.report import Column, Report, Row

# Okabe and Ito's colours, which colour-blind people can tell apart; each with a marker of its own.
_COLOURS = ("#0072B2", "#D55E00", "#009E73", "#CC79A7", "#E69F00", "#56B4E9", "#000000", "#8C6D1F")
_MARKERS = ("circle", "square", "triangle", "diamond")
_GREY, _INK = "#D8D8D8", "#202020"
_SCALE = 2
_PANEL = (430, 300)  # pixels; around the axes is room for numbers and names
_LEFT, _TOP, _RIGHT, _BOTTOM = 62, 34, 14, 46
_WIDE_RANGE = 5.0  # a larger ratio of values is drawn on a logarithmic axis

Point = tuple[float, float]


@dataclass(frozen=True)
class Series:
    """Points of one name, drawn with a line from left to right."""

    name: str
    points: tuple[Point, ...]


@dataclass(frozen=True)
class Axis:
    """Values from `low` to `high`, or their logarithms, and the values that are marked."""

    low: float
    high: float
    ticks: tuple[float, ...]
    is_log: bool = False

    def place(self, value: float) -> float:
        """Where a value lies: 0 at `low`, 1 at `high`."""
        at, low, high = (math.log(v) if self.is_log else v for v in (value, self.low, self.high))
        return (at - low) / (high - low)

    @classmethod
    def of(cls, values: Sequence[float], ticks: Sequence[float] = ()) -> Axis:
        """The axis for values: `ticks` on a logarithmic one if given, else round numbers."""
        least, most = min(values), max(values)
        is_log = bool(ticks) or (least > 0 and most / least > _WIDE_RANGE)
        if is_log:
            room = max((most / least) ** 0.06, 1.1)
            low, high = least / room, most * room
            marked = [t for t in ticks or _log_ticks(low, high) if low <= t <= high]
            return cls(low, high, tuple(marked), True)
        room = 0.08 * (most - least) or abs(most) * 0.1 or 1.0
        low, high = least - room, most + room
        return cls(low, high, tuple(_round_ticks(low, high)))


def _round_ticks(low: float, high: float) -> list[float]:
    """Four to eight multiples of 1, 2 or 5 times a power of ten."""
    rough = (high - low) / 5
    power = 10 ** math.floor(math.log10(rough))
    step = next(m * power for m in (1, 2, 5, 10) if m * power >= rough)
    first, last = math.ceil(low / step - 1e-9), math.floor(high / step + 1e-9)
    return [n * step for n in range(first, last + 1)]


def _log_ticks(low: float, high: float) -> list[float]:
    powers = range(math.floor(math.log10(low)), math.ceil(math.log10(high)) + 1)
    return [m * 10.0**p for p in powers for m in (1, 2, 5)]


def figures(report: Report) -> dict[str, Image.Image]:
    """Pictures by name: "steps", "guidance" and "seconds", those that have a line to draw."""
    metrics = [column for column in report.columns if column.key != "seconds"]
    rows = [row for row in report.rows if row.steps is not None]
    several = len({(row.method, row.guidance) for row in rows}) > len({r.method for r in rows})

    def whose(row: Row) -> str:
        return f"{row.method}, guidance {row.guidance:g}" if several else row.method

    def at_steps(row: Row) -> str:
        return f"{row.method}, {row.steps} step{'s' * (row.steps != 1)}"

    kinds: dict[str, tuple[str, Callable[[Row], str], Callable[[Row], float | None]]] = {
        "steps": ("steps", whose, lambda row: row.steps),
        "guidance": ("guidance scale", at_steps, lambda row: row.guidance),
        "seconds": ("seconds a picture", whose, lambda row: row.scores.get("seconds")),
    }
    drawn = {}
    for name, (label, series_of, x) in kinds.items():
        panels = {_title(c): _series(rows, c, series_of, x) for c in metrics}
        panels = {title: series for title, series in panels.items() if series}
        if panels:
            drawn[name] = figure(panels, label, marked=name == "steps")
    return drawn


def _title(column: Column) -> str:
    is_distance = column.key.startswith(("fid/", "kid/"))
    return f"{column.label} ({'lower' if is_distance else 'higher'} is better)"


def _series(
    rows: Sequence[Row],
    column: Column,
    series_of: Callable[[Row], str],
    x: Callable[[Row], float | None],
) -> list[Series]:
    """The lines of one metric, of at least two different places each."""
    points: dict[str, list[Point]] = {}
    for row in rows:
        at, score = x(row), row.scores.get(column.key)
        if at is not None and score is not None:
            points.setdefault(series_of(row), []).append((at, score * column.scale))
    lines = {name: tuple(sorted(found)) for name, found in points.items()}
    return [Series(name, found) for name, found in lines.items() if len(dict(found)) > 1]


def figure(panels: dict[str, list[Series]], x_label: str, *, marked: bool = False) -> Image.Image:
    """Panels by their titles in rows, and one legend below; `marked` ticks each x, spaced by log.

    Values that differ by more than 5 times are drawn on a logarithmic axis.
    """
    if not panels or not all(panels.values()):
        raise RequestError("a figure needs a panel, and each panel a line")
    names = list(dict.fromkeys(series.name for lines in panels.values() for series in lines))
    columns = len(panels) if len(panels) < 4 else 2 + len(panels) % 2
    rows = -(-len(panels) // columns)
    width, height = (n * side for n, side in zip((columns, rows), _PANEL, strict=True))
    legend = _legend(names, width)
    image = Image.new("RGB", (_SCALE * width, _SCALE * height + legend.height), "white")
    for index, (title, lines) in enumerate(panels.items()):
        corner = (index % columns * _PANEL[0], index // columns * _PANEL[1])
        _Panel(image, corner).draw(title, lines, names, x_label, marked)
    image.paste(legend, (0, _SCALE * height))
    return image.resize((image.width // _SCALE, image.height // _SCALE), Image.Resampling.LANCZOS)


class _Panel:
    """One pair of axes on an image, at a corner in final pixels."""

    def __init__(self, image: Image.Image, corner: tuple[int, int]):
        self.pen = ImageDraw.Draw(image)
        x, y = corner
        sides = (x + _LEFT, y + _TOP, x + _PANEL[0] - _RIGHT, y + _PANEL[1] - _BOTTOM)
        self.left, self.top, self.right, self.bottom = (_SCALE * side for side in sides)

    def draw(
        self, title: str, lines: Sequence[Series], names: Sequence[str], x_label: str, marked: bool
    ) -> None:
        xs = [x for series in lines for x, _ in series.points]
        self.x = Axis.of(xs, sorted(set(xs)) if marked else ())
        self.y = Axis.of([y for series in lines for _, y in series.points])
        self._axes()
        for series in lines:
            number = names.index(series.name)
            points = [self._at(*point) for point in series.points]
            self.pen.line(points, _COLOURS[number % len(_COLOURS)], 2 * _SCALE, joint="curve")
            for point in points:
                _marker(self.pen, point, number)
        middle = (self.left + self.right) / 2
        self._text((middle, self.top - 9 * _SCALE), title, "ms", 14)
        self._text((middle, self.bottom + 36 * _SCALE), x_label, "ms", 12)

    def _axes(self) -> None:
        for value in self.x.ticks:
            x, _ = self._at(value, self.y.low)
            self.pen.line([(x, self.top), (x, self.bottom)], _GREY, _SCALE)
            self._text((x, self.bottom + 5 * _SCALE), f"{value:.4g}", "mt", 11)
        for value in self.y.ticks:
            _, y = self._at(self.x.low, value)
            self.pen.line([(self.left, y), (self.right, y)], _GREY, _SCALE)
            self._text((self.left - 6 * _SCALE, y), f"{value:.4g}", "rm", 11)
        self.pen.rectangle((self.left, self.top, self.right, self.bottom), None, _INK, _SCALE)

    def _at(self, x: float, y: float) -> Point:
        return (
            self.left + self.x.place(x) * (self.right - self.left),
            self.bottom - self.y.place(y) * (self.bottom - self.top),
        )

    def _text(self, place: Point, text: str, anchor: str, size: int) -> None:
        self.pen.text(place, text, _INK, ImageFont.load_default(_SCALE * size), anchor)


def _legend(names: Sequence[str], width: int) -> Image.Image:
    """Names with their lines and markers, in as many rows as they need, `width` final pixels."""
    font = ImageFont.load_default(_SCALE * 12)
    entry = _SCALE * 48 + math.ceil(max(font.getlength(name) for name in names))
    across = max(1, (_SCALE * width - 2 * _SCALE * 16) // entry)
    rows = -(-len(names) // across)
    image = Image.new("RGB", (_SCALE * width, _SCALE * (20 * rows + 14)), "white")
    pen = ImageDraw.Draw(image)
    for number, name in enumerate(names):
        x, y = _SCALE * 16 + number % across * entry, _SCALE * (14 + number // across * 20)
        ends = [(x, y), (x + 28 * _SCALE, y)]
        pen.line(ends, _COLOURS[number % len(_COLOURS)], 2 * _SCALE)
        _marker(pen, (x + 14 * _SCALE, y), number)
        pen.text((x + 34 * _SCALE, y), name, _INK, font, "lm")
    return image


def _marker(pen: ImageDraw.ImageDraw, place: Point, number: int) -> None:
    """The marker of the series of a number, centred."""
    (x, y), r = place, 4 * _SCALE
    colour = _COLOURS[number % len(_COLOURS)]
    # A colour that comes back has another marker.
    match _MARKERS[(number + number // len(_COLOURS)) % len(_MARKERS)]:
        case "circle":
            pen.ellipse((x - r, y - r, x + r, y + r), colour)
        case "square":
            pen.rectangle((x - r, y - r, x + r, y + r), colour)
        case "triangle":
            pen.polygon([(x - r, y + r), (x + r, y + r), (x, y - r)], colour)
        case "diamond":
            pen.polygon([(x - r, y), (x, y - r), (x + r, y), (x, y + r)], colour)
