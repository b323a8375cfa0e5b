"""What a terminal can show: pictures in three protocols, and a progress bar that comes late."""

from __future__ import annotations

import base64
import os
import shutil
import sys
import time
from collections.abc import Mapping
from pathlib import Path
from typing import TextIO

import PIL.Image

CHUNK = 4096  # bytes of base64 in one message of kitty's protocol
PATIENCE = 2.0  # seconds of work before a progress bar appears
WIDEST = 64  # character cells of a picture made of half blocks


def picture_protocol(environment: Mapping[str, str]) -> str | None:
    """How this terminal shows pictures: "kitty", "iterm2", "blocks", or None if it cannot.

    A multiplexer (tmux, screen) passes neither of the picture protocols on.
    """
    term, program = environment.get("TERM", ""), environment.get("TERM_PROGRAM", "")
    if "TMUX" not in environment and not term.startswith(("screen", "tmux")):
        if "KITTY_WINDOW_ID" in environment or term in ("xterm-kitty", "xterm-ghostty"):
            return "kitty"
        if program in ("iTerm.app", "WezTerm") or environment.get("LC_TERMINAL") == "iTerm2":
            return "iterm2"
    return "blocks" if environment.get("COLORTERM") in ("truecolor", "24bit") else None


def show(file: Path, wanted: bool | None, stream: TextIO) -> None:
    """Shows a PNG file on `stream`.

    `wanted` None shows it if `stream` is a terminal that can; True shows it in any case, with half
    blocks of 24-bit colour where nothing better is known.
    """
    if wanted is False or (wanted is None and not stream.isatty()):
        return
    protocol = picture_protocol(os.environ) or ("blocks" if wanted else None)
    match protocol:
        case "kitty":
            stream.write(kitty(file.read_bytes()))
        case "iterm2":
            stream.write(iterm2(file.read_bytes()))
        case "blocks":
            columns, rows = shutil.get_terminal_size()
            with PIL.Image.open(file) as picture:
                stream.write(half_blocks(picture, min(columns, WIDEST), rows - 2))
    stream.flush()


def kitty(png: bytes) -> str:
    """A PNG file in kitty's graphics protocol: base64 in chunks, all but the last marked m=1."""
    data = base64.standard_b64encode(png).decode("ascii")
    chunks = [data[i : i + CHUNK] for i in range(0, len(data), CHUNK)]
    heads = ["a=T,f=100,"] + [""] * (len(chunks) - 1)
    more = [1] * (len(chunks) - 1) + [0]
    parts = zip(heads, more, chunks, strict=True)
    return "".join(f"\x1b_G{head}m={m};{chunk}\x1b\\" for head, m, chunk in parts) + "\n"


def iterm2(png: bytes) -> str:
    """A PNG file in iTerm2's inline picture protocol, which WezTerm reads too."""
    data = base64.standard_b64encode(png).decode("ascii")
    return f"\x1b]1337;File=inline=1;size={len(png)}:{data}\x07\n"


def half_blocks(picture: PIL.Image.Image, columns: int, rows: int) -> str:
    """A picture as upper half blocks, two pixels a cell, within `columns` x `rows` cells."""
    scale = min(columns / picture.width, 2 * rows / picture.height)
    width = max(1, round(picture.width * scale))
    height = max(2, round(picture.height * scale / 2) * 2)
    small = picture.convert("RGB").resize((width, height), PIL.Image.Resampling.LANCZOS)
    pixels = small.tobytes()

    def colour(x: int, y: int) -> str:
        at = 3 * (y * width + x)
        return ";".join(str(value) for value in pixels[at : at + 3])

    def cell(x: int, y: int) -> str:
        return f"\x1b[38;2;{colour(x, y)};48;2;{colour(x, y + 1)}m▀"

    lines = ("".join(cell(x, y) for x in range(width)) for y in range(0, height, 2))
    return "".join(f"{line}\x1b[0m\n" for line in lines)


class Progress:
    """A bar on stderr that counts steps: on a terminal only, after two seconds of work."""

    def __init__(self, total: int) -> None:
        from tqdm import tqdm

        self.bar = tqdm(
            total=total, unit="step", delay=PATIENCE, leave=False, disable=not sys.stderr.isatty()
        )

    def __enter__(self) -> Progress:
        return self

    def __exit__(self, *_: object) -> None:
        self.bar.close()

    def advance(self) -> None:
        """One step more."""
        self.bar.update()

    def reach(self, step: int) -> None:
        """All steps before `step` are done or were not needed."""
        self.bar.update(step - self.bar.n)

    def make_way(self) -> None:
        """Clears the bar's line for other output; the next step draws it again."""
        if not self.bar.disable and time.time() - self.bar.start_t > PATIENCE:
            self.bar.clear()
