"""GET and DELETE /jobs/{job_id}, and GET /jobs/{job_id}/events: jobs that were accepted with 202 or with a key."""

from __future__ import annotations

from collections.abc import AsyncIterator
from contextlib import ExitStack, aclosing
from typing import Annotated, Any

from fastapi import APIRouter, Path, Query, Request, Response
from fastapi.responses import StreamingResponse
from starlette.types import Receive, Scope, Send

from service.answers import Ticket, job_document, render_images
from service.errors import job_not_found
from service.jobs import Finished
from service.negotiation import choose_kept
from service.queue.base import JobState, Status
from service.routes.examples import DONE
from service.routes.openapi import QUEUE_UNAVAILABLE, error, example, success, success_or_image
from service.routes.strict import OPTIONS_ALONE, REFUSED
from service.runtime import Service
from service.schemas import JobResponse
from service.tracker import Tracker

router = APIRouter(tags=["jobs"], dependencies=OPTIONS_ALONE, responses=REFUSED)

Preview = Annotated[bool, Query(description="Show the first image in the making.")]
JobId = Annotated[str, Path(description="As the answer to the request gave it.")]

_NOT_FOUND = example(
    404, "No such job, or its result is kept no longer", "job_not_found", "no job '5f0c5a2e'", "job_id"
)
_TOO_MANY = example(
    429, "Too many follow jobs; see Retry-After", "too_many_requests", "too many requests at once", None
)
_ERRORS: dict[int | str, dict[str, Any]] = {404: _NOT_FOUND, 503: QUEUE_UNAVAILABLE}
_FOUND = success_or_image(DONE, "How far it is, and its images when it is done")
_CANCELLED = success(DONE, "What became of it")
_EVENTS: dict[str, Any] = {
    "description": "Server-sent events, each with the job as data: `status` at first and when it starts, `progress` "
    "after ticks and with a new preview, and at last `done`, `failed` or `cancelled`. `error`: the job is known no "
    "longer.",
    "content": {
        "text/event-stream": {
            "schema": {"type": "string"},
            "example": f"event: done\ndata: {DONE.model_dump_json()}\n\n",
        }
    },
}


@router.head("/jobs/{job_id}", include_in_schema=False)
@router.get(
    "/jobs/{job_id}",
    summary="How far a job is, and its images",
    response_model=None,
    responses={200: _FOUND, 406: error(406), **_ERRORS},
)
async def job(request: Request, job_id: JobId) -> Response:
    """Any process of the service answers, whichever accepted the job. What is over is kept for a while."""
    status = await _tracker(request).status(job_id)
    outcome = status.outcome
    if isinstance(outcome, Finished):
        ticket = Ticket.model_validate_json(status.note)
        accept = ", ".join(request.headers.getlist("accept"))
        if choose_kept(accept, ticket.format, len(outcome.images)).raw:
            return render_images(job_id, ticket, outcome, raw=True)
    return _json(job_id, status)


@router.delete(
    "/jobs/{job_id}", summary="Give a job up", response_model=JobResponse, responses={200: _CANCELLED, **_ERRORS}
)
async def cancel_job(request: Request, job_id: JobId) -> Response:
    """Answers with what became of it: `cancelled`, or what it was already when it is over. Again is not an error."""
    return _json(job_id, await _tracker(request).cancel(job_id))


@router.get(
    "/jobs/{job_id}/events",
    summary="Follow a job",
    response_class=StreamingResponse,
    response_model=None,
    responses={200: _EVENTS, 429: _TOO_MANY, **_ERRORS},
)
async def job_events(request: Request, job_id: JobId, preview: Preview = False) -> StreamingResponse:
    """Ends by itself when the job is over, after an event that carries its images or its error.

    Ticks that follow one another faster than can be told are told together. Comments keep a silent line open.
    Previews are made while somebody wants them and nothing finished waits, so not after each step.
    """
    tracker = _tracker(request)
    service: Service = request.app.state.service
    with ExitStack() as place:
        place.enter_context(tracker.follower(service.settings.max_inflight))
        await tracker.status(job_id)  # What is not known is refused before the stream begins.
        return _Events(_told(tracker, job_id, preview), place.pop_all())


class _Events(StreamingResponse):
    """Events for one who has a place among those that follow jobs, until they end or never begin."""

    def __init__(self, events: AsyncIterator[str], place: ExitStack) -> None:
        # Proxies that collect answers would hold events back.
        super().__init__(events, headers={"X-Accel-Buffering": "no"}, media_type="text/event-stream")
        self._place = place

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        """Send them."""
        with self._place:
            await super().__call__(scope, receive, send)


def _tracker(request: Request) -> Tracker:
    service: Service = request.app.state.service
    return service.tracker


def _json(job_id: str, status: Status) -> Response:
    return Response(job_document(job_id, status).model_dump_json(), media_type="application/json")


async def _told(tracker: Tracker, job_id: str, preview: bool) -> AsyncIterator[str]:
    state: JobState | None = None
    try:
        async with aclosing(tracker.follow(job_id, preview)) as statuses:
            async for status in statuses:
                if status is None:
                    yield ": still here\n\n"
                    continue
                document = job_document(job_id, status).model_dump_json()
                yield f"event: {_event(status, state)}\ndata: {document}\n\n"
                state = status.state
    except KeyError:
        yield f"event: error\ndata: {job_not_found(job_id).text()}\n\n"


def _event(status: Status, before: JobState | None) -> str:
    """The name of the event that tells of a status."""
    if status.outcome is not None:
        return status.state
    return "progress" if status.state == before == "running" else "status"
