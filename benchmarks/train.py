"""Training a LoRA by fewstep and by diffusers' published script, in turns; speed, memory, parts.

    python benchmarks/train.py --script train_lcm_distill_lora_sd_wds.py
    python benchmarks/train.py --script ... --precision bf16 --batch 8 --rounds 3
    python benchmarks/train.py --script ... --size full --resolution 256 --steps 1 --rounds 1

The script is examples/consistency_distillation/train_lcm_distill_lora_sd_wds.py of diffusers; it
runs as it is and needs accelerate, webdataset, braceexpand, peft and tensorboard. Both sides train
the same model of random weights on the same synthetic pictures, each run in a new process. The
turns (A B A B ...) spread what else the machine does over both; nothing else should run.
"""

from __future__ import annotations

import argparse
import contextlib
import json
import os
import platform
import subprocess
import sys
import tempfile
from collections.abc import Iterator, Sequence
from dataclasses import asdict
from pathlib import Path
from typing import Any

from train_material import make_pictures, size_of
from train_report import SIDES, Comparison, markdown, side_of

HERE = Path(__file__).parent
RECIPE = "lcm_lora_sd15"
W_RANGE = (5.0, 15.0)  # the script's own


def main(arguments: Sequence[str] | None = None) -> None:
    options = parsed(arguments)
    with work_folder(options.folder) as folder:
        report = Benchmark(options, folder).run()
    if options.json:
        Path(options.json).write_text(json.dumps(report, indent=2) + "\n", encoding="utf-8")
    print(report["markdown"])


# ── options ──


def parsed(arguments: Sequence[str] | None) -> argparse.Namespace:
    """The options, with the size's own numbers where none are given."""
    parser = argparse.ArgumentParser(description=__doc__.partition("\n")[0])
    add = parser.add_argument
    add("--script", required=True, help="the published script's file")
    add("--size", choices=("tiny", "full"), default="tiny", help="of the model; full: SD 1.5")
    add("--batch", type=int, help="samples a step; default: 4 tiny, 1 full")
    add("--resolution", type=int, help="pixels a side; default: 128 tiny, 512 full")
    add("--steps", type=int, default=8, help="counted, of each run")
    add("--warmup", type=int, default=2, help="steps before them")
    add("--rounds", type=int, default=2, help="runs of each side")
    add("--precision", choices=("fp32", "bf16"), default="fp32")
    add("--autocast", choices=("published", "off"), default="published", help=AUTOCAST)
    add("--rank", type=int, default=64, help="of the LoRA")
    add("--pictures", type=int, default=32)
    add("--gradient-checkpointing", action="store_true", help="on both sides")
    add(
        "--compile", action="store_true", help="fewstep's run.compile; the script has no such thing"
    )
    add("--device", choices=("auto", "cpu"), default="auto")
    add("--threads", type=int, default=0, help="of torch; default: its own choice")
    add("--folder", help="where models and pictures are kept for the next time; default: nowhere")
    add("--json", help="file for all that was measured")
    options = parser.parse_args(arguments)
    size = size_of(options.size)
    options.batch = size.batch if options.batch is None else options.batch
    options.resolution = size.resolution if options.resolution is None else options.resolution
    if not Path(options.script).is_file():
        parser.error(
            f"--script {options.script}: there is no such file; it is "
            "examples/consistency_distillation/train_lcm_distill_lora_sd_wds.py of diffusers"
        )
    for name in ("batch", "steps", "warmup", "rounds", "rank"):
        if getattr(options, name) < 1:
            parser.error(f"--{name} {getattr(options, name)} must be at least 1")
    if options.resolution < 64 or options.resolution % 64:
        parser.error(f"--resolution {options.resolution} must be a multiple of 64")
    if options.pictures < options.batch:
        parser.error(f"--pictures {options.pictures} must be at least --batch {options.batch}")
    if options.autocast == "off" and options.precision != "fp32":
        parser.error("--autocast off goes with --precision fp32 only; leave one of them out")
    return options


AUTOCAST = (
    "with fp32 the script still runs teacher and target in autocast's half precision; "
    "off: everything in float32"
)


@contextlib.contextmanager
def work_folder(given: str | None) -> Iterator[Path]:
    """The folder given, or one that is removed at the end."""
    if given is not None:
        yield Path(given).absolute()
        return
    with tempfile.TemporaryDirectory() as folder:
        yield Path(folder)


# ── the runs ──


class Benchmark:
    """The jobs of one comparison; each is a process."""

    def __init__(self, options: argparse.Namespace, folder: Path) -> None:
        self.options, self.folder = options, folder
        self.steps = options.warmup + options.steps
        self.model = folder / f"model-{options.size}"
        self.pictures = folder / f"pictures-{options.resolution}-{options.pictures}"
        self.passing = folder / "passing"  # of one benchmark: runs and caches
        self.jobs = 0

    def run(self) -> dict[str, Any]:
        """The report, as JSON; runs everything."""
        options = self.options
        self.folder.mkdir(parents=True, exist_ok=True)
        with tempfile.TemporaryDirectory(dir=self.folder) as passing:
            self.passing = Path(passing)
            if not self.model.exists():
                self.job("model", size=options.size, folder=str(self.model))
            self.shard = make_pictures(self.pictures, options.pictures, options.resolution * 5 // 4)
            cached = self.job("cache", **self.recipe())
            results: dict[str, list[dict[str, Any]]] = {"script": [], "fewstep": []}
            for _ in range(options.rounds):
                results["script"].append(self.job("script", **self.script()))
                results["fewstep"].append(self.job("fewstep", **self.recipe(), parts=self.parts))
            if not self.parts:  # a pair more, for the parts only
                results["script"][0]["parts"] = self.job(
                    "script", **self.script() | {"parts": True}
                )["parts"]
                results["fewstep"][0]["parts"] = self.job("fewstep", **self.recipe(), parts=True)[
                    "parts"
                ]
        return self.report(results, cached)

    @property
    def parts(self) -> bool:
        """Whether the counted runs also time their parts: not where that makes them slower."""
        import torch

        return self.options.device == "cpu" or not torch.cuda.is_available()

    def job(self, name: str, **spec: Any) -> dict[str, Any]:
        """The result of a job in a new process. Exits with the end of what it said if it fails."""
        self.jobs += 1
        print(f"{name} ...", file=sys.stderr, flush=True)
        stem = self.passing / f"{self.jobs}-{name}"
        ask, answer, log = (stem.with_suffix(s) for s in (".ask", ".answer", ".log"))
        ask.write_text(json.dumps({"job": name, **spec}))
        command = [sys.executable, str(HERE / "train_child.py"), str(ask), str(answer)]
        with log.open("w") as file:
            done = subprocess.run(command, stdout=file, stderr=file, env=self.environment())
        if done.returncode:
            told = "\n".join(log.read_text(errors="replace").splitlines()[-30:])
            raise SystemExit(f"{told}\nerror: the job {name!r} failed with code {done.returncode}")
        return dict(json.loads(answer.read_text()))

    def environment(self) -> dict[str, str]:
        """The processes' own: offline, on the wanted device and threads."""
        given = {**os.environ, "HF_HUB_OFFLINE": "1", "TOKENIZERS_PARALLELISM": "false"}
        if self.options.threads:
            given |= {"OMP_NUM_THREADS": str(self.options.threads)}
            given |= {"MKL_NUM_THREADS": str(self.options.threads)}
        if self.options.device == "cpu":
            given |= {"CUDA_VISIBLE_DEVICES": "", "ACCELERATE_USE_CPU": "true"}
        return given

    def script(self) -> dict[str, Any]:
        """The script's job."""
        options = self.options
        given: dict[str, Any] = {
            "pretrained_teacher_model": self.model,
            "train_shards_path_or_url": self.shard,
            "output_dir": self.passing / f"script-{self.jobs}",
            "resolution": options.resolution,
            "train_batch_size": options.batch,
            "max_train_steps": self.steps,
            "max_train_samples": self.steps * options.batch,
            "dataloader_num_workers": 1,  # with 0 it divides by zero
            "mixed_precision": "bf16" if options.precision == "bf16" else "no",
            "lora_rank": options.rank,
            "lora_alpha": options.rank,
            "loss_type": "huber",
            "w_min": W_RANGE[0],
            "w_max": W_RANGE[1],
            "adam_weight_decay": 0.0,
            "validation_steps": self.steps + 1,
            "seed": 0,
        }
        words = [word for key, value in given.items() for word in (f"--{key}", str(value))]
        words += ["--gradient_checkpointing"] * options.gradient_checkpointing
        return {
            "path": str(Path(options.script).absolute()),
            "arguments": words,
            "autocast": options.autocast == "published",
            "parts": self.parts,
        }

    def recipe(self) -> dict[str, Any]:
        """The recipe's name and what replaces its entries."""
        options = self.options
        given: dict[str, Any] = {
            "folder": str(self.passing / f"fewstep-{self.jobs}"),
            "data.path": str(self.pictures),
            "data.resolution": options.resolution,
            "data.crop": "random",
            "data.flip": 0.0,
            "data.variants": 1,
            "data.min_side": 0,
            "data.held_out": 0,
            "data.cache": str(self.passing / "cache"),
            "optimizer.warmup": 0,
            "run.steps": self.steps,
            "run.batch": options.batch,
            "run.accumulate": 1,
            "run.precision": options.precision,
            "run.device": options.device,
            "run.gradient_checkpointing": options.gradient_checkpointing,
            "run.compile": options.compile,
            "run.sheet_steps": 0,
            "consistency.base": str(self.model),
            "consistency.w_min": W_RANGE[0],
            "consistency.w_max": W_RANGE[1],
            "consistency.lora.rank": options.rank,
            "consistency.lora.alpha": options.rank,
        }
        overrides = [f"{key}={json.dumps(value)}" for key, value in given.items()]
        return {"recipe": RECIPE, "overrides": overrides}

    # ── what is said ──

    def report(
        self, results: dict[str, list[dict[str, Any]]], cached: dict[str, Any]
    ) -> dict[str, Any]:
        """All figures, and the Markdown of them."""
        options, warmup = self.options, self.options.warmup
        first = results["script"][0]
        script, fewstep = (side_of(results[side], warmup, options.batch) for side in SIDES)
        compared = Comparison(
            script, fewstep, cached["seconds"], cached["pictures"], first["threads"]
        )
        text = "\n".join([markdown(self.title(), compared), *notes(options, first)])
        figures = {
            "speed": compared.speed,
            "memory": compared.memory,
            "caching_steps": compared.caching_steps,
            "paid_back": compared.paid_back,
        }
        return {
            "options": vars(options) | {"script": Path(options.script).name, "folder": None},
            "machine": machine(first),
            "ratios": figures,
            **asdict(compared),
            "markdown": text,
        }

    def title(self) -> str:
        """What was compared."""
        options = self.options
        inside = {"published": "", "off": ", the script's autocast off"}[options.autocast]
        again = ", gradient checkpointing" * options.gradient_checkpointing
        again += ", fewstep compiled" * options.compile
        return (
            f"{options.size}, {options.resolution} px, batch {options.batch}, {options.precision}"
            f"{inside}, rank {options.rank}{again}"
        )


def machine(first: dict[str, Any]) -> dict[str, Any]:
    """What it ran on, and with what versions."""
    import torch

    on_gpu = torch.cuda.is_available()
    return {
        "device": torch.cuda.get_device_name() if on_gpu else platform.machine() + " CPU",
        "threads": first["threads"],
        "torch": torch.__version__,
        "diffusers": first["diffusers"],
        "python": platform.python_version(),
    }


def notes(options: argparse.Namespace, first: dict[str, Any]) -> list[str]:
    """What a reader must know beside the figures."""
    told = machine(first)
    lines = [
        f"{told['device']}, {told['threads']} threads, torch {told['torch']}, diffusers "
        f"{told['diffusers']}; {options.rounds} runs of {options.steps} counted steps each, "
        f"{options.warmup} before them; the script reads its pictures in a process of its own."
    ]
    if first["stand_in"]:
        lines.append(
            "torchvision is not installed: the script ran with a stand-in for the few functions "
            "that it calls."
        )
    return lines


if __name__ == "__main__":
    main()
