"""The load benchmark: its clients notice what goes wrong, its figures, its plots, and all of it."""

from __future__ import annotations

import asyncio
import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import PIL.Image
import pytest
from server.asked import file

FOLDER = Path(__file__).parents[2] / "benchmarks"
SIZE = (16, 16)
Answering = Callable[[dict[str, Any]], tuple[int, bytes, str] | None]


@pytest.fixture(autouse=True)
def on_path(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.syspath_prepend(str(FOLDER))


def picture(seed: int) -> bytes:
    """A file of its own for each seed."""
    values = np.random.default_rng(seed).integers(0, 256, (*SIZE, 3), dtype=np.uint8)
    return file(PIL.Image.fromarray(values))


def right(fields: dict[str, Any]) -> tuple[int, bytes, str]:
    return 200, picture(fields["seed"]), ""


def taken(answering: Answering, clients: int = 2, seconds: float = 0.3) -> Any:
    """A turn against a server that answers so (None: it hangs up); alone it answers right."""
    from serve_load import orders, pixels, take_turn

    async def serve(reader: asyncio.StreamReader, writer: asyncio.StreamWriter) -> None:
        try:
            while True:
                head = await reader.readuntil(b"\r\n\r\n")
                length = head.lower().partition(b"content-length: ")[2].split()[0]
                found = answering(json.loads(await reader.readexactly(int(length))))
                if found is None:
                    break
                status, data, more = found
                headers = f"HTTP/1.1 {status} -\r\nContent-Length: {len(data)}\r\n{more}\r\n"
                writer.write(headers.encode() + data)
        except EOFError:
            pass
        writer.close()

    async def run() -> Any:
        server = await asyncio.start_server(serve, "127.0.0.1", 0)
        async with server:
            host, port = server.sockets[0].getsockname()[:2]
            asked = orders(4, 0, SIZE, 4.0)
            alone = [pixels(picture(number)) for number in range(4)]
            return await take_turn(f"http://{host}:{port}", asked, alone, clients, seconds, 0)

    return asyncio.run(run())


# ── the clients ──


def test_every_answer_is_counted_and_is_its_own() -> None:
    turn = taken(right)
    assert turn.asked == len(turn.done) > 10 and not turn.errors
    assert turn.lost == turn.strange == turn.largest == 0
    assert all(0 < late <= when for when, late in turn.done)


def test_a_picture_of_somebody_else_is_strange() -> None:
    turn = taken(lambda fields: (200, picture(fields["seed"] ^ 1), ""))
    assert turn.strange == len(turn.done) > 0 and turn.largest > 100


def test_a_picture_of_another_size_is_strange() -> None:
    turn = taken(lambda _: (200, file(PIL.Image.new("RGB", (8, 8))), ""))
    assert turn.strange == len(turn.done) > 0


def test_rounding_is_told_and_not_strange() -> None:
    def rounded(fields: dict[str, Any]) -> tuple[int, bytes, str]:
        from serve_load import pixels

        near = (pixels(picture(fields["seed"])) - 2).clip(0, 255).astype(np.uint8)
        return 200, file(PIL.Image.fromarray(near)), ""

    turn = taken(rounded)
    assert turn.largest == 2 and turn.strange == 0


def test_who_is_sent_away_waits_and_is_counted() -> None:
    body = json.dumps({"error": {"code": "queue_full"}}).encode()
    turn = taken(lambda _: (429, body, "Retry-After: 1\r\n"))
    assert turn.errors == {"429 queue_full": 2} and turn.asked == 2 and not turn.done


def test_a_server_that_hangs_up_loses_requests() -> None:
    turn = taken(lambda _: None)
    assert turn.errors["no answer"] == turn.lost == turn.asked > 0


def test_requests_differ_and_are_the_same_for_a_seed() -> None:
    from serve_load import SHARES, orders

    made = orders(400, 3, SIZE, 4.0)
    assert made == orders(400, 3, SIZE, 4.0) != orders(400, 4, SIZE, 4.0)
    fields = [json.loads(each.body) for each in made]
    assert len({each["prompt"] for each in fields}) == len({each["seed"] for each in fields}) == 400
    assert {each.steps for each in made} == set(range(1, 9))
    for task, share in SHARES.items():
        assert abs(sum(each.task == task for each in made) / 400 - share) < 0.08
    assert all(("mask" in each) <= ("image" in each) for each in fields)


# ── the figures ──


def turn_of(rate: int, late: float, minutes: float = 0.1) -> Any:
    """A turn whose memory grows by 6 MB a minute."""
    from serve_load import Turn

    seconds = 60 * minutes
    done = [(number / rate, late) for number in range(int(rate * seconds))]
    memory = [(float(second), 10**8 + 10**5 * second, 0) for second in range(int(seconds))]
    return Turn(2, seconds, asked=len(done), done=done, memory=memory)


def test_growing_memory_is_told_by_minute() -> None:
    from serve_report import soak_table, soaked

    told = soaked("fewstep", turn_of(10, 0.2, minutes=2))
    assert told["bytes_per_minute"] == pytest.approx(6e6) and len(told["minutes"]) == 2
    assert told["minutes"][1]["pictures_per_second"] == pytest.approx(10, rel=0.01)
    assert "| +6.00 |" in soak_table({"cells": [told], "sides": {}})


def test_the_plots_show_a_line_of_each_side() -> None:
    from serve_report import Cell, plots, soaked

    cells = [
        Cell(side, clients, [turn_of(rate, 0.01 * clients)]).to_dict()
        for side, rate in (("a", 20), ("b", 10))
        for clients in (1, 8, 32)
    ]
    found = plots({"load": {"cells": cells}, "soak": {"cells": [soaked("a", turn_of(5, 1.0))]}})
    assert set(found) == {"throughput", "latency", "memory"}
    colours = {colour for _, colour in found["throughput"].getcolors(1 << 20)}
    assert {(0, 114, 178), (213, 94, 0)} <= colours


@pytest.mark.parametrize(
    ("arguments", "says"),
    [
        (("--sides", "fewstep,vllm"), "--sides vllm"),
        (("--orders", "4", "--clients", "8"), "--orders 4"),
        (("--seconds", "0"), "--seconds 0"),
        (("--clients", "0"), "--clients"),
    ],
)
def test_options_that_cannot_be_are_named(
    arguments: tuple[str, ...], says: str, capsys: pytest.CaptureFixture[str]
) -> None:
    from serve import parsed

    with pytest.raises(SystemExit):
        parsed(arguments)
    assert says in capsys.readouterr().err


# ── all of it ──


def test_two_clients_of_each_side_lose_nothing_and_cross_nothing(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    import serve

    file, document = tmp_path / "serving.json", tmp_path / "serving.md"
    document.write_text("<!-- load: begin -->\nold\n<!-- load: end -->\n")
    places = ["--json", str(file), "--images", str(tmp_path), "--document", str(document)]
    how = ["--clients", "2", "--seconds", "0.5", "--rounds", "1", "--orders", "4", "--threads", "1"]
    serve.main([*how, *places])
    load = json.loads(file.read_text())["load"]
    assert [cell["side"] for cell in load["cells"]] == list(serve.SIDES.values())
    for cell in load["cells"]:
        assert cell["pictures"] == cell["asked"] > 0 and cell["errors"] == {}
        assert cell["lost"] == cell["strange"] == cell["refused"] == 0 and cell["largest"] <= 2
        assert cell["latency"]["p50"] <= cell["latency"]["p95"] <= cell["latency"]["p99"]
        assert cell["peak_bytes"] > 2**27 and cell["driver_cores"] < 0.5
    assert load["agreement"][serve.UNBATCHED]["text"]["largest"] == 0
    agreed = load["agreement"][serve.PEER]["text"]
    assert agreed["close"] == agreed["of"] > 0
    assert str(tmp_path) not in file.read_text() and str(FOLDER) not in file.read_text()
    assert load["sides"][serve.UNBATCHED].endswith("--cache 0 --max-batch 1")
    assert "old" not in document.read_text() and "| 2 | fewstep |" in document.read_text()
    for name in ("throughput", "latency"):
        with PIL.Image.open(tmp_path / f"serving-{name}.png") as plot:
            assert plot.size == (860, 380)
    capsys.readouterr()
