"""`fewstep run`: fewstep under the name of diffusers, for one script."""

from __future__ import annotations

import sys
from collections.abc import Callable
from pathlib import Path

import pytest

import fewstep

Run = Callable[..., tuple[int, str, str]]


@pytest.fixture
def script(run: Run) -> Callable[..., tuple[int, str, str]]:
    """Runs lines of Python as a script, in the folder of the test."""

    def call(text: str, *arguments: object) -> tuple[int, str, str]:
        Path("sample.py").write_text(text)
        return run("run", "sample.py", *arguments)

    return call


def test_its_imports_come_from_fewstep(script: Run) -> None:
    code, out, error = script(
        "import diffusers, diffusers.utils\n"
        "from diffusers import LCMScheduler, StableDiffusionXLPipeline\n"
        "from diffusers.utils import load_image, make_image_grid\n"
        "from diffusers.models import UNet2DConditionModel\n"
        "from diffusers.loaders import StableDiffusionLoraLoaderMixin\n"
        "from diffusers.schedulers import DDIMScheduler\n"
        "from diffusers.schedulers.scheduling_lcm import LCMScheduler as same\n"
        "from diffusers.pipelines.stable_diffusion import StableDiffusionPipeline\n"
        "from diffusers.utils.torch_utils import randn_tensor\n"
        "assert same is LCMScheduler is diffusers.LCMScheduler\n"
        "assert diffusers.utils.load_image is load_image\n"
        "assert not hasattr(diffusers, 'FluxPipeline')\n"
        "assert tuple(map(int, diffusers.__version__.split('.'))) > (0, 20)\n"
        "print(LCMScheduler.__module__.split('.')[0], load_image.__module__)\n"
    )
    assert (code, out, error) == (0, "fewstep fewstep.utils\n", "")


def test_it_draws(script: Run, lcm_folder: Path) -> None:
    code, out, error = script(
        "import sys, torch\n"
        "from diffusers import DiffusionPipeline, LCMScheduler\n"
        "pipe = DiffusionPipeline.from_pretrained(sys.argv[1])\n"
        "pipe.set_progress_bar_config(disable=True)\n"
        "pipe.scheduler = LCMScheduler.from_config(pipe.scheduler.config)\n"
        "print(pipe('a cat', num_inference_steps=2).images[0].size)\n",
        lcm_folder,
    )
    assert (code, out, error) == (0, "(32, 32)\n", "")


def test_the_name_is_lent_to_the_script_alone(script: Run) -> None:
    modules = {name for name in sys.modules if name.split(".")[0] == "diffusers"}
    before = list(sys.argv), list(sys.path), list(sys.meta_path)
    assert script("import diffusers")[0] == 0
    assert {name for name in sys.modules if name.split(".")[0] == "diffusers"} == modules
    assert (sys.argv, sys.path, sys.meta_path) == before


@pytest.mark.parametrize(
    ("line", "name"),
    [
        ("from diffusers import FluxPipeline", "diffusers.FluxPipeline"),
        ("from diffusers.utils import check_min_version", "diffusers.utils.check_min_version"),
        ("import diffusers.training_utils", "diffusers.training_utils"),
        ("from diffusers.pipelines.wan import x", "diffusers.pipelines.wan"),
    ],
)
def test_a_name_that_is_missing_is_an_import_error(line: str, name: str, script: Run) -> None:
    code, out, error = script(f"print('begun')\n{line}\n")
    assert (code, out) == (1, "begun\n")
    assert error.startswith('Traceback (most recent call last):\n  File "sample.py", line 2')
    said = f"ImportError: {name} is not in fewstep {fewstep.__version__}, which stands for"
    assert error.splitlines()[-1].startswith(said)


@pytest.mark.parametrize(
    ("ending", "code", "said"),
    [
        ("sys.exit()", 0, ""),
        ("sys.exit(3)", 3, ""),
        ("sys.exit('no model')", 1, "no model\n"),
        ("raise KeyboardInterrupt", 130, ""),
    ],
)
def test_the_exit_code_is_the_scripts(ending: str, code: int, said: str, script: Run) -> None:
    assert script(f"import sys\n{ending}\n") == (code, "", said)


def test_its_own_options_reach_it(script: Run) -> None:
    text = "import sys; print(sys.argv)"
    for words in (["--debug", "--help", "-x", "1"], ["a", "--version"], []):
        assert script(text, *words)[1] == f"{['sample.py', *words]}\n"


def test_it_finds_modules_beside_itself(run: Run) -> None:
    Path("there").mkdir()
    Path("there/helper.py").write_text("value = 5")
    Path("there/main.py").write_text("import helper; print(helper.value, __name__, __file__)")
    assert run("run", "there/main.py")[1] == "5 __main__ there/main.py\n"
    del sys.modules["helper"]


def test_a_script_that_is_not_there_ends_in_one_line(run: Run) -> None:
    assert run("run", "no.py") == (
        2,
        "",
        "error: SCRIPT no.py: no such file; give a Python script\n",
    )
    assert run("run")[0] == 2


def test_warnings_of_the_pipelines_are_seen(script: Run, lcm_folder: Path) -> None:
    code, _, error = script(
        "import sys\nfrom diffusers import DiffusionPipeline\n"
        "DiffusionPipeline.from_pretrained(sys.argv[1], varient='fp16')\n",
        lcm_folder,
    )
    assert (code, error.count("\n")) == (0, 1)
    assert error.startswith("warning: unknown argument 'varient'; did you mean 'variant'?")
