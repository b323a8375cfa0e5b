"""The whole server as an ASGI app."""

from __future__ import annotations

import asyncio
from collections.abc import AsyncIterator
from contextlib import asynccontextmanager

from fastapi import FastAPI

from .. import __version__
from . import a1111, live, native, openai_api, pages, problems, status
from .desk import Desk
from .guards import Guard
from .orders import Worker
from .schemas import describe
from .settings import Settings

DESCRIPTION = "Pictures by latent consistency models, in one to eight steps."
PUBLIC = frozenset({"/health"}) | pages.PUBLIC


def create_app(worker: Worker, settings: Settings | None = None) -> FastAPI:
    """The app of one worker, which it starts, and drains at the end."""
    desk = Desk(worker, (settings or Settings()).checked())

    @asynccontextmanager
    async def lifespan(_: FastAPI) -> AsyncIterator[None]:
        worker.observe = desk.metrics.observe  # type: ignore[attr-defined]
        worker.start()
        yield
        await asyncio.to_thread(worker.drain, desk.settings.drain_seconds)
        desk.close()

    app = FastAPI(
        title="fewstep",
        version=__version__,
        description=DESCRIPTION,
        lifespan=lifespan,
        docs_url=None,  # they load scripts of other hosts
        redoc_url=None,
        redirect_slashes=False,
    )
    app.state.desk = desk
    problems.install(app)
    for part in (native, openai_api, a1111, status):
        app.include_router(part.routes(desk))
    pages.mount(app)
    live.mount(app, desk)
    app.openapi = lambda: describe(app)  # type: ignore[method-assign]
    app.add_middleware(
        Guard,
        settings=desk.settings,
        limits=worker.limits,
        public=PUBLIC,
        observe=desk.metrics.request,
    )
    return app
