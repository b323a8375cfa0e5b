"""Who does what: the positions of a batch, votes, and what the environment says."""

from __future__ import annotations

import pytest
import torch

from fewstep.errors import RequestError
from fewstep.training.environment import number
from fewstep.training.ranks import Ranks, joined


@pytest.mark.parametrize(("count", "parts"), [(1, 1), (1, 4), (2, 3), (6, 2), (3, 4)])
def test_the_parts_of_all_processes_are_the_batch_once(count: int, parts: int) -> None:
    several = [part for rank in range(count) for part in Ranks(rank, count).parts(12, parts)]
    assert [position for part in several for position in part] == list(range(12))
    assert len({len(part) for part in several}) == 1


@pytest.mark.parametrize(("batch", "parts"), [(0, 1), (5, 1), (4, 0), (4, 4)])
def test_a_batch_that_cannot_be_shared_evenly_is_refused(batch: int, parts: int) -> None:
    with pytest.raises(RequestError, match=f"run.batch={batch} must be a multiple of the 2"):
        Ranks(0, 2).check(batch, parts)


def test_one_process_alone_asks_nobody() -> None:
    with joined(torch.device("cpu")) as (ranks, device):
        assert (ranks, device.type) == (Ranks(), "cpu")
        assert ranks.any(True, False) == [True, False]
        assert ranks.mean(torch.tensor(3.0)) == 3
        ranks.wait()


def test_a_number_in_the_environment_that_is_none_is_named(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    monkeypatch.setenv("NPROC_PER_NODE", "all")
    with pytest.raises(RequestError, match="NPROC_PER_NODE='all' must be a whole number"):
        number("NPROC_PER_NODE", 1)
