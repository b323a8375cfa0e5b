"""The page that goes with what a run of the consistency phase gives: README.md for the hub."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

from .config import EMBEDDED_TEACHER, ConsistencyPhase, Recipe, placed

# Licences of bases, as their pages give them. What is made from a base is bound by its licence.
LICENCES = {
    "SimianLuo/LCM_Dreamshaper_v7": "mit",
    "latent-consistency/lcm-sdxl": "openrail++",
    "segmind/SSD-1B": "apache-2.0",
    "stabilityai/stable-diffusion-xl-base-1.0": "openrail++",
    "stable-diffusion-v1-5/stable-diffusion-v1-5": "creativeml-openrail-m",
}
PROMPT = "a lighthouse at dusk"  # where a recipe has none
CARD = """\
---
{header}
---

# {name}

{what}

{guidance}

```python
{sample}
```

**Base.** {base}

**Training.** {training}

**Data.** {data}

**Licence.** {licence}

## Figures

{figures}
"""


def settings_of(recipe: Recipe) -> ConsistencyPhase:
    """The settings of a recipe of the consistency phase."""
    assert isinstance(recipe.settings, ConsistencyPhase), recipe.phase
    return recipe.settings


def run_name(recipe: Recipe) -> str:
    """What the result is called: the folder of the run's phases, and the phase's own."""
    return "-".join(part for part in (Path(recipe.folder).name, recipe.name) if part)


def card(
    recipe: Recipe,
    *,
    name: str,
    embedded: bool,
    xl: bool = False,
    counts: Mapping[str, int] | None = None,
    figures: str = "",
    steps: int | None = None,
) -> str:
    """The model card, in Markdown.

    `name` is the folder or the repository that the sample loads, `embedded` whether the network
    takes guidance as an input, `xl` whether it is SDXL, `counts` how many samples of the data were
    kept and dropped, by rule, `figures` a table, `steps` how many were trained where it is not the
    recipe's number.
    """
    settings = settings_of(recipe)
    return CARD.format(
        header=header(recipe),
        name=run_name(recipe),
        what=what(recipe, xl),
        guidance=guidance(settings, embedded),
        sample=sample(recipe, name, embedded),
        base=base(recipe),
        training=training(recipe, recipe.run.steps if steps is None else steps),
        data=data(recipe, counts or {}),
        licence=licence(recipe),
        figures=figures.strip() or "Not measured yet.",
    )


def header(recipe: Recipe) -> str:
    """What the hub reads: licence, base, library, tags."""
    settings = settings_of(recipe)
    kind = ["latent-consistency-model"] if settings.method != "denoising" else []
    tags = [*kind, "text-to-image", *(["lora"] if settings.lora else [])]
    lines = ["library_name: diffusers", "pipeline_tag: text-to-image", f"tags: [{', '.join(tags)}]"]
    if start(recipe) in LICENCES:
        lines.append(f"license: {LICENCES[start(recipe)]}")
    if settings.base in LICENCES:  # what is on this machine alone, the hub cannot link to
        lines.append(f"base_model: {settings.base}")
    return "\n".join(lines)


def start(recipe: Recipe) -> str:
    """What the network was before training."""
    settings = settings_of(recipe)
    return placed(settings.unet or settings.base, recipe.folder)


METHODS = {
    ("distillation", "zero"): "latent consistency distillation (LCM, arXiv:2310.04378)",
    ("distillation", "phases"): "phased consistency distillation (PCM, arXiv:2405.18407)",
    ("distillation", "sampled"): "trajectory consistency distillation (TCD, arXiv:2402.19159)",
    ("fine_tuning", "zero"): "latent consistency fine-tuning (LCF, arXiv:2310.04378)",
    ("fine_tuning", "phases"): "phased consistency fine-tuning, without a teacher",
    ("fine_tuning", "sampled"): "trajectory consistency fine-tuning, without a teacher",
    ("denoising", "zero"): "fine-tuning by the denoising loss (DDPM, arXiv:2006.11239)",
}


def what(recipe: Recipe, xl: bool) -> str:
    """What it is, in a sentence or two."""
    settings = settings_of(recipe)
    kind = "SDXL" if xl else "Stable Diffusion"
    if settings.method == "denoising":
        thing = f"A LoRA for {kind}" if settings.lora else f"A {kind} model"
        return f"{thing}, by {METHODS[settings.method, settings.endpoint]}."
    thing = f"A LoRA that makes {kind} draw" if settings.lora else f"A {kind} model that draws"
    steps = str(settings.phases) if settings.endpoint == "phases" else "2 to 8"
    return (
        f"{thing} in {steps} steps, by {METHODS[settings.method, settings.endpoint]}. "
        f"Sample with {sampler(settings)[0]}."
    )


def guidance(settings: ConsistencyPhase, embedded: bool) -> str:
    """What guidance_scale means to it; the paper's omega is guidance_scale - 1."""
    if settings.method == "denoising":
        return "**Guidance** works as with the base."
    low, high = settings.w_min, settings.w_max
    drawn = f"{low:g}" if low == high else f"{low:g} to {high:g}"
    omega = f"omega = guidance_scale - 1 was {drawn} in training"
    if embedded:
        scales = f"{low + 1:g}" if low == high else f"{low + 1:g} to {high + 1:g}"
        return (
            f"**Guidance** is an input of the network: {omega}, so give `guidance_scale` {scales}. "
            "A step is one call of the network, and negative prompts have no effect."
        )
    if settings.method == "distillation" and not settings.solver_guidance:
        return (
            "**Guidance** is not in the weights: the teacher's steps were unguided. "
            "Classifier-free guidance and negative prompts work as with the base."
        )
    return (
        f"**Guidance** is in the weights ({omega}, {'fixed' if low == high else 'drawn'}): give "
        "`guidance_scale` 1, or up to 2 for negative prompts to have an effect."
    )


def sampler(settings: ConsistencyPhase) -> tuple[str, dict[str, Any]]:
    """The scheduler that draws with the result: its class, and what differs from the base's."""
    own: dict[str, Any] = {}
    if settings.prediction_type:
        own["prediction_type"] = settings.prediction_type
    if settings.method == "denoising":
        return "DDIMScheduler", own
    if settings.endpoint == "phases":  # times at the upper ends of the phases, without noise
        own |= {"timestep_spacing": "trailing", "clip_sample": False, "set_alpha_to_one": False}
        return "DDIMScheduler", own
    own["original_inference_steps"] = settings.grid_steps
    return ("LCMScheduler" if settings.endpoint == "zero" else "TCDScheduler"), own


def steps_of(settings: ConsistencyPhase) -> int:
    """How many steps a sample takes."""
    if settings.method == "denoising":
        return max(settings.sheet.steps, default=settings.sheet.teacher_steps)
    return settings.phases if settings.endpoint == "phases" else 4


def sample(recipe: Recipe, name: str, embedded: bool) -> str:
    """A script that draws with it."""
    settings = settings_of(recipe)
    scale = settings.sheet.guidance_scale
    if embedded:
        scale = min(max(scale, settings.w_min + 1), settings.w_max + 1)
    prompt = settings.sheet.prompts[0] if settings.sheet.prompts else PROMPT
    given = f"{prompt!r}, num_inference_steps={steps_of(settings)}, guidance_scale={scale:g}"
    call = f"image = pipe({given}).images[0]"
    lines = lora_sample(recipe, name) if settings.lora else full_sample(name)
    return "\n".join([*lines, call, 'image.save("picture.png")'])


def full_sample(name: str) -> Sequence[str]:
    """Loads a whole model, which brings its scheduler."""
    return (
        "from fewstep import DiffusionPipeline  # or diffusers",
        "",
        f"pipe = DiffusionPipeline.from_pretrained({name!r})",
    )


def lora_sample(recipe: Recipe, name: str) -> Sequence[str]:
    """Loads the base, another scheduler and the LoRA."""
    settings = settings_of(recipe)
    scheduler, own = sampler(settings)
    given = "".join(f", {key}={value!r}" for key, value in own.items())
    imports, load = base_sample(recipe)
    return (
        f"from fewstep import {', '.join([*imports, scheduler])}  # or diffusers",
        "",
        *load,
        f"pipe.scheduler = {scheduler}.from_config(pipe.scheduler.config{given})",
        f"pipe.load_lora_weights({name!r})",
    )


def base_sample(recipe: Recipe) -> tuple[list[str], list[str]]:
    """(what to import, the lines that make `pipe`) of a LoRA's base."""
    settings = settings_of(recipe)
    if settings.base == EMBEDDED_TEACHER:
        line = "from fewstep.pipelines.embedded import embedded_teacher"
        return [], [line, "", "pipe = embedded_teacher()"]
    at = placed(settings.base, recipe.folder)
    place = "EMBEDDED" if at == "embedded" else repr(at)
    load = "from_single_file" if settings.base.endswith(".safetensors") else "from_pretrained"
    imports = ["DiffusionPipeline", *(["EMBEDDED"] if place == "EMBEDDED" else [])]
    if not settings.unet:
        return imports, [f"pipe = DiffusionPipeline.{load}({place})"]
    return [*imports, "UNet2DConditionModel"], [
        f"unet = UNet2DConditionModel.from_pretrained({placed(settings.unet, recipe.folder)!r})",
        f"pipe = DiffusionPipeline.{load}({place}, unet=unet)",
    ]


def base(recipe: Recipe) -> str:
    """The models that it was made from."""
    settings = settings_of(recipe)
    parts = [f"`{placed(settings.base, recipe.folder)}`"]
    if settings.unet:
        parts.append(f"with the UNet of `{placed(settings.unet, recipe.folder)}`")
    if settings.vae:
        parts.append(f"with the autoencoder `{placed(settings.vae, recipe.folder)}`")
    return " ".join(parts) + "."


def training(recipe: Recipe, steps: int) -> str:
    """The method's numbers."""
    settings, run = settings_of(recipe), recipe.run
    solver = f"the solver {settings.solver}, {'' if settings.solver_guidance else 'un'}guided"
    average = f"averaged with decay {settings.target_decay:g}"
    sentences = [f"{steps:,} steps of {run.batch} samples, learning rate {recipe.optimizer.lr:g}"]
    if settings.method != "denoising":
        sentences += [
            f"a grid of {settings.grid_steps} times",
            *([solver] if settings.method == "distillation" else []),
            f"target {average if settings.target == 'ema' else 'stop-gradient'}",
            f"distance {settings.distance}",
        ]
    if settings.lora:
        sentences.append(f"rank {settings.lora.rank}, alpha {settings.lora.alpha:g}")
    return "; ".join(sentences) + ". Weights averaged over the steps are published."


def data(recipe: Recipe, counts: Mapping[str, int]) -> str:
    """Where the samples came from, and how many were kept and dropped."""
    place = getattr(recipe.data, "path", "") or "emoji scenes, which fewstep composes"
    told = ", ".join(f"{rule}: {number:,}" for rule, number in counts.items())
    return f"{place}{f' ({told})' if told else ''}."


def licence(recipe: Recipe) -> str:
    """The licence of what it was made from."""
    source = start(recipe)
    if source in LICENCES:
        return f"That of the base, `{source}`: {LICENCES[source]}."
    return f"That of the base, `{source}`."
