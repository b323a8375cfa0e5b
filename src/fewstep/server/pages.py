"""The studio's page and its files, which are all that is served without a key.

A file is served if it stands in the table that is made when the server starts: names out of a
request are looked up there, and never become paths.
"""

from __future__ import annotations

import hashlib
from dataclasses import dataclass
from pathlib import Path

from fastapi import FastAPI, Request
from starlette.responses import Response

STUDIO = Path(__file__).parent / "studio"
KINDS = {
    ".html": "text/html; charset=utf-8",
    ".css": "text/css; charset=utf-8",
    ".js": "text/javascript; charset=utf-8",
    ".svg": "image/svg+xml",
}
HEADERS = {
    "Content-Security-Policy": (
        "default-src 'self'; img-src 'self' data: blob:; object-src 'none'; base-uri 'none'; "
        "form-action 'none'; frame-ancestors 'none'"
    ),
    "X-Content-Type-Options": "nosniff",
    "Referrer-Policy": "no-referrer",
    "Cross-Origin-Opener-Policy": "same-origin",
    "Cross-Origin-Resource-Policy": "same-origin",
    "Cache-Control": "no-cache",  # asked again each time, answered by 304
}


@dataclass(frozen=True)
class Page:
    """A file as it is served."""

    body: bytes
    kind: str
    tag: str


def pages() -> dict[str, Page]:
    """The files of the studio by the paths that they are served at."""
    found = {}
    for file in sorted(STUDIO.iterdir()):
        if file.suffix in KINDS:
            body = file.read_bytes()
            tag = f'"{hashlib.sha256(body).hexdigest()[:32]}"'
            found[f"/studio/{file.name}"] = Page(body, KINDS[file.suffix], tag)
    found["/"] = found.pop("/studio/index.html")
    return found


PUBLIC = frozenset({"/", *(f"/studio/{file.name}" for file in STUDIO.glob("*.*"))})
"""The paths that need no key."""


def mount(app: FastAPI) -> None:
    """Serve the studio at `/` and its files below `/studio/`."""
    for path, page in pages().items():
        add(app, path, page)


def add(app: FastAPI, path: str, page: Page) -> None:
    """Serve one file."""

    async def served(request: Request) -> Response:
        headers = {**HEADERS, "ETag": page.tag}
        if request.headers.get("if-none-match") == page.tag:
            return Response(status_code=304, headers=headers)
        return Response(page.body, media_type=page.kind, headers=headers)

    app.add_api_route(path, served, methods=["GET", "HEAD"], include_in_schema=False)
