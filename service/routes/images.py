"""POST /generate, /edit and /inpaint."""

from __future__ import annotations

import time
from dataclasses import replace
from functools import partial

from fastapi import APIRouter, Request, Response

from service.answers import Ticket, job_document, render_images
from service.bodies import check_fields, read_fields
from service.errors import ApiError
from service.idempotency import digest_of, key_of
from service.intake import deadline_of, make_job
from service.jobs import Job
from service.negotiation import choose
from service.queue.base import Keep, Status
from service.routes.openapi import documented
from service.runtime import Service
from service.schemas import EditRequest, GenerateRequest, InpaintRequest

router = APIRouter(tags=["images"])

_RESPOND_ASYNC = "respond-async"


@router.post("/generate", summary="Text to images", **documented(GenerateRequest))
async def generate(request: Request) -> Response:
    """Make images from a prompt."""
    return await _serve(request, GenerateRequest)


@router.post("/edit", summary="Image and text to images", **documented(EditRequest))
async def edit(request: Request) -> Response:
    """Make images that start from an image.

    An image of another size is resized to the bundle's first, and stretched where its proportions are others;
    transparent parts are laid on white.
    """
    return await _serve(request, EditRequest)


@router.post("/inpaint", summary="Repaint part of an image", **documented(InpaintRequest))
async def inpaint(request: Request) -> Response:
    """Make part of an image anew.

    The mask has the image's own size. The result has the bundle's size: an image of another size is resized,
    and a pixel of the result is repainted when any pixel under it is marked. The other pixels come back exactly
    as they went in (for an image that was resized, or laid on white where it was transparent: as they were after
    it), in png always, in jpeg and webp as far as those formats are exact.
    """
    return await _serve(request, InpaintRequest)


async def _serve(request: Request, model: type[GenerateRequest]) -> Response:
    service: Service = request.app.state.service
    began: float = request.state.began
    with service.admitted():
        if request.url.query:
            raise ApiError(422, "unknown_field", "fields go into the body, not into the URL", param="query")
        fields, typed = await read_fields(request, service)
        body = check_fields(model, fields, typed)
        key = key_of(request)
        preferred = _prefers_async(request)
        body = body.model_copy(update={"asynchronous": body.asynchronous or preferred})
        rendering = choose(", ".join(request.headers.getlist("accept")), body)
        deadline = deadline_of(body, service.settings, began)
        gone = partial(_disconnected, request)
        async with service.leased(body.model, deadline, gone) as pipeline:
            make = partial(
                make_job,
                body,
                rendering.format,
                pipeline,
                service.settings,
                request_id=request.state.request_id,
                began=began,
            )
            job = await service.decoded(make, deadline, gone) if isinstance(body, EditRequest) else make()
            ticket = Ticket.of(job, pipeline.manifest)
            if not body.asynchronous and key is None:
                finished = await service.complete(job, gone)
                return render_images(job.id, ticket, finished, rendering.raw, time.monotonic() - began)
        keep = Keep(service.settings.keep_results_s, ticket.model_dump_json(), key)
        if key is not None:
            digest = partial(digest_of, request.url.path, body, rendering.format)
            keep = replace(keep, digest=await service.parsed(digest, deadline))
        job_id = await service.accept(job, keep)
        if body.asynchronous:
            return await _accepted(service, job, job_id, keep, preferred)
        status, finished = await service.completed(job_id, deadline, gone)
        return render_images(
            job_id, Ticket.model_validate_json(status.note), finished, rendering.raw, time.monotonic() - began
        )


async def _accepted(service: Service, job: Job, job_id: str, keep: Keep, preferred: bool) -> Response:
    """202: where the job is, and how far. ``preferred``: because a header asked for it."""
    headers = {"Location": f"/jobs/{job_id}"}
    if preferred:
        headers["Preference-Applied"] = _RESPOND_ASYNC
    # A job of this moment is not asked about: without a queue to ask it would seem refused.
    fresh = Status("queued", 0, job.cost, job.deadline - time.monotonic(), keep.note)
    status = fresh if job_id == job.id else await service.tracker.status(job_id)
    return Response(job_document(job_id, status).model_dump_json(), 202, headers, media_type="application/json")


def _prefers_async(request: Request) -> bool:
    preferences = ",".join(request.headers.getlist("prefer")).split(",")
    return any(preference.partition(";")[0].strip().lower() == _RESPOND_ASYNC for preference in preferences)


async def _disconnected(request: Request) -> None:
    while (await request.receive())["type"] != "http.disconnect":
        pass
