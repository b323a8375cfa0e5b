from __future__ import annotations

import errno
import json
import os
import resource
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path

import numpy as np
import PIL.Image
import pytest

from fewstep import LatentConsistencyModelPipeline
from fewstep.cli.drawing import resolve_device
from fewstep.cli.record import read_record
from fewstep.errors import RequestError

Run = Callable[..., tuple[int, str, str]]


def pixels(file: Path | str) -> np.ndarray:
    with PIL.Image.open(file) as picture:
        return np.asarray(picture.convert("RGB"))


@pytest.fixture
def photo(tmp_path: Path) -> Path:
    """A picture of 60 x 30."""
    noise = np.random.default_rng(0).integers(0, 256, (30, 60, 3), dtype=np.uint8)
    file = tmp_path / "photo.png"
    PIL.Image.fromarray(noise).save(file)
    return file


def test_it_prints_where_the_picture_went_and_nothing_else(run: Run, lcm_folder: Path) -> None:
    assert run("generate", "a cat", "-m", lcm_folder, "--seed", 7) == (0, "fewstep-7.png\n", "")
    assert os.listdir() == ["fewstep-7.png"]
    assert pixels("fewstep-7.png").shape == (32, 32, 3)


def test_without_a_seed_each_run_draws_another_picture(run: Run, lcm_folder: Path) -> None:
    names = {run("generate", "a cat", "-m", lcm_folder)[1].strip() for _ in range(2)}
    assert len(names) == 2
    first, second = names
    assert (pixels(first) != pixels(second)).any()
    assert first == f"fewstep-{read_record(Path(first)).pictures[0].seed}.png"


def test_it_never_overwrites_by_itself(run: Run, lcm_folder: Path) -> None:
    for name in ("fewstep-7.png", "fewstep-7-2.png", "fewstep-7-3.png"):
        assert run("generate", "a cat", "-m", lcm_folder, "--seed", 7) == (0, f"{name}\n", "")


def test_the_picture_is_the_pipelines(run: Run, lcm_folder: Path) -> None:
    import torch

    run("generate", "a cat", "-m", lcm_folder, "--seed", 7, "-s", 2, "-g", 3, "--size", "16x24")
    pipe = LatentConsistencyModelPipeline.from_pretrained(lcm_folder)
    pipe.set_progress_bar_config(disable=True)
    (expected,) = pipe(
        "a cat",
        num_inference_steps=2,
        guidance_scale=3.0,
        width=16,
        height=24,
        generator=torch.Generator().manual_seed(7),
    ).images
    assert (pixels("fewstep-7.png") == np.asarray(expected)).all()


def test_the_picture_of_a_seed_does_not_depend_on_the_others(run: Run, lcm_folder: Path) -> None:
    code, out, _ = run("generate", "a cat", "a dog", "-m", lcm_folder, "-n", 2, "--seed", 3)
    assert (code, out.split()) == (0, [f"fewstep-{seed}.png" for seed in (3, 4, 5, 6)])
    assert [
        read_record(Path(f"fewstep-{seed}.png")).pictures[0].prompt for seed in (3, 4, 5, 6)
    ] == [
        "a cat",
        "a cat",
        "a dog",
        "a dog",
    ]
    run("generate", "a dog", "-m", lcm_folder, "--seed", 6, "--out", "alone.png")
    assert (pixels("alone.png") == pixels("fewstep-6.png")).all()
    assert (pixels("alone.png") != pixels("fewstep-5.png")).any()


def test_a_grid_is_one_file_of_all_pictures(run: Run, lcm_folder: Path) -> None:
    run("generate", "a cat", "-m", lcm_folder, "-n", 3, "--seed", 3)
    assert run("generate", "a cat", "-m", lcm_folder, "-n", 3, "--seed", 3, "--grid") == (
        0,
        "fewstep-3-grid.png\n",
        "",
    )
    sheet = pixels("fewstep-3-grid.png")
    assert sheet.shape == (64, 64, 3)
    assert (sheet[:32, 32:] == pixels("fewstep-4.png")).all()
    assert (sheet[32:, :32] == pixels("fewstep-5.png")).all()
    assert (sheet[32:, 32:] == 255).all()


def test_an_empty_prompt_is_a_prompt(run: Run, lcm_folder: Path) -> None:
    assert run("generate", "", "-m", lcm_folder, "--seed", 7)[0] == 0
    assert read_record(Path("fewstep-7.png")).pictures[0].prompt == ""


def test_a_warning_is_one_line_beside_the_result(run: Run, lcm_folder: Path) -> None:
    code, out, error = run("generate", "word " * 30, "-m", lcm_folder, "--seed", 7)
    assert (code, out) == (0, "fewstep-7.png\n")
    assert error.startswith("warning: the prompt is longer than the 16 tokens")
    assert error.count("\n") == 1


def test_out_names_a_file_or_a_folder(run: Run, lcm_folder: Path) -> None:
    assert run("generate", "a", "-m", lcm_folder, "--out", "x/y.png")[1] == f"{Path('x/y.png')}\n"
    assert Path("x/y.png").is_file()
    assert run("generate", "a", "-m", lcm_folder, "-o", "z", "--seed", 1)[1].startswith("z")
    assert Path("z/fewstep-1.png").is_file()


def test_force_replaces_the_file(run: Run, lcm_folder: Path) -> None:
    Path("a.png").write_bytes(b"before")
    assert run("generate", "a", "-m", lcm_folder, "--out", "a.png", "--force")[0] == 0
    assert pixels("a.png").shape == (32, 32, 3)


def test_json_tells_everything_in_one_object(run: Run, lcm_folder: Path) -> None:
    code, out, error = run("generate", "a cat", "-m", lcm_folder, "-n", 2, "--seed", 3, "--json")
    told = json.loads(out)
    assert (code, error) == (0, "")
    assert [file["path"] for file in told["files"]] == ["fewstep-3.png", "fewstep-4.png"]
    assert set(told["seconds"]) == {"load", "draw"}
    for file in told["files"]:
        path = file.pop("path")
        assert file == read_record(Path(path)).to_dict()


def test_the_record_holds_all_settings(run: Run, lcm_folder: Path, photo: Path) -> None:
    run(
        *("generate", "a cat", "-m", lcm_folder, "--seed", 7, "--steps", 3, "--guidance", 2.5),
        *("--size", 16, "--image", photo, "--strength", 0.5, "--dtype", "bf16", "--device", "cpu"),
    )
    record = read_record(Path("fewstep-7.png"))
    (picture,) = record.pictures
    assert record.model.id == str(lcm_folder)
    assert record.model.pipeline == "LatentConsistencyModelImg2ImgPipeline"
    assert record.model.scheduler["_class_name"] == "LCMScheduler"
    assert (record.device, record.dtype) == ("cpu", "bfloat16")
    assert set(record.versions) == {"fewstep", "torch", "transformers"}
    assert (picture.prompt, picture.seed, picture.steps, picture.guidance_scale) == (
        "a cat",
        7,
        3,
        2.5,
    )
    assert (picture.width, picture.height, picture.strength) == (16, 16, 0.5)
    assert picture.image is not None
    assert picture.image.path == str(photo)


def test_a_source_picture_gives_its_shape_at_the_models_size(
    run: Run, lcm_folder: Path, photo: Path
) -> None:
    assert run("generate", "a cat", "-m", lcm_folder, "--image", photo, "--seed", 7)[0] == 0
    # 60 x 30 at about 32 * 32 pixels, in multiples of 4.
    assert pixels("fewstep-7.png").shape == (24, 44, 3)


def test_a_higher_strength_leaves_the_source_further_behind(
    run: Run, lcm_folder: Path, photo: Path
) -> None:
    results = []
    for strength in (0.2, 0.2, 0.9):
        run(
            *("generate", "a cat", "-m", lcm_folder, "-i", photo, "--strength", strength),
            *("--seed", 7, "--out", "a.png", "--force"),
        )
        results.append(pixels("a.png"))
    assert (results[0] == results[1]).all()
    assert (results[0] != results[2]).any()


def test_a_negative_prompt_changes_a_model_with_guidance(run: Run, sd_folder: Path) -> None:
    for words in ([], ["--negative", "a dog"]):
        assert run("generate", "a cat", "-m", sd_folder, "--seed", 7, "-s", 2, *words)[0] == 0
    assert read_record(Path("fewstep-7-2.png")).pictures[0].negative_prompt == "a dog"
    assert (pixels("fewstep-7.png") != pixels("fewstep-7-2.png")).any()


def test_a_model_with_guidance_draws_from_pictures(run: Run, sd_folder: Path, photo: Path) -> None:
    assert run("generate", "a", "-m", sd_folder, "-i", photo, "-s", 4, "--seed", 7)[0] == 0
    record = read_record(Path("fewstep-7.png"))
    assert record.model.pipeline == "StableDiffusionImg2ImgPipeline"
    assert record.pictures[0].strength == 0.8


def refusals() -> list[tuple[list[object], str]]:
    """Arguments after `generate a -m MODEL`, and the words of the one line that answers them."""
    return [
        (["--size", "30"], "--size 30x30: this model needs multiples of 4; take 32x32"),
        (["--size", "32x33"], "--size 32x33: this model needs multiples of 4; take 32x32"),
        (["--size", "1"], "--size 1x1: this model needs multiples of 4; take 4x4"),
        (["--size", "big"], "--size"),
        (["--size", "0"], "for example 512x768"),
        (["--size", "1x2x3"], "for example 512x768"),
        (["--size", "-8"], "for example 512x768"),
        (["--image", "PHOTO", "--strength", "0"], "--strength': 0 is not above 0 and at most 1"),
        (["--image", "PHOTO", "--strength", "1.5"], "--strength': 1.5 is not above 0"),
        (["--image", "PHOTO", "--strength", "nan"], "--strength': nan is not above 0"),
        (["--image", "PHOTO", "--strength", "half"], "--strength': half is not above 0"),
        (["--strength", "0.5"], "--strength 0.5: has a meaning only with --image"),
        (["--image", "PHOTO", "--strength", "0.02"], "--strength"),
        (["--steps", "0"], "--steps"),
        (["--steps", "51"], "--steps"),
        (["--steps", "four"], "--steps"),
        (["--guidance", "nan"], "--guidance' / '-g': nan is not from 0 to 100"),
        (["--guidance", "-1"], "--guidance' / '-g': -1 is not from 0 to 100"),
        (["--size", "100000"], "give N or WIDTHxHEIGHT up to 8192"),
        (["--count", "0"], "--count"),
        (["--seed", "-1"], "--seed"),
        (["--seed", str(2**63)], f"--seed {2**63}: is too large; give at most {2**63 - 1}"),
        (["--negative", "x"], "--negative: has no effect on this model"),
        (["--image", "no.png"], "--image no.png: no such file; give a PNG, JPEG or WebP file"),
        (["--image", "TEXT"], "cannot be read as a picture"),
        (["--image", "."], "--image .: no such file; give a PNG, JPEG or WebP file"),
        (["--out", "a.gif"], "--out a.gif: a picture goes into a PNG file; give a name in .png"),
        (["--out", "TEXT/a.png"], "cannot be written (Not a directory); give another folder"),
        (["--out", "taken.png"], "--out taken.png: exists; give another name, or --force"),
        (["-n", "2", "--out", "a.png"], "--out a.png: is one file for 2 pictures; give a folder"),
        (["--force"], "--force: has a meaning only with --out FILE.png"),
        (["--device", "tpu"], "--device tpu: is not on this machine (have: "),
        (["--device", "cpu:7"], "--device cpu:7: is not on this machine (have: "),
        (
            ["--dtype", "int8"],
            "--dtype': 'int8' is unknown; give auto, float32, float16 or bfloat16",
        ),
        (["--colour"], "No such option: --colour"),
    ]


@pytest.mark.parametrize(
    ("arguments", "words"),
    refusals(),
    ids=lambda value: value if isinstance(value, str) else " ".join(value),
)
def test_bad_input_ends_in_one_line(
    arguments: list[object], words: str, run: Run, lcm_folder: Path, photo: Path, tmp_path: Path
) -> None:
    (tmp_path / "text.txt").write_text("no picture")
    Path("taken.png").write_bytes(b"before")
    places = {"PHOTO": photo, "TEXT": tmp_path / "text.txt"}
    given = [
        str(a).replace(
            str(a).split("/")[0], str(places.get(str(a).split("/")[0], str(a).split("/")[0]))
        )
        for a in arguments
    ]
    code, out, error = run("generate", "a", "-m", lcm_folder, *given)
    assert (code, out) == (2, "")
    assert error.startswith("error: ")
    assert error.count("\n") == 1
    assert words in error
    assert os.listdir() == ["taken.png"]
    assert Path("taken.png").read_bytes() == b"before"


def test_a_model_without_embedded_guidance_is_told_how_to_use_negatives(
    run: Run, sd_folder: Path
) -> None:
    code, _, error = run("generate", "a", "-m", sd_folder, "--negative", "x", "-g", 1)
    assert code == 2
    assert error == "error: --negative: has no effect with --guidance 1; use more than 1\n"


@pytest.mark.parametrize("name", ["no/such-model", "./no-such-folder", "no such model!"])
def test_an_unknown_model_ends_in_one_line(
    name: str, run: Run, monkeypatch: pytest.MonkeyPatch
) -> None:
    import huggingface_hub.constants

    monkeypatch.setattr(huggingface_hub.constants, "HF_HUB_OFFLINE", True)
    code, out, error = run("generate", "a", "--model", name)
    assert (code, out) == (2, "")
    assert error.startswith(f"error: --model {name}: ")
    assert error.count("\n") == 1


def test_a_broken_model_ends_in_one_line(run: Run, lcm_folder: Path, tmp_path: Path) -> None:
    broken = tmp_path / "broken"
    for file in lcm_folder.rglob("*"):
        if file.is_file():
            copy = broken / file.relative_to(lcm_folder)
            copy.parent.mkdir(parents=True, exist_ok=True)
            copy.write_bytes(file.read_bytes())
    (broken / "unet" / "diffusion_pytorch_model.safetensors").write_bytes(b"torn")
    code, out, error = run("generate", "a", "--model", broken)
    assert (code, out) == (2, "")
    assert error.startswith(f"error: --model {broken}: ")
    assert error.count("\n") == 1


def test_a_full_disk_ends_in_one_line_and_leaves_nothing(run: Run, lcm_folder: Path) -> None:
    before = resource.getrlimit(resource.RLIMIT_FSIZE)
    resource.setrlimit(resource.RLIMIT_FSIZE, (200, before[1]))
    try:
        code, out, error = run("generate", "a", "-m", lcm_folder, "--seed", 7)
    finally:
        resource.setrlimit(resource.RLIMIT_FSIZE, before)
    assert (code, out) == (2, "")
    assert error == (
        f"error: --out fewstep-7.png: cannot be written ({os.strerror(errno.EFBIG)}); "
        "free some space, or give another folder\n"
    )
    assert os.listdir() == []


def test_an_interruption_leaves_nothing_half_written(
    run: Run, lcm_folder: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    def interrupted(*_: object, **__: object) -> None:
        raise KeyboardInterrupt

    monkeypatch.setattr(PIL.Image.Image, "save", interrupted)
    assert run("generate", "a", "-m", lcm_folder)[:2] == (130, "")
    assert os.listdir() == []


def test_a_fault_of_our_own_is_one_line_too_and_debug_shows_where(
    run: Run, lcm_folder: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    def fault(*_: object, **__: object) -> None:
        raise ZeroDivisionError("by zero")

    monkeypatch.setattr(PIL.Image.Image, "save", fault)
    code, _, error = run("generate", "a", "-m", lcm_folder)
    assert code == 1
    assert error == "error: ZeroDivisionError: by zero (run again with --debug to see where)\n"
    code, _, error = run("generate", "a", "-m", lcm_folder, "--debug")
    assert code == 1
    assert "Traceback" in error


def test_a_devices_name_is_checked() -> None:
    assert str(resolve_device("cpu")) == "cpu"
    for name in ("cuda:99", "cuda:x", "cpu:1", "", ":"):
        with pytest.raises(RequestError, match="is not on this machine"):
            resolve_device(name)


def test_help_comes_without_torch() -> None:
    code = (
        "import sys\nfrom fewstep.cli import main\nmain(['generate', '--help'])\n"
        "sys.exit(bool({'torch', 'transformers', 'numpy'} & set(sys.modules)))"
    )
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True)
    assert done.returncode == 0
    assert "fewstep generate" in done.stdout


def test_the_package_is_the_command() -> None:
    done = subprocess.run(
        [sys.executable, "-m", "fewstep", "generate"], capture_output=True, text=True
    )
    assert done.returncode == 2
    assert done.stderr == "error: Missing argument 'PROMPT' (see fewstep generate --help)\n"


@pytest.mark.parametrize(
    "command", [[], ["generate"], ["repro"]], ids=lambda command: " ".join(command) or "fewstep"
)
def test_every_command_has_help_with_examples(command: list[str], run: Run) -> None:
    code, out, _ = run(*command, "--help")
    assert code == 0
    assert "Examples:\n" in out


def test_without_a_command_there_is_help(run: Run) -> None:
    assert run()[1] == run("--help")[1]


def test_the_version_is_told(run: Run) -> None:
    import fewstep

    assert run("--version") == (0, f"fewstep {fewstep.__version__}\n", "")
