"""A process for a side, and what is said when it dies."""

from __future__ import annotations

import json
import os
import subprocess
import sys
import tempfile
from pathlib import Path
from types import TracebackType
from typing import Any

PACKAGE = Path(__file__).parents[2]
LINES = 15  # of what a side said, shown when it dies


class SideFailed(Exception):
    """A side that cannot go on, and why; `on_purpose` if fewstep refused what was asked."""

    def __init__(self, reason: str, on_purpose: bool = False) -> None:
        super().__init__(reason)
        self.on_purpose = on_purpose


class Child:
    """The process of a side; what it prints goes to a file that `failed` reads."""

    def __init__(self, name: str, folder: Path, threads: int = 0) -> None:
        self.name = name
        with tempfile.NamedTemporaryFile("w", dir=folder, suffix=".log", delete=False) as log:
            self.log = Path(log.name)
            self.process = subprocess.Popen(
                [sys.executable, "-m", "fewstep.bench.child"],
                stdin=subprocess.PIPE,
                stdout=subprocess.PIPE,
                stderr=log,
                text=True,
                encoding="utf-8",
                cwd=folder,
                env=environment(threads),
            )

    def __enter__(self) -> Child:
        return self

    def __exit__(self, kind: type[BaseException] | None, *_: TracebackType | Any) -> None:
        self.end()

    def end(self) -> None:
        """Ends the process, also if that was done before."""
        if self.process.stdin is None or self.process.stdin.closed:
            return
        self.process.terminate()
        try:
            self.process.wait(5)
        except subprocess.TimeoutExpired:
            self.process.kill()
        self.process.communicate()

    def ask(self, job: str, **values: Any) -> dict[str, Any]:
        """The answer to a job. Raises SideFailed with the reason if there is none."""
        assert self.process.stdin is not None and self.process.stdout is not None
        try:
            self.process.stdin.write(json.dumps({"job": job, **values}) + "\n")
            self.process.stdin.flush()
        except BrokenPipeError:
            pass  # what it said tells more
        line = self.process.stdout.readline()
        if not line:
            code = self.process.wait()
            said = self.log.read_text(encoding="utf-8", errors="replace").splitlines()
            last = "; ".join(line.strip() for line in said[-LINES:]) or "it said nothing"
            raise SideFailed(f"its process ended with code {code}: {last}")
        answer: dict[str, Any] = json.loads(line)
        if "failed" in answer:
            raise SideFailed(answer["failed"], answer["on_purpose"])
        return answer


def environment(threads: int) -> dict[str, str]:
    """A child's: offline, this package in reach, and the threads that were asked for."""
    path = os.pathsep.join(filter(None, [str(PACKAGE), os.environ.get("PYTHONPATH")]))
    given = {**os.environ, "HF_HUB_OFFLINE": "1", "TOKENIZERS_PARALLELISM": "false"}
    given |= {"PYTHONPATH": path, "PYTHONWARNINGS": "ignore"}
    counted = ("OMP_NUM_THREADS", "MKL_NUM_THREADS") if threads else ()
    return given | dict.fromkeys(counted, str(threads))
