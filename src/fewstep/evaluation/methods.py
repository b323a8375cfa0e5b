"""What is compared: a model at numbers of steps and guidance scales, its teacher by other samplers.

These are the rows of the tables of few-step papers (Luo et al. 2023, "Latent Consistency Models",
tables 1 and 2): the LCM, DDIM, DPM-Solver and DPM-Solver++, each at 1, 2, 4 and 8 steps.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np
import torch
from torch import nn

from fewstep.errors import FewstepError, RequestError
from fewstep.evaluation.fingerprints import fingerprint, settings_key
from fewstep.schedulers import DDIMScheduler, DPMSolverMultistepScheduler, LCMScheduler

# name -> label, class, what its config must say beside the teacher's
SAMPLERS: Mapping[str, tuple[str, Any, Mapping[str, Any]]] = {
    "ddim": ("DDIM", DDIMScheduler, {}),
    "dpm": (
        "DPM",
        DPMSolverMultistepScheduler,
        # The solver in noise cannot end at noise 0.
        {"algorithm_type": "dpmsolver", "solver_order": 2, "final_sigmas_type": "sigma_min"},
    ),
    "dpm++": (
        "DPM++",
        DPMSolverMultistepScheduler,
        {"algorithm_type": "dpmsolver++", "solver_order": 2},
    ),
}


@dataclass(frozen=True, eq=False)
class Method:
    """A pipeline at a number of steps and a guidance scale; `weights` names its networks."""

    name: str
    pipe: Any
    steps: int
    guidance: float
    weights: str = ""

    @property
    def key(self) -> str:
        """Names all that its pictures depend on but prompts, seeds and size."""
        return settings_key(
            weights=self.weights,
            pipeline=type(self.pipe).__name__,
            dtype=self.pipe.dtype,
            device=self.pipe.device.type,
            scheduler=[type(self.pipe.scheduler).__name__, dict(self.pipe.scheduler.config)],
            steps=self.steps,
            guidance=self.guidance,
        )

    def draw(self, prompts: list[str], seed: int) -> np.ndarray:
        """Pictures uint8 (B, H, W, 3); row i of a seed has its own generator."""
        return self.pictures(prompts, [1000 * seed + i for i in range(len(prompts))])

    def pictures(self, prompts: list[str], seeds: Sequence[int], **size: int) -> np.ndarray:
        """Pictures uint8 (B, H, W, 3), each by a generator of its own seed, whoever shares B."""
        drawn = self.pipe(
            prompts,
            num_inference_steps=self.steps,
            guidance_scale=self.guidance,
            generator=[torch.Generator().manual_seed(seed) for seed in seeds],
            output_type="np",
            return_dict=False,
            **size,
        )[0]
        return (np.asarray(drawn) * 255).round().astype(np.uint8)

    def check(self) -> None:
        """RequestError if its sampler cannot take so many steps."""
        try:
            self.pipe.scheduler.plan(self.steps)
        except FewstepError as error:
            raise RequestError(f"{self.name} at {self.steps} steps: {error}") from error


def methods(
    model: Any,
    teacher: Any = None,
    *,
    guidance: Sequence[float],
    teacher_guidance: float,
    steps: Sequence[int] = (1, 2, 4, 8),
    teacher_steps: int | None = 50,
    compare: Sequence[str] = ("ddim",),
) -> list[Method]:
    """The model's pipeline at all `steps` and `guidance`; the teacher's by each of `compare`.

    The teacher takes the same few steps, and by its first sampler `teacher_steps` (None: not)
    before them. Raises RequestError for a sampler that cannot do this.
    """
    check_samplers(compare)
    name = "LCM" if isinstance(model.scheduler, LCMScheduler) else "model"
    weights = weights_of(model)
    listed = [Method(name, model, n, scale, weights) for scale in guidance for n in steps]
    if teacher is not None:
        weights = weights_of(teacher)
        many = [teacher_steps] if teacher_steps is not None else []
        for index, sampler in enumerate(compare):
            label, pipe = f"teacher, {SAMPLERS[sampler][0]}", sampled_by(teacher, sampler)
            for n in dict.fromkeys([*(many if index == 0 else []), *steps]):
                listed.append(Method(label, pipe, n, teacher_guidance, weights))
    for method in listed:
        method.pipe.set_progress_bar_config(disable=True)
        method.check()
    return listed


def check_samplers(names: Sequence[str]) -> None:
    """RequestError for a name that is not in SAMPLERS."""
    if unknown := [name for name in names if name not in SAMPLERS]:
        raise RequestError(f"compare: {unknown[0]!r} is unknown (have: {', '.join(SAMPLERS)})")


def sampled_by(pipe: Any, name: str) -> Any:
    """A pipeline of the same components with a sampler of SAMPLERS."""
    _, scheduler, says = SAMPLERS[name]
    try:
        sampler = scheduler.from_config(pipe.scheduler.config, **says)
    except FewstepError as error:
        raise RequestError(f"compare: {name} cannot sample this teacher ({error})") from error
    return type(pipe).from_pipe(pipe, scheduler=sampler)


def weights_of(pipe: Any) -> str:
    """The fingerprint of all networks of a pipeline, LoRAs that are merged included."""
    networks = {n: c for n, c in pipe.components.items() if isinstance(c, nn.Module)}
    states = {name: network.state_dict().items() for name, network in networks.items()}
    return fingerprint({f"{name}.{key}": t for name, items in states.items() for key, t in items})
