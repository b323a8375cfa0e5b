"""The native interface: one picture by `/v1/generate`, as events or as the file alone."""

from __future__ import annotations

from collections.abc import AsyncGenerator
from contextlib import aclosing
from typing import Any

from fastapi import APIRouter, Request
from pydantic import Field
from starlette.responses import Response

from .asking import OrderFields, order_of, read_json, validated
from .desk import Desk, Job, client_of, owner_of
from .orders import Drawn, Failed, Order, Queued, ServerError, Stepped
from .pictures import MEDIA, QUALITY, Format, packed
from .problems import responses
from .schemas import takes
from .streams import EVENTS, EventStream, event

KIND = "native"
STREAM = {
    "description": "Events `queued`, `step`, and then `picture` or `error`; or a file alone.",
    "content": {
        **EVENTS,
        **{media: {"schema": {"type": "string", "format": "binary"}} for media in MEDIA.values()},
    },
}


class Generate(OrderFields):
    """A picture, and the file it comes as."""

    format: Format = "png"
    quality: int = Field(QUALITY, ge=1, le=100, description="Of JPEG and WebP.")


async def order_from(desk: Desk, fields: OrderFields, client: str) -> Order:
    """The order that fields ask for, its pictures decoded."""
    names = ("image", "mask", "control")
    decoded = {name: await desk.picture(getattr(fields, name), name) for name in names}
    return order_of(fields, client, **decoded)


def routes(desk: Desk) -> APIRouter:
    """The routes."""
    router = APIRouter(tags=["fewstep"])

    @router.post(
        "/v1/generate",
        responses={**responses(400, 408, 409, 413, 415, 422, 504), 200: STREAM},
        openapi_extra=takes(Generate),
        response_class=Response,
    )
    async def generate(request: Request) -> Response:
        """Draw one picture. `Accept: image/*` gives the file alone."""
        fields = validated(Generate, await read_json(request))
        order = await order_from(desk, fields, client_of(request))
        job = desk.take(order, owner_of(request), KIND)
        accepted = request.headers.get("accept", "")
        if accepted.startswith("image/"):
            return await alone(desk, request, job, fields)
        return EventStream(desk, request, [job], events(desk, job, fields))

    @router.delete(
        "/v1/jobs/{id}", status_code=204, responses=responses(404, 422), response_class=Response
    )
    async def cancel(request: Request, id: str) -> Response:
        """Give up a job of this client, whose id its first event told."""
        job = desk.jobs.get(id)
        if job is None or job.order.client != client_of(request):
            raise ServerError("not_found", "there is no such job", hint="it may be done")
        job.ticket.cancel()
        return Response(status_code=204)

    return router


async def alone(desk: Desk, request: Request, job: Job, fields: Generate) -> Response:
    """The picture's file."""
    async with desk.watched(request, [job]):
        drawn = await desk.finish(job)
        wanted = request.headers["accept"].partition(";")[0].partition(",")[0].strip()
        format = next((f for f, media in MEDIA.items() if media == wanted), fields.format)
        data = await desk.file(drawn, format, fields.quality)  # type: ignore[arg-type]
    headers = {"X-Seed": str(job.order.seed), "X-Seconds": f"{drawn.seconds:.3f}"}
    return Response(data, media_type=MEDIA[format], headers=headers | desk.headers)


async def events(desk: Desk, job: Job, fields: Generate) -> AsyncGenerator[str, None]:
    """The events of a job; the first tells its id."""
    is_told = False
    async with aclosing(desk.follow(job)) as happenings:
        async for happened in happenings:
            if isinstance(happened, Queued) or not is_told:
                ahead = happened.ahead if isinstance(happened, Queued) else 0
                yield event("queued", {"id": job.id, "ahead": ahead})
                is_told = True
            if isinstance(happened, Stepped):
                yield event("step", await step(desk, happened))
            elif isinstance(happened, Drawn):
                yield event("picture", await picture(desk, job, happened, fields))
            elif isinstance(happened, Failed):
                raise happened.error


async def step(desk: Desk, happened: Stepped) -> dict[str, Any]:
    """What is told of a step."""
    found: dict[str, Any] = {"step": happened.step, "steps": happened.steps}
    if happened.preview is not None:
        found["preview"] = await desk.preview(happened.preview)
    return found


async def picture(desk: Desk, job: Job, drawn: Drawn, fields: Generate) -> dict[str, Any]:
    """What is told of a picture."""
    return {
        "id": job.id,
        "image": packed(await desk.file(drawn, fields.format, fields.quality)),
        "media_type": MEDIA[fields.format],
        "seed": job.order.seed,
        "record": drawn.record,
        "queue_ms": round(drawn.waited * 1000, 1),
        "draw_ms": round(drawn.seconds * 1000, 1),
        "cached": drawn.cached,
    }
