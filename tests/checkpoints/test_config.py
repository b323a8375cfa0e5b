"""Configs: dataclasses that read as mappings and refuse what is not implemented."""

from __future__ import annotations

import copy
import json
from collections.abc import Mapping
from dataclasses import FrozenInstanceError, dataclass
from pathlib import Path
from typing import Any, ClassVar

import pytest

from fewstep import CheckpointError, UnsupportedConfig
from fewstep.checkpoints.config import LAYOUT_VERSION, Config, read_json, replacing, write_json


@dataclass(frozen=True)
class Network(Config):
    INERT: ClassVar[Mapping[str, tuple[Any, ...]]] = {
        "class_embed_type": (None,),
        "act_fn": ("silu", "swish"),
    }

    channels: int = 4
    widths: tuple[Any, ...] = (8, 16)
    act_fn: str = "silu"


@dataclass(frozen=True)
class Sampler(Config):
    STRICT: ClassVar[bool] = False

    steps: int = 50
    scale: float = 1.0


def test_a_config_reads_as_an_object_and_as_a_mapping() -> None:
    config = Network.from_dict({"channels": 8, "widths": [1, [2, 3]], "_name_or_path": "x"})
    assert config.channels == config["channels"] == config.get("channels") == 8
    assert config.widths == (1, (2, 3))
    assert config.class_embed_type is None and config["class_embed_type"] is None
    assert "act_fn" in config and "missing" not in config
    assert config.get("missing", 5) == 5
    assert dict(config) == dict(config.items()) and list(config) == list(config.keys())
    assert Network.from_dict(dict(config)) == config == copy.deepcopy(config)
    assert {**config}["channels"] == 8
    with pytest.raises(AttributeError, match="Network has no key 'missing'"):
        _ = config.missing
    with pytest.raises(KeyError):
        config["missing"]


def test_a_config_cannot_be_changed() -> None:
    config = Network()
    for change in (
        lambda: setattr(config, "channels", 2),
        lambda: setattr(config, "new", 2),
        lambda: delattr(config, "channels"),
    ):
        with pytest.raises(FrozenInstanceError):
            change()
    with pytest.raises(TypeError):
        config["channels"] = 2  # type: ignore[index]


def test_values_that_are_not_implemented_are_named() -> None:
    message = r"class_embed_type='timestep' is not implemented \(supported: None\)"
    with pytest.raises(UnsupportedConfig, match=message):
        Network.from_dict({"class_embed_type": "timestep"})
    with pytest.raises(ValueError, match=r"act_fn='gelu' .*'silu', 'swish'"):
        Network.from_dict({"act_fn": "gelu"})
    assert Network.from_dict({"act_fn": "swish"}).act_fn == "swish"


def test_a_network_refuses_unknown_keys_and_a_sampler_carries_them() -> None:
    with pytest.raises(UnsupportedConfig, match=r"chanels=3; did you mean 'channels'"):
        Network.from_dict({"chanels": 3})
    sampler = Sampler.from_dict({"karras": True})
    assert sampler.karras is True and sampler.to_dict()["karras"] is True


def test_overrides_win_and_defaults_of_another_class_give_way() -> None:
    stored = {"steps": 20, "scale": 3.0, "_use_default_values": ["scale"]}
    config = Sampler.from_dict(stored)
    assert (config.steps, config.scale) == (20, 1.0)
    assert config["_use_default_values"] == ["scale"]
    changed = Sampler.from_dict(config, scale=2.0)
    assert (changed.steps, changed.scale) == (20, 2.0)
    assert "_use_default_values" not in changed
    assert Sampler(steps=20)["_use_default_values"] == ["scale"]


def test_saving_writes_every_key_and_a_header(tmp_path: Path) -> None:
    config = Network.from_dict({"channels": 8, "_name_or_path": "x"})
    write_json(config.to_dict("UNet"), tmp_path / "deep" / "config.json")
    text = (tmp_path / "deep" / "config.json").read_text()
    stored = json.loads(text)
    assert text == json.dumps(stored, indent=2, sort_keys=True) + "\n"
    assert stored.pop("_diffusers_version") == LAYOUT_VERSION
    assert stored == {
        "_class_name": "UNet",
        "act_fn": "silu",
        "channels": 8,
        "class_embed_type": None,
        "widths": [8, 16],
    }
    assert Network.from_dict(stored) == config


def test_broken_files_are_named(tmp_path: Path) -> None:
    path = tmp_path / "config.json"
    for content, message in (
        (b"{", "not valid JSON"),
        (b"[1]", "list"),
        (b"\xff\xfe", "not valid"),
    ):
        path.write_bytes(content)
        with pytest.raises(CheckpointError, match=rf"config.json.*{message}"):
            read_json(path)


def test_a_failed_write_leaves_the_file_as_it_was(tmp_path: Path) -> None:
    path = tmp_path / "config.json"
    path.write_text("old")
    with pytest.raises(RuntimeError), replacing(path) as beside:
        beside.write_text("half")
        raise RuntimeError
    with pytest.raises(AttributeError):
        write_json({"a": object()}, path)
    assert [p.name for p in tmp_path.iterdir()] == ["config.json"]
    assert path.read_text() == "old"
