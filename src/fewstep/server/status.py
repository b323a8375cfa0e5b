"""How a server is: alive, ready, how busy, what it takes."""

from __future__ import annotations

from dataclasses import asdict
from typing import Any

from fastapi import APIRouter
from prometheus_client import CONTENT_TYPE_LATEST
from pydantic import BaseModel
from starlette.responses import Response

from .desk import Desk
from .frames import model_of
from .problems import responses


class Alive(BaseModel):
    """The server answers."""

    status: str = "ok"


class Ready(BaseModel):
    """Pictures are drawn."""

    status: str = "ready"
    waiting: int
    running: int


class Limited(BaseModel):
    """What is taken, and by which model."""

    limits: dict[str, int | float]
    model: dict[str, Any]


def routes(desk: Desk) -> APIRouter:
    """The routes."""
    router = APIRouter(tags=["status"])

    @router.get("/health", responses={403: responses()[403]})
    async def health() -> Alive:
        """Whether the server answers. Needs no key."""
        return Alive()

    @router.get("/ready", responses=responses())
    async def ready() -> Ready:
        """Whether pictures are drawn; 503 while the model is loaded and at the end."""
        desk.check_ready()
        load = desk.worker.load()
        return Ready(waiting=load.waiting, running=load.running)

    @router.get("/v1/limits", responses=responses())
    async def limits() -> Limited:
        """What is taken, and the model's facts."""
        return Limited(limits=asdict(desk.limits), model=model_of(desk.facts))

    @router.get("/metrics", responses=responses(), response_class=Response)
    async def metrics() -> Response:
        """Prometheus' figures."""
        return Response(desk.metrics.text(), media_type=CONTENT_TYPE_LATEST)

    return router
