"""What the load benchmark tells: figures as JSON, tables, and plots of lines."""

from __future__ import annotations

import math
import statistics
from collections import Counter
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any

import numpy as np
from PIL import Image, ImageDraw, ImageFont
from serve_load import Turn

from fewstep.bench.plot import COLOURS, GREY, INK, SCALE, write
from fewstep.bench.report import MB, seconds

WIDTH, HEIGHT = 860, 380  # of a plot, pixels
LEFT, RIGHT, TOP, BOTTOM = 76, 24, 76, 46
SETTLED = 0.2  # of a soak, before memory is told to grow or not
CLOSE = 8  # levels of 255: of pictures that are told apart by rounding alone
Points = Sequence[tuple[float, float]]


# ── figures ──


@dataclass
class Cell:
    """All turns of one side with so many clients."""

    side: str
    clients: int
    turns: list[Turn] = field(default_factory=list)

    def to_dict(self) -> dict[str, Any]:
        """Its figures as JSON."""
        turns = self.turns
        late = [seconds for turn in turns for _, seconds in turn.done]
        rates = [turn.in_time / turn.seconds for turn in turns]
        memory = [resident for turn in turns for _, resident, _ in turn.memory]
        errors: Counter[str] = sum((turn.errors for turn in turns), Counter())
        return {
            "side": self.side,
            "clients": self.clients,
            "pictures_per_second": statistics.median(rates),
            "range": [min(rates), max(rates)],
            "steps_per_second": statistics.median(turn.steps / turn.seconds for turn in turns),
            "latency": percentiles(late),
            "asked": sum(turn.asked for turn in turns),
            "pictures": len(late),
            "lost": sum(turn.lost for turn in turns),
            "strange": sum(turn.strange for turn in turns),
            "largest": max(turn.largest for turn in turns),
            "refused": sum(n for code, n in errors.items() if code.startswith("429")),
            "errors": dict(errors),
            "server_cores": statistics.median(turn.server_cores for turn in turns),
            "driver_cores": statistics.median(turn.driver_cores for turn in turns),
            "peak_bytes": max(memory, default=0),
        }


def percentiles(values: Sequence[float]) -> dict[str, float] | None:
    """Of seconds; None if there are none."""
    if not values:
        return None
    found = np.percentile(values, (50, 95, 99, 100))
    return dict(zip(("p50", "p95", "p99", "longest"), map(float, found), strict=True))


def soaked(side: str, turn: Turn) -> dict[str, Any]:
    """The figures of a long turn, by minute, and how its memory grows."""
    minutes = math.ceil(turn.seconds / 60)
    parts: list[list[float]] = [[] for _ in range(minutes)]
    for when, late in turn.done:
        if when < turn.seconds:
            parts[int(when // 60)].append(late)
    lasts = [min(60.0, turn.seconds - 60 * index) for index in range(minutes)]
    told = Cell(side, turn.clients, [turn]).to_dict()
    told |= {
        "seconds": turn.seconds,
        "memory": [[round(when, 1), size, device] for when, size, device in turn.memory],
        "bytes_per_minute": slope(turn, 1),
        "minutes": [
            {"pictures_per_second": len(part) / last, "latency": percentiles(part)}
            for part, last in zip(parts, lasts, strict=True)
        ],
    }
    if any(device for _, _, device in turn.memory):
        told["gpu_bytes_per_minute"] = slope(turn, 2)
    return told


def slope(turn: Turn, column: int) -> float | None:
    """Bytes a minute by which a column of memory grows, once it has settled; least squares."""
    kept = [entry for entry in turn.memory if entry[0] >= SETTLED * turn.seconds]
    if len(kept) < 3:
        return None
    when, size = ([entry[i] for entry in kept] for i in (0, column))
    return float(np.polyfit(when, size, 1)[0] * 60)


def agreement(first: Sequence[np.ndarray], other: Sequence[np.ndarray]) -> dict[str, Any]:
    """How far a side's pictures are from the first one's, all drawn alone."""
    same = [a.shape == b.shape for a, b in zip(first, other, strict=True)]
    if not all(same):
        return {"largest": None, "mean": None, "close": 0, "of": len(same)}
    gaps = [np.abs(a - b) for a, b in zip(first, other, strict=True)]
    return {
        "largest": max(int(gap.max()) for gap in gaps),
        "mean": float(np.mean([gap.mean() for gap in gaps])),
        "close": sum(int(gap.max()) <= CLOSE for gap in gaps),
        "of": len(gaps),
    }


# ── tables ──


def table(told: Mapping[str, Any]) -> str:
    """Markdown of all that is in a report."""
    parts = [load_table(told["load"])] if "load" in told else []
    parts += [soak_table(told["soak"])] if "soak" in told else []
    return "\n\n".join(parts) + "\n"


def load_table(load: Mapping[str, Any]) -> str:
    """A row for each number of clients and side."""
    # The first of each number of clients, whose speed the others' are compared with.
    firsts = {cell["clients"]: cell["pictures_per_second"] for cell in reversed(load["cells"])}
    lines = [
        "| clients | side | pictures/s (range) | first side x | p50 | p95 | p99 | errors "
        "| largest difference | strange | peak MB |",
        "|---:|---|---:|---:|---:|---:|---:|---:|---:|---:|---:|",
        *(row(cell, firsts[cell["clients"]]) for cell in load["cells"]),
        "",
        f"{load['rounds']} x {load['seconds']:g} s each; {load['orders']} different pictures, any "
        f"two at least {load['closest']:.0f} levels of 255 apart on average. {driver(load)}",
        *(agreement_line(name, found) for name, found in load["agreement"].items() if found),
        "",
        *command_lines(load),
    ]
    return "\n".join(lines)


def row(cell: Mapping[str, Any], first: float) -> str:
    """One line; `first` is how many pictures a second the first side drew."""
    low, high = cell["range"]
    late = cell["latency"]
    times = (
        ["", "", ""] if late is None else [seconds(late[name]) for name in ("p50", "p95", "p99")]
    )
    cells = [
        str(cell["clients"]),
        cell["side"],
        f"{cell['pictures_per_second']:.1f} ({low:.1f} to {high:.1f})",
        f"{first / cell['pictures_per_second']:.2f}" if cell["pictures_per_second"] else "",
        *times,
        ", ".join(f"{code}: {n}" for code, n in cell["errors"].items()) or "0",
        str(cell["largest"]),
        str(cell["strange"]),
        f"{cell['peak_bytes'] / MB:.0f}",
    ]
    return "| " + " | ".join(cells) + " |"


def driver(load: Mapping[str, Any]) -> str:
    """What the clients themselves cost."""
    most = max(cell["driver_cores"] for cell in load["cells"])
    return f"The clients took {most:.2f} of a core at most."


def agreement_line(name: str, tasks: Mapping[str, Any]) -> str:
    """How near a side's pictures are."""
    counts = ", ".join(f"{task} {found['close']} of {found['of']}" for task, found in tasks.items())
    return (
        f"Pictures that {name} and the first side, both alone, draw the same up to {CLOSE} levels: "
        f"{counts}."
    )


def command_lines(part: Mapping[str, Any]) -> list[str]:
    """How each side was started."""
    return [f"- {name}: `{command}`" for name, command in part["sides"].items()]


def soak_table(soak: Mapping[str, Any]) -> str:
    """A row for each side."""
    lines = [
        "| side | clients | minutes | pictures | pictures/s | p95 | errors | strange | peak MB "
        "| MB a minute |",
        "|---|---:|---:|---:|---:|---:|---:|---:|---:|---:|",
    ]
    for cell in soak["cells"]:
        growth, late = cell["bytes_per_minute"], cell["latency"]
        cells = [
            cell["side"],
            str(cell["clients"]),
            f"{cell['seconds'] / 60:g}",
            str(cell["pictures"]),
            f"{cell['pictures_per_second']:.1f}",
            "" if late is None else seconds(late["p95"]),
            ", ".join(f"{code}: {n}" for code, n in cell["errors"].items()) or "0",
            str(cell["strange"]),
            f"{cell['peak_bytes'] / MB:.0f}",
            "" if growth is None else f"{growth / MB:+.2f}",
        ]
        lines.append("| " + " | ".join(cells) + " |")
    return "\n".join([*lines, "", *command_lines(soak)])


# ── plots ──


def plots(told: Mapping[str, Any]) -> dict[str, Image.Image]:
    """Pictures of a report by name."""
    found = {}
    if "load" in told:
        cells = told["load"]["cells"]
        rates = by_side(cells, lambda cell: cell["pictures_per_second"])
        late = by_side(cells, lambda cell: cell["latency"] and cell["latency"]["p95"])
        clients = sorted({cell["clients"] for cell in cells})
        at = {float(place): str(number) for place, number in enumerate(clients)}
        found["throughput"] = lines("pictures a second by clients", placed(rates, clients), at)
        found["latency"] = lines(
            "seconds until 95 of 100 pictures were there, by clients",
            placed(late, clients),
            at,
            is_log=True,
        )
    if "soak" in told:
        cells = told["soak"]["cells"]
        sizes = {
            cell["side"]: [(when / 60, size / MB) for when, size, _ in cell["memory"]]
            for cell in cells
        }
        most = max(cell["seconds"] for cell in cells) / 60
        title = f"memory in MB by minutes, {cells[0]['clients']} clients"
        found["memory"] = lines(title, sizes, {x: f"{x:g}" for x in ticks(most)})
    return found


def by_side(
    cells: Sequence[Mapping[str, Any]], figure: Callable[[Mapping[str, Any]], float | None]
) -> dict[str, list[tuple[float, float]]]:
    """(clients, figure) of each side, where there is one."""
    found: dict[str, list[tuple[float, float]]] = {}
    for cell in cells:
        if (value := figure(cell)) is not None:
            found.setdefault(cell["side"], []).append((cell["clients"], value))
    return found


def placed(series: Mapping[str, Points], clients: Sequence[int]) -> dict[str, Points]:
    """Points at equal distances, one for each number of clients."""
    places = {number: float(place) for place, number in enumerate(clients)}
    return {n: sorted((places[int(x)], y) for x, y in points) for n, points in series.items()}


def ticks(most: float) -> list[float]:
    """Round numbers from 0 to `most`, about five."""
    rough = max(most, 1e-9) / 5
    power = 10.0 ** math.floor(math.log10(rough))
    step = next(power * n for n in (1, 2, 5, 10) if power * n >= rough)
    return [step * n for n in range(int(most / step + 1e-9) + 1)]


def decades(low: float, high: float) -> list[float]:
    """1, 3, 10, 30 and so on, from at most `low` to at least `high`."""
    first, last = math.floor(math.log10(low)), math.ceil(math.log10(high))
    found = [n * 10.0**e for e in range(first, last + 1) for n in (1, 3)]
    begin = max(i for i, value in enumerate(found) if value <= low)
    end = next(i for i, value in enumerate(found) if value >= high)
    return found[begin : max(end, begin + 1) + 1]


def lines(
    title: str, series: Mapping[str, Points], at: Mapping[float, str], is_log: bool = False
) -> Image.Image:
    """A plot of a line for each side, over the places that `at` labels."""
    image = Image.new("RGB", (SCALE * WIDTH, SCALE * HEIGHT), "white")
    pen = ImageDraw.Draw(image)
    write(pen, (16, 22), title, 14)
    values = [y for points in series.values() for _, y in points] or [1.0]
    marks = decades(min(values), max(values)) if is_log else ticks(1.08 * max(values))
    scale = math.log10 if is_log else float
    low, high = (scale(marks[0]), scale(max(marks[-1], max(values))))
    left, right = min(at, default=0.0), max(max(at, default=1.0), 1e-9)
    right = max([right, *(x for points in series.values() for x, _ in points)])

    def place(x: float, y: float) -> tuple[float, float]:
        across = (x - left) / max(right - left, 1e-9)
        up = (scale(y) - low) / max(high - low, 1e-9)
        return LEFT + across * (WIDTH - LEFT - RIGHT), HEIGHT - BOTTOM - up * (
            HEIGHT - TOP - BOTTOM
        )

    for mark in marks:
        y = place(left, mark)[1]
        pen.line([SCALE * v for v in (LEFT, y, WIDTH - RIGHT, y)], "#E4E4E4", SCALE)
        write(pen, (16, y), f"{mark:g}", 12)
    for x, text in at.items():
        write(pen, (place(x, marks[0])[0] - 4 * len(text), HEIGHT - BOTTOM + 16), text, 12)
    base = HEIGHT - BOTTOM
    pen.line([SCALE * v for v in (LEFT, base, WIDTH - RIGHT, base)], GREY, SCALE)
    legend = LEFT
    for index, (name, points) in enumerate(series.items()):
        colour = COLOURS[index % len(COLOURS)]
        legend = key(pen, legend, name, colour)
        draw_line(pen, [place(x, y) for x, y in points], colour, len(points) <= 24)
    return image.resize((WIDTH, HEIGHT), Image.Resampling.LANCZOS)


def key(pen: ImageDraw.ImageDraw, left: float, name: str, colour: str) -> float:
    """A side's colour and name above the plot; where the next one begins."""
    pen.rectangle([SCALE * v for v in (left, 45, left + 18, 51)], colour)
    write(pen, (left + 26, 48), name, 12)
    return left + 26 + ImageFont.load_default(12).getlength(name) + 28


def draw_line(pen: ImageDraw.ImageDraw, points: Points, colour: str, is_dotted: bool) -> None:
    """A line through points in pixels, with dots if they are few."""
    pen.line([(SCALE * x, SCALE * y) for x, y in points], colour, 2 * SCALE, joint="curve")
    for x, y in points if is_dotted else ():
        pen.ellipse([SCALE * v for v in (x - 4, y - 4, x + 4, y + 4)], colour, INK)
