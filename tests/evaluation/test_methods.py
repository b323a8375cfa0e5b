from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch

from fewstep import AutoPipelineForText2Image
from fewstep.errors import RequestError
from fewstep.evaluation.methods import methods, weights_of


@pytest.fixture(scope="module")
def lcm(lcm_folder: Path) -> Any:
    return AutoPipelineForText2Image.from_pretrained(lcm_folder)


@pytest.fixture(scope="module")
def teacher(sd_folder: Path) -> Any:
    return AutoPipelineForText2Image.from_pretrained(sd_folder)


def test_the_papers_table_is_the_model_and_each_sampler_of_its_teacher(
    lcm: Any, teacher: Any
) -> None:
    listed = methods(
        lcm,
        teacher,
        guidance=(2.0, 8.0),
        teacher_guidance=7.5,
        steps=(1, 4),
        teacher_steps=20,
        compare=("ddim", "dpm++"),
    )
    assert [(m.name, m.steps, m.guidance) for m in listed] == [
        *(("LCM", n, scale) for scale in (2.0, 8.0) for n in (1, 4)),
        *(("teacher, DDIM", n, 7.5) for n in (20, 1, 4)),
        *(("teacher, DPM++", n, 7.5) for n in (1, 4)),
    ]
    names = [type(m.pipe.scheduler).__name__ for m in listed]
    assert (
        names == ["LCMScheduler"] * 4 + ["DDIMScheduler"] * 3 + ["DPMSolverMultistepScheduler"] * 2
    )
    assert listed[-1].pipe.unet is teacher.unet
    assert len({m.key for m in listed}) == len(listed)


def test_a_picture_depends_on_its_seed_and_not_on_its_batch(lcm: Any) -> None:
    (method,) = methods(lcm, guidance=(4.0,), teacher_guidance=1.0, steps=(2,))
    both = method.pictures(["a red cat", "dog"], [5, 6])
    alone = method.pictures(["dog"], [6])
    assert both.dtype == np.uint8 and both.shape == (2, 32, 32, 3)
    assert np.abs(both[1].astype(int) - alone[0]).max() <= 1
    assert np.abs(both[1].astype(int) - method.pictures(["dog"], [5])[0]).max() > 1


def test_the_key_tells_weights_apart(lcm: Any, lcm_folder: Path) -> None:
    other = AutoPipelineForText2Image.from_pretrained(lcm_folder)
    assert weights_of(other) == weights_of(lcm)
    with torch.no_grad():
        other.unet.conv_in.bias[0] += 1e-3
    assert weights_of(other) != weights_of(lcm)


def test_a_sampler_that_cannot_is_refused(lcm: Any, teacher: Any) -> None:
    arguments: dict[str, Any] = {"guidance": (2.0,), "teacher_guidance": 2.0}
    with pytest.raises(
        RequestError, match=r"compare: 'unipc' is unknown \(have: ddim, dpm, dpm\+\+"
    ):
        methods(lcm, teacher, compare=("unipc",), **arguments)
    with pytest.raises(RequestError, match="LCM at 2000 steps: "):
        methods(lcm, steps=(2000,), **arguments)
