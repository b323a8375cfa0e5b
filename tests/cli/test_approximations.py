"""--quantize and --fast: printed, recorded, and drawn again."""

from __future__ import annotations

import json
from collections.abc import Callable
from pathlib import Path

import pytest
import torch
from conftest import LCM_UNET

from fewstep import AutoencoderTiny, LatentConsistencyModelPipeline, UNet2DConditionModel
from fewstep.cli.record import FORMAT, Record, read_record
from fewstep.kernels import build
from fewstep.pipelines import approximations

Run = Callable[..., tuple[int, str, str]]
int8_only = pytest.mark.skipif(not build.has("avx512_vnni"), reason="a CPU without avx512_vnni")


@pytest.fixture(scope="module")
def folder(lcm_folder: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """An LCM with layers that are large enough to be quantised, and a tiny autoencoder beside."""
    torch.manual_seed(4)
    unet = UNet2DConditionModel(**LCM_UNET | {"block_out_channels": (32, 64)})
    made = tmp_path_factory.mktemp("models") / "wide"
    LatentConsistencyModelPipeline.from_pretrained(lcm_folder, unet=unet).save_pretrained(made)
    tiny = AutoencoderTiny(
        latent_channels=8,
        encoder_block_out_channels=(4,) * 3,
        decoder_block_out_channels=(4,) * 3,
        num_encoder_blocks=(1,) * 3,
        num_decoder_blocks=(1,) * 3,
    )
    tiny.save_pretrained(made / "vae_tiny")
    return made


def test_nothing_is_approximated_by_default(run: Run, folder: Path) -> None:
    assert run("generate", "a cat", "-m", folder, "--out", "a.png") == (0, "a.png\n", "")
    record = read_record(Path("a.png"))
    assert record.approximations == ()
    assert "approximations" not in record.to_dict()


@pytest.mark.parametrize("kind", [pytest.param("int8", marks=int8_only), "int8-weights"])
def test_a_quantised_picture_is_printed_recorded_and_drawn_again(
    run: Run, folder: Path, kind: str
) -> None:
    given = ("generate", "a cat", "-m", folder, "--seed", 3)
    run(*given, "--out", "exact.png")
    told = run(*given, "--out", "a.png", "--quantize", kind)
    assert told == (0, "a.png\n", f"approximations: {kind}\n")
    assert read_record(Path("a.png")).approximations == (kind,)
    assert run("repro", "a.png")[:2] == (0, "identical: a.png\n")
    assert Path("a.png").read_bytes() != Path("exact.png").read_bytes()


@int8_only
def test_fast_prints_what_it_does_and_the_picture_is_drawn_again(
    run: Run, folder: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(approximations, "WIDE", 32)
    monkeypatch.setattr(approximations, "bfloat16_refusal", lambda device: None)
    code, out, error = run("generate", "a cat", "-m", folder, "--fast", "--json", "-n", 2)
    assert code == 0
    lines = [line.partition(",")[0] for line in error.splitlines()]
    assert lines == ["fast: bfloat16: on", "fast: int8: on", "fast: tiny-vae: on"]
    for file in json.loads(out)["files"]:
        assert file["approximations"] == ["bfloat16", "int8", "tiny-vae"]
        assert file["dtype"] == "bfloat16"
        assert [a["kind"] for a in file["model"]["additions"]] == ["vae"]
        assert run("repro", file["path"])[:2] == (0, f"identical: {file['path']}\n")


def test_fast_says_that_it_has_no_effect(run: Run, lcm_folder: Path) -> None:
    run("generate", "a", "-m", lcm_folder, "--seed", 3, "--out", "exact.png")
    code, _, error = run("generate", "a", "-m", lcm_folder, "--seed", 3, "--fast", "-o", "a.png")
    assert code == 0
    assert error.startswith("fast: without effect on this machine with this model\n")
    assert error.count("left out") == 3
    assert read_record(Path("a.png")) == read_record(Path("exact.png"))


def test_what_cannot_be_done_names_the_option(
    run: Run, folder: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    cases = [
        ("int4", "'int4' is unknown; give one of int8, int8-weights, fp8"),
        ("fp8", "--quantize fp8: needs an NVIDIA GPU of compute capability 8.9"),
    ]
    for kind, said in cases:
        code, _, error = run("generate", "a", "-m", folder, "--quantize", kind)
        assert code == 2
        assert said in error
    monkeypatch.setattr(build, "has", lambda flag: False)
    code, _, error = run("generate", "a", "-m", folder, "--quantize", "int8")
    assert code == 2
    assert "--quantize int8: needs a CPU with avx512_vnni" in error


def test_a_record_of_the_format_before_is_read(run: Run, folder: Path) -> None:
    run("generate", "a", "-m", folder, "--out", "a.png")
    stored = read_record(Path("a.png")).to_dict()
    assert stored["format"] == FORMAT == 3
    assert Record.from_dict({**stored, "format": 2}).approximations == ()
