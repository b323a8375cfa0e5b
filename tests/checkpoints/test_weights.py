"""Weights: one copy, every name accounted for, nothing half-written."""

from __future__ import annotations

import json
import sys
import weakref
from collections.abc import Iterator
from pathlib import Path

import pytest
import torch
from safetensors import safe_open
from safetensors.torch import save_file
from torch import Tensor, nn

from fewstep import CheckpointError, RequestError
from fewstep.checkpoints import weights
from fewstep.checkpoints.legacy_names import modern_name, modern_shape
from fewstep.checkpoints.weights import load_weights, parse_size, read_tensors, save_weights


class Net(nn.Module):
    """Has a parameter of each kind, and a buffer that is not saved."""

    table: Tensor

    def __init__(self, width: int = 8) -> None:
        super().__init__()
        self.proj_in = nn.Linear(width, width)
        self.conv = nn.Conv2d(width, 4, 3)
        self.norm = nn.BatchNorm2d(4)
        self.register_buffer("table", torch.arange(5.0, device="cpu"), persistent=False)


def filled(width: int = 8) -> Net:
    torch.manual_seed(0)
    return Net(width)


def assert_same(a: nn.Module, b: nn.Module) -> None:
    left, right = a.state_dict(), b.state_dict()
    assert left.keys() == right.keys()
    assert all(torch.equal(left[key], right[key]) for key in left)


def test_what_is_saved_loads_as_it_was(tmp_path: Path) -> None:
    net = filled()
    (path,) = save_weights(net.state_dict(), tmp_path, "model")
    assert path.name == "model.safetensors"
    with safe_open(path, framework="pt") as file:
        assert file.metadata() == {"format": "pt"}
    loaded = load_weights(Net, [path])
    assert_same(net, loaded)
    assert torch.equal(loaded.table, torch.arange(5.0))
    assert all(p.requires_grad and not p.is_meta for p in loaded.parameters())


@pytest.mark.skipif(not sys.platform.startswith("linux"), reason="reads /proc")
def test_loaded_tensors_are_the_file_itself(tmp_path: Path) -> None:
    (path,) = save_weights(filled(64).state_dict(), tmp_path, "model")
    loaded = load_weights(lambda: Net(64), [path])
    lines = [line for line in Path("/proc/self/maps").read_text().splitlines() if str(path) in line]
    spans = [[int(end, 16) for end in line.split()[0].split("-")] for line in lines]
    for name, value in loaded.state_dict().items():
        assert any(start <= value.data_ptr() < end for start, end in spans), name


def test_changing_a_loaded_tensor_leaves_the_file_alone(tmp_path: Path) -> None:
    net = filled()
    (path,) = save_weights(net.state_dict(), tmp_path, "model")
    loaded = load_weights(Net, [path])
    with torch.no_grad():
        loaded.conv.weight.zero_()
    assert_same(net, load_weights(Net, [path]))
    # Saving over the file that the tensors are mapped to keeps what they hold.
    save_weights(loaded.state_dict(), tmp_path, "model")
    assert_same(loaded, load_weights(Net, [path]))


def test_floats_are_converted_on_request_and_integers_are_not(tmp_path: Path) -> None:
    paths = save_weights(filled().state_dict(), tmp_path, "model")
    loaded = load_weights(Net, paths, dtype=torch.bfloat16)
    assert loaded.conv.weight.dtype == torch.bfloat16
    assert loaded.norm.num_batches_tracked.dtype == torch.int64


def test_conversion_holds_one_tensor_at_a_time(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    paths = save_weights(filled().state_dict(), tmp_path, "model")
    originals: list[weakref.ref[Tensor]] = []

    def watched(files: list[Path]) -> Iterator[tuple[str, Tensor]]:
        for key, value in read_tensors(files):
            assert sum(ref() is not None for ref in originals) <= 1
            if value.is_floating_point():
                originals.append(weakref.ref(value))
            yield key, value
            del value

    monkeypatch.setattr(weights, "read_tensors", watched)
    load_weights(Net, paths, dtype=torch.float16)
    assert len(originals) == 8


def test_missing_and_surplus_names_are_listed(tmp_path: Path) -> None:
    state = filled().state_dict()
    del state["conv.bias"]
    state |= {f"extra.{i}": torch.zeros(1) for i in range(12)}
    paths = save_weights(state, tmp_path, "model")
    with pytest.raises(CheckpointError) as error:
        load_weights(Net, paths)
    message = str(error.value)
    assert "1 (conv.bias) missing, 12 (extra." in message and ", ...) surplus" in message
    assert message.count("extra.") == 10
    assert str(tmp_path) in message and "Net" in message


def test_a_shape_that_differs_is_named_with_both(tmp_path: Path) -> None:
    paths = save_weights(filled().state_dict(), tmp_path, "model")
    with pytest.raises(
        CheckpointError, match=r"conv.weight has shape \(4, 8, 3, 3\).*\(4, 6, 3, 3\)"
    ):
        load_weights(lambda: Net(6), paths)


@pytest.mark.parametrize("content", [b"", b"not safetensors at all", None])
def test_a_broken_file_is_named(tmp_path: Path, content: bytes | None) -> None:
    (path,) = save_weights(filled().state_dict(), tmp_path, "model")
    path.write_bytes(path.read_bytes()[:-8] if content is None else content)
    with pytest.raises(CheckpointError, match=r"model.safetensors is not a whole safetensors file"):
        load_weights(Net, [path])


def test_old_names_and_shapes_of_attention_load(tmp_path: Path) -> None:
    class Attention(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.to_q, self.to_k, self.to_v = (nn.Linear(4, 4) for _ in range(3))
            self.to_out = nn.ModuleList([nn.Linear(4, 4)])

    class Vae(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.attentions = nn.ModuleList([Attention()])
            self.proj_in = nn.Conv2d(4, 4, 1)

    vae = Vae()
    old = {}
    for key, value in vae.state_dict().items():
        for modern, name in (
            ("to_q", "query"),
            ("to_k", "key"),
            ("to_v", "value"),
            ("to_out.0", "proj_attn"),
        ):
            key = key.replace(modern, name)
        if key.endswith("weight"):
            value = value[:, :, 0, 0] if value.ndim == 4 else value[:, :, None, None]
        old[key] = value.contiguous()
    assert "attentions.0.proj_attn.weight" in old
    save_file(old, tmp_path / "old.safetensors")
    assert_same(vae, load_weights(Vae, [tmp_path / "old.safetensors"]))


def test_only_old_names_are_changed() -> None:
    assert modern_name("mid.attentions.0.key.bias") == "mid.attentions.0.to_k.bias"
    for name in ("attentions.0.to_k.weight", "key.weight", "attentions.0.query_norm.weight"):
        assert modern_name(name) == name
    value = torch.zeros(4, 3, 3, 3)
    assert modern_shape(value, (4, 3)) is value
    assert modern_shape(torch.zeros(4), (4, 1, 1)).shape == (4,)


@pytest.mark.parametrize("variant", [None, "fp16"])
def test_a_state_larger_than_a_shard_is_parted(tmp_path: Path, variant: str | None) -> None:
    net = filled(16)
    state = net.state_dict()
    written = save_weights(state, tmp_path, "model", variant, max_shard_size="2KB")
    *shards, index = written
    assert len(shards) > 1 and sorted(tmp_path.iterdir()) == sorted(written)
    middle = f"model.{variant}" if variant else "model"
    assert shards[0].name == f"{middle}-00001-of-{len(shards):05}.safetensors"
    assert index.name == f"model.safetensors.index{'.fp16' if variant else ''}.json"
    stored = json.loads(index.read_text())
    assert stored["weight_map"].keys() == state.keys()
    assert stored["metadata"]["total_size"] == sum(v.nbytes for v in state.values())
    assert_same(net, load_weights(lambda: Net(16), shards))
    for path in shards:
        with safe_open(path, framework="pt") as file:
            tensors = [file.get_tensor(key) for key in file.keys()]  # noqa: SIM118
        assert len(tensors) == 1 or sum(t.nbytes for t in tensors) <= 2000


def test_a_later_save_leaves_no_file_of_an_earlier_one(tmp_path: Path) -> None:
    state = filled(16).state_dict()
    other = tmp_path / "model.fp16.safetensors"
    other.touch()
    for size in ("2KB", "10GB", "4KB", "1KB"):
        written = save_weights(state, tmp_path, "model", max_shard_size=size)
        assert sorted(tmp_path.iterdir()) == sorted([*written, other])


def test_a_failed_save_leaves_the_files_as_they_were(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    net = filled(16)
    before = save_weights(net.state_dict(), tmp_path, "model", max_shard_size="2KB")
    calls = []

    def full_disk(tensors: dict[str, Tensor], path: Path, metadata: dict[str, str]) -> None:
        calls.append(path)
        if len(calls) == 2:
            Path(path).write_bytes(b"half")
            raise OSError("no space left on device")
        save_file(tensors, path, metadata)

    monkeypatch.setattr(weights, "save_file", full_disk)
    with pytest.raises(OSError, match="no space left"):
        save_weights(filled(8).state_dict(), tmp_path, "model", max_shard_size="1KB")
    assert sorted(tmp_path.iterdir()) == sorted(before)
    assert_same(net, load_weights(lambda: Net(16), before[:-1]))


def test_views_and_other_memory_formats_are_saved_by_value(tmp_path: Path) -> None:
    whole = torch.arange(24.0)
    state = {
        "first": whole[:12],
        "second": whole[12:],
        "turned": torch.arange(12.0).reshape(3, 4).T,
        "last": torch.rand(1, 2, 3, 4).to(memory_format=torch.channels_last),
    }
    loaded = dict(read_tensors(save_weights(state, tmp_path, "model")))
    assert all(torch.equal(loaded[key], value) for key, value in state.items())


@pytest.mark.parametrize(
    ("size", "expected"),
    [(5, 5), ("5B", 5), ("1.5KB", 1500), ("10GB", 10**10), ("2 MiB", 2 * 2**20), ("1tb", 10**12)],
)
def test_sizes_are_read(size: int | str, expected: int) -> None:
    assert parse_size(size) == expected


@pytest.mark.parametrize("size", ["", "GB", "5 apples", "-5GB", 0, -1, "0MB"])
def test_sizes_that_are_none_are_refused(size: int | str) -> None:
    with pytest.raises(RequestError, match="max_shard_size"):
        parse_size(size)


def test_files_are_as_readable_as_any_new_file(tmp_path):
    save_weights({"a": torch.zeros(2)}, tmp_path, "model")
    (tmp_path / "other").touch()
    (written,) = tmp_path.glob("*.safetensors")
    assert written.stat().st_mode == (tmp_path / "other").stat().st_mode
