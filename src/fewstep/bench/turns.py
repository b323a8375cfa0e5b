"""Sides in turns, A B A B: each in a process of its own, of which only one works at a time."""

from __future__ import annotations

import os
import tempfile
import time
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import ExitStack, contextmanager
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import numpy as np

from ..errors import RequestError
from .machine import available_memory
from .process import Child, SideFailed
from .report import Difference, Measured, Result, difference
from .sides import Side, side_of
from .work import Setting, Work

PAUSE = 0.05  # seconds between turns, in which threads that spin come to rest
REFERENCES = ("fewstep@float32", "diffusers@float32")
ROOM = 1.2  # bytes in memory, over those of the weights


@dataclass(frozen=True)
class How:
    """How a work is measured; `threads` 0 leaves their number to torch."""

    runs: int = 10
    warmup: int = 2
    threads: int = 0
    cold: bool = False
    error: bool = False
    cache: Path = Path()
    tell: Callable[[str], None] = lambda line: None

    def __post_init__(self) -> None:
        for name, least in (("runs", 1), ("warmup", 1), ("threads", 0)):
            if getattr(self, name) < least:
                raise RequestError(
                    f"{name} {getattr(self, name)}: must be at least {least}; give a larger number"
                )


# ── a work ──


def measure(work: Work, sides: Sequence[Side], how: How) -> Result:
    """A work on every side; a side that cannot do it is in the result with the reason."""
    if how.error and (work.part == "picture" or work.dtype == "float32"):
        raise RequestError(
            f"error: compares part unet or vae in bfloat16 or float16 with float32, got part "
            f"{work.part!r} in {work.dtype}; leave it out"
        )
    if len({side.name for side in sides}) < len(sides):
        raise RequestError("peer: one is named twice; name each once")
    load = os.getloadavg() if hasattr(os, "getloadavg") else (0.0,)
    with tempfile.TemporaryDirectory(prefix="fewstep-bench-") as name:
        return Measurement(work, sides, how, Path(name)).run(load[0])


class Measurement:
    """One work's processes and files."""

    def __init__(self, work: Work, sides: Sequence[Side], how: How, folder: Path) -> None:
        self.work, self.how, self.folder = work, how, folder
        self.sides = list(sides)
        self.found = {side.name: Measured(failed=side.refusal(work)) for side in sides}
        self.outputs: dict[str, Path] = {}

    @property
    def able(self) -> list[Side]:
        """The sides that have not failed."""
        return [side for side in self.sides if self.found[side.name].failed is None]

    def run(self, load: float) -> Result:
        how = self.how
        how.tell(f"preparing {self.work.title}")
        with Child("machine", self.folder, how.threads) as machine:
            ready = told(machine, "prepare", work=vars(self.work), cache=str(how.cache))
            self.setting = Setting.from_dict(ready["setting"])
            self.work = self.setting.work
            before = self.ceilings(machine)
            if how.cold:
                self.cold()
            else:
                self.check_memory(ready["weights"])
                self.warm()
            ceilings = higher(before, self.ceilings(machine))
        after = os.getloadavg()[0] if hasattr(os, "getloadavg") else 0.0
        return Result(
            work=self.work,
            cold=how.cold,
            runs=how.runs,
            warmup=how.warmup,
            sides=self.found,
            operations=ready["operations"],
            ceilings=ceilings,
            differences=self.differences(),
            errors=self.errors() if how.error else {},
            load=(load, after),
        )

    def ceilings(self, machine: Child) -> dict[str, Any]:
        """What the machine can do now."""
        self.how.tell("measuring the machine")
        how = {"dtype": self.work.dtype, "device": self.work.device, "threads": self.how.threads}
        return told(machine, "ceilings", **how)

    def check_memory(self, weights: float) -> None:
        """Raises RequestError unless all sides fit into memory at once."""
        there = available_memory()
        itemsize = {"float32": 4, "float16": 2, "bfloat16": 2}
        own = itemsize[self.work.dtype]
        sizes = [itemsize[side.dtype_of(self.work)] / own for side in self.able]
        needed = ROOM * weights * sum(sizes)
        if self.work.device == "cpu" and there is not None and there < needed:
            raise RequestError(
                f"peer: {len(sizes)} sides need about {needed / 1e9:.1f} GB of memory at once, and "
                f"{there / 1e9:.1f} GB are free; name fewer, or give --cold"
            )

    # ── one side ──

    @contextmanager
    def trying(self, side: Side) -> Iterator[None]:
        """Notes the reason if the side fails in the block."""
        try:
            yield
        except SideFailed as failure:
            found = self.found[side.name]
            self.found[side.name] = replace(found, failed=str(failure))

    def load(self, child: Child, side: Side) -> dict[str, Any]:
        """Loads a side in its process."""
        setting = replace(self.setting, dtype=side.dtype_of(self.work))
        return child.ask(
            "load", loader=side.loader, setting=setting.to_dict(), threads=self.how.threads
        )

    def started(self, stack: ExitStack, side: Side) -> tuple[Child, dict[str, Any]]:
        """A side's process that has loaded it, and nothing else; what it says of that."""
        self.how.tell(f"{side.name}: loading and warming up")
        for _ in range(2):
            child = stack.enter_context(Child(side.name, self.folder, self.how.threads))
            told = self.load(child, side)
            if not told["converted"]:
                return child, told
            child.end()  # it held more than a run needs
        raise SideFailed("it converts its networks each time; see whether --cache can be written")

    def warmed(self, child: Child, told: Mapping[str, Any], side: Side) -> None:
        """Runs a side as often as is asked for, and keeps the output of the last."""
        for _ in range(self.how.warmup - 1):
            child.ask("run", seed=0)
        file = self.folder / f"{side.name}.npy"
        kept = child.ask("output", seed=0, file=str(file))
        if not kept["finite"]:
            raise SideFailed("its output holds NaN or infinity")
        self.outputs[side.name] = file
        whole = child.ask("peak")["bytes"]
        child.ask("forget_peak")
        self.found[side.name] = Measured(
            load_seconds=(told["seconds"],),
            peak_bytes=whole,
            threads=told["threads"],
            versions=told["versions"],
            draws=told["draws"],
        )

    # ── all sides ──

    def warm(self) -> None:
        """Fills `found` by long-lived processes that take turns."""
        with ExitStack() as stack:
            children = {}
            for side in self.able:
                with self.trying(side):
                    child, told = self.started(stack, side)
                    children[side.name] = child
                    self.warmed(child, told, side)
            for name in children.keys() - {side.name for side in self.able}:
                children[name].end()  # the others need its memory
            for index in range(self.how.runs):
                self.how.tell(f"run {index + 1} of {self.how.runs}")
                for side in self.able:
                    with self.trying(side):
                        time.sleep(PAUSE)
                        told = children[side.name].ask("run", seed=index)
                        self.found[side.name] = self.found[side.name].with_run(told)
            for side in self.able:
                with self.trying(side):
                    self.note_peak(children[side.name], side)

    def note_peak(self, child: Child, side: Side) -> None:
        told, found = child.ask("peak"), self.found[side.name]
        self.found[side.name] = replace(
            found,
            peak_bytes=max(found.peak_bytes, told["bytes"]),
            running_bytes=told["bytes"],
            waiting_seconds=told["waiting"],
        )

    def cold(self) -> None:
        """Fills `found` by new processes, from their start to the first result.

        A round before the counted ones fills the disk's cache.
        """
        for index in range(self.how.runs + 1):
            self.how.tell(f"cold start {index} of {self.how.runs}")
            for side in self.able:
                with self.trying(side):
                    self.cold_run(side, counted=index > 0)

    def cold_run(self, side: Side, *, counted: bool) -> None:
        began = time.perf_counter()
        with Child(side.name, self.folder, self.how.threads) as child:
            told = self.load(child, side)
            run = child.ask("run", seed=0)
            run["seconds"] = time.perf_counter() - began
            peak = child.ask("peak")["bytes"]
        if not counted:
            return
        found = self.found[side.name].with_run(run)
        self.found[side.name] = replace(
            found,
            load_seconds=(*found.load_seconds, told["seconds"]),
            peak_bytes=max(found.peak_bytes, peak),
            threads=told["threads"],
            versions=told["versions"],
            draws=told["draws"],
        )

    # ── what came out ──

    def differences(self) -> dict[str, Difference]:
        """How far each side's output is from the first one's, where both drew the same noise."""
        if self.sides[0].name not in self.outputs:
            return {}
        first = self.found[self.sides[0].name].draws
        ours = read(self.outputs[self.sides[0].name])
        return {
            name: difference(read(file), ours)
            for name, file in self.outputs.items()
            if file != self.outputs[self.sides[0].name]
            and (self.work.part != "picture" or self.found[name].draws == first)
        }

    def errors(self) -> dict[str, dict[str, Difference]]:
        """How far each side's output is from fewstep's and diffusers' in float32."""
        errors: dict[str, dict[str, Difference]] = {}
        for reference in map(side_of, REFERENCES):
            if reference.refusal(self.work):
                continue
            self.how.tell(f"{reference.name}: the reference")
            file = self.folder / f"reference-{reference.name}.npy"
            with Child(reference.name, self.folder, self.how.threads) as child:
                try:
                    self.load(child, reference)
                    child.ask("output", seed=0, file=str(file))
                except SideFailed as failure:
                    self.how.tell(f"{reference.name}: {failure}")
                    continue
            exact = read(file)
            errors[reference.name] = {
                name: difference(read(output), exact) for name, output in self.outputs.items()
            }
        return errors


def told(child: Child, job: str, **values: Any) -> dict[str, Any]:
    """The answer of a process without which nothing can be measured."""
    try:
        return child.ask(job, **values)
    except SideFailed as failure:
        reason = str(failure)
        if failure.on_purpose:
            raise RequestError(reason.partition(": ")[2]) from None
        raise RuntimeError(f"{job}: {reason}") from failure


def read(file: Path) -> np.ndarray:
    """An output that a side kept."""
    found: np.ndarray = np.load(file, allow_pickle=False)
    return found


def higher(first: Mapping[str, Any], second: Mapping[str, Any]) -> dict[str, Any]:
    """The higher ceilings of two measurements."""
    rates = ("product", "convolution", "copy")
    return {**first, **{name: max(first[name], second[name]) for name in rates}}
