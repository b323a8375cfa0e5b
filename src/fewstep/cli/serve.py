"""`fewstep serve`: its options; what is served, and to whom, is in the package `server`."""

from __future__ import annotations

import logging
import os
import re
from importlib import import_module
from typing import Annotated, Any

import typer

from ..errors import CheckpointError, FewstepError, RequestError
from ..imports import first_import
from .options import BESIDE, MODEL, DeviceOption, Grouped, ModelOption, dtype

ACCESS, WORK = "Who may come", "How it draws"
KEY = "FEWSTEP_API_KEY"
NAMED = re.compile(r"([A-Za-z0-9_.-]{1,64})=(.+)")
EPILOG = (
    "\b\nExamples:\n"
    "  fewstep serve\n"
    "  fewstep serve -m SimianLuo/LCM_Dreamshaper_v7 --port 8000\n"
    "  fewstep serve -m Lykon/dreamshaper-7 --lora latent-consistency/lcm-lora-sdv1-5\n"
    f"  {KEY}=... fewstep serve --host 0.0.0.0 --allow-host draw.example"
)
serving = typer.Typer(rich_markup_mode=None)


@serving.command(cls=Grouped, epilog=EPILOG)
def serve(
    model: ModelOption = None,
    device: DeviceOption = "auto",
    precision: Annotated[
        str,
        typer.Option(
            "--dtype",
            parser=dtype,
            metavar="NAME",
            help="float32, float16, bfloat16. auto: float32 on CPUs, else float16.",
            rich_help_panel=MODEL,
        ),
    ] = "auto",
    lora: Annotated[
        list[str] | None,
        typer.Option(
            metavar="[NAME=]ID|FILE|FOLDER",
            help="A LoRA that requests may ask for by NAME; may be given several times.",
            rich_help_panel=BESIDE,
        ),
    ] = None,
    control: Annotated[
        str | None,
        typer.Option(
            metavar="ID|FOLDER",
            help="A ControlNet or T2I-Adapter that requests may send a picture for.",
            rich_help_panel=BESIDE,
        ),
    ] = None,
    host: Annotated[
        str,
        typer.Option(help="The address to listen at.", rich_help_panel=ACCESS),
    ] = "127.0.0.1",
    port: Annotated[
        int,
        typer.Option(min=0, max=65535, help="0: any that is free.", rich_help_panel=ACCESS),
    ] = 7860,
    api_key: Annotated[
        str | None,
        typer.Option(
            envvar=KEY,
            metavar="KEY",
            help="What clients must send: 8 characters or more. Seen by others on this machine, "
            "unless it comes by the variable.",
            rich_help_panel=ACCESS,
        ),
    ] = None,
    insecure: Annotated[
        bool,
        typer.Option("--insecure", help="Let others in without a key.", rich_help_panel=ACCESS),
    ] = False,
    allow_host: Annotated[
        list[str] | None,
        typer.Option(
            metavar="NAME", help="A name that clients call it by.", rich_help_panel=ACCESS
        ),
    ] = None,
    allow_origin: Annotated[
        list[str] | None,
        typer.Option(
            metavar="URL", help="Of a proxy that it stands behind.", rich_help_panel=ACCESS
        ),
    ] = None,
    allow_urls: Annotated[
        bool,
        typer.Option(
            "--allow-urls",
            help="Fetch pictures that requests give by a public address.",
            rich_help_panel=ACCESS,
        ),
    ] = False,
    max_batch: Annotated[
        int, typer.Option(min=1, max=256, help="Pictures in a step.", rich_help_panel=WORK)
    ] = 8,
    queue: Annotated[
        int, typer.Option(min=1, help="Pictures that may wait.", rich_help_panel=WORK)
    ] = 64,
    per_client: Annotated[
        int, typer.Option(min=1, help="Of those, from one address.", rich_help_panel=WORK)
    ] = 16,
    rate: Annotated[
        int,
        typer.Option(min=1, help="Requests a minute from one address.", rich_help_panel=WORK),
    ] = 600,
    cache: Annotated[
        int,
        typer.Option(
            min=0,
            metavar="MB",
            help="Kept of texts, of encoded pictures and of answers, each. 0: nothing.",
            rich_help_panel=WORK,
        ),
    ] = 64,
    deterministic: Annotated[
        bool,
        typer.Option(
            "--deterministic",
            help="A picture is the same to the bit, whoever draws beside; slower.",
            rich_help_panel=WORK,
        ),
    ] = False,
    threads: Annotated[
        int | None,
        typer.Option(min=1, help="Of the CPU. Default: all cores.", rich_help_panel=WORK),
    ] = None,
    ray: Annotated[
        bool,
        typer.Option("--ray", help="On several devices by Ray Serve.", rich_help_panel=WORK),
    ] = False,
    replicas: Annotated[
        int | None,
        typer.Option(
            min=1,
            help="With --ray: how many models. Default: a GPU's each, else a machine's each.",
            rich_help_panel=WORK,
        ),
    ] = None,
    ray_address: Annotated[
        str | None,
        typer.Option(
            metavar="HOST:PORT|auto",
            help="With --ray: a cluster that runs, to draw on its machines. Else $RAY_ADDRESS.",
            rich_help_panel=WORK,
        ),
    ] = None,
) -> None:
    """Serve pictures to many: a studio in the browser, OpenAI's and the web UI's APIs.

    SIGTERM or Ctrl+C finishes what is being drawn and ends; again, it ends at once.
    """
    for option, value in (("--replicas", replicas), ("--ray-address", ray_address)):
        if value is not None and not ray:
            raise RequestError(f"{option} {value}: needs --ray; give it too")
    from ..server.settings import Settings

    settings = Settings(
        host=host,
        port=port,
        api_key=api_key,
        insecure=insecure,
        hosts=tuple(name.lower() for name in allow_host or ()),
        origins=tuple(origin.lower().rstrip("/") for origin in allow_origin or ()),
        allow_urls=allow_urls,
    ).checked()
    loras = [named(entry) for entry in lora or ()]
    choices = {"loras": loras, "control": control, "max_batch": max_batch}
    choices["deterministic"] = deterministic
    choices |= dict.fromkeys(("text_bytes", "latent_bytes", "picture_bytes"), cache << 20)
    bounds = {"waiting": queue, "waiting_per_client": min(queue, per_client)}
    bounds["requests_per_minute"] = rate
    address = ray_address or os.environ.get("RAY_ADDRESS") or None
    cluster = {"replicas": replicas, "address": address} if ray else None
    run(settings, model, device, precision, threads, bounds, choices, cluster)


def named(text: str) -> str | tuple[str, str]:
    """A LoRA's place, behind its name if that is given."""
    found = NAMED.fullmatch(text)
    return text if found is None else (found[1], found[2])


def run(
    settings: Any,
    model: str | None,
    device: str,
    precision: str,
    threads: int | None,
    bounds: dict[str, int],
    choices: dict[str, Any],
    cluster: dict[str, Any] | None,
) -> None:
    """Load and serve. Raises FewstepError, in the options' names, for what cannot be had."""
    try:
        import_module("fewstep.server.app")  # and with it all that the extra brings
        from ..server.listening import bound
    except ImportError as error:
        raise RequestError(
            f"serve: needs {error.name}; install it by pip install 'fewstep[serve]'"
        ) from None
    with bound(settings) as at:
        try:
            where = (device, precision, threads, bounds)
            load_and_serve(settings, at, model, *where, choices, cluster)
        except RequestError:
            raise
        except (FewstepError, OSError) as error:
            raise CheckpointError(f"--model {model or 'of fewstep'}: {error}") from error


def load_and_serve(
    settings: Any,
    at: Any,
    model: str | None,
    device: str,
    precision: str,
    threads: int | None,
    bounds: dict[str, int],
    choices: dict[str, Any],
    cluster: dict[str, Any] | None,
) -> None:
    """Serve at a socket until a signal."""
    with first_import("torch"):
        import torch

        from .. import EMBEDDED
        from ..server.app import create_app
        from ..server.listening import serve
        from ..server.orders import Limits
        from ..server.worker import PipelineWorker
        from .drawing import quiet_transformers, resolve_device, resolve_dtype
    quiet_transformers()
    for part in ("worker", "ray_worker"):
        logging.getLogger(f"fewstep.server.{part}").addFilter(is_unexpected)
    if threads is not None:
        torch.set_num_threads(threads)
    limits, name = Limits(**bounds), model or EMBEDDED.name
    if cluster is None:
        chosen = resolve_device(device)
        numbers = resolve_dtype(precision, chosen)
        worker: Any = PipelineWorker(name, limits, dtype=numbers, device=chosen, **choices)
    else:
        from ..server.ray_worker import RayWorker

        given: dict[str, Any] = {"device": device, "threads": threads}
        given["dtype"] = None if precision == "auto" else precision
        worker = RayWorker(name, limits, **given, **cluster, **choices)
    everywhere = " and at every address of this machine" if settings.is_everywhere else ""
    told = f"{name} draws at {settings.address(at.getsockname()[1])}{everywhere}"
    serve(create_app(worker, settings), worker, settings, at, told)


def is_unexpected(record: logging.LogRecord) -> bool:
    """Whether the log shall have it: our own errors are printed in a line at the end."""
    error = record.exc_info[1] if record.exc_info else None
    return not isinstance(error, FewstepError)
