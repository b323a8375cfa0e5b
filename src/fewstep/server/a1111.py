"""The API of AUTOMATIC1111's web UI, as far as a server of one model has it."""

from __future__ import annotations

import asyncio
import json
import time
from collections import OrderedDict
from dataclasses import replace
from typing import Any, Literal

import PIL.Image
import PIL.ImageOps
from fastapi import APIRouter, Request
from pydantic import BaseModel, Field
from starlette.responses import Response

from .. import metadata
from . import pictures
from .a1111_fields import Img2Img, Txt2Img, loras_of, without_idle
from .asking import Fields, copies, read_json, some_seed, validated
from .desk import Desk, Job, client_of, owner_of
from .orders import Drawn, Limits, ModelFacts, Order
from .problems import did_you_mean, invalid, responses
from .schemas import takes

KIND = "a1111"
OWNERS = 1024  # whose options are kept


class Options(Fields):
    """What each client can set."""

    sd_model_checkpoint: str | None = Field(
        default=None, description="The one of /sdapi/v1/sd-models."
    )
    samples_format: Literal["png", "jpg", "jpeg", "webp"] = "png"
    jpeg_quality: int = Field(default=pictures.QUALITY, ge=1, le=100)
    live_previews_enable: bool = Field(
        default=True, description="Whether `progress` shows the picture."
    )


class PngInfo(Fields):
    """A picture to read the settings of."""

    image: str


class Answer(BaseModel):
    """Pictures in base64, what was asked, and how they were drawn as a JSON string."""

    images: list[str]
    parameters: dict[str, Any]
    info: str


class State(BaseModel):
    """Where a client's jobs are."""

    skipped: bool = False
    interrupted: bool = False
    job: str = ""
    job_count: int = 0
    job_timestamp: str = "0"
    job_no: int = 0
    sampling_step: int = 0
    sampling_steps: int = 0


class Progress(BaseModel):
    """How far a client's jobs are."""

    progress: float
    eta_relative: float
    state: State
    current_image: str | None = None
    textinfo: str | None = None


class Kept:
    """The options of the clients that were here last."""

    def __init__(self) -> None:
        self.options: OrderedDict[str, Options] = OrderedDict()

    def of(self, owner: str) -> Options:
        """A client's options."""
        return self.options.get(owner, Options())

    def put(self, owner: str, options: Options) -> None:
        """Keep a client's options."""
        self.options[owner] = options
        self.options.move_to_end(owner)
        if len(self.options) > OWNERS:
            self.options.popitem(last=False)


def sampler_of(facts: ModelFacts) -> str:
    """The name of the one sampler that the model has."""
    return str(facts.extra.get("scheduler", "LCMScheduler")).removesuffix("Scheduler")


def routes(desk: Desk) -> APIRouter:
    """The routes."""
    router, kept = APIRouter(prefix="/sdapi/v1", tags=["A1111"]), Kept()
    errors = responses(400, 408, 409, 413, 415, 422, 504)

    @router.post("/txt2img", responses=errors, openapi_extra=takes(Txt2Img))
    async def txt2img(request: Request, response: Response) -> Answer:
        """Draw pictures of a prompt."""
        given = await read_json(request)
        fields = validated(Txt2Img, without_idle(given, Txt2Img))
        first = order_of(fields, desk, client_of(request))
        response.headers.update(desk.headers)
        return await drawn(desk, request, kept, fields, first)

    @router.post("/img2img", responses=errors, openapi_extra=takes(Img2Img))
    async def img2img(request: Request, response: Response) -> Answer:
        """Draw pictures from another."""
        given = await read_json(request)
        fields = validated(Img2Img, without_idle(given, Img2Img))
        first = order_of(fields, desk, client_of(request)).checked(desk.limits)
        first = replace(first, strength=fields.denoising_strength)
        first = await with_pictures(desk, first, fields)
        response.headers.update(desk.headers)
        return await drawn(desk, request, kept, fields, first)

    @router.get("/progress", responses=responses(422))
    async def progress(request: Request, skip_current_image: bool = False) -> Progress:
        """How far this client's jobs are."""
        owner = owner_of(request)
        jobs = [job for job in desk.jobs.values() if (job.owner, job.kind) == (owner, KIND)]
        found = state_of(desk, jobs)
        shown = next((job.preview for job in jobs if job.preview is not None), None)
        if shown is not None and not skip_current_image:
            found.current_image = await desk.preview(shown, "png")
        return found

    @router.post("/interrupt", responses=responses())
    async def interrupt(request: Request) -> dict[str, Any]:
        """Give up this client's jobs, and nobody else's."""
        desk.cancel(owner_of(request), KIND)
        return {}

    @router.get("/options", responses=responses())
    async def options(request: Request) -> Options:
        """This client's options."""
        return kept.of(owner_of(request)).model_copy(update={"sd_model_checkpoint": desk.facts.id})

    @router.post("/options", responses=responses(400, 413, 415, 422), openapi_extra=takes(Options))
    async def set_options(request: Request) -> dict[str, Any]:
        """Change this client's options."""
        owner = owner_of(request)
        kept.put(owner, changed(kept.of(owner), await read_json(request), desk.facts))
        return {}

    @router.get("/sd-models", responses=responses())
    async def sd_models() -> list[dict[str, Any]]:
        """The model."""
        name = desk.facts.id
        nothing = {"hash": None, "sha256": None, "config": None}
        return [{"title": name, "model_name": name, "filename": name, **nothing}]

    @router.get("/samplers", responses=responses())
    async def samplers() -> list[dict[str, Any]]:
        """The one sampler."""
        return [{"name": sampler_of(desk.facts), "aliases": [], "options": {}}]

    @router.get("/loras", responses=responses())
    async def loras() -> list[dict[str, Any]]:
        """The LoRAs that the server has loaded; in a prompt: `<lora:name:weight>`."""
        return [
            {"name": name, "alias": shown, "path": name, "metadata": {}}
            for name, shown in desk.facts.loras
        ]

    @router.post("/png-info", responses=errors, openapi_extra=takes(PngInfo))
    async def png_info(request: Request) -> dict[str, Any]:
        """The settings that a picture holds."""
        fields = validated(PngInfo, await read_json(request))
        data = await desk.bytes_of(fields.image, "image")
        return await desk.aside(settings_in, data, desk.limits)

    return router


# ── from their fields to ours ──


def order_of(fields: Txt2Img, desk: Desk, client: str) -> Order:
    """The order of the first picture."""
    facts = desk.facts
    if fields.save_images:
        raise invalid("nothing is saved here", "save_images", "send false")
    sampler = fields.sampler_name or fields.sampler_index
    if sampler not in (None, "Automatic", sampler_of(facts)):
        hint = f"this model has {sampler_of(facts)}"
        raise invalid(f"there is no sampler {sampler[:64]!r} here", "sampler_name", hint)
    Order(fields.prompt).checked(desk.limits)  # before it is searched
    prompt, named = loras_of(fields.prompt)
    return Order(
        prompt,
        negative_prompt=fields.negative_prompt or None,
        seed=some_seed() if fields.seed == -1 else fields.seed,
        steps=fields.steps,
        guidance_scale=fields.cfg_scale,
        width=fields.width,
        height=fields.height,
        loras=tuple((id_of(name, facts), weight) for name, weight in named),
        client=client,
    )


def id_of(name: str, facts: ModelFacts) -> str:
    """The id of a LoRA that a prompt calls by its id or by its name."""
    found = next((id for id, shown in facts.loras if name in (id, shown)), None)
    if found is None:
        names = [id for id, _ in facts.loras]
        hint = did_you_mean(name, names) if names else "start the server with --lora"
        raise invalid(f"there is no LoRA {name[:64]!r} here", "prompt", hint)
    return found


def changed(options: Options, given: dict[str, Any], facts: ModelFacts) -> Options:
    """The options after some are set. Raises ServerError for those that are not there."""
    found = validated(Options, {**options.model_dump(), **given})
    name = found.sd_model_checkpoint
    if name not in (None, facts.id):
        hint = did_you_mean(name, [facts.id])
        raise invalid("this model is not here", "sd_model_checkpoint", hint)
    return found


async def with_pictures(desk: Desk, order: Order, fields: Img2Img) -> Order:
    """The order with its picture and its mask, whose white is drawn anew."""
    image = await desk.picture(fields.init_images[0], "init_images")
    mask = await desk.picture(fields.mask, "mask")
    if mask is not None and fields.inpainting_mask_invert:
        mask = await desk.aside(PIL.ImageOps.invert, mask)
        desk.held.keep(mask)
    if fields.resize_mode == 0 and order.width is not None and order.height is not None:
        size = (order.width, order.height)
        image, mask = [await desk.aside(stretched, desk, each, size) for each in (image, mask)]
    return replace(order, image=image, mask=mask)


def stretched(
    desk: Desk, picture: PIL.Image.Image | None, size: tuple[int, int]
) -> PIL.Image.Image | None:
    """A picture of exactly that size, whatever its shape was; otherwise it would be cropped."""
    if picture is None or picture.size == size:
        return picture
    found = picture.resize(size, PIL.Image.Resampling.LANCZOS)
    desk.held.keep(found)
    return found


# ── from our pictures to their answers ──


async def drawn(desk: Desk, request: Request, kept: Kept, fields: Txt2Img, first: Order) -> Answer:
    """The answer to a call."""
    facts, owner = desk.facts, owner_of(request)
    options = changed(kept.of(owner), fields.override_settings or {}, facts)
    if not fields.override_settings_restore_afterwards:
        kept.put(owner, options)
    count = fields.batch_size * fields.n_iter
    if count > desk.limits.pictures:
        raise invalid(f"{count} pictures are too many", "batch_size", f"{desk.limits.pictures} fit")
    orders = copies(replace(first, previews=options.live_previews_enable), count, desk.limits)
    jobs = desk.take_all(orders, owner, KIND)
    format: Any = options.samples_format.replace("jpg", "jpeg")
    async with desk.watched(request, jobs):
        results = await asyncio.gather(*(desk.finish(job) for job in jobs))
        files = [await desk.file(result, format, options.jpeg_quality) for result in results]
    return Answer(
        images=[pictures.packed(file) for file in files] if fields.send_images else [],
        parameters=fields.model_dump(exclude={"init_images", "mask"}),
        info=json.dumps(info(facts, jobs, results), default=float),
    )


def info(facts: ModelFacts, jobs: list[Job], results: list[Drawn]) -> dict[str, Any]:
    """How pictures were drawn, by the web UI's names."""
    records, first = [result.record for result in results], jobs[0].order
    record, seeds = records[0], [job.order.seed for job in jobs]
    count = len(jobs)
    return {
        "prompt": first.prompt,
        "all_prompts": [first.prompt] * count,
        "negative_prompt": first.negative_prompt or "",
        "all_negative_prompts": [first.negative_prompt or ""] * count,
        "seed": seeds[0],
        "all_seeds": seeds,
        "subseed": -1,
        "all_subseeds": [-1] * count,
        "subseed_strength": 0,
        "width": results[0].image.width,
        "height": results[0].image.height,
        "sampler_name": sampler_of(facts),
        "cfg_scale": record.get("guidance_scale", first.guidance_scale),
        "steps": record.get("steps", first.steps),
        "batch_size": count,
        "denoising_strength": first.strength,
        "sd_model_name": facts.id,
        "infotexts": [pictures.infotext(record) for record in records],
        "job_timestamp": time.strftime("%Y%m%d%H%M%S"),
    }


def state_of(desk: Desk, jobs: list[Job]) -> Progress:
    """How far jobs are, together."""
    if not jobs:
        return Progress(progress=0.0, eta_relative=0.0, state=State())
    steps = [(job.step, job.steps or job.order.steps or desk.worker.facts.steps[2]) for job in jobs]
    done, whole = sum(step for step, _ in steps), sum(count for _, count in steps)
    state = State(
        job=jobs[0].id,
        job_count=len(jobs),
        sampling_step=steps[0][0],
        sampling_steps=steps[0][1],
    )
    left = (whole - done) * (desk.worker.load().seconds_per_step or 0.0)
    return Progress(progress=done / max(whole, 1), eta_relative=left, state=state)


def settings_in(data: bytes, limits: Limits) -> dict[str, Any]:
    """The settings in a picture's file. Takes time."""
    picture = pictures.opened(data, "image", limits)
    try:
        told, record = metadata.stored_parameters(picture), metadata.stored_json(picture)
    except Exception as error:  # of a broken file Pillow raises anything
        raise pictures.broken("image", error) from None
    items = {"parameters": told, metadata.KEY: record}
    return {
        "info": told or "",
        "items": {name: text for name, text in items.items() if text is not None},
        "parameters": metadata.parsed_parameters(told or ""),
    }
