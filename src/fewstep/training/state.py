"""Checkpoints of a run: parameters, their average, the optimizer's moments and the step.

One safetensors file, written beside and renamed, so that a run killed at any time can go on from
the last complete one.
"""

from __future__ import annotations

import os
from collections.abc import Mapping
from pathlib import Path

import torch
from safetensors import safe_open
from safetensors.torch import save_file
from torch import Tensor, nn

from ..errors import CheckpointError

NAME = "checkpoint.safetensors"
MOMENTS = ("exp_avg", "exp_avg_sq")


def save_state(
    folder: Path,
    step: int,
    named: Mapping[str, nn.Parameter],
    optimizer: torch.optim.Optimizer,
    average: list[Tensor],
    kept: Mapping[str, nn.Module],
) -> None:
    """Write everything that going on after `step` steps needs."""
    tensors: dict[str, Tensor] = {}
    for (name, parameter), mean in zip(named.items(), average, strict=True):
        tensors[f"parameter/{name}"] = parameter.detach().contiguous()
        tensors[f"average/{name}"] = mean.contiguous()
        for moment in MOMENTS:
            tensors[f"{moment}/{name}"] = optimizer.state[parameter][moment].contiguous()
    for module, network in kept.items():
        for name, tensor in network.state_dict().items():
            tensors[f"kept/{module}.{name}"] = tensor.contiguous()
    part = folder / f"{NAME}.part"
    save_file(tensors, part, metadata={"step": str(step)})
    os.replace(part, folder / NAME)


@torch.no_grad()
def load_state(
    folder: Path,
    named: Mapping[str, nn.Parameter],
    optimizer: torch.optim.Optimizer,
    average: list[Tensor],
    kept: Mapping[str, nn.Module],
) -> int:
    """Put the checkpoint's tensors in place; the number of steps done, 0 without a checkpoint."""
    path = folder / NAME
    if not path.exists():
        return 0
    with safe_open(path, "pt") as file:
        step = int(file.metadata()["step"])
        wanted = {f"parameter/{name}" for name in named}
        stored = {key for key in file.keys() if key.startswith("parameter/")}  # noqa: SIM118
        if wanted != stored:
            raise CheckpointError(
                f"{path} belongs to other networks ({len(wanted ^ stored)} parameters differ); "
                "use another folder, or delete it to start afresh"
            )
        for (name, parameter), mean in zip(named.items(), average, strict=True):
            parameter.copy_(file.get_tensor(f"parameter/{name}"))
            mean.copy_(file.get_tensor(f"average/{name}"))
            optimizer.state[parameter] = {
                "step": torch.tensor(float(step), device=parameter.device),
                **{
                    moment: file.get_tensor(f"{moment}/{name}").to(parameter.device)
                    for moment in MOMENTS
                },
            }
        for module, network in kept.items():
            network.load_state_dict(
                {n: file.get_tensor(f"kept/{module}.{n}") for n in network.state_dict()}
            )
    return step
