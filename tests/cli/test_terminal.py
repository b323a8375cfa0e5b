from __future__ import annotations

import base64
import io
import re
from pathlib import Path

import PIL.Image
import pytest

from fewstep.cli import terminal
from fewstep.cli.terminal import Progress, half_blocks, iterm2, kitty, picture_protocol, show


@pytest.mark.parametrize(
    ("environment", "protocol"),
    [
        ({"TERM": "xterm-kitty"}, "kitty"),
        ({"TERM": "xterm-256color", "KITTY_WINDOW_ID": "1"}, "kitty"),
        ({"TERM": "xterm-ghostty", "COLORTERM": "truecolor"}, "kitty"),
        ({"TERM_PROGRAM": "iTerm.app"}, "iterm2"),
        ({"TERM_PROGRAM": "WezTerm"}, "iterm2"),
        ({"LC_TERMINAL": "iTerm2"}, "iterm2"),
        ({"TERM": "xterm-256color", "COLORTERM": "truecolor"}, "blocks"),
        ({"TERM": "tmux-256color", "KITTY_WINDOW_ID": "1", "COLORTERM": "24bit"}, "blocks"),
        ({"TERM": "xterm-kitty", "TMUX": "/tmp/x,1,0"}, None),
        ({"TERM": "xterm-256color"}, None),
        ({}, None),
    ],
)
def test_the_terminal_is_known_by_its_environment(
    environment: dict[str, str], protocol: str | None
) -> None:
    assert picture_protocol(environment) == protocol


@pytest.mark.parametrize("size", [1, 3072, 3073, 10_000])
def test_kitty_gets_the_file_in_chunks(size: int) -> None:
    png = bytes(i % 251 for i in range(size))
    messages = re.findall(r"\x1b_G([^;]*);([^\x1b]*)\x1b\\", kitty(png))
    assert base64.b64decode("".join(data for _, data in messages)) == png
    assert all(len(data) <= 4096 for _, data in messages)
    assert messages[0][0].startswith("a=T,f=100,")
    assert [head[-1] for head, _ in messages] == ["1"] * (len(messages) - 1) + ["0"]


def test_iterm2_gets_the_file_at_once() -> None:
    found = re.fullmatch(r"\x1b\]1337;File=inline=1;size=5:(.*)\x07\n", iterm2(b"hello"))
    assert found is not None
    assert base64.b64decode(found[1]) == b"hello"


def test_half_blocks_show_two_pixels_a_cell() -> None:
    picture = PIL.Image.new("RGB", (2, 2), "red")
    picture.paste("blue", (0, 1, 2, 2))
    cell = "\x1b[38;2;255;0;0;48;2;0;0;255m▀"
    assert half_blocks(picture, 2, 10) == f"{cell}{cell}\x1b[0m\n"


@pytest.mark.parametrize("size", [(100, 10), (10, 100), (1, 1), (300, 200)])
def test_half_blocks_stay_within_their_cells(size: tuple[int, int]) -> None:
    lines = half_blocks(PIL.Image.new("RGB", size), 20, 8).splitlines()
    assert len(lines) <= 8
    assert all(line.count("▀") <= 20 for line in lines)


class Terminal(io.StringIO):
    def isatty(self) -> bool:
        return True


@pytest.fixture
def file(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    for name in ("TERM", "TERM_PROGRAM", "LC_TERMINAL", "TMUX", "KITTY_WINDOW_ID", "COLORTERM"):
        monkeypatch.delenv(name, raising=False)
    PIL.Image.new("RGB", (4, 4)).save(tmp_path / "a.png")
    return tmp_path / "a.png"


@pytest.mark.parametrize(
    ("stream", "colours", "wanted", "shown"),
    [
        (Terminal, "truecolor", None, True),
        (Terminal, "", None, False),
        (Terminal, "truecolor", False, False),
        (Terminal, "", True, True),
        (io.StringIO, "truecolor", None, False),
        (io.StringIO, "", True, True),
    ],
)
def test_pictures_are_shown_where_they_can_be_or_must(
    stream: type[io.StringIO],
    colours: str,
    wanted: bool | None,
    shown: bool,
    file: Path,
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    monkeypatch.setenv("COLORTERM", colours)
    out = stream()
    show(file, wanted, out)
    assert ("▀" in out.getvalue()) is shown


@pytest.mark.parametrize(("patience", "shown"), [(0.0, True), (60.0, False)])
def test_the_bar_shows_on_a_terminal_after_a_while(
    patience: float, shown: bool, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(terminal, "PATIENCE", patience)
    monkeypatch.setattr("sys.stderr", Terminal())
    with Progress(3) as progress:
        progress.advance()
        progress.reach(2)
        progress.make_way()
        progress.advance()
        written = terminal.sys.stderr.getvalue()
    assert ("step" in written) is shown


def test_there_is_no_bar_in_a_pipe(capsys: pytest.CaptureFixture[str]) -> None:
    with Progress(1) as progress:
        progress.advance()
    assert capsys.readouterr() == ("", "")
