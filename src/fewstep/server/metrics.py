"""Prometheus' view of a server: what it answered, how long things took, how busy it is."""

from __future__ import annotations

from collections.abc import Iterator
from typing import Any

from prometheus_client import (
    CollectorRegistry,
    Counter,
    Histogram,
    ProcessCollector,
    generate_latest,
)
from prometheus_client.core import CounterMetricFamily, GaugeMetricFamily
from starlette.types import Scope

from .orders import Drawn, Event, Failed, Started, Stepped, Worker

SECONDS = (0.005, 0.01, 0.02, 0.05, 0.1, 0.2, 0.5, 1, 2, 5, 10, 30, 60, 300)
STAGES = 32  # names that a worker may measure under


class Busy:
    """A worker's load at the time of a scrape."""

    def __init__(self, worker: Worker) -> None:
        self.worker = worker

    def describe(self) -> list[Any]:
        """Nothing ahead: a worker that is loading has no load."""
        return []

    def collect(self) -> Iterator[Any]:
        """Prometheus' metrics."""
        is_ready = self.worker.is_ready
        yield GaugeMetricFamily("fewstep_ready", "Whether pictures are drawn", int(is_ready))
        if not is_ready:
            return
        load = self.worker.load()
        gauge, counter = GaugeMetricFamily, CounterMetricFamily
        yield gauge("fewstep_waiting", "Pictures in the line", load.waiting)
        yield gauge("fewstep_running", "Pictures being drawn", load.running)
        yield gauge("fewstep_step_seconds", "A step, of late", load.seconds_per_step or 0.0)
        yield counter("fewstep_drawn", "Pictures drawn", load.drawn)
        yield counter("fewstep_failed", "Pictures that failed", load.failed)
        yield counter("fewstep_cancelled", "Pictures given up", load.cancelled)
        yield counter("fewstep_batches", "Network calls", load.batches)
        yield counter("fewstep_rows", "Pictures in them, added up", load.rows)


class Metrics:
    """All figures of one app, in a registry of its own."""

    def __init__(self, worker: Worker) -> None:
        self.registry = own = CollectorRegistry(auto_describe=False)
        own.register(Busy(worker))
        ProcessCollector(registry=own)  # memory, open files, time
        self.errors = Counter("fewstep_errors", "Answers that are errors", ["code"], registry=own)
        self.failures = Counter(
            "fewstep_pictures_failed", "Pictures that were not drawn", ["code"], registry=own
        )
        self.requests = Histogram(
            "fewstep_request_seconds",
            "Requests",
            ["route", "status"],
            buckets=SECONDS,
            registry=own,
        )
        self.steps = Counter("fewstep_steps", "Steps taken", registry=own)
        self.queued = Histogram(
            "fewstep_queue_seconds", "In the line", buckets=SECONDS, registry=own
        )
        self.drawing = Histogram(
            "fewstep_picture_seconds",
            "From the first step to the picture",
            buckets=SECONDS,
            registry=own,
        )
        self.stages = Histogram(
            "fewstep_worker", "What the worker measured", ["stage"], buckets=SECONDS, registry=own
        )
        self.seen: set[str] = set()

    def observe(self, stage: str, value: float) -> None:
        """A figure of the worker's; for its attribute `observe`."""
        if stage in self.seen or len(self.seen) < STAGES:
            self.seen.add(stage)
            self.stages.labels(stage).observe(value)

    def event(self, event: Event) -> None:
        """Count what became of an order."""
        if isinstance(event, Started):
            self.queued.observe(event.waited)
        elif isinstance(event, Stepped):
            self.steps.inc()
        elif isinstance(event, Drawn):
            self.drawing.observe(event.seconds)
        elif isinstance(event, Failed):
            self.failures.labels(event.error.code).inc()

    def request(self, scope: Scope, status: int, code: str | None, seconds: float) -> None:
        """Count an answer, by its route's path, of which there are few."""
        route = getattr(scope.get("route"), "path", "none")
        if scope["type"] == "http":
            self.requests.labels(route, str(status)).observe(seconds)
        if code is not None:
            self.errors.labels(code).inc()

    def text(self) -> bytes:
        """Everything in Prometheus' text format."""
        return generate_latest(self.registry)
