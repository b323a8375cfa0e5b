"""Case 18, downloads: whatever a hub does, no damaged file is taken for a whole one.

huggingface_hub fetches. Its server here resets connections, ignores ranges, changes its mind and
sends other bytes than it says.
"""

from __future__ import annotations

import hashlib
import http.server
import json
import os
import subprocess
import sys
import threading
from collections.abc import Iterator
from pathlib import Path
from typing import Any, ClassVar

import pytest
import torch
from bad_files import python
from safetensors.torch import save

COMMIT = "0123456789abcdef0123456789abcdef01234567"
NAME = "model.safetensors"
CONTENT = save({"w": torch.arange(50_000, dtype=torch.float32)})
SUM = float(torch.arange(50_000, dtype=torch.float32).sum())
MODES = ("whole", "reset", "ignored", "changed", "unmet", "wrong", "never")
OTHER = CONTENT[:-1] + bytes([CONTENT[-1] ^ 1])


class Hub(http.server.BaseHTTPRequestHandler):
    """One file, sent as the repository's name asks: owner/MODE."""

    asked: ClassVar[dict[str, int]] = {}  # downloads of each repository
    halved, may_end = threading.Event(), threading.Event()  # of owner/hangs, which stops midway

    def do_HEAD(self) -> None:
        self.answer()

    def do_GET(self) -> None:
        self.answer()

    def answer(self) -> None:
        path = self.path.split("?")[0]
        mode = path.removeprefix("/api/models").split("/")[2]
        if path.startswith("/api/"):
            listed = {"id": f"owner/{mode}", "sha": COMMIT, "siblings": [{"rfilename": NAME}]}
            return self.send(json.dumps(listed).encode(), {})
        if self.command == "GET":
            self.asked[mode] = self.asked.get(mode, 0) + 1
        begin = int(self.headers.get("Range", "bytes=0-").split("=")[1].split("-")[0])
        return self.download(mode, begin, self.asked.get(mode, 0))

    def download(self, mode: str, begin: int, turn: int) -> None:
        is_old = mode == "changed" and turn < 2
        content = OTHER if mode == "wrong" or is_old else CONTENT
        named = OTHER if is_old else CONTENT
        headers = {"ETag": f'"{hashlib.sha256(named).hexdigest()}"', "X-Repo-Commit": COMMIT}
        if mode == "ignored":
            begin = 0
        if mode == "unmet" and begin:
            return self.send(b"", {"Content-Range": f"bytes */{len(content)}"}, 416)
        if begin:
            headers["Content-Range"] = f"bytes {begin}-{len(content) - 1}/{len(content)}"
        breaks = mode == "never" or (
            mode in ("reset", "ignored", "changed", "unmet", "hangs") and turn == 1
        )
        self.send(content[begin:], headers, 206 if begin else 200, breaks)

    def send(
        self, content: bytes, headers: dict[str, str], status: int = 200, breaks: bool = False
    ) -> None:
        self.send_response(status)
        for key, value in ({"Content-Length": str(len(content))} | headers).items():
            self.send_header(key, value)
        self.end_headers()
        if self.command == "GET":
            self.wfile.write(content[: len(content) // 2] if breaks else content)
            if breaks and "/hangs/" in self.path:
                self.halved.set()
                self.may_end.wait(30)
        self.close_connection = True

    def log_message(self, *arguments: object) -> None:
        pass


@pytest.fixture(scope="module")
def hub() -> Iterator[str]:
    server = http.server.ThreadingHTTPServer(("127.0.0.1", 0), Hub)
    threading.Thread(target=server.serve_forever, daemon=True).start()
    yield f"http://127.0.0.1:{server.server_port}"
    server.shutdown()
    server.server_close()


FETCH = """
import json, sys, time
time.sleep = lambda seconds: None  # the client's patience
from fewstep import CheckpointError
from fewstep.checkpoints.locate import Source
from fewstep.checkpoints.weights import read_tensors
told = {}
for mode in sys.argv[1:]:
    told[mode] = []
    for turn in range(2):
        try:
            path = Source(f"owner/{mode}").fetch("model.safetensors")
            ((_, tensor),) = read_tensors([path])
            told[mode].append(float(tensor.sum()))
        except CheckpointError as error:
            told[mode].append(str(error))
print(json.dumps(told))
"""


def variables(hub: str, home: Path) -> dict[str, str]:
    """What makes a process fetch from here."""
    where = {"HF_ENDPOINT": hub, "HF_HOME": str(home), "HF_HUB_OFFLINE": "0", "NO_PROXY": "*"}
    return where | {"HF_HUB_DISABLE_XET": "1", "HF_HUB_DISABLE_PROGRESS_BARS": "1"}


def fetched(hub: str, home: Path, *modes: str) -> dict[str, list[Any]]:
    """What two tries at each repository came to: the sum of the numbers, or the error."""
    done = python("-c", FETCH, *modes, **variables(hub, home))
    assert done.returncode == 0, done.stderr
    found: dict[str, list[Any]] = json.loads(done.stdout)
    return found


def test_no_interruption_and_no_other_bytes_make_a_file_that_is_loaded(
    hub: str, tmp_path: Path
) -> None:
    """Case 18: resets, a Range that is ignored or unmet (416), a changed ETag, a wrong sha256."""
    told = fetched(hub, tmp_path, *MODES)
    right = SUM
    assert told["whole"] == [right, right]
    for mode in ("reset", "ignored", "changed", "unmet"):
        assert told[mode][1] == right
        refused = any(said in str(told[mode][0]) for said in ("could not be fetched", "try again"))
        assert told[mode][0] == right or refused
    for error in told["wrong"]:
        assert "'owner/wrong' came damaged and was removed; try again" in error
    for error in told["never"]:
        assert "could not be fetched" in error
    kept = [path for path in tmp_path.rglob("blobs/*") if len(path.name) == 64]
    assert {path.read_bytes() for path in kept} == {CONTENT}


def test_what_a_killed_download_left_is_no_file_and_the_next_one_goes_on(
    hub: str, tmp_path: Path
) -> None:
    """Case 18: kill -9 amid a download."""
    environment = os.environ | variables(hub, tmp_path)
    with subprocess.Popen([sys.executable, "-c", FETCH, "hangs"], env=environment) as killed:
        try:
            assert Hub.halved.wait(60)
        finally:
            killed.kill()
    Hub.may_end.set()
    assert [path for path in tmp_path.rglob("blobs/*") if len(path.name) == 64] == []
    assert fetched(hub, tmp_path, "hangs")["hangs"] == [SUM, SUM]
