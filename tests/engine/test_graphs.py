"""Promises of the recorder: what is recorded, when it is used, and when it is dropped."""

from __future__ import annotations

import copy
import warnings
from collections.abc import Iterator
from typing import Any

import pytest
import torch
from torch import Tensor, nn
from traced import Traced

from fewstep.engine.graphs import Graphs
from fewstep.ops.layers import plain


@pytest.fixture(autouse=True)
def _plain() -> Iterator[None]:
    with plain(), torch.no_grad():
        yield


class Counting:
    """x w + b, and how often Python went through it."""

    def __init__(self) -> None:
        self.net = nn.Linear(3, 3)
        self.calls = 0

    def __call__(self, x: Tensor) -> Tensor:
        self.calls += 1
        return self.net(x)


@pytest.fixture
def f() -> Counting:
    torch.manual_seed(0)
    return Counting()


@pytest.fixture
def graphs() -> Graphs:
    return Graphs(Traced())


def x(seed: int, rows: int = 2, dtype: torch.dtype = torch.float32) -> Tensor:
    return torch.randn(rows, 3, generator=torch.Generator().manual_seed(seed)).to(dtype)


def run(graphs: Graphs, f: Counting, given: Tensor, key: Any = "k") -> Tensor:
    return graphs.run(f, [given], key, [f.net])


def test_the_first_call_is_eager_the_second_records_and_the_others_replay(
    graphs: Graphs, f: Counting
) -> None:
    for seed, made, replays in ((0, 0, 0), (1, 1, 1), (2, 1, 2), (3, 1, 3)):
        assert torch.equal(run(graphs, f, x(seed)), f.net(x(seed)))
        assert (graphs.recordings, graphs.replays, len(graphs)) == (made, replays, made)
    assert graphs.backend.warm_ups == 2  # type: ignore[attr-defined]
    assert f.calls == 3  # two to warm up, one to record


def test_an_output_stays_what_it_was_when_the_graph_runs_again(graphs: Graphs, f: Counting) -> None:
    outputs = [run(graphs, f, x(seed)) for seed in range(4)]
    assert all(torch.equal(o, f.net(x(seed))) for seed, o in enumerate(outputs))


def test_inputs_are_not_written_to_and_may_be_freed(graphs: Graphs, f: Counting) -> None:
    for seed in range(3):
        given = x(seed)
        run(graphs, f, given)
        assert torch.equal(given, x(seed))
        given.fill_(torch.nan)
    assert torch.equal(run(graphs, f, x(7)), f.net(x(7)))


@pytest.mark.parametrize(
    "other",
    [
        (x(0, rows=4), "k"),
        (x(0).T.contiguous().T, "k"),
        (x(0), "another"),
    ],
    ids=["shape", "strides", "key"],
)
def test_another_signature_has_a_graph_of_its_own(
    graphs: Graphs, f: Counting, other: tuple[Tensor, str]
) -> None:
    for _ in range(2):
        run(graphs, f, x(0))
        run(graphs, f, *other)
    assert graphs.recordings == len(graphs) == 2


def test_graphs_beyond_the_bound_go_oldest_first(f: Counting) -> None:
    graphs = Graphs(Traced(), most=2)
    for key in ("a", "a", "b", "b", "a", "c", "c"):
        run(graphs, f, x(0), key)
    assert (graphs.recordings, len(graphs)) == (3, 2)
    run(graphs, f, x(0), "a")  # used after b, so still there
    assert graphs.recordings == 3
    run(graphs, f, x(0), "b")
    run(graphs, f, x(0), "b")
    assert graphs.recordings == 4


def test_weights_that_change_in_place_take_effect_without_another_recording(
    graphs: Graphs, f: Counting
) -> None:
    run(graphs, f, x(0))
    before = run(graphs, f, x(0))
    f.net.weight.copy_(2 * f.net.weight)
    after = run(graphs, f, x(0))
    assert torch.equal(after, f.net(x(0))) and not torch.equal(after, before)
    assert graphs.recordings == 1


def moved(net: Any) -> None:
    net.weight.data = net.weight.data.clone() * 3


def replaced(net: Any) -> None:
    net.weight = nn.Parameter(net.weight * 3)


def cast(net: Any) -> None:
    net.weight.data, net.bias.data = net.weight.data.double(), net.bias.data.double()
    net.float()


@pytest.mark.parametrize("change", [moved, replaced, cast])
def test_weights_that_move_drop_the_graph(graphs: Graphs, f: Counting, change: Any) -> None:
    for key in ("a", "a", "b", "b"):
        run(graphs, f, x(0), key)
    kept = f.net.weight.data  # so that its address is not given away again
    change(f.net)
    assert torch.equal(run(graphs, f, x(0), "a"), f.net(x(0)))
    assert len(graphs) == 0, "all graphs of the network are stale"
    run(graphs, f, x(0), "a")
    assert torch.equal(run(graphs, f, x(1), "a"), f.net(x(1)))
    assert graphs.recordings == 3 and kept is not None


def test_a_module_that_is_replaced_drops_the_graph(graphs: Graphs) -> None:
    net = nn.Sequential(nn.Linear(3, 3), nn.ReLU())
    for _ in range(2):
        graphs.run(lambda v: net(v), [x(0)], "k", [net])
    net[1] = nn.Identity()
    assert torch.equal(graphs.run(lambda v: net(v), [x(0)], "k", [net]), net(x(0)))
    assert graphs.replays == 1


def test_another_network_is_another_signature(graphs: Graphs, f: Counting) -> None:
    for _ in range(2):
        run(graphs, f, x(0))
    other = Counting()
    assert torch.equal(run(graphs, other, x(0)), other.net(x(0)))


def test_a_failed_recording_runs_eagerly_for_good_and_is_reported_once(f: Counting) -> None:
    graphs = Graphs(Traced(fails="operation not permitted when stream is capturing\nand\nmore"))
    run(graphs, f, x(0))
    message = r"step by step: RuntimeError: operation not permitted when stream is capturing and$"
    with pytest.warns(UserWarning, match=message):
        assert torch.equal(run(graphs, f, x(1)), f.net(x(1)))
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        assert torch.equal(run(graphs, f, x(2)), f.net(x(2)))
    assert (graphs.recordings, graphs.replays, len(graphs)) == (0, 0, 0)


def test_a_function_that_asks_for_a_value_cannot_be_recorded(graphs: Graphs) -> None:
    def asks(v: Tensor) -> Tensor:
        return v * 2 if v.sum() > 0 else v

    graphs.run(asks, [x(0)], "k")
    with pytest.warns(UserWarning, match="cannot be recorded"):
        assert torch.equal(graphs.run(asks, [x(1)], "k"), asks(x(1)))


def test_an_error_of_the_first_call_is_the_callers(graphs: Graphs, f: Counting) -> None:
    with pytest.raises(RuntimeError, match="shapes cannot be multiplied"):
        run(graphs, f, torch.zeros(2, 4))


def test_dropped_graphs_and_copies_start_anew(graphs: Graphs, f: Counting) -> None:
    for _ in range(2):
        run(graphs, f, x(0))
    assert len(copy.deepcopy(graphs)) == 0
    graphs.drop()
    assert len(graphs) == 0
    assert torch.equal(run(graphs, f, x(1)), f.net(x(1)))
