"""Case 5: names of models, LoRAs, pictures, jobs and uploads never become paths."""

from __future__ import annotations

import json
import sys
from collections.abc import Iterator
from pathlib import Path
from urllib.parse import quote

import httpx
import pytest
from faults.wires import answer as read
from faults.wires import head, opened
from server.asked import Served, file, square

SECRET = "the contents of a file that nobody may read"
NAMES = [
    "../../etc/passwd",
    "/etc/passwd",
    "..\\..\\x",
    "C:\\x",
    "%2e%2e%2f",
    "..%2f..%2fetc%2fpasswd",
    "a\0b",
    "CON",
    "x" * 4096,
    "link/secret.txt",
    "secret.txt",
    "<img src=x onerror=alert(1)>",
]
IDS = [name[:24].encode("ascii", "backslashreplace").decode() for name in NAMES]
_opened: list[str] | None = None  # what the process opens while somebody looks


def _look(event: str, arguments: tuple[object, ...]) -> None:
    if _opened is not None and event in ("open", "os.rename", "os.remove", "os.mkdir"):
        _opened.append(str(arguments[0]))


@pytest.fixture(scope="module", autouse=True)
def looking() -> None:
    sys.addaudithook(_look)  # for good: Python cannot take it back


@pytest.fixture
def folder(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Iterator[Path]:
    """The server's folder, with a secret and a link out of it; nothing of it is touched."""
    global _opened
    outside = tmp_path / "outside"
    outside.mkdir()
    (outside / "secret.txt").write_text(SECRET)
    here = tmp_path / "here"
    here.mkdir()
    (here / "link").symlink_to(outside)
    (here / "secret.txt").write_text(SECRET)
    monkeypatch.chdir(here)
    before = sorted(tmp_path.rglob("*"))
    touched: list[str] = []
    _opened = touched
    yield here
    wrong = ("passwd", str(tmp_path), "secret", "CON", "onerror", "xxxx")
    assert not [path for path in touched if any(word in path for word in wrong)]
    assert (here / "secret.txt").read_text() == SECRET
    assert "secret.txt" in touched[-1]  # what is opened is seen
    _opened = None
    assert sorted(tmp_path.rglob("*")) == before


def check(answer: httpx.Response, statuses: tuple[int, ...]) -> None:
    """It is refused, as JSON that no browser takes for a page, and nothing was read."""
    assert answer.status_code in statuses, answer.text
    assert answer.headers["content-type"] == "application/json"
    assert answer.headers["x-content-type-options"] == "nosniff"
    assert SECRET not in answer.text and "root:" not in answer.text


@pytest.mark.usefixtures("folder")
@pytest.mark.parametrize("name", NAMES, ids=IDS)
def test_a_name_of_a_model_or_a_lora_is_looked_up_and_never_opened(real: Served, name: str) -> None:
    """Case 5."""
    with httpx.Client(base_url=real.address) as client:
        fields = {"prompt": "a", "model": name}
        check(client.post("/v1/images/generations", json=fields), (404, 422))
        settings = {"sd_model_checkpoint": name}
        check(client.post("/sdapi/v1/options", json=settings), (422,))
        asked = {"prompt": "a", "override_settings": settings}
        check(client.post("/sdapi/v1/txt2img", json=asked), (422,))
        loras = [{"id": name, "weight": 1.0}]
        check(client.post("/v1/generate", json={"prompt": "a", "loras": loras}), (422,))
        if not set("<>:") & set(name) and len(name) <= 256:  # else it is no LoRA but a text
            asked = {"prompt": f"a <lora:{name}:1>"}
            check(client.post("/sdapi/v1/txt2img", json=asked), (422,))


@pytest.mark.usefixtures("folder")
@pytest.mark.parametrize("name", NAMES, ids=IDS)
def test_a_path_of_a_request_leads_to_a_route_or_nowhere(real: Served, name: str) -> None:
    """Case 5: in percent signs, and as raw as a line of HTTP allows."""
    forms = {quote(name, safe=""), quote(name)}
    if name.isascii() and name.isprintable() and " " not in name:
        forms.add(name)
    for method, place in (
        ("GET", "/v1/models/"),
        ("GET", "/v1/images/files/"),
        ("GET", "/studio/"),
        ("GET", "/"),
        ("DELETE", "/v1/jobs/"),
    ):
        for form in forms:
            with opened(real, head(method, place + form, Host="localhost")) as connection:
                found = read(connection, method)
            assert found.status in (400, 404, 405), (method, place, form, found)
            assert SECRET.encode() not in found.body and b"root:" not in found.body


@pytest.mark.usefixtures("folder")
@pytest.mark.parametrize("name", NAMES, ids=IDS)
def test_the_name_of_an_upload_is_not_used(real: Served, name: str) -> None:
    """Case 5."""
    about = quote(name, safe=" <>=()/.\\:%")
    lines = [
        b'--b\r\nContent-Disposition: form-data; name="prompt"\r\n\r\na cat\r\n--b\r\n',
        f'Content-Disposition: form-data; name="image"; filename="{about}"\r\n\r\n'.encode(),
        file(square()),
        b"\r\n--b--\r\n",
    ]
    answer = httpx.post(
        f"{real.address}/v1/images/edits",
        content=b"".join(lines),
        headers={"Content-Type": "multipart/form-data; boundary=b"},
        timeout=30,
    )
    assert answer.status_code == 200, answer.text
    assert json.loads(answer.text)["data"][0]["b64_json"]
