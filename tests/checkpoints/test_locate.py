"""Finding files: local folders, the hub's cache, a hub that answers and one that does not."""

from __future__ import annotations

import http.server
import json
import os
import subprocess
import sys
import threading
import time
from collections.abc import Iterator
from pathlib import Path

import pytest

from fewstep import CheckpointError
from fewstep.checkpoints.locate import Source, shards_of

STEM = "diffusion_pytorch_model"
COMMIT = "0123456789abcdef0123456789abcdef01234567"


def put(folder: Path, *names: str) -> Path:
    for name in names:
        (folder / name).parent.mkdir(parents=True, exist_ok=True)
        (folder / name).write_text("{}")
    return folder


def put_index(path: Path, *shards: str) -> None:
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_text(json.dumps({"weight_map": {f"w{i}": s for i, s in enumerate(shards)}}))
    put(path.parent, *shards)


def names_of(paths: list[Path]) -> list[str]:
    return [path.name for path in paths]


def test_a_local_folder_is_listed_by_its_subfolder(tmp_path: Path) -> None:
    put(tmp_path, "model_index.json", "unet/config.json", "unet/deep/x.txt", "vae/config.json")
    assert Source(str(tmp_path)).names()[0] == "model_index.json"
    source = Source(str(tmp_path), subfolder="unet")
    assert source.names() == ["config.json", "deep/x.txt"]
    assert source.fetch("config.json") == tmp_path / "unet" / "config.json"
    assert source.folder(["*.json"]) == tmp_path / "unet"
    assert source.read_json("config.json") == {}


def test_variants_and_plain_files_are_told_apart(tmp_path: Path) -> None:
    put(tmp_path, f"{STEM}.safetensors", f"{STEM}.fp16.safetensors", f"{STEM}.bin")
    assert names_of(Source(str(tmp_path)).weights(STEM)) == [f"{STEM}.safetensors"]
    variant = Source(str(tmp_path), variant="fp16")
    assert names_of(variant.weights(STEM)) == [f"{STEM}.fp16.safetensors"]


@pytest.mark.parametrize(
    ("variant", "index", "shards"),
    [
        (None, f"{STEM}.safetensors.index.json", (f"{STEM}-00001-of-00002.safetensors",) * 2),
        (
            "fp16",
            f"{STEM}.safetensors.index.fp16.json",
            (f"{STEM}.fp16-00001-of-00002.safetensors", f"{STEM}.fp16-00002-of-00002.safetensors"),
        ),
        (
            "fp16",
            f"{STEM}.fp16.safetensors.index.json",
            (f"{STEM}-00001-of-00002.fp16.safetensors", f"{STEM}-00002-of-00002.fp16.safetensors"),
        ),
    ],
)
def test_shards_are_found_by_either_spelling_of_their_index(
    tmp_path: Path, variant: str | None, index: str, shards: tuple[str, ...]
) -> None:
    put_index(tmp_path / "unet" / index, *shards)
    source = Source(str(tmp_path), subfolder="unet", variant=variant)
    assert names_of(source.weights(STEM)) == sorted(set(shards))
    (tmp_path / "unet" / shards[-1]).unlink()
    with pytest.raises(CheckpointError, match=f"no file {shards[-1]}"):
        Source(str(tmp_path), subfolder="unet", variant=variant).weights(STEM)


@pytest.mark.parametrize(
    "shard",
    ["../secret.safetensors", "/etc/x.safetensors", "a\\b.safetensors", "..", "", "x.bin", "C:x"],
)
def test_an_index_cannot_name_files_outside_its_folder(tmp_path: Path, shard: str) -> None:
    with pytest.raises(CheckpointError, match="shards must be safetensors beside their index"):
        shards_of({"weight_map": {"w": shard}}, "index.json")
    with pytest.raises(CheckpointError, match="no weight_map"):
        shards_of({"metadata": {}}, "index.json")


@pytest.mark.parametrize(
    ("there", "variant", "message"),
    [
        ("config.json", None, r"subfolder 'unet'; there is: config.json$"),
        (f"{STEM}.safetensors", "fp16", "variant 'fp16'.*leave variant out"),
        (f"{STEM}.fp16.safetensors", None, "choose variant="),
        (f"{STEM}.bin", None, "refused; convert them to safetensors"),
        ("model.ckpt", None, "refused; convert them to safetensors"),
    ],
)
def test_missing_weights_say_where_was_looked_and_what_is_there(
    tmp_path: Path, there: str, variant: str | None, message: str
) -> None:
    put(tmp_path / "unet", there)
    with pytest.raises(OSError, match=message) as error:
        Source(str(tmp_path), subfolder="unet", variant=variant).weights(STEM)
    assert str(tmp_path) in str(error.value) and there in str(error.value)


def test_a_long_folder_is_not_listed_in_full(tmp_path: Path) -> None:
    put(tmp_path, *(f"{i:02}.txt" for i in range(30)))
    with pytest.raises(CheckpointError, match=r"09\.txt and 20 more"):
        Source(str(tmp_path)).fetch("config.json")


@pytest.mark.parametrize("path", ["/no/such/folder", "./missing", "a/b/c", "owner/name with space"])
def test_what_is_no_folder_and_no_repository_is_said(path: str) -> None:
    for local_files_only in (False, True):
        with pytest.raises(CheckpointError, match=r"no local folder .* not the name of a hub"):
            Source(path, local_files_only=local_files_only).names()


@pytest.fixture
def cache(tmp_path: Path) -> Path:
    """The hub's cache as it is after owner/lcm was downloaded."""
    repository = tmp_path / "cache" / "models--owner--lcm"
    put(repository / "snapshots" / COMMIT, "unet/config.json", f"unet/{STEM}.safetensors")
    (repository / "refs").mkdir()
    (repository / "refs" / "main").write_text(COMMIT)
    return tmp_path / "cache"


def test_the_cache_serves_without_a_network(cache: Path) -> None:
    source = Source("owner/lcm", subfolder="unet", cache_dir=cache, local_files_only=True)
    assert source.names() == ["config.json", f"{STEM}.safetensors"]
    assert source.weights(STEM)[0].is_file()
    assert (source.folder() / "config.json").is_file()
    with pytest.raises(CheckpointError, match=r"not in the hub's cache either; local_files_only"):
        Source("owner/other", cache_dir=cache, local_files_only=True).names()
    with pytest.raises(CheckpointError, match="cannot be downloaded anew"):
        Source("owner/lcm", cache_dir=cache, local_files_only=True, force_download=True).names()


def run(code: str, **environment: str) -> str:
    """What a fresh Python prints: the hub's settings are read when it is imported."""
    prelude = "from fewstep.checkpoints.locate import Source\n"
    variables = {key: value for key, value in os.environ.items() if not key.startswith("HF_")}
    variables |= {"NO_PROXY": "127.0.0.1", "no_proxy": "127.0.0.1"} | environment
    result = subprocess.run(
        [sys.executable, "-c", prelude + code], env=variables, capture_output=True, text=True
    )
    assert result.returncode == 0, result.stderr
    return result.stdout


def test_an_unreachable_hub_is_one_error_at_once(tmp_path: Path, cache: Path) -> None:
    code = f"""
print(len(Source("owner/lcm", cache_dir={str(cache)!r}).names()))
try:
    Source("owner/other", subfolder="unet").names()
except OSError as error:
    print(error)
"""
    started = time.monotonic()
    closed = run(code, HF_ENDPOINT="http://127.0.0.1:9", HF_HOME=str(tmp_path / "home"))
    assert time.monotonic() - started < 20
    assert closed.startswith("2\n") and "the hub cannot be reached" in closed
    offline = run(code, HF_HUB_OFFLINE="1", HF_HOME=str(tmp_path / "home"))
    assert offline.startswith("2\n") and "HF_HUB_OFFLINE is set" in offline


FILES = {
    "model_index.json": b"{}",
    "unet/config.json": b'{"a": 1}',
    f"unet/{STEM}.safetensors": b"weights",
    "vae/config.json": b"{}",
}


class Hub(http.server.BaseHTTPRequestHandler):
    """As much of the hub's interface as a download uses."""

    def do_HEAD(self) -> None:
        self.respond()

    def do_GET(self) -> None:
        self.respond()

    def respond(self) -> None:
        path = self.path.split("?")[0]
        if path.endswith(("/api/models/owner/lcm", "/api/models/owner/lcm/revision/main")):
            siblings = [{"rfilename": name} for name in FILES]
            content = {"id": "owner/lcm", "sha": COMMIT, "siblings": siblings}
            return self.send(200, json.dumps(content).encode())
        if "/api/models/owner/lcm/tree/" in path:
            entries = [
                {"type": "file", "path": name, "size": len(data), "oid": f"{i:040x}"}
                for i, (name, data) in enumerate(FILES.items())
            ]
            return self.send(200, json.dumps(entries).encode())
        name = path.partition("/resolve/")[2].partition("/")[2]
        if name in FILES:
            return self.send(200, FILES[name], ETag=f'"{list(FILES).index(name):040x}"')
        return self.send(404, b"{}", **{"X-Error-Code": "RepoNotFound"})

    def send(self, status: int, content: bytes, **headers: str) -> None:
        self.send_response(status)
        self.send_header("Content-Length", str(len(content)))
        self.send_header("Content-Type", "application/json")
        self.send_header("X-Repo-Commit", COMMIT)
        for key, value in headers.items():
            self.send_header(key, value)
        self.end_headers()
        if self.command == "GET":
            self.wfile.write(content)

    def log_message(self, *arguments: object) -> None:
        pass


@pytest.fixture
def hub() -> Iterator[str]:
    server = http.server.ThreadingHTTPServer(("127.0.0.1", 0), Hub)
    threading.Thread(target=server.serve_forever, daemon=True).start()
    yield f"http://127.0.0.1:{server.server_port}"
    server.shutdown()
    server.server_close()


def test_a_hub_serves_files_and_folders_and_only_what_is_asked_for(
    hub: str, tmp_path: Path
) -> None:
    code = f"""
folder = Source("owner/lcm").folder(["model_index.json", "vae/*"])
print(sorted(p.relative_to(folder).as_posix() for p in folder.rglob("*") if p.is_file()))
unet = Source("owner/lcm", subfolder="unet")
print(unet.read_json("config.json"), unet.weights({STEM!r})[0].read_text())
try:
    Source("owner/none").names()
except OSError as error:
    print(error)
"""
    home = tmp_path / "home"
    printed = run(code, HF_ENDPOINT=hub, HF_HOME=str(home), HF_HUB_DISABLE_TELEMETRY="1")
    first, second, third = printed.splitlines()
    assert first == "['model_index.json', 'vae/config.json']"
    assert second == "{'a': 1} weights"
    assert "the hub has no such repository" in third
    # What was fetched is there when the hub is not.
    again = 'print(Source("owner/lcm", subfolder="unet").read_json("config.json"))'
    assert run(again, HF_HUB_OFFLINE="1", HF_HOME=str(home)).strip() == "{'a': 1}"
