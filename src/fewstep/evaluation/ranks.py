"""The processes of one evaluation: who draws what, and how their numbers come together.

A single process is the case of one rank. Under `torchrun` each rank draws every count-th chunk of
prompts and the sums are added over gloo on the CPU, whatever device draws.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from datetime import timedelta
from typing import TypeVar

import numpy as np
import torch
import torch.distributed as dist

from fewstep.evaluation.moments import Moments
from fewstep.training import ranks
from fewstep.training.environment import number

T = TypeVar("T")
_PATIENCE = timedelta(hours=12)  # a rank may wait for one that draws much longer


@dataclass(frozen=True)
class Ranks(ranks.Ranks):
    """This process's place, and what it does with the numbers of all."""

    @classmethod
    def of_environment(cls) -> Ranks:
        """The place that torchrun gave this process, connected to the others; else the only one."""
        count = cls.planned()
        if count > 1 and not dist.is_initialized():
            dist.init_process_group("gloo", timeout=_PATIENCE)
        return cls(number("RANK", 0), count, number("LOCAL_RANK", 0))

    @staticmethod
    def planned() -> int:
        """How many processes torchrun started; 1 without it."""
        return number("WORLD_SIZE", 1)

    def mine(self, work: Sequence[T]) -> Sequence[T]:
        """This rank's share: every `count`-th piece."""
        return work[self.rank :: self.count]

    def summed(self, moments: Moments) -> Moments:
        """The moments over the rows of all ranks."""
        if self.count == 1:
            return moments
        count = self._summed(np.array([float(moments.count)]))
        return Moments(int(count[0]), self._summed(moments.total), self._summed(moments.outer))

    def gathered(self, rows: np.ndarray, index: np.ndarray) -> np.ndarray:
        """The float rows [N, D] of all ranks in the order of `index`, this rank's row numbers [n].

        Sorted, they do not depend on the number of ranks.
        """
        if self.count == 1:
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
        if self.count > 1 and dist.is_initialized():
            dist.barrier()
            dist.destroy_process_group()

    def _summed(self, array: np.ndarray) -> np.ndarray:
        summed = torch.from_numpy(array.copy())
        dist.all_reduce(summed)
        return summed.numpy()

    def _most(self, number: int) -> int:
        most = torch.tensor([number])
        dist.all_reduce(most, dist.ReduceOp.MAX)
        return int(most)

    def _all(self, array: np.ndarray) -> list[np.ndarray]:
        mine = torch.from_numpy(array)
        everyones = [torch.empty_like(mine) for _ in range(self.count)]
        dist.all_gather(everyones, mine)
        return [each.numpy() for each in everyones]
