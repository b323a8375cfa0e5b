"""The table of docs/performance.md: named works, one after another, with their targets.

    python benchmarks/speed.py --list
    python benchmarks/speed.py                        # all works for the CPU; goes on where it was
    python benchmarks/speed.py --gpu                  # those for a GPU
    python benchmarks/speed.py --only unet-512-bf16 --again

Each work is a run of `fewstep bench`, whose command the table tells. What was measured is kept in a
JSON file after every work, and what is in it is not measured again. Nothing else should run.
"""

from __future__ import annotations

import argparse
import json
import sys
from collections.abc import Sequence
from dataclasses import dataclass
from datetime import datetime, timezone
from pathlib import Path
from typing import Any

from fewstep.bench.machine import machine
from fewstep.bench.report import Result, seconds, text, write_report
from fewstep.bench.sides import FEWSTEP, side_of
from fewstep.bench.turns import How, measure
from fewstep.bench.work import Work
from fewstep.checkpoints.config import replacing
from fewstep.errors import FewstepError

DOCS = Path(__file__).parents[1] / "docs"
PEER = "diffusers"
HEAD = "| work | side | median (range) | x (range) | peak GB | of limit | rel. L2 | targets |"


# ── what is wanted ──


@dataclass(frozen=True)
class Target:
    """A bound of a figure, told in the row of `side`.

    `kind`: "ratio" (at least), "memory" (fewstep's peak over the side's, at most), "fraction" (of
    the limit, at least), "error" (relative, against float32, at most), "largest" (difference, at
    most), "seconds" and "seconds a picture" (at most).
    """

    kind: str
    bound: float
    side: str = PEER

    def figure(self, result: Result) -> float | None:
        """What was measured, None if that failed."""
        if self.side not in result.able or FEWSTEP.name not in result.able:
            return None
        match self.kind:
            case "ratio":
                return None if (found := result.ratio(self.side)) is None else found.median
            case "memory":
                return result.memory_ratio(self.side)
            case "fraction":
                return result.fraction(self.side)
            case "error":
                gaps = [sides.get(self.side) for sides in result.errors.values()]
                return max((gap.relative for gap in gaps if gap), default=None)
            case "largest":
                gap = result.differences.get(self.side)
                return None if gap is None else gap.largest
            case "seconds":
                return result.sides[self.side].median
            case _:
                return result.sides[self.side].median / result.work.batch

    def verdict(self, result: Result) -> str:
        """The bound, and whether it is met or by how much not."""
        sign, figure = "≥" if self.kind in ("ratio", "fraction") else "≤", self.figure(result)
        told = f"{self.kind} {sign} {shown(self.kind, self.bound)}"
        if figure is None:
            return f"{told}: not measured"
        met = figure >= self.bound if sign == "≥" else figure <= self.bound
        if met:
            return f"{told}: met"
        return f"{told}: **{shown(self.kind, abs(figure - self.bound))} short**"


def shown(kind: str, value: float) -> str:
    """A figure of a kind."""
    match kind:
        case "ratio" | "memory":
            return f"{value:.2f}"
        case "fraction":
            return f"{value:.0%}"
        case "error" | "largest":
            return f"{value:.1e}"
        case _:
            return seconds(value)


MEMORY = Target("memory", 1.0)


@dataclass(frozen=True)
class Entry:
    """A named work: who does it, how often, and what is wanted of it."""

    name: str
    work: Work
    targets: tuple[Target, ...]
    peers: tuple[str, ...] = (PEER,)
    runs: int = 5
    cold: bool = False
    error: bool = False

    def command(self) -> str:
        """The command that measures it."""
        work, plain = self.work, Work()
        words = ["fewstep bench"]
        for name in ("model", "task", "part", "steps", "batch", "dtype", "device"):
            if (value := getattr(work, name)) != getattr(plain, name):
                words += [f"--{name} {value}"]
        words += [f"--size {work.size[0]}x{work.size[1]}"] if work.size else []
        words += [f"--peer {','.join(self.peers)}"] if self.peers != (PEER,) else []
        words += [f"--runs {self.runs}"]
        return " ".join([*words, *["--cold"] * self.cold, *["--error"] * self.error])


def ratio(bound: float, side: str = PEER) -> Target:
    return Target("ratio", bound, side)


def sized(model: str, side: int, **more: Any) -> Work:
    return Work(model, size=(side, side), **more)


BF16 = {"dtype": "bfloat16"}
UNET = {"part": "unet"}
CPU = (
    Entry("embedded", Work(), (ratio(2.0), MEMORY), runs=30),
    # Apart: ONNX Runtime's threads go on spinning into the next one's turn.
    Entry("embedded-exported", Work(), (), ("openvino", "onnxruntime"), runs=10),
    *(
        Entry(f"embedded-{steps}-steps", Work(steps=steps), (MEMORY,), runs=10)
        for steps in (1, 2, 8)
    ),
    Entry("embedded-batch-4", Work(batch=4), (MEMORY,), runs=10),
    Entry("embedded-image-to-image", Work(task="image-to-image"), (MEMORY,), runs=10),
    Entry("embedded-cold", Work(), (ratio(2.0),), cold=True),
    Entry(
        "unet-256-fp32",
        sized("sd15", 256, **UNET),
        (ratio(1.7), MEMORY),
        (PEER, "openvino"),
    ),
    Entry("unet-256-bf16", sized("sd15", 256, **UNET, **BF16), (ratio(1.5), MEMORY), error=True),
    Entry("unet-512-fp32", sized("sd15", 512, **UNET), (MEMORY,)),
    Entry(
        "unet-512-bf16",
        sized("sd15", 512, **UNET, **BF16),
        (
            ratio(1.4),
            ratio(1.0, "openvino"),
            Target("error", 1.5e-2, "fewstep"),
            Target("fraction", 0.75, "fewstep"),
            MEMORY,
        ),
        (PEER, "openvino"),
        error=True,
    ),
    Entry("unet-768-bf16", sized("sd15", 768, **UNET, **BF16), (MEMORY,), runs=3),
    Entry("unet-xl-512-bf16", sized("sdxl", 512, **UNET, **BF16), (MEMORY,), runs=3),
    Entry("vae-512-fp32", sized("sd15", 512, part="vae"), (MEMORY,), runs=3),
    Entry("vae-512-bf16", sized("sd15", 512, part="vae", **BF16), (MEMORY,), runs=3),
    Entry("controlnet-256-bf16", sized("sd15", 256, task="controlnet", steps=2, **BF16), (MEMORY,)),
    Entry("lora-256-bf16", sized("sd15", 256, task="lora", steps=2, **BF16), (MEMORY,)),
    Entry(
        "picture-512-fp32",
        sized("sd15", 512),
        (ratio(1.25), Target("largest", 1e-4), MEMORY),
        runs=3,
    ),
    Entry(
        "picture-512-bf16",
        sized("sd15", 512, **BF16),
        (ratio(1.3), ratio(2.2, "diffusers@float32"), MEMORY),
        (PEER, "diffusers@float32"),
        runs=3,
    ),
    Entry("picture-256-cold", sized("sd15", 256, steps=1), (ratio(2.0),), runs=3, cold=True),
)
GPU = {"dtype": "bfloat16", "device": "cuda"}
BOTH = (PEER, "diffusers-compiled")
ON_GPU = (
    Entry(
        "gpu-512",
        sized("sd15", 512, **GPU),
        (ratio(4.0), ratio(1.5, BOTH[1]), Target("seconds", 0.020, "fewstep")),
        BOTH,
        runs=20,
    ),
    Entry(
        "gpu-512-batch",
        sized("sd15", 512, batch=8, **GPU),
        (Target("seconds a picture", 0.015, "fewstep"),),
        runs=10,
    ),
    Entry(
        "gpu-1024-xl",
        sized("sdxl", 1024, **GPU),
        (Target("seconds", 0.095, "fewstep"),),
        runs=10,
    ),
)


# ── the table ──


def table(entries: Sequence[Entry], stored: dict[str, Any]) -> str:
    """Markdown: a row for each side of each work, then the commands and the machine."""
    lines = [HEAD, "|---|---|---:|---:|---:|---:|---:|---|"]
    for entry in entries:
        kept = stored.get(entry.name, {"failed": "not measured yet"})
        if "failed" in kept:
            lines.append(f"| {entry.name} | {kept['failed']} |" + " |" * 6)
            continue
        result = Result.from_dict(kept["result"])
        lines += [row(entry, result, name) for name in result.sides]
    commands = [f"{entry.name}: `{entry.command()}`" for entry in entries]
    return "\n".join([*lines, "", *machines(entries, stored), "", *bullets(commands)]) + "\n"


def bullets(lines: Sequence[str]) -> list[str]:
    return [f"- {line}" for line in lines]


def row(entry: Entry, result: Result, name: str) -> str:
    """One side's line."""
    side, first = result.sides[name], name == result.first
    targets = "; ".join(t.verdict(result) for t in entry.targets if t.side == name)
    label = entry.name if first else ""
    if name not in result.able:
        reason = (side.failed or "no figures").replace("|", "/")
        return f"| {label} | {name} | {reason} | | | | | {targets} |"
    found, fraction, gap = result.ratio(name), result.fraction(name), result.differences.get(name)
    times = f"{seconds(side.median)} ({seconds(min(side.seconds))} to {seconds(max(side.seconds))})"
    cells = [
        label,
        name,
        times,
        ""
        if first or found is None
        else f"{found.median:.2f} ({found.low:.2f} to {found.high:.2f})",
        f"{side.peak_bytes / 1e9:.2f}",
        "" if fraction is None else f"{fraction:.0%}",
        "" if gap is None else f"{gap.relative:.1e}",
        targets,
    ]
    return "| " + " | ".join(cells) + " |"


def machines(entries: Sequence[Entry], stored: dict[str, Any]) -> list[str]:
    """What it was measured on, once for each machine and set of versions."""
    told: dict[str, list[str]] = {}
    for entry in entries:
        if "result" in (kept := stored.get(entry.name, {})):
            told.setdefault(about(kept), []).append(entry.name)
    if len(told) < 2:
        return list(told)
    return [f"{', '.join(names)}: {line}" for line, names in told.items()]


def about(kept: dict[str, Any]) -> str:
    """One line on a machine."""
    on, ceilings = kept["machine"], kept["result"]["ceilings"]
    versions = ", ".join(f"{name} {version}" for name, version in on["versions"].items())
    where = ceilings.get("gpu") or f"{on['processor']} ({', '.join(on['flags'])})"
    memory = "" if on["memory_bytes"] is None else f", {on['memory_bytes'] / 2**30:.0f} GiB"
    return f"{where}, {on['cores']} cores{memory}; Python {on['python']}, {versions}."


def update(document: Path, mark: str, made: str) -> None:
    """Puts a table between two markers of a document: all of it, or on failure nothing."""
    begin, end = f"<!-- {mark}: begin -->\n", f"<!-- {mark}: end -->"
    before = document.read_text(encoding="utf-8")
    if before.count(begin) != 1 or before.count(end) != 1:
        raise SystemExit(
            f"error: {document}: must hold one line {begin.strip()} and one {end}; "
            "write them where the table is to stand"
        )
    head, _, rest = before.partition(begin)
    with replacing(document) as beside:
        beside.write_text(head + begin + made + end + rest.partition(end)[2], encoding="utf-8")


# ── the runs ──


def parsed(arguments: Sequence[str] | None) -> argparse.Namespace:
    parser = argparse.ArgumentParser(description=__doc__.partition("\n")[0])
    add = parser.add_argument
    add("--gpu", action="store_true", help="the works for a GPU")
    add("--only", help="names with commas between; default: all")
    add("--again", action="store_true", help="measure what the JSON file holds already, too")
    add("--runs", type=int, help="of each side; default: as listed")
    add("--threads", type=int, default=0, help="of each side; default: its own choice")
    add("--cache", type=Path, default=Path("~/.cache/fewstep/bench"), help="models of full size")
    add("--json", type=Path, help="default: docs/performance.json, docs/performance-gpu.json")
    add("--document", type=Path, default=DOCS / "performance.md", help="whose table is written")
    add("--list", action="store_true", help="print names and commands, measure nothing")
    options = parser.parse_args(arguments)
    entries = ON_GPU if options.gpu else CPU
    names = [entry.name for entry in entries]
    wanted = names if options.only is None else options.only.split(",")
    if unknown := sorted(set(wanted) - set(names)):
        parser.error(f"--only {unknown[0]}: is no such work; give some of {', '.join(names)}")
    options.entries, options.wanted = entries, wanted
    options.json = options.json or DOCS / f"performance{'-gpu' * options.gpu}.json"
    return options


def main(arguments: Sequence[str] | None = None) -> None:
    options = parsed(arguments)
    if options.list:
        print("\n".join(f"{entry.name:<18}{entry.command()}" for entry in options.entries))
        return
    stored = json.loads(options.json.read_text()) if options.json.exists() else {}
    mark = f"speed{'-gpu' * options.gpu}"
    update(options.document, mark, table(options.entries, stored))  # fails before, not after
    for entry in options.entries:
        if entry.name not in options.wanted:
            continue
        if "result" in stored.get(entry.name, {}) and not options.again:
            print(f"{entry.name}: is in {options.json}; --again measures it again")
            continue
        stored[entry.name] = measured(entry, options)
        write_report(stored, options.json)
        update(options.document, mark, table(options.entries, stored))


def measured(entry: Entry, options: argparse.Namespace) -> dict[str, Any]:
    """The result of one work with machine and date, or why there is none."""
    began = datetime.now(timezone.utc).isoformat(timespec="seconds")
    told = {"command": entry.command(), "date": began, "machine": machine()}
    how = How(
        runs=options.runs or entry.runs,
        threads=options.threads,
        cold=entry.cold,
        error=entry.error,
        cache=options.cache.expanduser().absolute(),
        tell=lambda line: print(f"{entry.name}: {line}", file=sys.stderr, flush=True),
    )
    try:
        result = measure(entry.work, [FEWSTEP, *map(side_of, entry.peers)], how)
    except (FewstepError, RuntimeError) as error:
        print(f"{entry.name}: {error}", flush=True)
        return {**told, "failed": " ".join(str(error).split())}
    print(text(result), flush=True)
    return {**told, "result": result.to_dict()}


if __name__ == "__main__":
    main()
