"""Several processes from one command, and how they end."""

from __future__ import annotations

import os
import subprocess
import sys
import textwrap
import time
from collections.abc import Callable
from pathlib import Path

import pytest
from safetensors.torch import load_file

from fewstep.errors import RequestError
from fewstep.training.launch import Processes, wanted

TESTS = Path(__file__).parents[1]


@pytest.fixture(autouse=True)
def clean(monkeypatch: pytest.MonkeyPatch) -> None:
    for name in ("NPROC_PER_NODE", "NNODES", "NODE_RANK", "ADDR", "PORT"):
        monkeypatch.delenv(name, raising=False)


def test_one_process_is_not_launched(monkeypatch: pytest.MonkeyPatch) -> None:
    assert wanted() is None
    monkeypatch.setenv("NPROC_PER_NODE", "1")
    assert wanted() is None


def test_who_was_started_by_torchrun_joins_and_starts_nobody(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    monkeypatch.setenv("NPROC_PER_NODE", "2")
    assert wanted() == Processes(per_node=2)
    monkeypatch.setenv("LOCAL_RANK", "0")
    assert wanted() is None


def test_the_environment_becomes_torchruns_options(monkeypatch: pytest.MonkeyPatch) -> None:
    assert Processes(4).torchrun == ["--nnodes=1", "--nproc-per-node=4", "--standalone"]
    values = {"NPROC_PER_NODE": "8", "NNODES": "2", "NODE_RANK": "1", "ADDR": "n0", "PORT": "29500"}
    for name, value in values.items():
        monkeypatch.setenv(name, value)
    several = wanted()
    assert several is not None
    assert several.torchrun == [
        "--nnodes=2",
        "--nproc-per-node=8",
        "--node-rank=1",
        "--master-addr=n0",
        "--master-port=29500",
    ]


@pytest.mark.parametrize(
    ("values", "message"),
    [
        ({"NNODES": "2"}, "NNODES=2 needs PORT, .*PORT=29500"),
        ({"NPROC_PER_NODE": "0"}, "NPROC_PER_NODE=0"),
        ({"NNODES": "2", "NODE_RANK": "2", "PORT": "1"}, r"NODE_RANK=2 must lie in \[0, 1\]"),
        ({"NPROC_PER_NODE": "gpu"}, "NPROC_PER_NODE='gpu' must be a whole number"),
    ],
)
def test_an_environment_that_cannot_be_is_refused_with_the_remedy(
    values: dict[str, str], message: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    for name, value in values.items():
        monkeypatch.setenv(name, value)
    with pytest.raises(RequestError, match=message):
        wanted()


PROGRAM = """
    import sys
    from functools import partial
    from pathlib import Path

    import many
    from fewstep.training import launch
    from fewstep.training.report import LossLog

    LossLog.EVERY = 1
    how, folder = sys.argv[1:]
    if how == "start":
        sys.exit(launch.start(launch.wanted(), [__file__, "join", folder]))
    many.train_toy(Path(folder), partial(many.die, 7) if Path(folder).name == "die" else None)
"""


@pytest.fixture(scope="module")
def program(tmp_path_factory: pytest.TempPathFactory) -> Path:
    file = tmp_path_factory.mktemp("program") / "program.py"
    file.write_text(textwrap.dedent(PROGRAM))
    return file


def start(program: Path, folder: Path) -> subprocess.CompletedProcess[str]:
    environment = os.environ | {"NPROC_PER_NODE": "2", "PYTHONPATH": str(TESTS)}
    command = [sys.executable, str(program), "start", str(folder)]
    return subprocess.run(command, env=environment, capture_output=True, text=True, timeout=100)


def test_a_process_that_dies_ends_the_job_and_the_same_command_goes_on(
    program: Path, tmp_path: Path
) -> None:
    folder = tmp_path / "die"
    began = time.monotonic()
    done = start(program, folder)
    assert done.returncode in (1, 9)  # of the process that died, or of the one it left waiting
    assert done.stderr.splitlines()[-1].startswith("error: process ")
    assert "the same command goes on from the last checkpoint" in done.stderr
    assert time.monotonic() - began < 60
    folder.rename(tmp_path / "parts")
    assert start(program, tmp_path / "parts").returncode == 0
    stored = load_file(tmp_path / "parts" / "checkpoint.safetensors")
    assert stored["optimizer/step/first.weight"] == 12


@pytest.mark.parametrize("words", [[], ["--ray", "2"]])
def test_what_all_processes_would_refuse_is_told_once_before_they_start(
    words: list[str], run: Callable[..., tuple[int, str, str]], monkeypatch: pytest.MonkeyPatch
) -> None:
    if not words:
        monkeypatch.setenv("NPROC_PER_NODE", "2")
    code, out, err = run("train", "emoji64_1_autoencoder", "run.batch=3", *words)
    assert (code, out) == (2, "")
    assert err.startswith("error: run.batch=3 must be a multiple of the 2 devices")
    assert len(err.splitlines()) == 1
