"""`recipes`: lists the training recipes that ship with fewstep, shows one, copies one."""

from __future__ import annotations

import itertools
import re
from collections.abc import Iterable, Iterator
from pathlib import Path
from typing import Annotated

import typer

from ..checkpoints.config import replacing
from ..errors import RequestError

EPILOG = (
    "\b\nExamples:\n"
    "  fewstep recipes\n"
    "  fewstep recipes lcm_lora_sd15\n"
    "  fewstep recipes lcm_lora_sd15 --copy mine.toml"
)
# Title -> the names of its recipes; each stands under the first title that fits it.
GROUPS = {
    "The embedded model, and what is made from it": r"emoji",
    "Latent consistency fine-tuning (LCF): pictures of one's own": r"lcf_",
    "Phased and trajectory consistency (PCM, TCD)": r"(pcm|tcd)_",
    "LCM-LoRA: adapters for any model of a kind": r"lcm_(xl_)?lora",
    "Latent consistency models, the whole network (LCM)": r"lcm_",
    "Others": r"",
}


def recipes(
    name: Annotated[
        str | None, typer.Argument(metavar="RECIPE", help="Print this recipe in full.")
    ] = None,
    copy: Annotated[
        Path | None,
        typer.Option(metavar="FILE.toml|FOLDER", help="Write it there instead, to be changed."),
    ] = None,
) -> None:
    """List the training recipes that ship with fewstep; show or copy one.

    A copy is run by its name as a file: `fewstep train mine.toml`.
    """
    from ..training.config import recipe_names, recipe_path

    if name is None:
        if copy is not None:
            raise RequestError(f"--copy {copy}: says not which; give a recipe's name before it")
        print("\n".join(listed(recipe_names())))
        return
    text = recipe_path(name).read_text(encoding="utf-8")
    if copy is None:
        print(text, end="")
        return
    print(copied(text, copy / f"{name}.toml" if copy.is_dir() else copy))


def listed(names: Iterable[str]) -> Iterator[str]:
    """Lines: each group's title, and its recipes with a sentence each."""
    from ..training.config import recipe_path

    left = list(names)
    width = max(map(len, left))
    for title, pattern in GROUPS.items():
        found = [name for name in left if re.match(pattern, name)]
        left = [name for name in left if name not in found]
        if found:
            yield f"{title}:"
            yield from (f"  {name:<{width}}  {about(recipe_path(name))}" for name in found)
            yield ""


def copied(text: str, file: Path) -> Path:
    """The new file that holds `text`. Raises RequestError for one that exists, or cannot be."""
    if file.exists():
        raise RequestError(f"--copy {file}: exists; give another name, or delete it")
    try:
        with replacing(file) as beside:
            beside.write_text(text, encoding="utf-8")
    except OSError as error:
        raise RequestError(f"--copy {file}: cannot be written ({error.strerror})") from error
    return file


def about(recipe: Path) -> str:
    """The first sentence of the comment that a recipe opens with."""
    lines = recipe.read_text(encoding="utf-8").splitlines()
    comment = itertools.takewhile(lambda line: line.startswith("#"), lines)
    return " ".join(line.lstrip("# ") for line in comment).partition(". ")[0].rstrip(".")
