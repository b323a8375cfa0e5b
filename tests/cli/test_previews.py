"""`--previews` and `--vae`: what the steps predicted, in files, and another decoder."""

from __future__ import annotations

import json
from collections.abc import Callable
from pathlib import Path

import numpy as np
import PIL.Image
import pytest
import torch

import fewstep
from fewstep.cli.record import read_record

Run = Callable[..., tuple[int, str, str]]


@pytest.fixture(scope="module")
def tiny(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A small autoencoder of the latents of the LCM in `lcm_folder`."""
    torch.manual_seed(5)
    folder = tmp_path_factory.mktemp("vae") / "tiny"
    fewstep.AutoencoderTiny(
        latent_channels=8,
        encoder_block_out_channels=(4, 4, 4),
        decoder_block_out_channels=(4, 4, 4),
        num_encoder_blocks=(1, 1, 1),
        num_decoder_blocks=(1, 1, 1),
    ).save_pretrained(folder)
    return folder


def pixels(file: Path | str) -> np.ndarray:
    with PIL.Image.open(file) as picture:
        return np.asarray(picture.convert("RGB"))


def names(folder: str) -> list[str]:
    return sorted(file.name for file in Path(folder).iterdir())


def test_each_step_is_a_file_and_the_last_is_the_picture(run: Run, lcm_folder: Path) -> None:
    arguments = ("generate", "a cat", "-m", lcm_folder, "--seed", 7, "-s", 2)
    assert run(*arguments, "--previews", "steps") == (0, "fewstep-7.png\n", "")
    assert names("steps") == ["fewstep-7-step-1.png", "fewstep-7-step-2.png"]
    assert (pixels("steps/fewstep-7-step-2.png") == pixels("fewstep-7.png")).all()
    assert (pixels("steps/fewstep-7-step-1.png") != pixels("fewstep-7.png")).any()
    run(*arguments, "--out", "plain.png")
    assert (pixels("plain.png") == pixels("fewstep-7.png")).all()
    assert run("repro", "fewstep-7.png")[0] == 0
    code, _, error = run("repro", "steps/fewstep-7-step-2.png")
    assert code == 2 and "does not say what it was drawn from" in error


def test_previews_are_never_overwritten(run: Run, lcm_folder: Path) -> None:
    arguments = ("generate", "a", "-m", lcm_folder, "--seed", 7, "--previews", "steps")
    for steps in (2, 1, 10):
        run(*arguments, "-s", steps)
    assert names("steps")[:2] == ["fewstep-7-2-step-1.png", "fewstep-7-3-step-01.png"]
    assert len(names("steps")) == 13


def test_a_sheet_has_the_previews_of_all_its_pictures(
    run: Run, lcm_folder: Path, tiny: Path
) -> None:
    code, out, _ = run(
        *("generate", "a", "-m", lcm_folder, "-n", 2, "--grid", "--seed", 3, "-s", 1, "--json"),
        *("--previews", "a/b", "--preview-vae", tiny),
    )
    assert code == 0
    wanted = [str(Path("a/b") / f"fewstep-{seed}-step-1.png") for seed in (3, 4)]
    assert json.loads(out)["previews"] == wanted
    sheet = pixels("fewstep-3-grid.png")
    assert (pixels(wanted[0]) != sheet[:, :32]).any(), "another autoencoder decoded it"


def test_another_autoencoder_draws_is_recorded_and_draws_again(
    run: Run, lcm_folder: Path, tiny: Path
) -> None:
    arguments = ("generate", "a cat", "-m", lcm_folder, "--seed", 7, "-s", 2)
    run(*arguments, "--out", "a.png")
    assert run(*arguments, "--out", "b.png", "--vae", tiny)[0] == 0
    assert (pixels("a.png") != pixels("b.png")).any()
    (addition,) = read_record(Path("b.png")).model.additions
    assert (addition.kind, addition.id, len(addition.weights)) == ("vae", str(tiny), 64)
    assert run("repro", "b.png") == (0, "identical: b.png\n", "")


@pytest.mark.parametrize(
    ("options", "words"),
    [
        ("--preview-vae TINY", "--preview-vae TINY: has a meaning only with --previews"),
        ("--previews file", "--previews file: exists and is no folder; give a folder"),
        ("--previews file/x", "--previews file/x: cannot be written (Not a directory)"),
        ("--previews x --preview-vae SD/vae", "--preview-vae SD/vae: vae has latent_channels=4"),
        ("--previews x --preview-vae SD/unet", "names the class UNet2DConditionModel; give"),
        ("--vae SD/vae", "--vae SD/vae: vae has latent_channels=4, and this model's latents have"),
        ("--vae SD/unet", "--vae SD/unet: its config.json names the class UNet2DConditionModel"),
        ("--vae ./none", "--vae ./none: "),
    ],
)
def test_bad_input_ends_in_one_line(
    options: str, words: str, run: Run, lcm_folder: Path, sd_folder: Path, tiny: Path
) -> None:
    Path("file").touch()

    def placed(text: str) -> str:
        return text.replace("TINY", str(tiny)).replace("SD", str(sd_folder))

    code, out, error = run("generate", "a", "-m", lcm_folder, *placed(options).split())
    assert (code, out) == (2, "")
    assert error.startswith("error: ") and error.count("\n") == 1
    assert placed(words) in error
    assert names(".") == ["file"]


def test_help_lists_the_options_of_generate_in_groups(run: Run) -> None:
    text = run("generate", "--help")[1]
    titles = ("Drawing", "From a picture", "Model", "Beside the model", "Videos", "Output")
    places = [text.index(f"\n{title}:\n") for title in titles]
    assert places == sorted(places)
    assert places[0] < text.index("--steps") < places[1] < text.index("--mask FILE") < places[2]
    assert places[-1] < text.index("--previews FOLDER") < text.index("\nOther options:\n")
    assert "<" not in text.replace("PROMPT <list[str]>", ""), "every value has a name"
