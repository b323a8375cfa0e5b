"""Server-sent events of jobs."""

from __future__ import annotations

import asyncio
import json
from collections.abc import AsyncGenerator, AsyncIterator
from typing import Any

from fastapi import Request
from starlette.responses import StreamingResponse
from starlette.types import Receive, Scope, Send

from .desk import Desk, Job
from .problems import known, told

# What OpenAPI says of each of them.
EVENTS: dict[str, Any] = {
    "text/event-stream": {
        "schema": {
            "type": "object",
            "properties": {"event": {"type": "string"}, "data": {"type": "string"}},
            "required": ["event", "data"],
        }
    }
}
QUIET = 15.0  # seconds after which a comment shows that the stream is alive


def event(name: str, data: dict[str, Any]) -> str:
    """One event of a stream."""
    return f"event: {name}\ndata: {json.dumps(data)}\n\n"


class EventStream(StreamingResponse):
    """A response of events; when it ends, however it ends, its jobs are given up."""

    media_type = "text/event-stream"

    def __init__(
        self, desk: Desk, request: Request, jobs: list[Job], events: AsyncGenerator[str, None]
    ) -> None:
        self.desk, self.request, self.jobs = desk, request, jobs
        headers = {"Cache-Control": "no-store", "X-Accel-Buffering": "no", **desk.headers}
        super().__init__(alive(guarded(request, events)), headers=headers)

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        async with self.desk.watched(self.request, self.jobs):
            await super().__call__(scope, receive, send)


async def guarded(request: Request, events: AsyncGenerator[str, None]) -> AsyncGenerator[str, None]:
    """The events, and an `error` in the place of what they raise."""
    try:
        async for text in events:
            yield text
    except Exception as error:
        request_id = request.scope["state"]["request_id"]
        shown = told(known(error, request_id), request_id, request.scope["path"])
        yield event("error", {"type": "error", **shown})
    finally:
        await events.aclose()


async def alive(events: AsyncGenerator[str, None]) -> AsyncIterator[str]:
    """The events, with comments where they take long."""
    coming = asyncio.ensure_future(anext(events))
    try:
        while True:
            done, _ = await asyncio.wait([coming], timeout=QUIET)
            if not done:
                yield ": still here\n\n"
                continue
            try:
                text = coming.result()
            except StopAsyncIteration:
                return
            yield text
            coming = asyncio.ensure_future(anext(events))
    finally:
        coming.cancel()
