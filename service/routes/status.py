"""GET /livez, /readyz and /metrics of every role; GET /capabilities beside the image endpoints.

Those of every role are asked by orchestrators and scrapers, whose own options in the URL change nothing.
"""

from __future__ import annotations

import asyncio
from typing import Any

from fastapi import APIRouter, Request, Response
from prometheus_client.exposition import choose_encoder

from service.capabilities import describe
from service.errors import SHOULD_RETRY
from service.routes.examples import ALIVE, CAPABILITIES, LOADING, READY
from service.routes.openapi import error, success
from service.routes.strict import OPTIONS_ALONE, REFUSED
from service.runtime import Service, State
from service.schemas import Capabilities, ErrorResponse, Health

router = APIRouter(tags=["status"])
scraped = APIRouter(tags=["status"])
about = APIRouter(tags=["status"], dependencies=OPTIONS_ALONE, responses=REFUSED)

_READY: dict[int | str, dict[str, Any]] = {
    200: success(READY, "Ready"),
    503: {**success(LOADING, "Not ready"), "model": Health | ErrorResponse},
}
_ABOUT: dict[int | str, dict[str, Any]] = {
    200: success(CAPABILITIES, "The capabilities"),
    404: error(404),
    503: error(503),
}


@router.head("/livez", include_in_schema=False)
@router.get("/livez", summary="The process answers", responses={200: success(ALIVE, "It answers")})
async def livez() -> Health:
    """Ok from the first moment, also while the bundle loads."""
    return Health(status="ok")


@router.head("/readyz", include_in_schema=False)
@router.get("/readyz", summary="Requests for images are welcome", responses=_READY)
async def readyz(request: Request, response: Response) -> Health:
    """200 once the bundle is loaded and warm and the queue answers, until the service drains; else 503.

    A bundle that was unloaded on request changes nothing: the next request that wants it loads it and waits.
    """
    service: Service = request.app.state.service
    state = await service.health()
    if state is not State.READY:
        response.status_code = 503
        response.headers.update({"Retry-After": "2", SHOULD_RETRY: "true"})
    return Health(status=state.value)


@about.head("/capabilities", include_in_schema=False)
@about.get("/capabilities", summary="What a bundle can do", responses=_ABOUT)
async def capabilities(request: Request, model: str | None = None) -> Capabilities:
    """Steps, guidance range, sizes, formats and limits, of the default bundle or of the one named."""
    service: Service = request.app.state.service
    service.require_loaded()
    return describe(await asyncio.to_thread(service.manifest, model), service.settings)


@scraped.head("/metrics", include_in_schema=False)
@scraped.get("/metrics", summary="Prometheus metrics", response_class=Response)
def metrics(request: Request) -> Response:
    """In the text format that the Accept header names. In a thread, as the queue is asked what waits."""
    service: Service = request.app.state.service
    encode, content_type = choose_encoder(request.headers.get("accept", ""))
    return Response(encode(service.metrics.registry), headers={"Content-Type": content_type})
