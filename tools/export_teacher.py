"""Writes what turns the embedded model back into its teacher: a LoRA of a tenth of its size.

    python tools/export_teacher.py runs/emoji64/teacher/pipeline OUTPUT_FOLDER

Distillation moves the weights by three per cent, mostly along a few directions: of each weight's
difference the strongest `--rank` are kept, and of vectors all. It prints how much is lost.
"""

from __future__ import annotations

import argparse
from pathlib import Path

import torch
from torch import Tensor

from fewstep import EMBEDDED, UNet2DConditionModel
from fewstep.checkpoints.lora_formats import WEIGHTS_NAME, Change
from fewstep.checkpoints.lora_writing import write_lora_file


def low_rank(difference: Tensor, rank: int) -> dict[str, Tensor]:
    """The nearest (up, down) of a rank to a difference (O, I, K...), or the difference itself."""
    flat = difference.flatten(1)
    if min(flat.shape) <= rank:
        return {"diff": difference}
    u, s, v = torch.linalg.svd(flat, full_matrices=False)
    root = s[:rank].sqrt()
    down = (root[:, None] * v[:rank]).reshape(rank, *difference.shape[1:])
    up = (u[:, :rank] * root).reshape(len(u), rank, *[1] * (difference.ndim - 2))
    return {"up": up, "down": down}


def changes(teacher: UNet2DConditionModel, student: UNet2DConditionModel, rank: int) -> dict:
    """What makes the student the teacher, by module, in float16."""
    found: dict[str, Change] = {}
    mine = student.state_dict()
    for name, module in teacher.named_modules():
        parts: dict[str, Tensor] = {}
        for kind, parameter in module.named_parameters(recurse=False):
            difference = parameter.float() - mine[f"{name}.{kind}"].float()
            if kind == "bias":
                parts["diff_b"] = difference
            elif kind == "weight":  # LoRA files know no other parameters; one table is left out
                parts |= low_rank(difference, rank) if difference.ndim > 1 else {"diff": difference}
        if parts:
            alpha = float(rank) if "down" in parts else None
            found[name] = Change({n: p.half().contiguous() for n, p in parts.items()}, alpha)
    return found


@torch.no_grad()
def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("teacher", type=Path)
    parser.add_argument("output", type=Path)
    parser.add_argument("--rank", type=int, default=16)
    given = parser.parse_args()
    teacher = UNet2DConditionModel.from_pretrained(given.teacher / "unet")
    student = UNet2DConditionModel.from_pretrained(EMBEDDED / "unet")
    given.output.mkdir(parents=True, exist_ok=True)
    found = changes(teacher, student, given.rank)
    path = given.output / WEIGHTS_NAME
    write_lora_file(path, {"unet": found}, "kohya", dict(student.config))
    print(f"{path}: {path.stat().st_size / 1e6:.1f} MB")


if __name__ == "__main__":
    main()
