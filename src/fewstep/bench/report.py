"""What was measured, and what follows from it: medians, ratios, fractions; JSON and tables.

A ratio is a peer's time over fewstep's, so that 2 means twice as fast. It is that of the medians;
its range is that of the pairs of runs that followed each other.
"""

from __future__ import annotations

import json
import statistics
from collections.abc import Mapping, Sequence
from dataclasses import asdict, dataclass, field, replace
from pathlib import Path
from typing import Any

import numpy as np

from ..checkpoints.config import replacing
from ..errors import CheckpointError
from .work import Work

FORMAT = 1  # of the JSON
MB = 1e6


@dataclass(frozen=True)
class Difference:
    """Of two outputs: the largest, and the norm of all over the reference's norm."""

    largest: float
    relative: float


@dataclass(frozen=True)
class Ratio:
    """A peer's figure over fewstep's, and its range."""

    median: float
    low: float
    high: float


@dataclass(frozen=True)
class Measured:
    """One side. `failed` says why there are no figures, or why they end early.

    `peak_bytes` is the most that its process had in memory (resident, mapped files included; on a
    GPU what was allocated there), from its start on, and `running_bytes` the same of the counted
    runs alone. `others` is how many cores other processes used in each run; `waiting_seconds` is
    CPU time that it used between its turns.
    """

    seconds: tuple[float, ...] = ()
    cpu_seconds: tuple[float, ...] = ()
    others: tuple[float, ...] = ()
    load_seconds: tuple[float, ...] = ()
    peak_bytes: int = 0
    running_bytes: int | None = None
    waiting_seconds: float = 0.0
    threads: int = 0
    versions: Mapping[str, str] = field(default_factory=dict)
    draws: str = ""
    failed: str | None = None

    @property
    def median(self) -> float:
        return statistics.median(self.seconds)

    def with_run(self, told: Mapping[str, float]) -> Measured:
        """With what one more run took."""
        return replace(
            self,
            seconds=(*self.seconds, told["seconds"]),
            cpu_seconds=(*self.cpu_seconds, told["cpu_seconds"]),
            others=(*self.others, *([told["others"]] if "others" in told else [])),
        )


@dataclass(frozen=True)
class Result:
    """One work on all sides; the first side is what the others are compared with."""

    work: Work
    cold: bool
    runs: int
    warmup: int
    sides: Mapping[str, Measured]
    operations: Mapping[str, float]
    ceilings: Mapping[str, Any]
    differences: Mapping[str, Difference] = field(default_factory=dict)
    errors: Mapping[str, Mapping[str, Difference]] = field(default_factory=dict)
    load: tuple[float, float] = (0.0, 0.0)  # of the machine, before and after

    @property
    def first(self) -> str:
        """The side that the others are compared with."""
        return next(iter(self.sides))

    @property
    def able(self) -> dict[str, Measured]:
        """The sides that have figures."""
        return {n: side for n, side in self.sides.items() if side.failed is None and side.seconds}

    def ratio(self, name: str) -> Ratio | None:
        """The time of a side over the first one's, None where one of them has no figures."""
        if not {name, self.first} <= set(self.able):
            return None
        return ratio(self.sides[self.first].seconds, self.sides[name].seconds)

    def memory_ratio(self, name: str) -> float | None:
        """The first side's peak over another's: below 1 it needs less."""
        if not {name, self.first} <= set(self.able):
            return None
        return self.sides[self.first].peak_bytes / self.sides[name].peak_bytes

    @property
    def ceiling(self) -> tuple[str, float]:
        """What this machine does most quickly, and its operations a second."""
        kinds = ("convolution", "product")
        best = max(kinds, key=lambda kind: self.ceilings[kind])
        return best, self.ceilings[best]

    @property
    def limit_seconds(self) -> float:
        """The time that the work would take if all of it ran at the ceiling."""
        return self.operations["total"] / self.ceiling[1]

    def fraction(self, name: str) -> float | None:
        """How much of the machine's limit a side reaches; None for cold starts."""
        if self.cold or name not in self.able:
            return None
        return self.limit_seconds / self.sides[name].median

    def to_dict(self) -> dict[str, Any]:
        """All of it as JSON, with what follows from it under `figures`."""
        figures = {
            name: {
                "median": side.median,
                "low": min(side.seconds),
                "high": max(side.seconds),
                "ratio": None if (found := self.ratio(name)) is None else asdict(found),
                "memory_ratio": self.memory_ratio(name),
                "fraction": self.fraction(name),
            }
            for name, side in self.able.items()
        }
        told = {"limit_seconds": self.limit_seconds, "ceiling": self.ceiling[0]}
        return {**asdict(self), **told, "figures": figures}

    @classmethod
    def from_dict(cls, stored: Mapping[str, Any]) -> Result:
        """The result of `to_dict`. Raises CheckpointError if it is none."""
        try:
            return cls(
                work=Work.from_dict(stored["work"]),
                sides={name: measured(side) for name, side in stored["sides"].items()},
                differences=differences(stored["differences"]),
                errors={name: differences(inner) for name, inner in stored["errors"].items()},
                load=(stored["load"][0], stored["load"][1]),
                **{n: stored[n] for n in ("cold", "runs", "warmup", "operations", "ceilings")},
            )
        except (KeyError, TypeError, ValueError, AttributeError, IndexError) as error:
            raise CheckpointError(f"not a result of `fewstep bench`: {error!r}") from error


def measured(stored: Mapping[str, Any]) -> Measured:
    """A side from JSON, where tuples are lists."""
    plain: dict[str, Any] = {n: tuple(v) if isinstance(v, list) else v for n, v in stored.items()}
    return Measured(**plain)


def differences(stored: Mapping[str, Any]) -> dict[str, Difference]:
    return {name: Difference(**inner) for name, inner in stored.items()}


# ── arithmetic ──


def ratio(ours: Sequence[float], theirs: Sequence[float]) -> Ratio:
    """`theirs` over `ours`: of the medians, and the range over the pairs."""
    pairs = [theirs_ / ours_ for ours_, theirs_ in zip(ours, theirs, strict=False)]
    return Ratio(statistics.median(theirs) / statistics.median(ours), min(pairs), max(pairs))


def difference(output: np.ndarray, reference: np.ndarray) -> Difference:
    """How far an output is from a reference; infinite where their shapes differ."""
    if output.shape != reference.shape:
        return Difference(float("inf"), float("inf"))
    gap = output.astype(np.float64) - reference
    size = float(np.linalg.norm(reference.astype(np.float64)))
    return Difference(float(np.abs(gap).max()), float(np.linalg.norm(gap)) / max(size, 1e-30))


# ── what is shown ──


def text(result: Result) -> str:
    """A table for a terminal, and what the limit is made of."""
    head = ["", "median", "range", "x", "range", "peak", "of limit", "max |d|", "rel. L2"]
    rows = [row(result, name) for name in result.able]
    widths = [max(len(line[i]) for line in [head, *rows]) for i in range(len(head))]
    lines = [title(result)]
    for line in [head, *rows]:
        first, *rest = (cell.rjust(w) for cell, w in zip(line, widths, strict=True))
        lines.append("  ".join([line[0].ljust(len(first)), *rest]).rstrip())
    lines += [f"{name}: {side.failed}" for name, side in result.sides.items() if side.failed]
    lines += [*limit_lines(result), *error_lines(result), noise_line(result)]
    return "\n".join(line for line in lines if line)


def title(result: Result) -> str:
    """What was measured and how often."""
    how = "cold start: a new process each" if result.cold else f"after {result.warmup} to warm up"
    threads = max((side.threads for side in result.sides.values()), default=0)
    counted = f"{result.runs} run{'s' * (result.runs != 1)}"
    return f"{result.work.title}; {threads} threads; {counted}, {how}"


def row(result: Result, name: str) -> list[str]:
    """One side's cells."""
    side, found, gap = result.sides[name], result.ratio(name), result.differences.get(name)
    fraction = result.fraction(name)
    return [
        name,
        seconds(side.median),
        f"{seconds(min(side.seconds))} to {seconds(max(side.seconds))}",
        "" if found is None else f"{found.median:.2f}",
        "" if found is None or name == result.first else f"{found.low:.2f} to {found.high:.2f}",
        f"{side.peak_bytes / MB:.0f} MB",
        "" if fraction is None else f"{fraction:.0%}",
        "" if gap is None else f"{gap.largest:.1e}",
        "" if gap is None else f"{gap.relative:.1e}",
    ]


def seconds(value: float) -> str:
    """Seconds, with three digits that mean something; milliseconds below a tenth."""
    if value < 0.1:
        return f"{1000 * value:.3g} ms"
    return f"{value:.3g} s" if value < 100 else f"{value:.0f} s"


def limit_lines(result: Result) -> list[str]:
    """How far the first side is from the machine's limit, and what that is."""
    kind, rate = result.ceiling
    giga = {name: result.ceilings[name] / 1e9 for name in ("product", "convolution", "copy")}
    lines = [
        f"limit: {result.operations['total'] / 1e9:.4g} GFLOP at {rate / 1e9:.4g} GFLOP/s (best "
        f"{kind}) take {seconds(result.limit_seconds)}; measured: convolution "
        f"{giga['convolution']:.4g}, product {giga['product']:.4g} GFLOP/s, copy "
        f"{giga['copy']:.3g} GB/s",
    ]
    fraction = result.fraction(result.first)
    if fraction is not None:
        lines.append(f"{result.first} reaches {fraction:.0%} of this machine's limit")
    return lines


def error_lines(result: Result) -> list[str]:
    """How far each side is from float32."""
    return [
        f"error against {name}: "
        + ", ".join(f"{side} {gap.relative:.1e}" for side, gap in sides.items())
        for name, sides in result.errors.items()
    ]


def noise_line(result: Result) -> str:
    """A warning if other processes worked meanwhile, or a side did between its turns."""
    others = [value for side in result.sides.values() for value in side.others]
    mean = statistics.fmean(others) if others else 0.0
    lines = [f"other processes used {mean:.1f} cores meanwhile"] if mean > 0.2 else []
    for name, side in result.able.items():
        if side.waiting_seconds > 0.1 * sum(side.cpu_seconds):
            lines.append(f"{name} worked {seconds(side.waiting_seconds)} between its turns")
    return "not quiet: " + "; ".join(lines) if lines else ""


# ── the file ──


def report(
    results: Sequence[Result], machine: Mapping[str, Any], command: str, date: str
) -> dict[str, Any]:
    """What a JSON file of a benchmark holds."""
    return {
        "format": FORMAT,
        "command": command,
        "date": date,
        "machine": dict(machine),
        "results": [result.to_dict() for result in results],
    }


def write_report(told: Mapping[str, Any], file: Path) -> None:
    """Writes the JSON file: all of it, or on failure nothing."""
    with replacing(file) as beside:
        beside.write_text(json.dumps(told, indent=2) + "\n", encoding="utf-8")
