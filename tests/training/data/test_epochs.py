"""Which rows make up a batch: once an epoch, of one shape, none lost, a function of the step."""

from __future__ import annotations

from collections import Counter

import numpy as np
import pytest

from fewstep.training.data.epochs import Epochs

GROUPS = [np.arange(0, 7), np.arange(7, 10), np.arange(10, 31)]


@pytest.mark.parametrize("batch", [4, 12, 25])
def test_one_group_gives_each_row_once_an_epoch_in_a_new_order(batch: int) -> None:
    epochs = Epochs([np.arange(12)], seed=4)
    rows = np.concatenate([epochs.rows(step, batch) for step in range(12)])
    orders = [np.random.default_rng([4, epoch]).permutation(12) for epoch in range(batch)]
    np.testing.assert_array_equal(rows, np.concatenate(orders))


@pytest.mark.parametrize("batch", [1, 4, 8, 40])
def test_batches_have_one_group_and_every_row_comes_equally_often(batch: int) -> None:
    epochs = Epochs(GROUPS, seed=0)
    count = len(np.concatenate(GROUPS))
    seen: Counter[int] = Counter()
    steps = 12 * count // batch
    for step in range(steps):
        rows = epochs.rows(step, batch)
        assert len(rows) == batch
        assert len({next(g for g, group in enumerate(GROUPS) if row in group) for row in rows}) == 1
        seen.update(rows.tolist())
    # Leftovers wait for the next batch of their group, so at most a batch is outstanding.
    for group in GROUPS:
        times = [seen[row] for row in group.tolist()]
        assert max(times) - min(times) <= 1
        assert abs(min(times) - 12) <= 2 + batch // len(group)


def test_a_step_has_the_same_rows_whatever_was_asked_before() -> None:
    in_order = [Epochs(GROUPS, seed=1).rows(step, 4) for step in range(30)]
    one = Epochs(GROUPS, seed=1)
    for step in (29, 3, 17, 3, 0):
        np.testing.assert_array_equal(one.rows(step, 4), in_order[step])


def test_orders_differ_between_epochs_and_seeds() -> None:
    epochs = Epochs([np.arange(64)], seed=1)
    first, second = epochs.rows(0, 64), epochs.rows(1, 64)
    assert sorted(first) == sorted(second) == list(range(64))
    assert (first != second).any()
    assert (Epochs([np.arange(64)], seed=2).rows(0, 64) != first).any()


def test_groups_are_mixed_within_an_epoch() -> None:
    epochs = Epochs([np.arange(0, 40), np.arange(40, 80)], seed=0)
    kinds = [int(epochs.rows(step, 4)[0] >= 40) for step in range(20)]
    assert sum(kinds) == 10
    assert kinds != sorted(kinds) and kinds != sorted(kinds, reverse=True)
