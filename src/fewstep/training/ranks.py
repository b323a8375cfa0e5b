"""The processes of one run: which of them this is, and what they agree on.

torchrun or Ray start them and tell each its place in the environment. Without them there is one.
"""

from __future__ import annotations

import gc
import os
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from datetime import timedelta

import torch
import torch.distributed as dist
from torch import Tensor

from ..errors import RequestError
from .environment import number

# A process that dies ends the job at once, because its connections close. This is for one that
# hangs, or whose machine is gone; sheets and encoding of one process must be quicker.
PATIENCE = timedelta(hours=1)


@dataclass(frozen=True)
class Ranks:
    """This process is number `rank` of `count`, and number `local` on its machine."""

    rank: int = 0
    count: int = 1
    local: int = 0

    @property
    def is_first(self) -> bool:
        """Whether this process writes the files."""
        return self.rank == 0

    def parts(self, batch: int, parts: int) -> list[range]:
        """The positions in a batch that are this process's, in so many parts."""
        size = batch // (self.count * parts)
        start = self.rank * parts * size
        return [range(at, at + size) for at in range(start, start + parts * size, size)]

    def check(self, batch: int, parts: int) -> None:
        """Raises RequestError unless a batch can be shared evenly."""
        if parts < 1 or batch < 1 or batch % (self.count * parts):
            raise RequestError(
                f"run.batch={batch} must be a multiple of the {self.count} devices times "
                f"run.accumulate={parts}; run.batch counts the samples of all devices"
            )

    def mean(self, value: Tensor) -> Tensor:
        """The mean of a number over all processes, on its device."""
        if self.count > 1:
            dist.all_reduce(value)
            value = value / self.count
        return value

    def any(self, *said: bool) -> list[bool]:
        """For each of some questions, whether any process says yes; all processes must ask.

        It goes over the CPUs, so that none of them waits for its GPU.
        """
        if self.count == 1:
            return list(said)
        votes = torch.tensor(said, dtype=torch.int32)
        dist.all_reduce(votes, dist.ReduceOp.MAX)
        return [bool(vote) for vote in votes.tolist()]

    def wait(self) -> None:
        """Returns when all processes have come here."""
        self.any(False)

    @contextmanager
    def first_alone(self) -> Iterator[None]:
        """The first process runs this block before the others, which find what it has written."""
        if not self.is_first:
            self.wait()
        yield
        if self.is_first:
            self.wait()


@contextmanager
def joined(device: torch.device) -> Iterator[tuple[Ranks, torch.device]]:
    """The place of this process, connected with the others, and its own device.

    On CPUs the processes of one machine share its cores.
    """
    count, here = number("WORLD_SIZE", 1), number("LOCAL_WORLD_SIZE", 1)
    check_device(device)
    if count == 1:
        yield Ranks(), device
        return
    local = number("LOCAL_RANK", 0)
    if device.type == "cuda":
        check_devices(here)
        device = torch.device("cuda", local % torch.cuda.device_count())
        torch.cuda.set_device(device)
    else:
        torch.set_num_threads(max(1, (os.cpu_count() or 1) // here))
    connected = dist.is_initialized()  # by Ray
    if not connected:
        backend = "gloo" if device.type == "cpu" else "cpu:gloo,cuda:nccl"
        dist.init_process_group(backend, timeout=PATIENCE)
    yield Ranks(dist.get_rank(), dist.get_world_size(), local), device
    if not connected:  # after an error the process ends, and the others see it
        # What averages gradients holds on to the group, and a process that leaves before the others
        # may abort: one in four runs of two processes did.
        gc.collect()
        dist.barrier()
        dist.destroy_process_group()


def check_device(device: torch.device) -> None:
    """Raises RequestError for a GPU that this machine does not have."""
    count = torch.cuda.device_count()
    if device.type == "cuda" and (device.index or 0) >= count:
        raise RequestError(
            f"run.device={str(device)!r} is not on this machine, which has {count} GPUs; set "
            "run.device=auto"
        )


def check_devices(processes: int) -> None:
    """Raises RequestError if a machine has fewer GPUs than processes."""
    if processes > torch.cuda.device_count() > 1:
        raise RequestError(
            f"NPROC_PER_NODE={processes}: this machine has {torch.cuda.device_count()} GPUs; start "
            "at most one process for each"
        )
