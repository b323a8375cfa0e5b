"""Checkpoints of a run: parameters, their average, the optimizer's state and the step.

`checkpoint.safetensors` holds all of it. A run whose networks are spread over devices (`run.shard`)
writes a folder `checkpoint-STEP` on the way instead, in which each process has a safetensors file
of its shares, by torch.distributed.checkpoint; any number of processes, sharded or not, goes on
from either. Both are written beside and renamed: a run killed at any time goes on from the last.
"""

from __future__ import annotations

import os
import shutil
import warnings
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import torch
from safetensors import SafetensorError, safe_open
from safetensors.torch import save_file
from torch import Tensor, nn

from ..checkpoints.weights import read_tensors
from ..errors import CheckpointError
from .parallel import is_share, place, whole
from .ranks import Ranks

NAME = "checkpoint.safetensors"
FOLDERS = "checkpoint-[0-9]*[0-9]"  # of shares
Layout = dict[str, tuple[tuple[int, ...], torch.dtype]]  # of the stored tensors, by key


@dataclass(frozen=True, eq=False)
class State:
    """All that a run's next step depends on; `scaler` is float16's loss scaling."""

    named: Mapping[str, nn.Parameter]
    optimizer: torch.optim.Optimizer
    average: list[Tensor]
    kept: Mapping[str, nn.Module] = field(default_factory=dict)
    scaler: torch.amp.GradScaler | None = None
    ranks: Ranks = field(default_factory=Ranks)

    @property
    def is_sharded(self) -> bool:
        """Whether each process holds shares only."""
        return any(is_share(parameter) for parameter in self.named.values())

    def tensors(self) -> dict[str, Tensor]:
        """Every tensor by its key in a checkpoint."""
        tensors: dict[str, Tensor] = {}
        for (name, parameter), mean in zip(self.named.items(), self.average, strict=True):
            tensors[f"parameter/{name}"] = parameter.detach()
            tensors[f"average/{name}"] = mean
            for key, value in self.optimizer.state[parameter].items():
                tensors[f"optimizer/{key}/{name}"] = torch.as_tensor(value)
        for module, network in self.kept.items():
            for name, tensor in network.state_dict().items():
                tensors[f"kept/{module}.{name}"] = tensor.detach()
        if self.scaler is not None:
            for key, value in self.scaler.state_dict().items():
                tensors[f"scaler/{key}"] = torch.tensor(float(value))
        return tensors

    # ── writing ──

    def save(self, folder: Path, step: int) -> None:
        """Write everything that going on after `step` steps needs: all of it, or nothing.

        All processes must call it; the first one alone writes if nothing is sharded.
        """
        if self.is_sharded:
            self._save_shares(folder / f"checkpoint-{step:06d}", step)
        elif self.ranks.is_first:
            self._save_whole(folder, step, self.tensors())

    def save_whole(self, folder: Path, step: int) -> None:
        """The same as one file, also of a sharded run: at its end. All processes must call it."""
        tensors = {}
        for key, tensor in self.tensors().items():
            full = whole(tensor)
            if self.ranks.is_first:
                tensors[key] = full.cpu() if self.is_sharded else full
        if self.ranks.is_first:
            self._save_whole(folder, step, tensors)

    def _save_whole(self, folder: Path, step: int, tensors: Mapping[str, Tensor]) -> None:
        part = folder / f"{NAME}.part"
        tensors = {key: tensor.contiguous() for key, tensor in tensors.items()}
        with told(part, step):
            save_file(tensors, part, metadata={"step": str(step)})
            os.replace(part, folder / NAME)
        remove_others(folder, folder / NAME)

    def _save_shares(self, path: Path, step: int) -> None:
        import torch.distributed.checkpoint as dcp

        part = path.with_name("checkpoint.part")
        if self.ranks.is_first:
            remove(part)
            part.mkdir()
        self.ranks.wait()
        # This writer's files are safetensors; torch's usual ones hold pickles.
        writer = dcp.HuggingFaceStorageWriter(str(part), save_distributed=True)
        with told(part, step):
            dcp.save(dict(self.tensors()), storage_writer=writer)
            if self.ranks.is_first:
                os.replace(part, path)
        if self.ranks.is_first:
            remove_others(path.parent, path)

    # ── reading ──

    @torch.no_grad()
    def load(self, folder: Path) -> int:
        """Put the newest checkpoint's tensors in place; the number of steps done, 0 without one."""
        path, step = newest(folder)
        if path is None:
            return 0
        with readable(path):
            targets = self._targets(path, layout(path))
            fill(path, targets)
        if self.scaler is not None:
            stored: dict[str, Any] = {
                name: targets[f"scaler/{name}"].item() for name in self.scaler.state_dict()
            }
            stored["_growth_tracker"] = int(stored["_growth_tracker"])
            self.scaler.load_state_dict(stored)
        return step

    def _targets(self, path: Path, stored: Layout) -> dict[str, Tensor]:
        """What the stored tensors go into, by key; the optimizer gets moments to hold them."""
        targets = self.tensors()
        moments = {key: stored[key] for key in stored if key.startswith("optimizer/")}
        wanted = {key: tuple(tensor.shape) for key, tensor in targets.items()}
        there = {key: stored[key][0] for key in stored.keys() - moments.keys()}
        differ = {key for key, _ in wanted.items() ^ there.items()}
        if differ:
            raise CheckpointError(
                f"{path} belongs to other networks ({len(differ)} tensors differ, for example "
                f"{min(differ)}); use another folder, or delete it to start afresh"
            )
        for key, (shape, dtype) in moments.items():
            _, moment, name = key.split("/", 2)
            parameter = self.named[name].detach()
            value = torch.zeros(shape, dtype=dtype, device=parameter.device)
            if shape == parameter.shape:
                value = torch.zeros_like(parameter, dtype=dtype)
            self.optimizer.state[self.named[name]][moment] = targets[key] = value
        return targets


# ── files ──


@contextmanager
def told(part: Path, step: int) -> Iterator[None]:
    """Within this context a file that cannot be written is a CheckpointError, and removed."""
    try:
        yield
    except (OSError, SafetensorError) as error:
        remove(part)
        raise CheckpointError(
            f"{part}: the checkpoint of step {step} could not be written ({error}); the one before "
            "it is kept; make room and start again"
        ) from error


@contextmanager
def readable(path: Path) -> Iterator[None]:
    """Within this context a file that cannot be read is a CheckpointError."""
    try:
        yield
    except CheckpointError:
        raise
    except (OSError, SafetensorError) as error:
        raise CheckpointError(
            f"{path} cannot be read ({error}); put back a copy, or delete it to start afresh"
        ) from error


def newest(folder: Path) -> tuple[Path | None, int]:
    """The checkpoint of the most steps in a run's folder, and their number; (None, 0): none."""
    found: list[tuple[int, Path]] = []
    for path in folder.glob(FOLDERS):
        found.append((int(path.name.rpartition("-")[2]), path))
    path = folder / NAME
    if path.exists():
        with readable(path), safe_open(path, "pt") as file:
            found.append((int((file.metadata() or {}).get("step", 0)), path))
    if not found:
        return None, 0
    step, path = max(found)
    return path, step


def layout(path: Path) -> Layout:
    """The shape, in full, and the dtype of every tensor of a checkpoint."""
    if path.is_file():
        return {key: (tuple(each.shape), each.dtype) for key, each in read_tensors([path])}
    import torch.distributed.checkpoint as dcp

    stored: Mapping[str, Any] = (
        dcp.HuggingFaceStorageReader(str(path)).read_metadata().state_dict_metadata
    )
    return {key: (tuple(each.size), each.properties.dtype) for key, each in stored.items()}


def fill(path: Path, targets: Mapping[str, Tensor]) -> None:
    """Overwrite tensors, or this process's shares of them, by a checkpoint's of the same keys."""
    if path.is_file():
        for key, tensor in read_tensors([path]):
            if key in targets:
                place(targets[key], tensor)
        return
    import torch.distributed.checkpoint as dcp

    # Each process reads for itself: nobody waits for one that cannot.
    reader = dcp.HuggingFaceStorageReader(str(path))
    with warnings.catch_warnings():
        warnings.filterwarnings("ignore", "torch.distributed is disabled")
        dcp.load(dict(targets), storage_reader=reader, no_dist=True)


def remove(path: Path) -> None:
    """Delete a file or a folder, if it is there."""
    if path.is_dir():
        shutil.rmtree(path)
    path.unlink(missing_ok=True)


def remove_others(folder: Path, kept: Path) -> None:
    """Delete the checkpoints of a run's folder but one."""
    for path in (*folder.glob(FOLDERS), folder / NAME):
        if path != kept:
            remove(path)


def read_weights(place: Path, weights: str = "average") -> dict[str, Tensor]:
    """The averaged (`average`) or last (`parameter`) weights of a checkpoint, by name.

    `place` is a checkpoint, whole or of shares, or the folder of a run, whose newest is taken.
    """
    path = place if place.is_file() or place.match(FOLDERS) else newest(place)[0]
    if path is None:
        raise CheckpointError(f"{place} holds no checkpoint; run its recipe first")
    found = {k: v for k, v in layout(path).items() if k.startswith(f"{weights}/")}
    tensors = {key: torch.empty(shape, dtype=dtype) for key, (shape, dtype) in found.items()}
    fill(path, tensors)
    return {key.removeprefix(f"{weights}/"): tensor for key, tensor in tensors.items()}
