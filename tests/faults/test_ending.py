"""Case 17: signals end a server when its work is done, or brutally; nothing is left over."""

from __future__ import annotations

import os
import signal
import socket
import subprocess
import sys
import threading
import time
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

import httpx

SLOW = {"prompt": "a cat", "steps": 40, "width": 128, "height": 128}


def free_port() -> int:
    with socket.create_server(("127.0.0.1", 0)) as found:
        return int(found.getsockname()[1])


@contextmanager
def started(folder: Path, port: int) -> Iterator[tuple[subprocess.Popen[str], str]]:
    """`fewstep serve` in a folder that is its home and its place for temporary files."""
    home = dict.fromkeys(("HOME", "TMPDIR", "XDG_CACHE_HOME", "XDG_CONFIG_HOME"), str(folder))
    kernels = os.environ.get("FEWSTEP_CACHE", str(Path.home() / ".cache/fewstep"))
    environment = {**os.environ, **home, "OMP_NUM_THREADS": "1", "FEWSTEP_CACHE": kernels}
    environment.pop("FEWSTEP_API_KEY", None)
    command = [sys.executable, "-m", "fewstep", "serve", "--port", str(port)]
    with subprocess.Popen(
        command,
        stdout=subprocess.PIPE,
        stderr=subprocess.PIPE,
        text=True,
        env=environment,
        cwd=folder,
    ) as process:
        assert process.stdout is not None
        try:
            assert f"127.0.0.1:{port}" in process.stdout.readline()
            yield process, f"http://127.0.0.1:{port}"
        finally:
            process.kill()


class Asking(threading.Thread):
    """Somebody who waits for a picture that takes long."""

    def __init__(self, address: str) -> None:
        super().__init__()
        self.address = address
        self.status: int | None = None
        self.start()

    def run(self) -> None:
        try:
            headers = {"Accept": "image/png"}
            url = f"{self.address}/v1/generate"
            self.status = httpx.post(url, json=SLOW, headers=headers, timeout=60).status_code
        except httpx.HTTPError:
            self.status = 0


def is_drawing(address: str) -> bool:
    return bool(httpx.get(f"{address}/ready").json()["running"])


def wait_for(address: str) -> None:
    ends = time.monotonic() + 20
    while not is_drawing(address):
        assert time.monotonic() < ends
        time.sleep(0.01)


def files(folder: Path) -> list[Path]:
    """What lies in a folder."""
    return [path for path in folder.rglob("*") if path.is_file()]


def test_after_a_kill_nothing_is_left_and_the_next_server_has_the_port(tmp_path: Path) -> None:
    """Case 17: SIGKILL in the middle; then SIGTERM, which refuses, finishes and ends with 0."""
    port = free_port()
    with started(tmp_path, port) as (process, address):
        lost = Asking(address)
        wait_for(address)
        process.send_signal(signal.SIGKILL)
        assert process.wait(10) == -signal.SIGKILL
        lost.join(10)
        assert lost.status == 0
    assert files(tmp_path) == []
    with started(tmp_path, port) as (process, address):
        kept = Asking(address)
        wait_for(address)
        process.send_signal(signal.SIGTERM)
        time.sleep(0.3)
        assert process.poll() is None
        for path in ("/ready", "/v1/limits"):  # nobody new is let in
            answer = httpx.get(address + path, timeout=5)
            assert (answer.status_code, answer.json()["error"]["code"]) == (503, "not_ready")
        assert httpx.get(f"{address}/health").status_code == 200
        kept.join(60)
        assert kept.status == 200
        assert process.wait(30) == 0
        assert process.stderr is not None and process.stderr.read() == ""
    assert files(tmp_path) == []
    with socket.create_server(("127.0.0.1", port)):
        pass  # nobody holds it
