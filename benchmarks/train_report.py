"""What the training benchmark says of its runs: figures for JSON, and Markdown of them."""

from __future__ import annotations

import statistics
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any

GIB = 2**30
SIDES = ("script", "fewstep")


@dataclass(frozen=True)
class Side:
    """One side's figures over all of its runs, warm-up steps left out."""

    seconds: list[float]  # of each step
    samples_per_second: float  # from the median
    peak_gib: float
    loss: float
    trained: int
    parts: dict[str, float]  # mean seconds a step


def side_of(results: Sequence[Mapping[str, Any]], warmup: int, batch: int) -> Side:
    """The figures of the runs of one side; a step's time is from the end of the one before it."""
    seconds = [
        later - earlier
        for result in results
        for earlier, later in zip(
            result["stamps"][warmup - 1 :], result["stamps"][warmup:], strict=False
        )
    ]
    steps = [parts for result in results for parts in result["parts"][warmup:]]
    names = sorted({name for parts in steps for name in parts})
    means = {n: statistics.fmean(parts.get(n, 0.0) for parts in steps) for n in names}
    if means:
        means["other"] = max(0.0, statistics.fmean(seconds) - sum(means.values()))
    losses = [loss for result in results for loss in result["losses"][warmup:]]
    return Side(
        seconds,
        batch / statistics.median(seconds),
        max(result["peak"] for result in results) / GIB,
        statistics.fmean(losses),
        results[0]["trained"],
        means,
    )


@dataclass(frozen=True)
class Comparison:
    """Both sides, and what caching cost."""

    script: Side
    fewstep: Side
    caching_seconds: float
    cached_pictures: int
    threads: int

    def __post_init__(self) -> None:
        if self.script.trained != self.fewstep.trained:
            raise SystemExit(
                f"error: the script trains {self.script.trained:,} parameters and fewstep "
                f"{self.fewstep.trained:,}: this is not the same work, so no ratio is given"
            )

    @property
    def speed(self) -> float:
        """Samples per second, fewstep's over the script's."""
        return self.fewstep.samples_per_second / self.script.samples_per_second

    @property
    def memory(self) -> float:
        """Peak memory, fewstep's over the script's."""
        return self.fewstep.peak_gib / self.script.peak_gib

    @property
    def caching_steps(self) -> float:
        """How many of fewstep's own steps take as long as caching did."""
        return self.caching_seconds / statistics.median(self.fewstep.seconds)

    @property
    def paid_back(self) -> float | None:
        """After how many steps caching has saved what it cost; None if it never does."""
        saved = statistics.median(self.script.seconds) - statistics.median(self.fewstep.seconds)
        return self.caching_seconds / saved if saved > 0 else None


def markdown(title: str, compared: Comparison) -> str:
    """Two tables and two sentences."""
    both = (compared.script, compared.fewstep)
    rows = [
        ["samples a second", *(f"{s.samples_per_second:.3g}" for s in both), ratio(compared.speed)],
        ["seconds a step, median (range)", *(spread(s.seconds) for s in both), ""],
        ["peak memory, GiB", *(f"{s.peak_gib:.2f}" for s in both), ratio(compared.memory)],
        ["trained parameters", *(f"{s.trained:,}" for s in both), ""],
        ["mean loss", *(f"{s.loss:.4g}" for s in both), ""],
    ]
    tables = [table(["", *SIDES, "fewstep / script"], rows)]
    if compared.script.parts:
        tables.append(table(["seconds a step", *SIDES, "difference"], part_rows(compared)))
    return "\n".join([f"### {title}", "", *tables, caching(compared)])


def part_rows(compared: Comparison) -> list[list[str]]:
    """Where the time goes: each part on both sides, the longest of the script's first."""
    ours, theirs = compared.fewstep.parts, compared.script.parts
    names = sorted({*ours, *theirs} - {"other"}, key=lambda n: -theirs.get(n, 0.0))
    rows = [
        [name, cell(theirs, name), cell(ours, name), difference(theirs, ours, name)]
        for name in [*names, "other"]
    ]
    totals = [sum(theirs.values()), sum(ours.values())]
    return [*rows, ["all", *(f"{t:.3f}" for t in totals), f"{totals[1] - totals[0]:+.3f}"]]


def cell(parts: Mapping[str, float], name: str) -> str:
    """Seconds and share of a part, or nothing where it does not occur."""
    if name not in parts:
        return ""
    return f"{parts[name]:.3f} ({parts[name] / sum(parts.values()):.0%})"


def difference(theirs: Mapping[str, float], ours: Mapping[str, float], name: str) -> str:
    return f"{ours.get(name, 0.0) - theirs.get(name, 0.0):+.3f}"


def caching(compared: Comparison) -> str:
    """What the cache cost, in words."""
    paid = compared.paid_back
    back = "is not paid back" if paid is None else f"is paid back after {paid:.1f} steps"
    return (
        f"Caching {compared.cached_pictures} pictures and their captions took "
        f"{compared.caching_seconds:.2f} s, as long as {compared.caching_steps:.1f} of fewstep's "
        f"steps; against the script it {back}.\n"
    )


def ratio(value: float) -> str:
    return f"**{value:.2f}**"


def spread(seconds: Sequence[float]) -> str:
    return f"{statistics.median(seconds):.3f} ({min(seconds):.3f} to {max(seconds):.3f})"


def table(head: Sequence[str], rows: Sequence[Sequence[str]]) -> str:
    """Markdown, with a line after it."""
    lines = [head, ["---"] + ["---:"] * (len(head) - 1), *rows]
    return "\n".join("| " + " | ".join(line) + " |" for line in lines) + "\n"
