"""What a step of the embedded model costs, in counts that do not depend on the machine.

A bound is the count at the time of writing. Where fewer are needed, lower it; more need a reason.
"""

from __future__ import annotations

from collections.abc import Iterator
from typing import Any

import pytest
import torch
from torch import Tensor
from torch.utils._pytree import tree_leaves
from traced import META, NoWaiting

from fewstep import EMBEDDED, LCMScheduler, UNet2DConditionModel
from fewstep.pipelines.denoise import Conditioning, Job, denoise
from fewstep.pipelines.recorded import Facts, count_draws, drawn, timed, without_tensors

CALLS = 851  # operators of a step on a GPU without graphs, views included
ALLOCATIONS = 426  # of them those whose result is new memory


class Counted(NoWaiting):
    """Operators that ran on the device, and those that took memory. Waiting is an error."""

    allocations = 0

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        given = {
            x.untyped_storage()._cdata for x in tree_leaves((args, kwargs)) if isinstance(x, Tensor)
        }
        result = super().__torch_dispatch__(func, types, args, kwargs)
        made = [x for x in tree_leaves(result) if isinstance(x, Tensor) and x.device == self.device]
        self.allocations += sum(x.untyped_storage()._cdata not in given for x in made)
        return result


@pytest.fixture(autouse=True)
def _without_gradients() -> Iterator[None]:
    with torch.no_grad():
        yield


@pytest.fixture(scope="module")
def unet() -> Any:
    return UNet2DConditionModel.from_pretrained(EMBEDDED, subfolder="unet").to(META)


def counted(unet: Any, steps: int) -> Counted:
    """A run of the loop on the device, as it is recorded."""
    scheduler = LCMScheduler.from_pretrained(EMBEDDED, subfolder="scheduler")
    plan, config = scheduler.plan(steps), unet.config
    text = torch.zeros(1, 16, config.per_level("cross_attention_dim")[0], device=META)
    w = torch.zeros(1, config.time_cond_proj_dim, device=META)
    shape = (1, config.in_channels, 16, 16)
    update = scheduler.updater(plan)
    job = Job(Conditioning(text, w=w), None, 4.0, plan, update, shape, torch.float32)
    facts = Facts(count_draws(job), plan.timesteps.to(META))
    given = {"cond.text": text, "cond.w": w, "z": torch.zeros(shape, device=META)}
    given["noise"] = torch.zeros(max(facts.draws, 1), *shape, device=META)
    with Counted() as counts:
        denoise(timed(unet), drawn(without_tensors(job, facts), update, given))
    return counts


def test_a_step_takes_no_more_operators_than_it_did(unet: Any) -> None:
    calls = counted(unet, 4).calls - counted(unet, 3).calls
    assert calls <= CALLS


def test_a_step_allocates_no_more_often_than_it_did(unet: Any) -> None:
    allocations = counted(unet, 4).allocations - counted(unet, 3).allocations
    assert allocations <= ALLOCATIONS


def test_what_is_the_same_at_every_step_is_computed_in_the_first(unet: Any) -> None:
    one, two, three = (counted(unet, steps).calls for steps in (1, 2, 3))
    assert three - two < one
