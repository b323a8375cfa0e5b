"""Servers that the tests of faults ask: one with the embedded model, and one that only pretends."""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import replace

import pytest
from server.asked import Served, serving
from server.fake import FakeWorker

from fewstep import EMBEDDED
from fewstep.server.orders import Limits
from fewstep.server.worker import PipelineWorker

BLUEPRINT, EDGES = "fewstep-emoji-blueprint", "fewstep-emoji-edges"
MANY = Limits(requests_per_minute=1_000_000, waiting_per_client=64)


@pytest.fixture(scope="session")
def worker() -> PipelineWorker:
    """The embedded model with a LoRA and a control; no picture is answered from a cache."""
    made = PipelineWorker(EMBEDDED.name, MANY, loras=[BLUEPRINT], control=EDGES, picture_bytes=0)
    made.start()
    assert made.wait_until_ready(60)
    return made


@pytest.fixture(scope="session")
def real(worker: PipelineWorker) -> Iterator[Served]:
    """A server of the embedded model."""
    with serving(worker) as served:
        yield served


@pytest.fixture(scope="session")
def pretending() -> Iterator[Served]:
    """A server of a worker without a model, which all faults have to leave as it was."""
    worker = FakeWorker(replace(MANY, body_bytes=4 << 20))
    with serving(worker, body_seconds=1.0, head_seconds=1.0) as served:
        yield served


@pytest.fixture
def fake(pretending: Served) -> FakeWorker:
    """Its worker, to whom nobody has come."""
    found: FakeWorker = pretending.app.state.desk.worker
    found.orders.clear()
    found.tickets.clear()
    return found
