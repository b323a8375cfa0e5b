"""A finished run of the emoji recipes as the folder that ships: half precision, card, notices."""

from __future__ import annotations

import json
import os
import shutil
from pathlib import Path

import torch

from ..errors import RequestError
from ..pipelines.catalog import LatentConsistencyModelPipeline
from ..pipelines.families import StableDiffusion
from .convert import stored_recipe
from .emoji.notices import NOTICE
from .scenes import sampler_of

CARD = """\
---
license: apache-2.0
library_name: fewstep
tags: [latent-consistency-model, text-to-image]
---

# {name}

A small latent consistency model: it draws emoji-like pictures of {size}x{size} pixels from English
text in 1 to 8 steps. Guidance is an input of the network; it was trained for `guidance_scale` from
{guidance_min:g} to {guidance_max:g}.

```python
from fewstep import EMBEDDED, DiffusionPipeline

pipe = DiffusionPipeline.from_pretrained(EMBEDDED)
pipe("a red apple", num_inference_steps=4, guidance_scale=4.0).images[0].save("apple.png")
```

**What it knows.** {concepts} objects, animals, foods and places as 3D renders and flat icons, in
colours, on coloured backgrounds, sometimes two at once. It is a model of an emoji world, not of the
world: it draws no photographs, no people, no letters, and words outside its captions are drawn as
the nearest thing it knows.

**Parts.** UNet {unet:.2f} M, VAE {vae:.2f} M, text encoder {text:.2f} M parameters, in float16.

**Training.** By fewstep's own code, from nothing: `fewstep train {folder}_1_autoencoder`,
`_2_text`, `_3_teacher` ({teacher_samples:,} samples), `_4_lcm` ({lcm_samples:,} samples, latent
consistency distillation, DDIM solver on a grid of {grid} steps, {target} target). No other model's
weights are in it; the text encoder was pulled towards sentence embeddings of all-MiniLM-L6-v2
(Apache-2.0).

**Data.** Scenes composed from Microsoft's Fluent Emoji (MIT), captioned by composition; names and
keywords from emojibase-data and emojilib (MIT). See NOTICE.

**Licence.** The weights: Apache-2.0. The notices in NOTICE go with them.

## Figures

{figures}
"""


def package_model(
    run: str | Path, output: str | Path, *, figures: str = "", dtype: torch.dtype = torch.float16
) -> Path:
    """Write the LCM of a run's folder into the new folder `output`, with its card and notices.

    `figures` is Markdown for the card. Raises RequestError if `output` is there, or if the run has
    not come to its end.
    """
    run, output = Path(run), Path(output)
    source = run / "lcm" / "pipeline"
    if not source.is_dir():
        raise RequestError(f"run={str(run)!r} has no finished LCM; run its four recipes first")
    if output.exists():
        raise RequestError(f"output={str(output)!r} exists; give a new folder, or delete it")
    pipe = LatentConsistencyModelPipeline.from_pretrained(source, torch_dtype=dtype)
    beside = output.with_name(output.name + ".part")
    shutil.rmtree(beside, ignore_errors=True)
    pipe.save_pretrained(beside)
    for name in ("vocab.json", "merges.txt"):  # for readers that know only CLIP's own files
        shutil.copy(run / "text" / "tokenizer" / name, beside / "tokenizer" / name)
    for path in beside.rglob("*.safetensors"):
        path.chmod(0o644)  # transformers leaves its file private
    (beside / "README.md").write_text(card(run, pipe, output.name, figures), encoding="utf-8")
    (beside / "NOTICE").write_text(NOTICE, encoding="utf-8")
    os.replace(beside, output)
    return output


def card(run: Path, pipe: StableDiffusion, name: str, figures: str) -> str:
    """The model card, from the run's recipes and the networks."""
    teacher, lcm = (json.loads((run / p / "recipe.json").read_text()) for p in ("teacher", "lcm"))
    settings = lcm["settings"]

    def millions(module: torch.nn.Module) -> float:
        return sum(p.numel() for p in module.parameters()) / 1e6

    return CARD.format(
        name=name,
        size=lcm["data"]["size"],
        guidance_min=settings["w_min"] + 1,
        guidance_max=settings["w_max"] + 1,
        concepts=concepts_of(run / "lcm"),
        unet=millions(pipe.unet),
        vae=millions(pipe.vae),
        text=millions(pipe.text_encoder),
        folder=Path(lcm["folder"]).name,
        teacher_samples=teacher["run"]["steps"] * teacher["run"]["batch"],
        lcm_samples=lcm["run"]["steps"] * lcm["run"]["batch"],
        grid=settings["grid_steps"],
        target="averaged" if settings["target"] == "ema" else "stop-gradient",
        figures=figures or "Not measured yet.",
    )


def concepts_of(run: Path) -> int:
    """How many concepts a run's captions name; early runs have it on file."""
    if (run / "figures.json").exists():
        return int(json.loads((run / "figures.json").read_text())["concepts"])
    return len(sampler_of(stored_recipe(run / "recipe.json")).rows)
