"""Several LoRAs -> one, exactly; or into the weights of a model.

A sum of low-rank changes is a low-rank change: the factors stand side by side,

    sum of w_i s_i up_i down_i = [w_1 s_1 up_1, w_2 s_2 up_2, ...] [down_1; down_2; ...]

so tau' = 0.8 tau_style + 1.0 tau_LCM (LCM-LoRA, arXiv:2311.05556) is one file of rank
r_1 + r_2. A smaller rank is the best approximation, by singular values.

Shapes: O outputs, I inputs, K the kernel of a convolution, r rank.
"""

from __future__ import annotations

import math
import warnings
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from .. import EMBEDDED, schedulers
from ..checkpoints.lora_formats import Change, Changes
from ..checkpoints.lora_writing import Form, rank_of, write_lora_file
from ..errors import RequestError
from ..models.lora import scale_of
from ..pipelines.base import DiffusionPipeline
from ..pipelines.embedded import TEACHER, embedded_teacher
from .config import EMBEDDED_TEACHER
from .export import add_half, halved, new_folder
from .lora_names import OWN, architecture, read_changes, read_named

PLAIN = ({"down", "up"}, {"down", "up", "mid"})


@dataclass(frozen=True)
class Term:
    """A LoRA and its weight: a file, or a folder or hub repository and perhaps the `file` in it."""

    place: str
    weight: float = 1.0
    file: str | None = None


@dataclass(frozen=True)
class Merged:
    """What was written. The errors are relative, in the Frobenius norm: of all, of the worst."""

    path: Path
    ranks: tuple[int, int]  # the smallest and the largest
    error: float = 0.0
    worst: float = 0.0


# ── into one LoRA ──


def merge_loras(
    terms: Sequence[Term],
    output: str | Path,
    *,
    form: Form = "diffusers",
    rank: int | None = None,
    model: str | None = None,
    half: bool = False,
) -> Merged:
    """The sum of the terms as the file `output`, of all their ranks, or of at most `rank`.

    Numbers are float32, or float16 with `half`. `model` (a folder, a hub repository, a single file)
    tells what the modules are called, where that is not one of the known models. Raises
    RequestError for changes that are not of low rank, CheckpointError for those of another model.
    """
    if not terms:
        raise RequestError("there is no LoRA to merge; give at least one")
    if rank is not None and rank < 1:
        raise RequestError(f"rank={rank} must be positive")
    known = architecture(read_named(terms[0].place, terms[0].file)[0], model)
    read = [read_changes(term.place, term.file, known) for term in terms]
    for term, found in zip(terms, read, strict=True):
        refuse_other_kinds(term, found)
    merged: dict[str, Changes] = {}
    lost: list[tuple[float, float]] = []  # squared norms of what was cut off, and of the whole
    for network, module in places(read):
        weighted = [
            (term.weight, found[network][module])
            for term, found in zip(terms, read, strict=True)
            if module in found.get(network, {})
        ]
        change, cut = cut_to(rank, combined(weighted))
        lost.append(cut)
        merged.setdefault(network, {})[module] = change
    ranks = [rank_of(change) for found in merged.values() for change in found.values()]
    if form == "kohya":
        merged = {n: levelled(found, max(ranks)) for n, found in merged.items()}
    if half:
        merged = {n: halved(found) for n, found in merged.items()}
    path = write_lora_file(Path(output), merged, form, known.unet_config)
    return Merged(path, (min(ranks), max(ranks)), *errors(lost))


def refuse_other_kinds(term: Term, found: Mapping[str, Changes]) -> None:
    """Raises RequestError for changes that are no product of two matrices."""
    for network, changes in found.items():
        for module, change in changes.items():
            if set(change.parts) not in PLAIN:
                raise RequestError(
                    f"{term.place}: {network}.{module} is no plain LoRA "
                    f"({', '.join(sorted(change.parts))}), so it cannot be part of one; merge it "
                    "into a model (--model)"
                )


def places(read: Iterable[Mapping[str, Changes]]) -> list[tuple[str, str]]:
    """Every (network, module) that any of the LoRAs changes, each once, in order."""
    found = {(n, m): None for changes in read for n, modules in changes.items() for m in modules}
    return list(found)


def combined(weighted: Sequence[tuple[float, Change]]) -> Change:
    """The weighted sum of changes of one module, float32: their factors side by side.

    The weights and scales are in `up` (O, r...), and alpha is the rank, so that the scale is 1.
    """
    factors = [plain(change) for _, change in weighted]
    dim = max(down.ndim for _, down in factors)  # files may write a 1x1 convolution as a matrix
    ups = [
        expanded(up * (weight * scale_of(change)), dim)
        for (weight, change), (up, _) in zip(weighted, factors, strict=True)
    ]
    down = torch.cat([expanded(down, dim) for _, down in factors])
    return Change({"down": down, "up": torch.cat(ups, dim=1)}, alpha=len(down))


def plain(change: Change) -> tuple[Tensor, Tensor]:
    """(up (O, r, 1...), down (r, I, K...)) float32; a Tucker core becomes part of `down`."""
    parts = {name: part.float() for name, part in change.parts.items()}
    if "mid" not in parts:
        return parts["up"], parts["down"]
    return parts["up"], torch.einsum("ij...,jn->in...", parts["mid"], parts["down"].flatten(1))


def expanded(factor: Tensor, dim: int) -> Tensor:
    """A factor with as many dimensions as `dim`, the further ones of size 1."""
    return factor.reshape(*factor.shape, *[1] * (dim - factor.ndim))


def levelled(changes: Changes, alpha: float) -> Changes:
    """The same changes with one alpha for all, since diffusers reads only one in Kohya's form."""
    return {
        module: Change({**c.parts, "up": c.parts["up"] * (rank_of(c) / alpha)}, alpha)
        for module, c in changes.items()
    }


def cut_to(rank: int | None, change: Change) -> tuple[Change, tuple[float, float]]:
    """(the nearest change of at most `rank`, squared norms of what is cut off and of the whole).

    By the singular values of up @ down, which are those of the small product of the triangular
    factors of both (Eckart and Young 1936).
    """
    up, down = change.parts["up"], change.parts["down"]
    if rank is None or len(down) <= rank:
        return change, (0.0, norm_of(up, down))
    left, left_corner = torch.linalg.qr(up.flatten(1).double())
    right, right_corner = torch.linalg.qr(down.flatten(1).T.double())
    u, s, v = torch.linalg.svd(left_corner @ right_corner.T, full_matrices=False)
    root = s[:rank].sqrt()
    new_up = (left @ u[:, :rank] * root).float()
    new_down = (root[:, None] * v[:rank] @ right.T).float()
    parts = {
        "down": new_down.reshape(-1, *down.shape[1:]),
        "up": new_up.reshape(len(up), -1, *up.shape[2:]),
    }
    cut = s[rank:].square().sum().item()
    return Change(parts, alpha=len(new_down)), (cut, s.square().sum().item())


def norm_of(up: Tensor, down: Tensor) -> float:
    """The squared Frobenius norm of up @ down, of products of size (r, r) only."""
    a, b = up.flatten(1), down.flatten(1)
    return float(((a.T @ a) * (b @ b.T)).sum())


def errors(lost: Iterable[tuple[float, float]]) -> tuple[float, float]:
    """(relative error of all modules together, of the worst)."""
    pairs = [(cut, whole) for cut, whole in lost if whole > 0]
    if not pairs:
        return 0.0, 0.0
    total = sum(cut for cut, _ in pairs) / sum(whole for _, whole in pairs)
    return math.sqrt(total), math.sqrt(max(cut / whole for cut, whole in pairs))


# ── into a model ──


def pipeline_of(model: str) -> Any:
    """The pipeline of a folder, a hub repository, a single file, or a name of the package's own."""
    if model in (TEACHER.name, EMBEDDED_TEACHER):
        return embedded_teacher()
    if model.endswith(".safetensors"):
        return DiffusionPipeline.from_single_file(model)
    return DiffusionPipeline.from_pretrained(EMBEDDED if model in OWN else model)


def merge_into_model(
    terms: Sequence[Term],
    model: str,
    output: str | Path,
    *,
    half: bool = False,
    scheduler: str | None = None,
) -> Path:
    """The new folder `output`: the pipeline `model` with the terms in its weights, float32.

    All kinds of LoRA can be merged so. With `half` float16 variants stand beside; `scheduler` is
    the class that the folder names in place of the model's. Raises RequestError if `output` exists.
    """
    output = Path(output)
    if output.exists():
        raise RequestError(f"output={str(output)!r} exists; give a new folder, or delete it")
    pipe = pipeline_of(model)
    names = [f"lora_{number}" for number in range(1, len(terms) + 1)]
    for name, term in zip(names, terms, strict=True):
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")  # that the one before is not active any more
            pipe.load_lora_weights(term.place, adapter_name=name, weight_name=term.file)
    pipe.set_adapters(names, [term.weight for term in terms])
    if scheduler is not None:
        pipe.scheduler = getattr(schedulers, scheduler).from_config(pipe.scheduler.config)
    with new_folder(output) as beside:
        pipe.save_pretrained(beside)
        if half:
            add_half(beside)
    return output
