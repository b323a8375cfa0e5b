"""Case 2: a damaged or hostile safetensors file is named with the reason, and costs no memory."""

from __future__ import annotations

import struct
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
from bad_files import copied, floats, python, safetensors

from fewstep import CheckpointError, DiffusionPipeline, StableDiffusionPipeline

TWICE = b'{"a":%s,"a":%s}' % ((b'{"dtype":"F32","shape":[2],"data_offsets":[0,8]}',) * 2)
OVERLAP = {"a": floats(0, 8), "b": floats(4, 12)}
HUGE = {"a": floats(0, 8) | {"shape": [2**40, 2**40]}}
# A fault -> (the file from a good one, what is said of it).
FAULTS: dict[str, tuple[Callable[[bytes], bytes], str]] = {
    "cut in half": (lambda good: good[: len(good) // 2], "not fully covered"),
    "empty": (lambda good: b"", "header too small"),
    "header of 2^63 bytes": (
        lambda good: safetensors({}, size=2**63),
        "would have 9223372036854775808",
    ),
    "header of 200 MB": (lambda good: safetensors({}, size=200 << 20), "would have 209715200"),
    "header longer than the file": (lambda good: safetensors({}, size=1000), "header"),
    "overlapping tensors": (lambda good: safetensors(OVERLAP, bytes(12)), "invalid offset"),
    "tensors beyond the end": (lambda good: safetensors({"a": floats(0, 8)}, bytes(4)), "covered"),
    "a name twice": (lambda good: safetensors(TWICE, bytes(8)), "more than once"),
    "bytes behind the end": (lambda good: good + b"PK\x03\x04", "not fully covered"),
    "a shape of 2^80 numbers": (lambda good: safetensors(HUGE, bytes(8)), "overflow"),
    "a list that is none": (lambda good: safetensors(b"[]"), "invalid JSON"),
    "a list of depth 10^6": (lambda good: safetensors(b"[" * 10**6 + b"]" * 10**6), "JSON"),
    "no text": (lambda good: safetensors(b'{"\xff":1}'), "UTF-8"),
}


@pytest.fixture(scope="module")
def pipe(sd_folder: Path) -> Any:
    return DiffusionPipeline.from_pretrained(sd_folder)


@pytest.mark.parametrize("fault", FAULTS)
def test_a_damaged_file_is_named_with_the_reason_at_every_door(
    fault: str, pipe: Any, sd_folder: Path, tmp_path: Path
) -> None:
    """Case 2: truncated, header lengths, offsets, duplicate keys, trailing bytes."""
    damaged, reason = FAULTS[fault]
    good = (sd_folder / "text_encoder" / "model.safetensors").read_bytes()
    file = tmp_path / "one.safetensors"
    file.write_bytes(damaged(good))
    for component in ("unet", "text_encoder"):
        folder = copied(sd_folder, tmp_path / component, **{component: file.read_bytes()})
        with pytest.raises(CheckpointError, match=rf"{component}/\w+\.safetensors .*{reason}"):
            DiffusionPipeline.from_pretrained(folder)
    for door in (StableDiffusionPipeline.from_single_file, pipe.load_lora_weights):
        with pytest.raises(CheckpointError, match=rf"one\.safetensors .*{reason}"):
            door(file)
    assert pipe.get_list_adapters() == {}


READ = """
import resource, sys
from pathlib import Path
import fewstep
from fewstep.checkpoints.weights import read_tensors

def peak():
    return resource.getrusage(resource.RUSAGE_SELF).ru_maxrss // 1024

def doors(file):
    yield lambda: fewstep.StableDiffusionPipeline.from_single_file(file)
    yield lambda: list(read_tensors([Path(file)]))

def refused(call):
    try:
        call()
    except fewstep.CheckpointError:
        return
    sys.exit("it was read")

for door in doors(sys.argv[1]):  # imports what is needed
    refused(door)
before = peak()
for file in sys.argv[2:]:
    for door in doors(file):
        refused(door)
print(peak() - before)
"""


def test_lists_of_hundreds_of_megabytes_are_refused_unread(tmp_path: Path) -> None:
    """Case 2: a 200 MB header, and 3: a million keys; less than 64 MB more are in use."""
    (tmp_path / "empty").write_bytes(b"")
    with (tmp_path / "spaces").open("wb") as stream:  # sparse: as large as it says
        stream.write(struct.pack("<Q", 200 << 20) + b"{")
        stream.truncate(200 << 20)
    entry = b'"%d":{"dtype":"F32","shape":[0],"data_offsets":[0,0]}'
    for name, count in (("keys", 10**6), ("fewer keys", 250_000)):
        keys = b",".join(entry % number for number in range(count))
        (tmp_path / name).write_bytes(safetensors(b"{%s}" % keys))
    names = ("empty", "spaces", "keys", "fewer keys")
    files = [(tmp_path / name).rename(tmp_path / f"{name}.safetensors") for name in names]
    done = python("-c", READ, *files)
    assert done.returncode == 0, done.stderr
    assert int(done.stdout) < 64
