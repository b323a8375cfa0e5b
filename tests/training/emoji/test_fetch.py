import hashlib
import os
import stat

import pytest

from fewstep.errors import FewstepError, RequestError
from fewstep.training.emoji import fetch as module
from fewstep.training.emoji.fetch import PACKAGES, Package, fetch


@pytest.fixture
def fake_npm(tmp_path, monkeypatch):
    """An `npm` that packs five bytes under the name asked for."""
    script = tmp_path / "bin" / "npm"
    script.parent.mkdir()
    script.write_text('#!/bin/sh\nprintf hello > "$4/thing-1.0.0.tgz"\n')
    script.chmod(script.stat().st_mode | stat.S_IXUSR)
    monkeypatch.setenv("PATH", str(script.parent), prepend=os.pathsep)


def pin(monkeypatch, content: bytes) -> None:
    package = Package("thing", "1.0.0", hashlib.sha256(content).hexdigest())
    monkeypatch.setitem(PACKAGES, "thing", package)


def test_file_with_another_hash_is_refused_by_name(tmp_path):
    broken = tmp_path / PACKAGES["keywords"].file_name
    broken.write_bytes(b"not the package")
    with pytest.raises(FewstepError, match=r"emojilib-4\.0\.3\.tgz is not emojilib@4\.0\.3"):
        fetch(["keywords"], tmp_path)


def test_fetched_file_is_verified_and_kept(tmp_path, monkeypatch, fake_npm):
    pin(monkeypatch, b"hello")
    path = fetch(["thing"], tmp_path / "cache")["thing"]
    assert path.read_bytes() == b"hello"
    monkeypatch.setattr(module, "_pack", None)  # a second fetch would fail
    assert fetch(["thing"], tmp_path / "cache")["thing"] == path


def test_download_with_another_hash_leaves_nothing_behind(tmp_path, monkeypatch, fake_npm):
    pin(monkeypatch, b"something else")
    with pytest.raises(FewstepError, match="sha256"):
        fetch(["thing"], tmp_path / "cache")
    assert list((tmp_path / "cache").iterdir()) == []


def test_missing_npm_is_named_with_the_way_round_it(tmp_path, monkeypatch):
    monkeypatch.setenv("PATH", str(tmp_path))
    with pytest.raises(FewstepError, match=r"needs `npm`.*put emojilib-4\.0\.3\.tgz into"):
        fetch(["keywords"], tmp_path / "cache")


def test_unknown_package_is_named(tmp_path):
    with pytest.raises(RequestError, match="'nothing' is unknown"):
        fetch(["nothing"], tmp_path)


def test_scoped_names_become_file_names_as_npm_does():
    assert PACKAGES["3d"].file_name == "lobehub-fluent-emoji-3d-1.1.0.tgz"
