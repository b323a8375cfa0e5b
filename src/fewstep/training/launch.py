"""Several processes from one command: `NPROC_PER_NODE=8 fewstep train NAME`.

They are torchrun's, on this machine's part of a job. Who calls torchrun himself needs none of this.
"""

from __future__ import annotations

import logging
import sys
from collections.abc import Sequence
from dataclasses import dataclass

from ..errors import RequestError
from .environment import number, text

BAD_INPUT, TERMINATED = 2, 143  # exit statuses: of an error in a request; 128 + SIGTERM


@dataclass(frozen=True)
class Processes:
    """What the environment asks for, in diffengine's words."""

    per_node: int = 1  # NPROC_PER_NODE
    nodes: int = 1  # NNODES
    node: int = 0  # NODE_RANK
    address: str = "127.0.0.1"  # ADDR, of node 0
    port: int = 0  # PORT, on node 0; 0: any that is free

    @classmethod
    def of_environment(cls) -> Processes:
        """Raises RequestError for numbers that cannot be."""
        several = cls(
            per_node=number("NPROC_PER_NODE", 1),
            nodes=number("NNODES", 1),
            node=number("NODE_RANK", 0),
            address=text("ADDR", "127.0.0.1"),
            port=number("PORT", 0),
        )
        several.check()
        return several

    def check(self) -> None:
        if self.per_node < 1 or self.nodes < 1:
            raise RequestError(
                f"NPROC_PER_NODE={self.per_node} and NNODES={self.nodes} must be at least 1"
            )
        if not 0 <= self.node < self.nodes:
            raise RequestError(
                f"NODE_RANK={self.node} must lie in [0, {self.nodes - 1}], as NNODES={self.nodes}"
            )
        if self.nodes > 1 and not self.port:
            raise RequestError(
                f"NNODES={self.nodes} needs PORT, one that is free on the machine ADDR and the "
                "same in every command: PORT=29500, for example"
            )

    @property
    def count(self) -> int:
        """Of all nodes."""
        return self.nodes * self.per_node

    @property
    def torchrun(self) -> list[str]:
        """The options of torchrun."""
        shape = [f"--nnodes={self.nodes}", f"--nproc-per-node={self.per_node}"]
        if self.nodes == 1 and not self.port:
            return [*shape, "--standalone"]
        where = [f"--master-addr={self.address}", f"--master-port={self.port}"]
        return [*shape, f"--node-rank={self.node}", *where]


def wanted() -> Processes | None:
    """The processes to start; None if this is one of them, or if there is but one."""
    if text("WORLD_SIZE", "") or text("LOCAL_RANK", ""):
        return None
    several = Processes.of_environment()
    return several if several.count > 1 else None


def start(several: Processes, program: Sequence[str]) -> int:
    """Run a Python program (a file, or -m and a module; arguments) in every process; its status.

    If one process fails, the others are ended, and the status is that of the first to fail.
    """
    from torch.distributed.elastic.multiprocessing import SignalException
    from torch.distributed.elastic.multiprocessing.errors import ChildFailedError
    from torch.distributed.run import parse_args, run

    # What a process prints says what is wrong; torchrun's own account of it is long.
    logging.getLogger("torch.distributed").setLevel(logging.CRITICAL)
    try:
        run(parse_args([*several.torchrun, *program]))
    except SignalException as error:
        return 128 + int(error.sigval)
    except ChildFailedError as error:
        rank, failure = error.get_first_failure()
        status = failure.exitcode if failure.exitcode > 0 else 128 - failure.exitcode
        if status not in (BAD_INPUT, TERMINATED):  # they have said so themselves
            print(
                f"error: process {rank} ended with status {status} and the others were ended; the "
                "same command goes on from the last checkpoint",
                file=sys.stderr,
            )
        return status
    return 0
