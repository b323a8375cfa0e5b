"""The images API of OpenAI: `/v1/images/generations`, `/v1/images/edits` and `/v1/models`.

Beyond its fields there are `seed`, `steps`, `guidance_scale`, `negative_prompt`, of generations
`loras` and of edits `strength`; the official client sends them by `extra_body`.
"""

from __future__ import annotations

import asyncio
import re
import time
from collections.abc import AsyncGenerator
from contextlib import aclosing
from dataclasses import replace
from typing import Any, Literal

import PIL.Image
from fastapi import APIRouter, Request
from pydantic import BaseModel, Field
from starlette.responses import Response

from . import pictures
from .asking import Fields, Lora, copies, read_form, read_json, some_seed, validated
from .desk import Desk, Job, client_of, owner_of
from .orders import Drawn, Failed, ModelFacts, Order, ServerError, Stepped
from .pictures import MEDIA, Format
from .problems import did_you_mean, invalid, responses
from .schemas import takes
from .streams import EVENTS, EventStream, event

KIND = "openai"
SIZE = re.compile(r"([0-9]{1,5})x([0-9]{1,5})")
BEGAN = int(time.time())
USAGE = {
    "input_tokens": 0,
    "output_tokens": 0,
    "total_tokens": 0,
    "input_tokens_details": {"image_tokens": 0, "text_tokens": 0},
}
FILES = ("image", "image[]", "mask")


class Images(Fields):
    """What generations and edits have in common."""

    prompt: str = Field(min_length=1)
    model: str | None = Field(None, description="The one of /v1/models.")
    n: int = Field(1, ge=1, le=10)
    size: str = Field("auto", description="WIDTHxHEIGHT; auto is the model's own.")
    quality: Literal["auto", "low", "medium", "standard", "high", "hd", "xhigh", "max"] = Field(
        "auto", description="If no steps are given: low half of the usual, high and above twice."
    )
    background: Literal["auto", "opaque"] = "auto"
    moderation: Literal["auto", "low"] = Field("auto", description="Nothing is moderated.")
    response_format: Literal["b64_json", "url"] = "b64_json"
    output_format: Format = "png"
    output_compression: int | None = Field(None, ge=0, le=100, description="JPEG and WebP.")
    stream: bool = False
    partial_images: int = Field(0, ge=0, le=3)
    user: str | None = Field(None, description="Not kept.")
    seed: int | None = Field(None, description="Of the first picture; the others count on.")
    steps: int | None = None
    guidance_scale: float | None = None
    negative_prompt: str | None = None


class Generations(Images):
    """A call of `images.generate`."""

    loras: list[Lora] = Field([], max_length=16)


class Edits(Images):
    """A call of `images.edit`."""

    strength: float | None = Field(None, description="0 to 1: how much changes.")


class Image(BaseModel):
    """A picture."""

    b64_json: str | None = None
    url: str | None = None
    seed: int


class ImagesResponse(BaseModel):
    """Pictures."""

    created: int
    data: list[Image]
    background: str = "opaque"
    output_format: str
    quality: str
    size: str
    usage: dict[str, Any] = USAGE


class ModelEntry(BaseModel):
    """A model."""

    id: str
    object: str = "model"
    created: int = BEGAN
    owned_by: str = "fewstep"


class ModelList(BaseModel):
    """The models."""

    object: str = "list"
    data: list[ModelEntry]


def routes(desk: Desk) -> APIRouter:
    """The routes."""
    router = APIRouter(tags=["OpenAI"])
    errors = responses(400, 404, 408, 409, 413, 415, 422, 504)
    pictured: dict[str, Any] = {
        "response_model": ImagesResponse,
        "response_model_exclude_none": True,
        "responses": {**errors, 200: {"description": "Pictures, or events.", "content": EVENTS}},
    }

    @router.post("/v1/images/generations", openapi_extra=takes(Generations), **pictured)
    async def generations(request: Request, response: Response) -> Any:
        """Draw pictures of a prompt."""
        asked = validated(Generations, await read_json(request))
        order = order_of(asked, desk.facts, client_of(request))
        loras = tuple((lora.id, lora.weight) for lora in asked.loras)
        response.headers.update(desk.headers)
        return await drawn(desk, request, asked, replace(order, loras=loras), "image_generation")

    @router.post(
        "/v1/images/edits",
        openapi_extra=takes(Edits, {"image": True, "mask": False}),
        **pictured,
    )
    async def edits(request: Request, response: Response) -> Any:
        """Draw a picture anew, where its mask is transparent or everywhere."""
        form = await read_form(request, desk.limits.body_bytes, FILES)
        image, mask = take_pictures(form)
        asked = validated(Edits, form, strict=False)
        order = order_of(asked, desk.facts, client_of(request))
        start = await desk.aside(started, image, mask, desk)
        order = replace(order, image=start[0], mask=start[1], strength=asked.strength)
        response.headers.update(desk.headers)
        return await drawn(desk, request, asked, order, "image_edit")

    @router.get(
        "/v1/images/files/{id}", responses=responses(404, 422), response_class=Response, name="file"
    )
    async def file(id: str) -> Response:
        """A picture that was answered by its address, for a while."""
        found = desk.files.get(id)
        if found is None:
            raise ServerError("not_found", "there is no such picture", hint="they are kept a while")
        return Response(found.data, media_type=found.media)

    @router.get("/v1/models", responses=responses())
    async def models() -> ModelList:
        """The model that draws."""
        return ModelList(data=[ModelEntry(id=desk.facts.id)])

    @router.get("/v1/models/{id:path}", responses=responses(404, 422))
    async def model(id: str) -> ModelEntry:
        """One model."""
        check_model(id, desk.facts)
        return ModelEntry(id=id)

    return router


# ── from their fields to ours ──


def check_model(name: str | None, facts: ModelFacts) -> None:
    """Raises ServerError for a model that is not the loaded one."""
    if name is not None and name != facts.id:
        hint = did_you_mean(name, [facts.id])
        raise ServerError("model_not_found", "this model is not here", param="model", hint=hint)


def order_of(asked: Images, facts: ModelFacts, client: str) -> Order:
    """The order of the first picture."""
    check_model(asked.model, facts)
    if asked.output_compression is not None and asked.output_format == "png":
        raise invalid("PNG has no compression to choose", "output_compression", "ask for jpeg")
    if asked.stream and asked.n > 1:
        raise invalid("a stream has one picture", "n", "send one request for each")
    if asked.stream and asked.response_format == "url":
        raise invalid("a stream has no addresses", "response_format", "ask for b64_json")
    if asked.partial_images and not asked.stream:
        raise invalid("partial images come by a stream", "partial_images", "set stream to true")
    width, height = size_of(asked.size)
    return Order(
        asked.prompt,
        negative_prompt=asked.negative_prompt,
        seed=some_seed() if asked.seed is None else asked.seed,
        steps=steps_of(asked, facts),
        guidance_scale=asked.guidance_scale,
        width=width,
        height=height,
        previews=asked.partial_images > 0,
        client=client,
    )


def size_of(text: str) -> tuple[int, int] | tuple[None, None]:
    """Width and height; Nones leave them to the model."""
    if text == "auto":
        return (None, None)
    found = SIZE.fullmatch(text)
    if found is None:
        raise invalid("size is no size", "size", "give WIDTHxHEIGHT, such as 512x512, or auto")
    return (int(found[1]), int(found[2]))


def steps_of(asked: Images, facts: ModelFacts) -> int | None:
    """The number of steps that are asked for, or that a quality stands for."""
    least, most, usual = facts.steps
    if asked.steps is not None or asked.quality in ("auto", "medium", "standard"):
        return asked.steps
    return max(least, usual // 2) if asked.quality == "low" else min(most, usual * 2)


def take_pictures(form: dict[str, Any]) -> tuple[bytes, bytes | None]:
    """The files of a form, which are taken out of it."""
    images = [*form.pop("image[]", ())]
    if "image" in form:
        images.append(form.pop("image"))
    if len(images) != 1 or not isinstance(images[0], bytes):
        raise invalid(f"one image is edited at a time, got {len(images)}", "image")
    return images[0], form.pop("mask", None)


def started(
    image: bytes, mask: bytes | None, desk: Desk
) -> tuple[PIL.Image.Image, PIL.Image.Image | None]:
    """The picture to start from, and what is drawn anew of it: all that is transparent."""
    found = pictures.decode(image, "image", desk.limits)
    if mask is None:
        drawn_anew = edited(found)
    else:
        given = pictures.decode(mask, "mask", desk.limits)
        if given.mode != "RGBA":
            hint = "send a PNG with an alpha channel"
            raise invalid("the mask is nowhere transparent", "mask", hint)
        drawn_anew = edited(given) or PIL.Image.new("L", given.size, 0)
    start = pictures.flat(found)
    for picture in (start, drawn_anew):
        if picture is not None:
            desk.held.keep(picture)
    return start, drawn_anew


def edited(picture: PIL.Image.Image) -> PIL.Image.Image | None:
    """White where a picture is fully transparent, or None if it is nowhere."""
    if picture.mode != "RGBA":
        return None
    mask = picture.getchannel("A").point(lambda alpha: 255 * (alpha == 0))
    return mask if mask.getbbox() else None


# ── from our pictures to their answers ──


async def drawn(desk: Desk, request: Request, asked: Images, first: Order, name: str) -> Any:
    """The answer to a call: pictures, or a stream of events that begin with `name`."""
    orders = copies(first, asked.n, desk.limits)
    jobs = desk.take_all(orders, owner_of(request), KIND)
    if asked.stream:
        return EventStream(desk, request, jobs, streamed(desk, jobs[0], asked, name))
    async with desk.watched(request, jobs):
        results = await asyncio.gather(*(desk.finish(job) for job in jobs))
        files = [await encoded(desk, result, asked) for result in results]
    data = [
        entry(desk, request, asked, file, job.order.seed)
        for file, job in zip(files, jobs, strict=True)
    ]
    return ImagesResponse(data=data, **about(asked, results[0].image))


async def encoded(desk: Desk, result: Drawn, asked: Images) -> bytes:
    """A picture as the file that was asked for."""
    quality = 100 if asked.output_compression is None else asked.output_compression
    return await desk.file(result, asked.output_format, quality)


def entry(desk: Desk, request: Request, asked: Images, file: bytes, seed: int) -> Image:
    """A picture, or where it is."""
    if asked.response_format == "b64_json":
        return Image(b64_json=pictures.packed(file), seed=seed)
    name = desk.files.put(file, MEDIA[asked.output_format])
    return Image(url=str(request.url_for("file", id=name)), seed=seed)


def about(asked: Images, image: PIL.Image.Image) -> dict[str, Any]:
    """What is told beside a picture."""
    return {
        "created": int(time.time()),
        "background": "opaque",
        "output_format": asked.output_format,
        "quality": asked.quality,
        "size": f"{image.width}x{image.height}",
    }


async def streamed(desk: Desk, job: Job, asked: Images, name: str) -> AsyncGenerator[str, None]:
    """The events of a call: partial pictures, and the whole one."""
    sent = 0
    async with aclosing(desk.follow(job)) as happenings:
        async for happened in happenings:
            if isinstance(happened, Stepped) and is_due(happened, sent, asked.partial_images):
                shown = await desk.aside(
                    pictures.encode, happened.preview, asked.output_format, None
                )
                told = framed(f"{name}.partial_image", shown, asked, happened.preview)
                yield event(told["type"], told | {"partial_image_index": sent})
                sent += 1
            elif isinstance(happened, Drawn):
                whole = await encoded(desk, happened, asked)
                told = framed(f"{name}.completed", whole, asked, happened.image)
                yield event(told["type"], told | {"usage": USAGE, "seed": job.order.seed})
            elif isinstance(happened, Failed):
                raise happened.error


def is_due(happened: Stepped, sent: int, wanted: int) -> bool:
    """Whether the picture of a step is the next partial one: they are spread over the steps."""
    due = (sent + 1) * happened.steps / (wanted + 1)
    is_partial = happened.preview is not None and happened.step < happened.steps
    return is_partial and sent < wanted and happened.step >= int(due)


def framed(kind: str, file: bytes, asked: Images, image: Any) -> dict[str, Any]:
    """The fields of an event that holds a picture."""
    found = about(asked, image)
    return {
        "type": kind,
        "b64_json": pictures.packed(file),
        "created_at": found.pop("created"),
        **found,
    }
