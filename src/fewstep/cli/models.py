"""`fewstep models`: what lies in the hub's cache that fewstep can use, and the embedded model."""

from __future__ import annotations

import json
from collections.abc import Iterator
from pathlib import Path
from typing import Any

from huggingface_hub import constants, scan_cache_dir
from huggingface_hub.errors import CacheNotFound
from safetensors import SafetensorError, safe_open

from .. import EMBEDDED
from ..checkpoints.config import read_json
from ..checkpoints.locate import PICKLED
from ..checkpoints.lora_formats import FAMILIES, split_key
from ..errors import FewstepError
from ..pipelines.catalog import CATALOG

INDEX, CONFIG = "model_index.json", "config.json"
# Networks of their own repositories, by the class in their config -> what they are called here.
NETWORKS = {
    "ControlNetModel": "ControlNet",
    "T2IAdapter": "T2I-Adapter",
    "MotionAdapter": "motion adapter",
    "UNet2DConditionModel": "UNet",
    "AutoencoderKL": "VAE",
    "AutoencoderTiny": "VAE",
}


def models(as_json: bool) -> None:
    """Prints the embedded model and those in the cache, by kind and name."""
    own = {"name": EMBEDDED.name, **described(EMBEDDED), "megabytes": megabytes(EMBEDDED)}
    own |= {"size": picture_size(EMBEDDED), "folder": str(EMBEDDED)}
    found = sorted(cached(), key=lambda model: (model["kind"], model["name"]))
    if as_json:
        print(json.dumps({"embedded": own, "cached": found}, ensure_ascii=False))
        return
    width = max(len(model["name"]) for model in [own, *found])
    for model in [own, *found]:
        size = f"{model['megabytes']:.0f} MB"
        family = model["family"] or "-"
        more = model.get("tasks") or [model["note"]] if model.get("note") else model.get("tasks")
        print(
            f"{model['name']:<{width}}  {model['kind']:<14}  {family:<8}  {size:>8}  "
            f"{', '.join(more or ())}".rstrip()
        )
    print(f"{EMBEDDED.name} is inside fewstep and draws {own['size']} in 1 to 8 steps.")


def cached() -> Iterator[dict[str, Any]]:
    """What is in the hub's cache and of use: name, kind, family, size and place of each."""
    try:
        repositories = scan_cache_dir(constants.HF_HUB_CACHE).repos
    except CacheNotFound:
        return
    for repository in repositories:
        newest = max(repository.revisions, key=lambda r: r.last_modified, default=None)
        if repository.repo_type != "model" or newest is None:
            continue
        if facts := described(newest.snapshot_path):
            yield {
                "name": repository.repo_id,
                **facts,
                "megabytes": round(repository.size_on_disk / 1e6, 1),
                "folder": str(newest.snapshot_path),
            }


def described(folder: Path) -> dict[str, Any]:
    """Kind, family and tasks of what a folder holds; empty if it is nothing for fewstep."""
    try:
        if (folder / INDEX).is_file():
            return pipeline(folder)
        if (folder / CONFIG).is_file():
            config = read_json(folder / CONFIG)
            kind = NETWORKS.get(config.get("_class_name", ""))
            return {} if kind is None else {"kind": kind, "family": family(config)}
        return lora(folder)
    except (FewstepError, OSError, SafetensorError) as error:
        return {"kind": "unreadable", "family": None, "note": str(error)}


def pipeline(folder: Path) -> dict[str, Any]:
    """What a folder with a model_index.json can do."""
    name = read_json(folder / INDEX).get("_class_name", "")
    tasks = [
        task
        for tasks in CATALOG.values()
        if name in (made.__name__ for made in tasks.values())
        for task in tasks
    ]
    unet = folder / "unet" / CONFIG
    facts = {"kind": "pipeline", "family": family(read_json(unet)) if unet.is_file() else None}
    if not tasks:
        return facts | {"note": f"{name} is not implemented"}
    weights = [file.name for file in (folder / "unet").glob("*") if file.suffix != ".json"]
    if not any(name.endswith(".safetensors") for name in weights):
        pickled = any(name.endswith(PICKLED) for name in weights)
        return facts | {"note": "pickled weights only" if pickled else "without its UNet's weights"}
    return facts | {"tasks": list(dict.fromkeys(tasks))}


def lora(folder: Path) -> dict[str, Any]:
    """The family of the LoRA that a folder holds, if it does."""
    for file in sorted(folder.glob("*.safetensors")):
        with safe_open(file, framework="pt") as stored:
            names = {key: name for key in stored.keys() if (name := split_key(key))}  # noqa: SIM118
            shapes = {
                stored.get_slice(key).get_shape()[1]
                for key, name in names.items()
                if name.part == "down" and name.module.endswith("attn2_to_k")
            }
        if names:
            return {"kind": "LoRA", "family": FAMILIES.get(min(shapes, default=0))}
    return {}


def family(config: dict[str, Any]) -> str | None:
    """The family of a network's config, by the text that it reads."""
    channels = config.get("cross_attention_dim")
    channels = min(channels) if isinstance(channels, list) else channels
    found = FAMILIES.get(channels or 0)
    distilled = config.get("time_cond_proj_dim") is not None
    return " ".join(filter(None, [found, "LCM" if distilled else None])) or None


def megabytes(folder: Path) -> float:
    """The size of a folder's files."""
    return round(sum(f.stat().st_size for f in folder.rglob("*") if f.is_file()) / 1e6, 1)


def picture_size(folder: Path) -> str:
    """The size that a model's pictures have unless another is asked for."""
    sample = read_json(folder / "unet" / CONFIG)["sample_size"]
    factor = 2 ** (len(read_json(folder / "vae" / CONFIG)["block_out_channels"]) - 1)
    return f"{sample * factor}x{sample * factor}"
