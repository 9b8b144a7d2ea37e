"""POST /generate, /edit and /inpaint."""

from __future__ import annotations

import base64
import time
from functools import partial
from typing import Any

from fastapi import APIRouter, Request, Response

from engines.manifest import Manifest
from service.bodies import check_fields, read_fields
from service.errors import ApiError
from service.intake import deadline_of, make_job
from service.jobs import Finished, Job
from service.negotiation import Rendering, choose
from service.routes.openapi import documented
from service.runtime import Service
from service.schemas import (
    Batch,
    EditRequest,
    GenerateRequest,
    Image,
    ImagesResponse,
    InpaintRequest,
    TimingsMs,
)

router = APIRouter(tags=["images"])


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
            finished = await service.complete(job, gone)
    return _render(job, finished, rendering, pipeline.manifest, time.monotonic() - began)


async def _disconnected(request: Request) -> None:
    while (await request.receive())["type"] != "http.disconnect":
        pass


def _render(job: Job, finished: Finished, rendering: Rendering, manifest: Manifest, total_s: float) -> Response:
    timings = _timings_ms(finished, total_s)
    stages = ", ".join(f"{stage[:-3]};dur={value:g}" for stage, value in timings.model_dump().items())
    headers = {"Server-Timing": stages}
    if rendering.raw:
        headers["X-Seed"] = str(job.tasks[0].seed)
        return Response(finished.images[0], headers=headers, media_type=f"image/{rendering.format}")
    _, height, width = manifest.image_shape
    images = [
        Image(b64_json=base64.b64encode(data).decode(), seed=task.seed, width=width, height=height)
        for task, data in zip(job.tasks, finished.images, strict=True)
    ]
    answer = ImagesResponse(
        id=job.id,
        created=int(time.time()),
        model=manifest.name,
        revision=manifest.revision,
        images=tuple(images),
        timings=timings,
        batch=Batch(ticks=finished.ticks),
    )
    return Response(answer.model_dump_json(), headers=headers, media_type="application/json")


def _timings_ms(finished: Finished, total_s: float) -> TimingsMs:
    seconds: dict[str, Any] = {
        "queue_ms": finished.timings.queue_s,
        "encode_ms": finished.timings.encode_s,
        "denoise_ms": finished.timings.denoise_s,
        "decode_ms": finished.timings.decode_s,
        "total_ms": total_s,
    }
    return TimingsMs(**{name: round(value * 1000, 3) for name, value in seconds.items()})
