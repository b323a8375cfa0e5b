"""A pipeline's folder: `model_index.json` and one subfolder per component, in and out."""

from __future__ import annotations

import importlib
import re
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager, nullcontext
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import torch
from torch import nn

from ..checkpoints.config import LAYOUT_VERSION, check_sizes, understood, write_json
from ..checkpoints.locate import Source, index_names, weights_name
from ..checkpoints.weights import opened, read_ahead
from ..errors import CheckpointError, UnsupportedConfig
from ..imports import first_import
from ..models.base import Model
from ..schedulers import SCHEDULER_CONFIG_NAME, Scheduler, scheduler_from_config
from .notices import warn_caller

INDEX_NAME = "model_index.json"
# Files beside the weights that a component may need: configs and tokenizers.
SMALL_FILES = (".json", ".txt")
# The name of a class in files -> where it is; transformers is imported when it is needed.
NETWORKS = {
    "MotionAdapter": "fewstep.models.motion",
    "UNetMotionModel": "fewstep.models.motion_unet",
    "UNet2DConditionModel": "fewstep.models.unet",
    "AutoencoderKL": "fewstep.models.vae",
    "ControlNetModel": "fewstep.models.controlnet",
    "MultiControlNetModel": "fewstep.models.controlnet",
    "T2IAdapter": "fewstep.models.t2i_adapter",
    "MultiAdapter": "fewstep.models.t2i_adapter",
    "AutoencoderTiny": "fewstep.models.vae_tiny",
    "CLIPTextModel": "transformers",
    "CLIPTextModelWithProjection": "transformers",
    "CLIPVisionModelWithProjection": "transformers",
    "StableDiffusionSafetyChecker": "fewstep.pipelines.safety",
}
TOKENIZERS = {"CLIPTokenizer": "CLIPTokenizer", "CLIPTokenizerFast": "CLIPTokenizer"}
# Serves the safety checker and IP-Adapters, which make one themselves where it is missing.
EXTRACTOR = "feature_extractor"
EXTRACTOR_CONFIG = "preprocessor_config.json"
EXTRACTORS = ("CLIPImageProcessor", "CLIPFeatureExtractor")
# Entries of transformers' configs that choose code: fetched from the hub, or of other packages.
CHOOSES_CODE = re.compile(r"auto_map|trust_remote_code|implementation|quantization|compression")
ADAPTER = "adapter_config.json"  # with which transformers would load a LoRA of PEFT's, unasked


@dataclass(frozen=True)
class Part:
    """One component of a checkpoint: its name, and its class as model_index.json has it."""

    name: str
    class_name: str

    @property
    def stem(self) -> str | None:
        """The name of its weights without extension, or None if it has no weights."""
        if self.class_name not in NETWORKS:
            return None
        is_ours = NETWORKS[self.class_name].startswith("fewstep.models")
        return "diffusion_pytorch_model" if is_ours else "model"


def read_index(root: Source) -> tuple[str, list[Part], dict[str, Any]]:
    """The pipeline's class name, its components and its options, from model_index.json."""
    index = root.read_json(INDEX_NAME)
    class_name = index.get("_class_name")
    if not isinstance(class_name, str):
        raise CheckpointError(f"{INDEX_NAME} of {root.path!r} names no _class_name")
    entries = {name: value for name, value in index.items() if not name.startswith("_")}
    parts = [
        Part(name, value[1])
        for name, value in entries.items()
        if isinstance(value, list) and len(value) == 2 and value[1] is not None
    ]
    options = {name: value for name, value in entries.items() if not isinstance(value, list)}
    return class_name, parts, options


def load_parts(
    root: Source, parts: Sequence[Part], dtype: torch.dtype | None, variant: str | None
) -> dict[str, Any]:
    """The components by name. `variant` falls back, with a warning, where a component has none."""
    loaded: dict[str, Any] = {}
    if any(part.name == EXTRACTOR for part in parts) and not has_extractor(root, parts):
        loaded[EXTRACTOR] = None
        parts = [part for part in parts if part.name != EXTRACTOR]
    for part in parts:
        check_class(part)
    variants = choose_variants(root, parts, variant)
    wanted = wanted_files(root, parts, variants)
    local = root.folder(wanted)
    read_ahead(local / name for name in wanted if name.endswith(".safetensors"))
    for part in parts:
        source = Source(str(local), subfolder=part.name, variant=variants.get(part.name))
        with understood(f"the {part.name} of {local}"):
            loaded[part.name] = load_part(part, source, dtype)
    return loaded


def has_extractor(root: Source, parts: Sequence[Part]) -> bool:
    """Whether a checkpoint's feature extractor is there, and CLIP's."""
    (class_name,) = [part.class_name for part in parts if part.name == EXTRACTOR]
    return class_name in EXTRACTORS and f"{EXTRACTOR}/{EXTRACTOR_CONFIG}" in root.names()


def check_class(part: Part) -> None:
    """Raises UnsupportedConfig for a class that is not implemented."""
    if part.name in ("scheduler", EXTRACTOR):
        return
    if part.class_name not in (*NETWORKS, *TOKENIZERS):
        raise UnsupportedConfig(
            f"the component {part.name} is a {part.class_name}, which is not implemented "
            f"(supported: {', '.join([*NETWORKS, *TOKENIZERS])})"
        )


def choose_variants(
    root: Source, parts: Sequence[Part], variant: str | None
) -> dict[str, str | None]:
    """The variant to load of each component with weights."""
    weighted = [part for part in parts if part.stem is not None]
    if variant is None:
        return dict.fromkeys((part.name for part in weighted), None)
    names = set(root.names())
    have = {part.name for part in weighted if has_weights(names, part, variant)}
    if weighted and not have:
        raise CheckpointError(
            f"{root.path!r} has no weights of variant={variant!r} in any component; "
            "leave variant out, and give torch_dtype to choose the precision"
        )
    for part in weighted:
        if part.name not in have:
            warn_caller(
                f"{part.name} has no weights of variant={variant!r}; its plain weights are loaded"
            )
    return {part.name: variant if part.name in have else None for part in weighted}


def has_weights(names: set[str], part: Part, variant: str | None) -> bool:
    """Whether the safetensors of a component are among the files `names`."""
    stem = f"{part.name}/{part.stem}"
    return not names.isdisjoint((weights_name(stem, variant), *index_names(stem, variant)))


def wanted_files(
    root: Source, parts: Sequence[Part], variants: Mapping[str, str | None]
) -> list[str]:
    """The files of `parts` in the chosen variants, so that nothing else is downloaded."""
    names = root.names()
    wanted = [INDEX_NAME]
    for part in parts:
        own = [name for name in names if name.startswith(f"{part.name}/")]
        wanted += [name for name in own if name.endswith(SMALL_FILES)]
        if part.stem is None:
            continue
        variant = variants[part.name]
        if not has_weights(set(names), part, variant):
            # Says what there is instead: other variants, or pickled weights.
            replace(root, subfolder=part.name, variant=variant).weights(part.stem)
        dot = f"\\.{re.escape(variant)}" if variant else ""
        number = r"-\d+-of-\d+"
        shape = rf"{part.name}/{part.stem}({dot}({number})?|{number}{dot})\.safetensors"
        wanted += [name for name in own if re.fullmatch(shape, name)]
    return wanted


def load_part(part: Part, source: Source, dtype: torch.dtype | None) -> Any:
    """One component from its local folder; `dtype` None keeps the files'."""
    if part.name == "scheduler":
        return scheduler_from_config(source.read_json(SCHEDULER_CONFIG_NAME))
    if part.class_name in TOKENIZERS:
        tokenizer = imported("transformers", TOKENIZERS[part.class_name])
        return tokenizer.from_pretrained(str(source.folder()), local_files_only=True)
    if part.name == EXTRACTOR:
        return image_processor().from_pretrained(str(source.folder()), local_files_only=True)
    network = imported(NETWORKS[part.class_name], part.class_name)
    if issubclass(network, Model):
        return network.from_pretrained(
            source.path,
            subfolder=source.subfolder,
            variant=source.variant,
            dtype=dtype or "auto",
        )
    if NETWORKS[part.class_name] != "transformers":
        return network.from_pretrained(source, dtype)
    return load_text_encoder(network, source, dtype)


def imported(module: str, name: str) -> Any:
    """The class `name` of `module`."""
    with first_import("transformers.modeling_utils"):
        return getattr(importlib.import_module(module), name)


def image_processor() -> Any:
    """transformers' class that makes CLIP's input by PIL, so that it is the same everywhere."""
    transformers = importlib.import_module("transformers")
    # transformers 4 has no other under the plain name.
    plain = not hasattr(transformers, "CLIPImageProcessorPil")
    return getattr(transformers, "CLIPImageProcessor" if plain else "CLIPImageProcessorPil")


def load_text_encoder(network: Any, source: Source, dtype: torch.dtype | None) -> nn.Module:
    """A transformers network. Raises CheckpointError where it would be left with random weights."""
    folder = str(source.folder())
    for path in source.weights("model"):
        with opened(path):
            pass  # what transformers says of a damaged file does not name it
    with no_progress_bar():
        model, report = network.from_pretrained(
            folder,
            config=text_config(network, source),
            variant=source.variant,
            use_safetensors=True,
            local_files_only=True,
            output_loading_info=True,
        )
    if missing := sorted(report["missing_keys"]):
        raise CheckpointError(
            f"the weights in {folder} do not fit {network.__name__}: {len(missing)} missing, "
            f"the first {missing[0]}"
        )
    return (model if dtype is None else model.to(dtype)).eval()


def text_config(network: Any, source: Source) -> Any:
    """The config of a transformers network without what would choose code."""
    if ADAPTER in source.names():
        raise CheckpointError(
            f"{source.folder()} holds {ADAPTER}, which is no part of a model; remove it, and load "
            "a LoRA by load_lora_weights"
        )
    stored = source.read_json("config.json")
    inner = stored.get(getattr(network.config_class, "base_config_key", ""))  # of a whole CLIP
    stored = inner if isinstance(inner, dict) else stored
    check_sizes(stored)
    plain = {key: value for key, value in stored.items() if not CHOOSES_CODE.search(key)}
    return network.config_class.from_dict(plain)


@contextmanager
def no_progress_bar() -> Iterator[None]:
    """transformers without its bar for every file, which takes longer to read than to finish."""
    from transformers.utils import logging

    was_on = logging.is_progress_bar_enabled()
    logging.disable_progress_bar()
    try:
        yield
    finally:
        if was_on:
            logging.enable_progress_bar()


def save_parts(
    folder: Path,
    class_name: str,
    components: Mapping[str, Any],
    options: Mapping[str, Any],
    *,
    variant: str | None,
    max_shard_size: int | str,
) -> None:
    """Write a pipeline as diffusers lays it out, so that diffusers loads it too.

    model_index.json comes last: a folder that has it is complete.
    """
    index: dict[str, Any] = {"_class_name": class_name, "_diffusers_version": LAYOUT_VERSION}
    for name, component in components.items():
        if component is None:
            index[name] = [None, None]
            continue
        index[name] = [library(component), stored_name(component)]
        is_network = isinstance(component, nn.Module)
        how = {"variant": variant, "max_shard_size": max_shard_size} if is_network else {}
        with no_progress_bar() if library(component) == "transformers" else nullcontext():
            component.save_pretrained(folder / name, **how)
    write_json(index | dict(options), folder / INDEX_NAME)


def library(component: Any) -> str:
    """The library that model_index.json names: ours are read by diffusers as its own."""
    if type(component).__name__ == "StableDiffusionSafetyChecker":
        return "stable_diffusion"
    return "diffusers" if isinstance(component, (Model, Scheduler)) else "transformers"


def stored_name(component: Any) -> str:
    """The class that model_index.json names."""
    if isinstance(component, Scheduler):
        return str(component.config["_class_name"])
    return type(component).__name__.removesuffix("Pil")  # image processors without torchvision
