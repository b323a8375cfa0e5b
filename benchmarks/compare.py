"""The same work on fewstep and on diffusers, in turns; prints medians, ranges and the ratio.

    python benchmarks/compare.py                      # the embedded model, text to picture, 4 steps
    python benchmarks/compare.py --model FOLDER --size 256 --runs 20
    python benchmarks/compare.py --cold               # whole processes of `fewstep generate`

Both load the same files and draw from the same seeds on the CPU in float32. The turns (A B A B ...)
spread what else the machine does over both. Nothing else should run: the ranges show if it did.
"""

from __future__ import annotations

import argparse
import json
import statistics
import subprocess
import sys
import tempfile
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np

from fewstep import EMBEDDED

Draw = Callable[[int], np.ndarray]  # seed -> pixels uint8 (H, W, 3)


def drawer(library: Any, arguments: argparse.Namespace) -> Draw:
    """Draws the prompt with a library that speaks diffusers' language."""
    import torch

    pipe = library.DiffusionPipeline.from_pretrained(arguments.model, torch_dtype=torch.float32)
    pipe.set_progress_bar_config(disable=True)
    sides = {} if arguments.size is None else {"width": arguments.size, "height": arguments.size}

    def draw(seed: int) -> np.ndarray:
        generator = torch.Generator("cpu").manual_seed(seed)
        result = pipe(
            arguments.prompt, num_inference_steps=arguments.steps, generator=generator, **sides
        )
        return np.asarray(result.images[0])

    return draw


def in_turns(draws: dict[str, Draw], runs: int) -> tuple[dict[str, list[float]], int]:
    """Seconds of each run by name, and the largest difference of two pictures of one seed."""
    for draw in draws.values():
        draw(0)  # the first run also fills caches
    seconds: dict[str, list[float]] = {name: [] for name in draws}
    largest = 0
    for seed in range(runs):
        pictures = []
        for name, draw in draws.items():
            started = time.perf_counter()
            pictures.append(draw(seed).astype(np.int16))
            seconds[name].append(time.perf_counter() - started)
        largest = max(largest, *(int(np.abs(p - pictures[0]).max()) for p in pictures))
    return seconds, largest


def line(name: str, seconds: list[float]) -> str:
    """Name, median and range."""
    median = statistics.median(seconds)
    return f"{name:<22} {median:8.3f} s   ({min(seconds):.3f} to {max(seconds):.3f})"


def compare(arguments: argparse.Namespace) -> None:
    """Warm drawing on both libraries."""
    import diffusers
    import torch

    import fewstep

    if arguments.threads:
        torch.set_num_threads(arguments.threads)
    diffusers.utils.logging.set_verbosity_error()
    draws = {"fewstep": drawer(fewstep, arguments), "diffusers": drawer(diffusers, arguments)}
    seconds, largest = in_turns(draws, arguments.runs)
    print(
        f"{Path(arguments.model).name}, {arguments.steps} steps, {arguments.runs} runs each, "
        f"{torch.get_num_threads()} threads, torch {torch.__version__}, "
        f"diffusers {diffusers.__version__}"
    )
    for name, times in seconds.items():
        print(line(name, times))
    ratio = statistics.median(seconds["diffusers"]) / statistics.median(seconds["fewstep"])
    print(f"{'diffusers / fewstep':<22} {ratio:8.2f}")
    print(f"{'largest difference':<22} {largest:8d} of 255")


def cold(arguments: argparse.Namespace) -> None:
    """Whole processes, from the command to the file; what --json tells of each beside it."""
    command = [sys.executable, "-m", "fewstep", "generate", arguments.prompt, "--json"]
    command += ["--model", str(arguments.model), "--steps", str(arguments.steps)]
    command += [] if arguments.size is None else ["--size", str(arguments.size)]
    whole, load, draw = [], [], []
    with tempfile.TemporaryDirectory() as folder:
        for seed in range(arguments.runs + 1):
            started = time.perf_counter()
            done = subprocess.run(
                [*command, "--seed", str(seed)], cwd=folder, capture_output=True, check=True
            )
            if seed:  # the first run fills the disk's cache
                whole.append(time.perf_counter() - started)
                told = json.loads(done.stdout)["seconds"]
                load.append(told["load"])
                draw.append(told["draw"])
    print(f"{Path(arguments.model).name}, {arguments.steps} steps, {arguments.runs} processes")
    for name, times in (("whole process", whole), ("of which loading", load), ("drawing", draw)):
        print(line(name, times))


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.partition("\n")[0])
    parser.add_argument("--model", default=EMBEDDED, help="folder; default: the embedded model")
    parser.add_argument("--prompt", default="a red apple")
    parser.add_argument("--steps", type=int, default=4)
    parser.add_argument("--size", type=int, help="pixels a side; default: the model's own")
    parser.add_argument("--runs", type=int, default=10)
    parser.add_argument("--threads", type=int, default=0, help="of torch; default: its own choice")
    parser.add_argument("--cold", action="store_true", help="time whole processes instead")
    arguments = parser.parse_args()
    (cold if arguments.cold else compare)(arguments)


if __name__ == "__main__":
    main()
