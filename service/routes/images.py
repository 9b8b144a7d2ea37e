"""POST /generate, /edit and /inpaint."""

from __future__ import annotations

import time
from collections.abc import Awaitable, Callable, Mapping
from dataclasses import dataclass, replace
from functools import partial

from fastapi import APIRouter, Request, Response

from engines.images import ImageFormat
from engines.pipeline import Pipeline
from service.answers import Ticket, job_document, render_images
from service.bodies import SMALL_BODY_BYTES, check_fields, read_fields
from service.desk import ClientIsGone
from service.errors import ApiError
from service.idempotency import digest_of, identity_of, key_of
from service.intake import deadline_of, draft_job, with_images
from service.jobs import Finished, Job
from service.negotiation import choose
from service.queue.base import Keep, Status
from service.routes.openapi import documented
from service.routes.strict import Direct
from service.runtime import Service
from service.schemas import EditRequest, GenerateRequest, ImageRequest, InpaintRequest
from service.settings import Settings

router = APIRouter(tags=["images"], route_class=Direct)

_RESPOND_ASYNC = "respond-async"
_REFUSED_LATE = frozenset({"model_unavailable", "shutting_down"})
"""Refusals that nobody counted before, as other requests have them as well."""
_REFUSED_BY_QUEUE = frozenset({"idempotency_conflict", "queue_full", "queue_unavailable"})
"""Refusals of a queue that has looked for the job which the key names."""

ReadBody = Callable[[Request, Service], Awaitable[GenerateRequest]]
Render = Callable[[str, Ticket, Finished, bool, float], Response]


@dataclass(frozen=True, slots=True)
class Dialect:
    """How an endpoint answers: in which form, by which names of fields, and whether with a job where one is asked for.

    ``names`` has what its clients call a field of ours, where that is not the same.
    """

    render: Render
    names: Mapping[str, str]
    gives_jobs: bool


_OURS = Dialect(render_images, {}, gives_jobs=True)


@router.post("/generate", summary="Text to images", **documented(GenerateRequest))
async def generate(request: Request) -> Response:
    """Make images from a prompt."""
    return await make_images(request, partial(_read, GenerateRequest))


@router.post("/edit", summary="Image and text to images", **documented(EditRequest))
async def edit(request: Request) -> Response:
    """Make images that start from an image.

    An image of another size is resized to the bundle's first, and stretched where its proportions are others;
    transparent parts are laid on white.
    """
    return await make_images(request, partial(_read, EditRequest))


@router.post("/inpaint", summary="Repaint part of an image", **documented(InpaintRequest))
async def inpaint(request: Request) -> Response:
    """Make part of an image anew.

    The mask has the image's own size. The result has the bundle's size: an image of another size is resized,
    and a pixel of the result is repainted when any pixel under it is marked. The other pixels come back exactly
    as they went in (for an image that was resized, or laid on white where it was transparent: as they were after
    it), in png always, in jpeg and webp as far as those formats are exact. With mask_blur this holds where the blurred
    mask is 0, and elsewhere the old and the new pixels are mixed by its value.
    """
    return await make_images(request, partial(_read, InpaintRequest))


async def make_images(request: Request, read: ReadBody, dialect: Dialect = _OURS) -> Response:
    """Make what the request asks for in the body that ``read`` gives, and answer. Raises ApiError, and ClientGone."""
    service: Service = request.app.state.service
    with service.admitted():
        making = _make(request, service, await read(request, service), dialect)  # It alone holds the body.
        try:
            return await making
        except ApiError as refusal:
            if refusal.code in _REFUSED_LATE:
                service.metrics.rejected.labels(refusal.code).inc()
            refusal.param = dialect.names.get(refusal.param or "", refusal.param)
            raise


async def _make(request: Request, service: Service, body: GenerateRequest, dialect: Dialect) -> Response:
    """Make it, and answer. The body is let go of once a job was made of it, as the job may wait long."""
    began: float = request.state.began
    key = key_of(request)
    if dialect.gives_jobs and _prefers_async(request):
        body = body.model_copy(update={"asynchronous": True})
    rendering = choose(", ".join(request.headers.getlist("accept")), body)
    deadline = deadline_of(body, service.settings, began)
    gone = partial(_disconnected, request)
    asynchronous = body.asynchronous
    keep = await _keep(request, body, rendering.format, key, deadline)
    fresh = None
    try:
        async with service.leased(body.model, deadline, gone) as pipeline:
            job, ticket = await _taken_in(request, body, rendering.format, keep, pipeline, deadline, gone)
            del body
            request.state.let_go_of_body()
            if keep is None:
                finished = await service.desk.complete(job, gone)
                return dialect.render(job.id, ticket, finished, rendering.raw, time.monotonic() - began)
        keep = replace(keep, note=ticket.model_dump_json())
        job_id = await service.desk.accept(job, keep)
        if job_id == job.id:
            fresh = Status("queued", 0, job.cost, job.deadline - time.monotonic(), keep.note)
    except ApiError as refusal:
        job_id = await _made_before(service, keep, refusal, deadline)
    if asynchronous:
        return await _accepted(request, job_id, fresh)
    status, finished = await service.desk.completed(job_id, deadline, gone)
    ticket = Ticket.model_validate_json(status.note)
    return dialect.render(job_id, ticket, finished, rendering.raw, time.monotonic() - began)


async def _keep(
    request: Request, body: GenerateRequest, output_format: ImageFormat, key: str | None, deadline: float
) -> Keep | None:
    """How what the body asks for is kept, if it is."""
    if not body.asynchronous and key is None:
        return None
    service: Service = request.app.state.service
    digest = partial(digest_of, request.url.path, body, output_format)
    said = "" if key is None else await service.parsed(digest, deadline)
    return Keep(service.settings.keep_results_s, key=key, digest=said)


async def _made_before(service: Service, keep: Keep | None, refusal: ApiError, deadline: float) -> str:
    """The job that the key names, of a request that would be refused now. Raises the refusal where there is none."""
    if keep is None or keep.key is None or refusal.code in _REFUSED_BY_QUEUE:
        raise refusal
    job_id = await service.desk.holder(keep, deadline)
    if job_id is None:
        raise refusal
    return job_id


async def _taken_in(
    request: Request,
    body: GenerateRequest,
    output_format: ImageFormat,
    keep: Keep | None,
    pipeline: Pipeline,
    deadline: float,
    client_gone: ClientIsGone,
) -> tuple[Job, Ticket]:
    """The job that the body asks for, and what its answer says beside the images."""
    service: Service = request.app.state.service
    draft = partial(_draft, request, body, output_format, pipeline)
    if isinstance(body, ImageRequest) and body.reuse:  # The text of a PNG may lie behind its pixels.
        job = await service.decoded(draft, deadline, client_gone)
    else:
        job = await service.parsed(draft, deadline) if _is_long(body) else draft()
    ticket = Ticket.of(job, pipeline.manifest)
    if isinstance(body, ImageRequest):
        await service.desk.ask(job, keep)  # Before the images are decoded, as that is dear.
        decode = partial(with_images, job, body, pipeline.manifest, service.settings)
        job = await service.decoded(decode, deadline, client_gone)
    return job, ticket


def _is_long(body: GenerateRequest) -> bool:
    """Whether reading it is worth a thread beside the event loop."""
    if not isinstance(body, ImageRequest):
        return False
    mask = body.mask if isinstance(body, InpaintRequest) else ""
    return len(body.image) + len(mask) > SMALL_BODY_BYTES


def _draft(request: Request, body: GenerateRequest, output_format: ImageFormat, pipeline: Pipeline) -> Job:
    state = request.state
    settings: Settings = request.app.state.service.settings
    job = draft_job(body, output_format, pipeline, settings, request_id=state.request_id, began=state.began)
    return replace(job, identity=identity_of(request, body, output_format))


async def _read(model: type[GenerateRequest], request: Request, service: Service) -> GenerateRequest:
    fields, typed = await read_fields(request, service)
    return check_fields(model, fields, typed)


async def _accepted(request: Request, job_id: str, fresh: Status | None) -> Response:
    """202: where the job is, and how far, which is known of a fresh one."""
    service: Service = request.app.state.service
    headers = {"Location": f"/jobs/{job_id}"}
    if _prefers_async(request):
        headers["Preference-Applied"] = _RESPOND_ASYNC
    # A job of this moment is not asked about: without a queue to ask it would seem refused.
    if fresh is not None:
        service.tracker.expect(job_id)
    status = fresh or await service.tracker.status(job_id)
    return Response(job_document(job_id, status).model_dump_json(), 202, headers, media_type="application/json")


def _prefers_async(request: Request) -> bool:
    preferences = ",".join(request.headers.getlist("prefer")).split(",")
    return any(preference.partition(";")[0].strip().lower() == _RESPOND_ASYNC for preference in preferences)


async def _disconnected(request: Request) -> None:
    while (await request.receive())["type"] != "http.disconnect":
        pass
