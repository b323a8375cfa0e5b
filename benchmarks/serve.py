"""Load: many clients at once of `fewstep serve`, beside servers that draw one picture at a time.

    python benchmarks/serve.py --quick             # a minute, to see whether it runs
    python benchmarks/serve.py                     # 1, 8, 32, 128 clients of each side, in turns
    python benchmarks/serve.py --minutes 10        # memory of one side, after the same beginning
    python benchmarks/serve.py --gpu --model sd15

Clients ask for pictures of one to eight steps, from texts, from pictures and with masks, and ask
again as soon as they have one. Every answer is compared with the picture that the same server drew
of the same request when nobody else was there. All servers are up at once, and one at a time is
asked. Caches are off: each picture is drawn. Figures go to a JSON file, a table and plots. Nothing
else should run.
"""

from __future__ import annotations

import argparse
import asyncio
import json
import shlex
import subprocess
import sys
import tempfile
import time
from collections.abc import Sequence
from contextlib import ExitStack
from dataclasses import dataclass, field
from datetime import datetime, timezone
from pathlib import Path
from typing import Any

import numpy as np
from serve_load import Turn, closest, drawn_alone, get, orders, take_turn
from serve_report import Cell, agreement, load_table, plots, soak_table, soaked, table
from speed import update

from fewstep import EMBEDDED
from fewstep.bench.machine import machine
from fewstep.bench.process import LINES, environment
from fewstep.bench.report import FORMAT, write_report
from fewstep.checkpoints.config import replacing
from fewstep.errors import FewstepError

HERE = Path(__file__).parent
DOCS = HERE.parent / "docs"
FEWSTEP, UNBATCHED, PEER = "fewstep", "fewstep, one at a time", "diffusers, locked"
SIDES = {"fewstep": FEWSTEP, "unbatched": UNBATCHED, "diffusers": PEER}
PAUSE = 1.0  # seconds between turns, in which threads that spin come to rest
WARM = 2.0  # seconds of all clients before anything is counted
BATCH = 8


# ── servers ──


class Server:
    """The process of a side, once it draws; what it says goes to a file."""

    def __init__(self, name: str, command: Sequence[str], folder: Path, threads: int) -> None:
        self.name, self.log = name, folder / f"{name}.log"
        with self.log.open("w") as log:
            self.process = subprocess.Popen(
                [sys.executable, *command],
                stdout=subprocess.PIPE,
                stderr=log,
                text=True,
                env=environment(threads),
            )

    def __enter__(self) -> Server:
        return self

    def __exit__(self, *_: Any) -> None:
        self.process.terminate()
        try:
            self.process.wait(60)
        except subprocess.TimeoutExpired:
            self.process.kill()
        self.process.communicate()

    def wait(self) -> str:
        """Its address. Raises RuntimeError with what it said if it ends before."""
        assert self.process.stdout is not None
        line = self.process.stdout.readline()
        if " draws at " not in line:
            said = self.log.read_text(errors="replace").splitlines()[-LINES:]
            raise RuntimeError(f"{self.name}: did not start: {'; '.join(said) or line}")
        return line.rpartition(" draws at ")[2].strip()


def commands(options: argparse.Namespace) -> dict[str, list[str]]:
    """How each side that is asked for is started."""
    given = ["--model", str(options.folder), "--device", options.device, "--dtype", options.dtype]
    given += ["--threads", str(options.threads)] if options.threads else []
    given += ["--port", "0"]
    most = str(2 * max(*options.clients, options.at))
    # All clients come from one address.
    bounds = ["--queue", most, "--per-client", most, "--rate", "1000000", "--cache", "0"]
    serve = ["-m", "fewstep", "serve", *given, *bounds]
    found = {
        FEWSTEP: [*serve, "--max-batch", str(options.batch)],
        UNBATCHED: [*serve, "--max-batch", "1"],
        PEER: [str(HERE / "serve_peer.py"), *given],
    }
    return {name: found[name] for name in map(SIDES.__getitem__, options.sides)}


# ── the work ──


@dataclass
class Bench:
    """Servers that are up, what they are asked for, and what each gives alone."""

    options: argparse.Namespace
    servers: dict[str, Server]
    addresses: dict[str, str]
    asked: list[Any] = field(default_factory=list)
    alone: dict[str, list[np.ndarray]] = field(default_factory=dict)

    def tell(self, line: str) -> None:
        """Says how far it is."""
        print(line, file=sys.stderr, flush=True)

    def prepare(self) -> None:
        """Makes the requests, has each drawn alone, and lets every side get warm."""
        options = self.options
        size, scale = options.size, options.guidance
        if own := [a for name, a in self.addresses.items() if name != PEER]:
            model = asyncio.run(get(own[0], "/v1/limits"))["model"]
            size, scale = size or model["native_size"], scale or model["guidance"]["default"]
        self.asked = orders(options.orders, options.seed, tuple(size), scale)
        for name, address in self.addresses.items():
            self.tell(f"{name}: {len(self.asked)} pictures, one after another")
            self.alone[name] = asyncio.run(drawn_alone(address, self.asked))
        for name in self.addresses:
            self.turn(name, max(options.clients), min(WARM, options.seconds))

    def turn(self, name: str, clients: int, seconds: float) -> Turn:
        """What clients get of a side."""
        time.sleep(min(PAUSE, seconds))
        taking = take_turn(
            self.addresses[name],
            self.asked,
            self.alone[name],
            clients,
            seconds,
            self.servers[name].process.pid,
            self.options.device.startswith("cuda"),
        )
        return asyncio.run(taking)

    def load(self) -> dict[str, Any]:
        """All numbers of clients, sides in turns."""
        options = self.options
        cells = {(n, side): Cell(side, n) for n in options.clients for side in self.addresses}
        for index in range(options.rounds):
            for (clients, side), cell in cells.items():
                turn = self.turn(side, clients, options.seconds)
                cell.turns.append(turn)
                rate = turn.in_time / turn.seconds
                self.tell(f"round {index + 1}: {side}, {clients} clients: {rate:.1f} pictures/s")
        first, *others = self.alone
        return {
            **self.about(),
            "seconds": options.seconds,
            "rounds": options.rounds,
            "agreement": {name: self.agreements(first, name) for name in others},
            "cells": [cell.to_dict() for cell in cells.values()],
        }

    def agreements(self, first: str, other: str) -> dict[str, Any]:
        """How far two sides' pictures are apart, by task."""
        found = {}
        for task in dict.fromkeys(asked.task for asked in self.asked):
            own = [i for i, asked in enumerate(self.asked) if asked.task == task]
            pair = ([self.alone[name][i] for i in own] for name in (first, other))
            found[task] = agreement(*pair)
        return found

    def soak(self) -> dict[str, Any]:
        """Sides one after another, each for minutes."""
        options, cells = self.options, []
        for side in self.addresses:
            self.tell(f"{side}: {options.minutes:g} minutes of {options.at} clients")
            cells.append(soaked(side, self.turn(side, options.at, 60 * options.minutes)))
        return {**self.about(), "cells": cells}

    def about(self) -> dict[str, Any]:
        """What was asked of whom."""
        options = self.options
        return {
            "model": options.model,
            "device": options.device,
            "dtype": options.dtype,
            "orders": len(self.asked),
            "seed": options.seed,
            "closest": closest(next(iter(self.alone.values()))),
            "sides": {name: self.shown(name) for name in self.addresses},
        }

    def shown(self, name: str) -> str:
        """A side's command without places of this machine."""
        options = self.options
        model = EMBEDDED.name if options.model == "embedded" else options.model
        words = [word.replace(str(options.folder), model) for word in commands(options)[name]]
        return shlex.join(words).replace("-m fewstep", "fewstep").replace(f"{HERE}/", "")


def measured(options: argparse.Namespace) -> dict[str, Any]:
    """The part of a report that is asked for."""
    began = datetime.now(timezone.utc).isoformat(timespec="seconds")
    with ExitStack() as stack:
        folder = Path(stack.enter_context(tempfile.TemporaryDirectory(prefix="fewstep-load-")))
        servers = {
            name: stack.enter_context(Server(name, command, folder, options.threads))
            for name, command in commands(options).items()
        }
        addresses = {name: server.wait() for name, server in servers.items()}
        bench = Bench(options, servers, addresses)
        bench.prepare()
        told = bench.soak() if options.minutes else bench.load()
    told |= {"date": began, "machine": machine()}
    return {"soak" if options.minutes else "load": told}


def kept(stored: dict[str, Any]) -> dict[str, Any]:
    """The parts of an earlier report."""
    return {name: stored[name] for name in ("load", "soak") if name in stored}


# ── the command ──


def parsed(arguments: Sequence[str] | None) -> argparse.Namespace:
    parser = argparse.ArgumentParser(description=__doc__.partition("\n")[0])
    add = parser.add_argument
    add("--quick", action="store_true", help="1 and 8 clients, 3 s each, 16 pictures")
    add("--clients", type=numbers, help="with commas between; default: 1,8,32,128")
    add("--seconds", type=float, help="of a turn; default: 15")
    add("--rounds", type=int, help="turns of each side and number of clients; default: 3")
    add("--minutes", type=float, default=0.0, help="measure memory over so long instead")
    add("--at", type=int, help="clients of --minutes; default: 32")
    add("--sides", help=f"of {','.join(SIDES)}; default: all, with --minutes the first")
    add("--orders", type=int, help="different pictures; default: two for each client")
    add("--batch", type=int, default=BATCH, help="pictures in a step of fewstep's")
    add("--seed", type=int, default=0, help="of what is asked for")
    add("--model", default="embedded", help="embedded, sd15, sdxl (random numbers), or a folder")
    add("--size", type=dimensions, help="WxH of pictures given; default: the model's own")
    add("--guidance", type=float, help="default: the model's own")
    add("--gpu", action="store_true", help="on a GPU, in float16")
    add("--threads", type=int, default=0, help="of each server; default: its own choice")
    add("--cache", type=Path, default=Path("~/.cache/fewstep/bench"), help="models of full size")
    add("--json", type=Path, help="default: docs/serving.json, docs/serving-gpu.json")
    add("--images", type=Path, default=DOCS / "images", help="the folder of the plots")
    add("--document", type=Path, help="whose table between `<!-- load: begin -->` and end is made")
    options = parser.parse_args(arguments)
    settle(options)
    for name in ("rounds", "seconds", "at", "batch", "orders"):
        if getattr(options, name) <= 0:
            parser.error(f"--{name} {getattr(options, name)}: must be above 0")
    if unknown := sorted(set(options.sides) - set(SIDES)):
        parser.error(f"--sides {unknown[0]}: is no side; give some of {', '.join(SIDES)}")
    if options.sides == ["diffusers"] and not (options.size and options.guidance):
        parser.error("--sides diffusers: cannot tell its size; give --size and --guidance too")
    if options.orders < (most := options.at if options.minutes else max(options.clients)):
        parser.error(f"--orders {options.orders}: {most} clients need as many different pictures")
    return options


def settle(options: argparse.Namespace) -> None:
    """Fills in what is not given."""
    quick = options.quick
    options.clients = options.clients or ([1, 8] if quick else [1, 8, 32, 128])
    options.seconds = options.seconds if options.seconds is not None else 3.0 if quick else 15.0
    options.rounds = options.rounds if options.rounds is not None else 1 if quick else 3
    options.at = options.at if options.at is not None else 8 if quick else 32
    most = max([options.at] if options.minutes else options.clients)
    options.orders = options.orders if options.orders is not None else 2 * most
    usual = next(iter(SIDES)) if options.minutes else ",".join(SIDES)
    options.sides = (options.sides or usual).split(",")
    options.device, options.dtype = ("cuda", "float16") if options.gpu else ("cpu", "float32")
    options.name = f"serving{'-gpu' * options.gpu}"
    options.json = options.json or DOCS / f"{options.name}.json"
    if options.minutes:
        options.clients = [options.at]


def numbers(text: str) -> list[int]:
    """Numbers of clients."""
    found = [int(part) for part in text.split(",")]
    if min(found) < 1:
        raise ValueError(text)
    return found


def dimensions(text: str) -> tuple[int, int]:
    """Width and height."""
    width, height = map(int, text.lower().split("x"))
    return width, height


def folder_of(options: argparse.Namespace) -> Path:
    """The checkpoint; one of full size is made of random numbers if it is not there."""
    if options.model == "embedded":
        return EMBEDDED
    from fewstep.bench.checkpoints import checkpoint
    from fewstep.bench.work import Work

    work = Work(options.model, dtype=options.dtype, device=options.device)
    return checkpoint(work, options.cache.expanduser().absolute())


def main(arguments: Sequence[str] | None = None) -> None:
    options = parsed(arguments)
    mark = f"load{'-gpu' * options.gpu}"
    stored = json.loads(options.json.read_text()) if options.json.exists() else {}
    if options.document:
        update(options.document, mark, table(stored))  # fails before, not after
    try:
        options.folder = folder_of(options)
        told = {"format": FORMAT, **kept(stored), **measured(options)}
    except (FewstepError, RuntimeError) as error:
        raise SystemExit(f"error: {error}") from None
    write_report(told, options.json)
    for name, picture in plots(told).items():
        with replacing(options.images / f"{options.name}-{name}.png") as beside:
            picture.save(beside, "PNG")
    if options.document:
        update(options.document, mark, table(told))
    print(soak_table(told["soak"]) if options.minutes else load_table(told["load"]))


if __name__ == "__main__":
    main()
