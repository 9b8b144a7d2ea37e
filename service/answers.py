"""What became of a job -> an answer: JSON, or one image's raw bytes. Knows neither queues nor the bundle."""

from __future__ import annotations

import base64
import time
from dataclasses import asdict
from typing import Self

from fastapi import Response

from engines.images import ImageFormat
from engines.manifest import Manifest
from service.errors import from_failure
from service.jobs import Failed, Finished, Job
from service.queue.base import Status
from service.schemas import (
    Batch,
    Body,
    ErrorBody,
    Image,
    ImagesResponse,
    JobResponse,
    Progress,
    TimingsMs,
)


class Ticket(Body):
    """What an answer says beside the images. It goes with a job, as another process may be asked for that."""

    created: int
    request_id: str
    model: str
    revision: str
    seeds: tuple[int, ...]
    width: int
    height: int
    format: ImageFormat

    @classmethod
    def of(cls, job: Job, manifest: Manifest) -> Self:
        """For a job that is about to be submitted."""
        _, height, width = manifest.image_shape
        return cls(
            created=int(time.time()),
            request_id=job.request_id,
            model=manifest.name,
            revision=manifest.revision,
            seeds=tuple(task.seed for task in job.tasks),
            width=width,
            height=height,
            format=job.output.format,
        )


def render_images(job_id: str, ticket: Ticket, finished: Finished, raw: bool, total_s: float | None = None) -> Response:
    """The images: the bytes of the one there is where ``raw``, else JSON."""
    answer = _images(job_id, ticket, finished, total_s)
    headers = server_timing(answer.timings)
    if raw:
        headers["X-Seed"] = str(ticket.seeds[0])
        return Response(finished.images[0], headers=headers, media_type=f"image/{ticket.format}")
    return Response(answer.model_dump_json(), headers=headers, media_type="application/json")


def job_document(job_id: str, status: Status) -> JobResponse:
    """How far the job has come, and when it is over its images or its error."""
    ticket = Ticket.model_validate_json(status.note)
    outcome = status.outcome
    return JobResponse(
        id=job_id,
        status=status.state,
        created=ticket.created,
        model=ticket.model,
        revision=ticket.revision,
        progress=Progress(done=status.done, total=status.total),
        position=status.position,
        preview=base64.b64encode(status.preview).decode() if status.preview else None,
        result=_images(job_id, ticket, outcome, None) if isinstance(outcome, Finished) else None,
        error=_error(outcome, ticket.request_id) if isinstance(outcome, Failed) else None,
    )


def _images(job_id: str, ticket: Ticket, finished: Finished, total_s: float | None) -> ImagesResponse:
    images = [
        Image(b64_json=base64.b64encode(data).decode(), seed=seed, width=ticket.width, height=ticket.height)
        for seed, data in zip(ticket.seeds, finished.images, strict=True)
    ]
    return ImagesResponse(
        id=job_id,
        created=ticket.created,
        model=ticket.model,
        revision=ticket.revision,
        images=tuple(images),
        timings=timings_ms(finished, total_s),
        batch=Batch(ticks=finished.ticks),
    )


def server_timing(timings: TimingsMs) -> dict[str, str]:
    """The header of that name."""
    return {"Server-Timing": ", ".join(f"{name[:-3]};dur={value:g}" for name, value in timings.model_dump().items())}


def timings_ms(finished: Finished, total_s: float | None) -> TimingsMs:
    """The time in each stage. ``total_s`` is None for who did not wait: then it is that of the stages together."""
    seconds = asdict(finished.timings)
    seconds["total_s"] = sum(seconds.values()) if total_s is None else total_s
    return TimingsMs(**{f"{name[:-2]}_ms": round(value * 1000, 3) for name, value in seconds.items()})


def _error(failure: Failed, request_id: str) -> ErrorBody:
    return ErrorBody(**from_failure(failure).body(request_id)["error"])
