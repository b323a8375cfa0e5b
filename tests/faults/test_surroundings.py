"""Cases 18 and 19: full disks and machines that lack something end in one line that says what."""

from __future__ import annotations

import errno
import os
import resource
import shutil
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any, NoReturn

import pytest
import torch
from bad_files import python

from fewstep import CheckpointError, DiffusionPipeline, FewstepError
from fewstep.cli.app import BAD_INPUT, explained
from fewstep.kernels import build

LAYER = "down_blocks.1.attentions.0.transformer_blocks.0.attn2.to_k"


@contextmanager
def largest_file(size: int) -> Iterator[None]:
    """Writing more than `size` bytes to a file fails, as on a full disk or over a quota."""
    before = resource.getrlimit(resource.RLIMIT_FSIZE)
    resource.setrlimit(resource.RLIMIT_FSIZE, (size, before[1]))
    try:
        yield
    finally:
        resource.setrlimit(resource.RLIMIT_FSIZE, before)


def test_a_full_disk_leaves_a_saved_network_as_it_was(sd_folder: Path, tmp_path: Path) -> None:
    """Case 18: ENOSPC while a model is saved over another."""
    unet = DiffusionPipeline.from_pretrained(sd_folder).unet
    unet.save_pretrained(tmp_path)
    before = {path.name: path.read_bytes() for path in tmp_path.iterdir()}
    with largest_file(1000), pytest.raises((FewstepError, OSError)):
        unet.save_pretrained(tmp_path)
    assert {path.name: path.read_bytes() for path in tmp_path.iterdir()} == before


def test_a_full_disk_leaves_a_saved_lora_as_it_was(sd_folder: Path, tmp_path: Path) -> None:
    """Case 18: the same of a LoRA, and nothing beside it."""
    pipe: Any = DiffusionPipeline.from_pretrained(sd_folder)
    layers = {f"{LAYER}.lora_{p}.weight": torch.ones(64, 64) for p in "AB"}
    pipe.save_lora_weights(tmp_path, unet_lora_layers=layers)
    (file,) = tmp_path.iterdir()
    before = file.read_bytes()
    with largest_file(1000), pytest.raises(CheckpointError, match="could not be written"):
        pipe.save_lora_weights(tmp_path, unet_lora_layers=layers)
    assert [path.read_bytes() for path in tmp_path.iterdir()] == [before]


@pytest.mark.parametrize(
    "number", [errno.ENOSPC, errno.EACCES, errno.EROFS, errno.ENAMETOOLONG, errno.ELOOP]
)
def test_what_the_system_refuses_is_bad_input_and_no_fault(number: int) -> None:
    """Case 19: one line that names the place, and exit code 2."""
    message, code = explained(OSError(number, os.strerror(number), "/some/place"))
    assert code == BAD_INPUT
    assert "/some/place" in message and os.strerror(number) in message
    assert "--debug" not in message


def test_without_a_home_the_kernels_are_left_out_with_a_word(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    """Case 19: HOME unset, and a user whom the system does not know (containers)."""

    def nowhere(path: Path) -> NoReturn:
        raise RuntimeError("Could not determine home directory.")

    monkeypatch.delenv("FEWSTEP_CACHE", raising=False)
    monkeypatch.setattr(Path, "expanduser", nowhere)
    with pytest.raises(build._Off, match="set FEWSTEP_CACHE"):
        build._folder()


def test_a_machine_without_home_and_locale_draws_into_a_folder_of_any_name(tmp_path: Path) -> None:
    """Cases 19 and 25: HOME unset, LC_ALL=C, a broken GPU hidden; a path that is not ASCII."""
    out = tmp_path / "größe 写真" / "Äpfel 🍎.png"
    command = ("-m", "fewstep", "generate", "Äpfel 🍎", "-s", 1, "--seed", 3, "--out", out)
    done = python(*command, HOME=None, LC_ALL="C", CUDA_VISIBLE_DEVICES="99")
    assert (done.returncode, done.stdout, done.stderr) == (0, f"{out}\n", "")
    from fewstep.cli.record import read_record

    assert read_record(out).pictures[0].prompt == "Äpfel 🍎"


FEW = """
import resource, sys
from pathlib import Path
from fewstep.cli import main
import fewstep.cli.generate, transformers.models.clip.modeling_clip
now = int(Path("/proc/self/statm").read_text().split()[0]) * resource.getpagesize()
resource.setrlimit(resource.RLIMIT_AS, (now + (100 << 20),) * 2)
sys.exit(main(["generate", "a", "-s", "1", "--size", "2048", "--out", sys.argv[1]]))
"""


def test_too_little_memory_is_said_with_what_takes_less(tmp_path: Path) -> None:
    """Case 19: a machine of 1 GB, of which 100 MB are left."""
    done = python("-c", FEW, tmp_path / "a.png")
    assert (done.returncode, done.stdout) == (2, "")
    assert done.stderr == "error: not enough memory; give a smaller --size, or --dtype float16\n"
    assert list(tmp_path.iterdir()) == []


REFUSALS = """
import sys
from pathlib import Path
from fewstep import FewstepError, UNet2DConditionModel
from fewstep.checkpoints.lora_formats import read_lora
from fewstep.cli import main
for line in sys.argv[2].splitlines():
    assert False, "python -O"  # passed over
    print(main(["generate", "a", *line.split()]), flush=True)
model, lora = Path(sys.argv[1], "model"), Path(sys.argv[1], "bad.safetensors")
for call in (lambda: UNet2DConditionModel.from_pretrained(model), lambda: read_lora(lora)):
    try:
        call()
    except FewstepError as error:
        print("error:", error, file=sys.stderr)
"""


def test_optimised_python_checks_all_the_same(sd_folder: Path, tmp_path: Path) -> None:
    """Case 25, `python -O`; and 19: a device that is not there, a folder that is a file."""
    (tmp_path / "bad.safetensors").write_bytes(b"\x80\x04 a pickle, by its first bytes")
    shutil.copytree(sd_folder / "unet", tmp_path / "model")
    config = tmp_path / "model" / "config.json"
    config.write_text(config.read_text().replace("layers_per_block", "layers_by_block"))
    lines = {
        "--device cuda": "--device cuda: is not on this machine",
        "--steps 0": "--steps",
        "--guidance nan": "--guidance",
        "--strength 0.5": "--strength 0.5: has a meaning only with --image",
        f"--out {config}/a.png": "cannot be written",
        f"--model {config}": "no local folder",
    }
    more = ["did you mean 'layers_per_block'", "convert them to safetensors"]
    done = python("-O", "-c", REFUSALS, tmp_path, "\n".join(lines), CUDA_VISIBLE_DEVICES="99")
    assert done.stdout.split() == ["2"] * len(lines), done.stderr
    for line, said in zip(done.stderr.splitlines(), [*lines.values(), *more], strict=True):
        assert line.startswith("error: ") and said in line
