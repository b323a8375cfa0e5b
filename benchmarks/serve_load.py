"""Clients of a server: what they ask for, how late it came, and whether it is what they asked for.

Each client asks again as soon as it has its picture. All of them are one event loop that speaks as
little HTTP as it takes, so that the servers have the machine for themselves.
"""

from __future__ import annotations

import asyncio
import base64
import io
import itertools
import json
import os
import random
import time
from collections import Counter
from collections.abc import AsyncIterator, Sequence
from contextlib import asynccontextmanager, suppress
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import numpy as np
import PIL.Image
import PIL.ImageDraw

SHARES = {"text": 0.6, "image": 0.25, "inpaint": 0.15}
STRENGTH = 0.8  # of pictures to start from
STEPS = (1, 8)
COLOURS = "red blue green yellow orange purple pink brown black white grey golden"
THINGS = (
    "apple cat dog car tree house fish bird sun moon star boat train cup hat shoe flower ball "
    "clock key book chair bear horse"
)
PATIENCE = 300.0  # seconds that a client waits for an answer
SAMPLED = 4096  # numbers of a picture by which all are compared with all
PAGE = os.sysconf("SC_PAGE_SIZE") if hasattr(os, "sysconf") else 4096


# ── what is asked for ──


@dataclass(frozen=True)
class Asked:
    """A request for one picture."""

    task: str
    steps: int
    body: bytes  # JSON


def orders(count: int, seed: int, size: tuple[int, int], guidance: float) -> list[Asked]:
    """Requests whose prompts, seeds and pictures all differ; the same ones for the same seed."""
    chance = random.Random(seed)
    subjects = [f"{colour} {thing}" for colour in COLOURS.split() for thing in THINGS.split()]
    chance.shuffle(subjects)
    return [order(number, subjects, chance, size, guidance) for number in range(count)]


def order(
    number: int, subjects: Sequence[str], chance: random.Random, size: tuple[int, int], scale: float
) -> Asked:
    """One of them. Starting pictures get two steps at least: strength may be counted in steps."""
    (task,) = chance.choices(list(SHARES), list(SHARES.values()))
    steps = chance.randint(STEPS[0] + (task == "image"), STEPS[1])
    again = f" {number}" if number >= len(subjects) else ""
    prompt = f"a {subjects[number % len(subjects)]}{again}"
    fields: dict[str, Any] = {"prompt": prompt, "seed": number, "steps": steps}
    fields["guidance_scale"] = scale
    if task != "text":
        fields["image"] = packed(disc(chance, size))
        fields["strength"] = STRENGTH if task == "image" else 1.0
    if task == "inpaint":
        fields["mask"] = packed(middle(size))
    return Asked(task, steps, json.dumps(fields).encode())


def disc(chance: random.Random, size: tuple[int, int]) -> PIL.Image.Image:
    """A disc of some colour somewhere on white."""
    picture = PIL.Image.new("RGB", size, "white")
    radius = min(size) * chance.uniform(0.15, 0.4)
    x, y = (chance.uniform(radius, side - radius) for side in size)
    colour = tuple(chance.randrange(200) for _ in range(3))
    box = (x - radius, y - radius, x + radius, y + radius)
    PIL.ImageDraw.Draw(picture).ellipse(box, fill=colour)
    return picture


def middle(size: tuple[int, int]) -> PIL.Image.Image:
    """A mask of the middle half of each side."""
    mask = PIL.Image.new("L", size, 0)
    width, height = size
    mask.paste(255, (width // 4, height // 4, width * 3 // 4, height * 3 // 4))
    return mask


def packed(picture: PIL.Image.Image) -> str:
    """A picture's PNG in base64."""
    file = io.BytesIO()
    picture.save(file, "PNG")
    return base64.b64encode(file.getvalue()).decode("ascii")


# ── asking ──


@dataclass(frozen=True)
class Answer:
    """What a server said; `data` is the picture's file if the status is 200."""

    status: int
    data: bytes
    retry_after: float = 0.0

    @property
    def code(self) -> str:
        """An error's, with its status."""
        with suppress(ValueError, KeyError, TypeError):
            return f"{self.status} {json.loads(self.data)['error']['code']}"
        return str(self.status)


class Connection:
    """One client's connection, opened anew when the server has closed it."""

    def __init__(self, address: str) -> None:
        self.host, _, port = address.removeprefix("http://").partition(":")
        self.port = int(port)
        self.writer: asyncio.StreamWriter | None = None

    async def ask(self, method: str, path: str, body: bytes = b"") -> Answer:
        """The whole answer. Raises OSError or EOFError if there is none."""
        if self.writer is None:
            self.reader, self.writer = await asyncio.open_connection(self.host, self.port)
        head = (
            f"{method} {path} HTTP/1.1\r\nHost: {self.host}:{self.port}\r\nAccept: image/png\r\n"
            f"Content-Type: application/json\r\nContent-Length: {len(body)}\r\n\r\n"
        )
        try:
            self.writer.write(head.encode() + body)
            return await self.answer()
        except BaseException:
            self.close()
            raise

    async def answer(self) -> Answer:
        first, *lines = (await self.reader.readuntil(b"\r\n\r\n")).decode("latin-1").split("\r\n")
        headers = {name.lower(): value for name, _, value in (s.partition(": ") for s in lines)}
        data = await self.reader.readexactly(int(headers["content-length"]))
        if headers.get("connection") == "close":
            self.close()
        return Answer(int(first.split()[1]), data, float(headers.get("retry-after", 0)))

    def close(self) -> None:
        """Let go of it."""
        if self.writer is not None:
            self.writer.close()
            self.writer = None


async def get(address: str, path: str) -> Any:
    """The JSON of a GET."""
    connection = Connection(address)
    try:
        return json.loads((await connection.ask("GET", path)).data)
    finally:
        connection.close()


def pixels(data: bytes) -> np.ndarray:
    """A file's picture (H, W, 3)."""
    with PIL.Image.open(io.BytesIO(data)) as picture:
        return np.asarray(picture.convert("RGB"), np.int16)


async def drawn_alone(address: str, asked: Sequence[Asked]) -> list[np.ndarray]:
    """What each request gives while nobody else asks. Raises RuntimeError if it gives none."""
    connection, found = Connection(address), []
    try:
        for each in asked:
            answer = await connection.ask("POST", "/v1/generate", each.body)
            if answer.status != 200:
                raise RuntimeError(f"{address}: {answer.code}: {answer.data[:500]!r}")
            found.append(pixels(answer.data))
    finally:
        connection.close()
    return found


def closest(pictures: Sequence[np.ndarray]) -> float:
    """The least mean difference of any two: whether one could be taken for another."""
    flat = np.stack([picture.ravel() for picture in pictures]).astype(np.float32)
    flat = flat[:, :: max(1, flat.shape[1] // SAMPLED)]
    gaps = [np.abs(flat[i + 1 :] - flat[i]).mean(1).min() for i in range(len(flat) - 1)]
    return float(min(gaps, default=np.inf))


# ── a turn of one server ──


@dataclass
class Turn:
    """What many clients got of one server in some seconds; all who began waited for the end."""

    clients: int
    seconds: float
    asked: int = 0
    done: list[tuple[float, float]] = field(default_factory=list)  # when, and how late; pictures
    steps: int = 0  # of pictures that came in time
    errors: Counter[str] = field(default_factory=Counter)  # by code
    largest: int = 0  # difference from the picture that was drawn alone, levels of 255
    strange: int = 0  # pictures that are not their own
    server_cores: float = 0.0
    driver_cores: float = 0.0
    memory: list[tuple[float, int, int]] = field(default_factory=list)  # when, resident, on the GPU

    @property
    def in_time(self) -> int:
        """Pictures that came within the seconds."""
        return sum(when <= self.seconds for when, _ in self.done)

    @property
    def lost(self) -> int:
        """Requests that got no answer of any kind."""
        return self.asked - len(self.done) - sum(self.errors.values()) + self.errors["no answer"]


@dataclass
class Crowd:
    """Clients of one server, each with requests of its own that nobody else sends."""

    address: str
    asked: Sequence[Asked]
    alone: Sequence[np.ndarray]
    turn: Turn
    strange: float  # levels of 255 that a picture is off its own on average if it is not its own
    began: float = 0.0

    async def run(self) -> None:
        """Fills the turn."""
        self.began = time.perf_counter()
        everybody = range(self.turn.clients)
        await asyncio.gather(*(self.client(number) for number in everybody))

    async def client(self, number: int) -> None:
        """Asks until the time is over."""
        connection = Connection(self.address)
        own = range(number, len(self.asked), self.turn.clients)
        try:
            for index in itertools.cycle(own):
                if time.perf_counter() - self.began >= self.turn.seconds:
                    return
                await self.ask(connection, index)
        finally:
            connection.close()

    async def ask(self, connection: Connection, index: int) -> None:
        """One request; who is sent away waits as long as he is told."""
        turn, begin = self.turn, time.perf_counter()
        turn.asked += 1
        asking = connection.ask("POST", "/v1/generate", self.asked[index].body)
        try:
            answer = await asyncio.wait_for(asking, PATIENCE)
        except (OSError, EOFError, asyncio.TimeoutError):
            turn.errors["no answer"] += 1
            await asyncio.sleep(0.1)
            return
        end = time.perf_counter()
        if answer.status != 200:
            turn.errors[answer.code] += 1
            await asyncio.sleep(answer.retry_after)
            return
        turn.done.append((end - self.began, end - begin))
        turn.steps += self.asked[index].steps * (end - self.began <= turn.seconds)
        self.compare(answer.data, self.alone[index])

    def compare(self, data: bytes, alone: np.ndarray) -> None:
        """Notes how far a picture is off the one that was drawn alone."""
        found = pixels(data)
        if found.shape != alone.shape:
            self.turn.strange += 1
            return
        gaps = np.abs(found - alone)
        self.turn.largest = max(self.turn.largest, int(gaps.max()))
        self.turn.strange += bool(gaps.mean() >= self.strange)


async def take_turn(
    address: str,
    asked: Sequence[Asked],
    alone: Sequence[np.ndarray],
    clients: int,
    seconds: float,
    process: int,
    on_gpu: bool = False,
) -> Turn:
    """What `clients` get within `seconds` of the server whose process is `process`."""
    turn, strange = Turn(clients, seconds), closest(alone) / 2
    _, cpu = used(process)
    own, begin = time.process_time(), time.perf_counter()
    async with watched(turn, process, on_gpu):
        await Crowd(address, asked, alone, turn, strange).run()
    wall = time.perf_counter() - begin
    turn.server_cores = (used(process)[1] - cpu) / wall
    turn.driver_cores = (time.process_time() - own) / wall
    return turn


# ── memory ──


@asynccontextmanager
async def watched(turn: Turn, process: int, on_gpu: bool) -> AsyncIterator[None]:
    """A block in which a server's memory is noted every second."""
    watching = asyncio.create_task(watch(turn, process, on_gpu))
    try:
        yield
    finally:
        watching.cancel()
        with suppress(asyncio.CancelledError):
            await watching


async def watch(turn: Turn, process: int, on_gpu: bool) -> None:
    """Notes memory, until it is cancelled."""
    begin = time.perf_counter()
    for second in itertools.count(1):
        on_device = await gpu_bytes() if on_gpu else 0
        turn.memory.append((time.perf_counter() - begin, used(process)[0], on_device))
        await asyncio.sleep(max(0.0, begin + second - time.perf_counter()))


async def gpu_bytes() -> int:
    """Memory in use on all GPUs, of whomever; 0 where the driver does not tell."""
    asked = ("nvidia-smi", "--query-gpu=memory.used", "--format=csv,noheader,nounits")
    try:
        asking = await asyncio.create_subprocess_exec(*asked, stdout=asyncio.subprocess.PIPE)
    except OSError:
        return 0
    told, _ = await asking.communicate()
    return sum(int(line) for line in told.split() if line.isdigit()) << 20


def used(process: int) -> tuple[int, float]:
    """Bytes that are resident and CPU seconds, of a process and its children; Linux alone tells."""
    size, cpu = 0, 0.0
    for each in tree(process):
        with suppress(OSError, IndexError, ValueError):
            place = Path("/proc", str(each))
            size += int((place / "statm").read_text().split()[1]) * PAGE
            fields = (place / "stat").read_text().rpartition(")")[2].split()
            cpu += (int(fields[11]) + int(fields[12])) / os.sysconf("SC_CLK_TCK")
    return size, cpu


def tree(process: int) -> list[int]:
    """A process and those below it."""
    found = [process]
    with suppress(OSError):
        for file in Path(f"/proc/{process}/task").glob("*/children"):
            found += [below for child in file.read_text().split() for below in tree(int(child))]
    return found
