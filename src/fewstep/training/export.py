"""What comes out of a run of the consistency phase: LoRA files, or a whole model, and its card.

finish_full   a pipeline folder that this library and diffusers load
finish_lora   a LoRA in diffusers' form, and in Kohya's for other programs
push          either, to the hub
"""

from __future__ import annotations

import os
import shutil
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import replace
from pathlib import Path
from typing import Any

from torch import Tensor

from .. import schedulers
from ..checkpoints.config import read_json, write_json
from ..checkpoints.locate import Source, index_names, weights_name
from ..checkpoints.lora_formats import WEIGHTS_NAME, Change, Changes
from ..checkpoints.lora_writing import Form, write_lora_file
from ..checkpoints.weights import read_tensors, save_weights
from ..errors import CheckpointError, RequestError
from ..models.base import CONFIG_NAME
from ..models.unet import UNet2DConditionModel
from ..pipelines.base import DiffusionPipeline
from ..pipelines.catalog import (
    LatentConsistencyModelPipeline,
    StableDiffusionPipeline,
    StableDiffusionXLPipeline,
)
from .card import card, run_name, sampler, settings_of, start
from .config import ConsistencyPhase, Recipe
from .state import NAME as CHECKPOINT_NAME

CARD_NAME = "README.md"
HALF = "fp16"  # the variant's name
# The key of the UNet's config that tells what its omega is. Readers pass over names with "_".
GUIDANCE_KEY = "_guidance"
STEMS = ("diffusion_pytorch_model", "model")

# ── LoRA ──


def write_lora(
    changes: Mapping[str, tuple[Tensor, Tensor]],
    alpha: float,
    folder: Path,
    *,
    unet_config: Mapping[str, Any],
    name: str = "lora",
    forms: Sequence[Form] = ("diffusers", "kohya"),
    half: bool = False,
    metadata: Mapping[str, str] | None = None,
) -> list[Path]:
    """The files written: a UNet's LoRA as (down, up) by module, each scaled by alpha / its rank.

    pytorch_lora_weights.safetensors in diffusers' form, with `half` a float16 variant of it, and
    `name`_kohya.safetensors in Kohya's, float16 if `half`. `metadata` goes into their headers.
    """
    if not changes:
        raise RequestError("changes is empty: there is no LoRA to write")
    found = {m: Change({"down": down, "up": up}, alpha) for m, (down, up) in changes.items()}
    small = halved(found)
    plan: list[tuple[str, Form, Changes]] = []
    if "diffusers" in forms:
        plan.append((WEIGHTS_NAME, "diffusers", found))
    if "diffusers" in forms and half:
        plan.append((weights_name(Path(WEIGHTS_NAME).stem, HALF), "diffusers", small))
    if "kohya" in forms:
        plan.append((f"{name}_kohya.safetensors", "kohya", small if half else found))
    return [
        write_lora_file(folder / file, {"unet": these}, form, unet_config, metadata)
        for file, form, these in plan
    ]


def halved(changes: Changes) -> Changes:
    """The same changes in float16."""
    return {
        module: replace(change, parts={part: value.half() for part, value in change.parts.items()})
        for module, change in changes.items()
    }


def finish_lora(
    changes: Mapping[str, tuple[Tensor, Tensor]],
    unet_config: Mapping[str, Any],
    folder: Path,
    recipe: Recipe,
    *,
    counts: Mapping[str, int] | None = None,
    figures: str = "",
) -> Path:
    """`folder`, with a LoRA's files as the recipe's output asks for them, and its card."""
    settings = settings_of(recipe)
    assert settings.lora is not None
    with new_folder(folder) as beside:
        write_lora(
            changes,
            settings.lora.alpha,
            beside,
            unet_config=unet_config,
            name=run_name(recipe),
            forms=("diffusers", "kohya") if settings.output.kohya else ("diffusers",),
            half=settings.output.half,
            metadata=lora_metadata(recipe),
        )
        text = card(
            recipe,
            name=settings.output.push_to or folder.name,
            embedded=unet_config.get("time_cond_proj_dim") is not None,
            xl=unet_config.get("addition_embed_type") == "text_time",
            counts=counts,
            figures=figures,
        )
        (beside / CARD_NAME).write_text(text, encoding="utf-8")
    return folder


def lora_metadata(recipe: Recipe) -> dict[str, str]:
    """What the header of a LoRA's file tells beside rank and alpha."""
    settings = settings_of(recipe)
    low, high = settings.w_min, settings.w_max
    return {
        "fewstep.base": start(recipe),
        "fewstep.omega": f"guidance_scale - 1, {low:g} to {high:g}",
        "fewstep.scheduler": sampler(settings)[0],
    }


# ── whole models ──


def finish_full(
    unet: UNet2DConditionModel,
    pipe: DiffusionPipeline,
    folder: Path,
    recipe: Recipe,
    *,
    counts: Mapping[str, int] | None = None,
    figures: str = "",
) -> Path:
    """`folder`, with the base `pipe`'s parts around the trained `unet`, its scheduler and card.

    The networks are written in the precision that they have, and with the recipe's `output.half` in
    float16 too. What the base's index says beside its components stays.
    """
    settings = settings_of(recipe)
    embedded = unet.config.time_cond_proj_dim is not None
    made = pipeline_around(unet, pipe, settings)
    with new_folder(folder) as beside:
        made.save_pretrained(beside)
        note_guidance(beside / "unet", settings, embedded)
        if settings.output.half:
            add_half(beside)
        text = card(
            recipe,
            name=settings.output.push_to or folder.name,
            embedded=embedded,
            xl=isinstance(made, StableDiffusionXLPipeline),
            counts=counts,
            figures=figures,
        )
        (beside / CARD_NAME).write_text(text, encoding="utf-8")
    return folder


def pipeline_around(
    unet: UNet2DConditionModel, pipe: DiffusionPipeline, settings: ConsistencyPhase
) -> DiffusionPipeline:
    """A pipeline of the trained network, the base's other parts, and the scheduler that fits."""
    name, own = sampler(settings)
    scheduler = getattr(schedulers, name).from_config(pipe.components["scheduler"].config, **own)
    kind: type[DiffusionPipeline] = StableDiffusionPipeline
    if "text_encoder_2" in pipe.components:
        kind = StableDiffusionXLPipeline
    elif unet.config.time_cond_proj_dim is not None and settings.endpoint == "zero":
        kind = LatentConsistencyModelPipeline
    return kind.from_pipe(pipe, unet=unet, scheduler=scheduler)


def note_guidance(folder: Path, settings: ConsistencyPhase, embedded: bool) -> None:
    """Write into a UNet's config.json what its omega is, since nothing else there tells."""
    note = {
        "omega": "guidance_scale - 1",
        "low": settings.w_min,
        "high": settings.w_max,
        "input": embedded,
        "scale": settings.sheet.guidance_scale,  # to draw with where nothing else is asked for
    }
    path = folder / CONFIG_NAME
    write_json(read_json(path) | {GUIDANCE_KEY: note}, path)


def add_half(folder: Path) -> list[Path]:
    """The float16 files written beside each network's own, in a pipeline's or a network's folder.

    One network at a time is held in memory.
    """
    written: list[Path] = []
    for place in [folder, *sorted(path for path in folder.iterdir() if path.is_dir())]:
        names = {path.name for path in place.iterdir()}
        for stem in STEMS:
            if names.isdisjoint((weights_name(stem), *index_names(stem))):
                continue
            files = Source(str(place)).weights(stem)
            halved = {n: t.half() if t.is_floating_point() else t for n, t in read_tensors(files)}
            written += save_weights(halved, place, stem, HALF)
    return written


@contextmanager
def new_folder(folder: Path) -> Iterator[Path]:
    """A new folder beside `folder`, which it replaces if the block ends well."""
    if (folder / CHECKPOINT_NAME).exists():
        raise RequestError(f"folder={str(folder)!r} holds a run, which would be lost; give another")
    beside = folder.with_name(f".{folder.name}.partial")
    shutil.rmtree(beside, ignore_errors=True)
    beside.mkdir(parents=True)
    try:
        yield beside
        shutil.rmtree(folder, ignore_errors=True)
        os.replace(beside, folder)
    finally:
        shutil.rmtree(beside, ignore_errors=True)


# ── the hub ──


def require_token(repository: str, token: str | None = None) -> None:
    """Raises RequestError unless something can be pushed to `repository`; asks no server."""
    from huggingface_hub import get_token
    from huggingface_hub.constants import HF_HUB_OFFLINE
    from huggingface_hub.errors import HFValidationError
    from huggingface_hub.utils import validate_repo_id

    try:
        validate_repo_id(repository)
    except HFValidationError:
        raise RequestError(
            f"push_to={repository!r} is not the name of a hub repository; give OWNER/NAME"
        ) from None
    if HF_HUB_OFFLINE:
        raise RequestError(f"push_to={repository!r}: HF_HUB_OFFLINE is set; unset it")
    if token is None and get_token() is None:
        raise RequestError(
            f"push_to={repository!r}: no token is stored; log in with `hf auth login`, or set "
            "HF_TOKEN"
        )


def push(folder: Path, repository: str, *, private: bool = False, token: str | None = None) -> str:
    """The address of the hub repository, made if need be, that `folder` was uploaded to."""
    from huggingface_hub import HfApi

    require_token(repository, token)
    if not folder.is_dir():
        raise RequestError(f"folder={str(folder)!r} is not there, so nothing can be pushed")
    api = HfApi(token=token)
    try:
        address = api.create_repo(repository, private=private, exist_ok=True)
        api.upload_folder(
            repo_id=repository,
            folder_path=folder,
            commit_message="Upload what fewstep trained",
            ignore_patterns=[".*", "*.part", CHECKPOINT_NAME],
        )
    except Exception as error:  # the hub's client raises errors of several libraries
        reason = str(error).splitlines()[0] if str(error) else type(error).__name__
        raise CheckpointError(
            f"{folder} could not be pushed to {repository!r}: {reason}"
        ) from error
    return str(address)
