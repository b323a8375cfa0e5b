"""The processes of one evaluation: who draws what, and how their numbers come together.

A single process is the case of one rank. Under `torchrun` each rank draws every world-th chunk of
prompts and the sums are added over gloo on the CPU, whatever device draws.
"""

from __future__ import annotations

import os
from collections.abc import Sequence
from dataclasses import dataclass
from datetime import timedelta
from typing import TypeVar

import numpy as np
import torch

from fewstep.evaluation.moments import Moments

T = TypeVar("T")
_PATIENCE = timedelta(hours=12)  # a rank may wait for one that draws much longer


@dataclass(frozen=True)
class Ranks:
    """This process's place among `world` processes; `local` is its place on its machine."""

    rank: int = 0
    world: int = 1
    local: int = 0

    @classmethod
    def of_environment(cls) -> Ranks:
        """The place that torchrun gave this process, connected to the others; else the only one."""
        from torch import distributed

        rank, local = (int(os.environ.get(name, "0")) for name in ("RANK", "LOCAL_RANK"))
        world = cls.planned()
        if world > 1 and not distributed.is_initialized():
            distributed.init_process_group("gloo", timeout=_PATIENCE)
        return cls(rank, world, local)

    @staticmethod
    def planned() -> int:
        """How many processes torchrun started; 1 without it."""
        return int(os.environ.get("WORLD_SIZE", "1"))

    @property
    def is_first(self) -> bool:
        """Whether this process tells the results."""
        return self.rank == 0

    def mine(self, work: Sequence[T]) -> Sequence[T]:
        """This rank's share: every `world`-th piece."""
        return work[self.rank :: self.world]

    def summed(self, moments: Moments) -> Moments:
        """The moments over the rows of all ranks."""
        if self.world == 1:
            return moments
        count = self._summed(np.array([float(moments.count)]))
        return Moments(int(count[0]), self._summed(moments.total), self._summed(moments.outer))

    def gathered(self, rows: np.ndarray, index: np.ndarray) -> np.ndarray:
        """The float rows [N, D] of all ranks in the order of `index`, this rank's row numbers [n].

        Sorted, they do not depend on the number of ranks.
        """
        if self.world == 1:
            return rows[np.argsort(index)]
        # gloo takes arrays of one shape: the shorter ones are padded, marked by a number below 0.
        longest = int(self._most(len(rows)))
        padded = np.zeros((longest, 1 + rows.shape[1]))
        padded[:, 0] = -1
        padded[: len(rows)] = np.concatenate([index[:, None], rows], axis=1)
        everything = np.concatenate(self._all(padded))
        everything = everything[everything[:, 0] >= 0]
        return everything[np.argsort(everything[:, 0]), 1:].astype(rows.dtype)

    def close(self) -> None:
        """Leaves the group; the first rank's files are written by then."""
        from torch import distributed

        if self.world > 1 and distributed.is_initialized():
            distributed.barrier()
            distributed.destroy_process_group()

    def _summed(self, array: np.ndarray) -> np.ndarray:
        from torch import distributed

        summed = torch.from_numpy(array.copy())
        distributed.all_reduce(summed)
        return summed.numpy()

    def _most(self, number: int) -> int:
        from torch import distributed

        most = torch.tensor([number])
        distributed.all_reduce(most, distributed.ReduceOp.MAX)
        return int(most)

    def _all(self, array: np.ndarray) -> list[np.ndarray]:
        from torch import distributed

        mine = torch.from_numpy(array)
        everyones = [torch.empty_like(mine) for _ in range(self.world)]
        distributed.all_gather(everyones, mine)
        return [each.numpy() for each in everyones]
