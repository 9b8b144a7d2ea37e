"""GET /livez, /readyz and /metrics of every role; GET /capabilities beside the image endpoints."""

from __future__ import annotations

import asyncio

from fastapi import APIRouter, Request, Response
from prometheus_client.exposition import choose_encoder

from service.capabilities import describe
from service.routes.openapi import error
from service.routes.strict import OPTIONS_ALONE, REFUSED
from service.runtime import Service, State
from service.schemas import Capabilities, Health

router = APIRouter(tags=["status"])
about = APIRouter(tags=["status"], dependencies=OPTIONS_ALONE, responses=REFUSED)


@router.head("/livez", include_in_schema=False)
@router.get("/livez", summary="The process answers")
async def livez() -> Health:
    """Ok from the first moment, also while the bundle loads."""
    return Health(status="ok")


@router.head("/readyz", include_in_schema=False)
@router.get("/readyz", summary="Requests for images are welcome", responses={503: {"model": Health}})
async def readyz(request: Request, response: Response) -> Health:
    """200 once the bundle is loaded and warm and the queue answers, until the service drains; else 503."""
    service: Service = request.app.state.service
    state = await service.health()
    if state is not State.READY:
        response.status_code = 503
        response.headers["Retry-After"] = "2"
    return Health(status=state.value)


@about.head("/capabilities", include_in_schema=False)
@about.get("/capabilities", summary="What a bundle can do", responses={404: error(404), 503: error(503)})
async def capabilities(request: Request, model: str | None = None) -> Capabilities:
    """Steps, guidance range, sizes, formats and limits, of the default bundle or of the one named."""
    service: Service = request.app.state.service
    service.require_loaded()
    return describe(await asyncio.to_thread(service.manifest, model), service.settings)


@router.head("/metrics", include_in_schema=False)
@router.get("/metrics", summary="Prometheus metrics", response_class=Response)
def metrics(request: Request) -> Response:
    """In the text format that the Accept header names. In a thread, as the queue is asked what waits."""
    service: Service = request.app.state.service
    encode, content_type = choose_encoder(request.headers.get("accept", ""))
    return Response(encode(service.metrics.registry), headers={"Content-Type": content_type})
