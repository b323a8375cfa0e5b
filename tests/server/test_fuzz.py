"""Everything that OpenAPI says can be asked, asked in all manners: no 5xx, and answers as told."""

from __future__ import annotations

from typing import Any

import pytest
from server.fake import FakeWorker

from fewstep.server.app import create_app
from fewstep.server.orders import Limits
from fewstep.server.settings import Settings

checks = pytest.importorskip("schemathesis.specs.openapi.checks", reason="needs schemathesis")
schemathesis = pytest.importorskip("schemathesis", reason="needs schemathesis")
hypothesis = pytest.importorskip("hypothesis", reason="needs hypothesis")

EXAMPLES = 120  # of each route, beside those that its schema's borders give
# What a schema cannot say is refused too: a mask without its image, a LoRA that is not loaded.
EXCLUDED = [checks.positive_data_acceptance]


def described() -> Any:
    """What the app of a worker without a model says of itself."""
    limits = Limits(requests_per_minute=10**9, largest_side=128)
    app = create_app(FakeWorker(limits), Settings(hosts=("testserver",)))

    async def endless(scope: Any, receive: Any, send: Any) -> None:
        if scope["type"] == "lifespan":
            raise RuntimeError("each request would be one, and the app is over behind the first")
        await app(scope, receive, send)

    return schemathesis.openapi.from_asgi("/openapi.json", endless)


schema = described()


@schema.parametrize()
@hypothesis.settings(max_examples=EXAMPLES, derandomize=True, deadline=None, database=None)
def test_no_request_breaks_the_server_and_answers_are_as_open_api_tells(case: Any) -> None:
    # A form has texts alone, so that null, "null" and ["null"] are one.
    of_forms = [checks.negative_data_rejection] * (case.media_type == "multipart/form-data")
    case.call_and_validate(excluded_checks=EXCLUDED + of_forms)
