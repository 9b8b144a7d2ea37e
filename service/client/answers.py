"""Answers of the service -> results, or a ServiceError. Fields that a later service adds are passed over."""

from __future__ import annotations

import base64
import io
import json
from collections.abc import Callable
from dataclasses import dataclass
from datetime import UTC, datetime
from email.utils import parsedate_to_datetime
from functools import cached_property
from pathlib import Path
from typing import Any, TypeVar

import httpx
import PIL.Image
from pydantic import BaseModel, ValidationError

from service.client.errors import AnswerUnreadable, JobFailed, ServiceError
from service.queue.base import JobState
from service.schemas import ErrorBody, ImagesResponse, JobResponse, TimingsMs

Result = TypeVar("Result")
Model = TypeVar("Model", bound=BaseModel)

# Of answers that are not the service's own, such as a proxy's.
_RETRYABLE = frozenset({408, 429, 502, 503, 504})


@dataclass(frozen=True)
class Answer:
    """What came back: the status, the headers, and the whole body."""

    status: int
    headers: httpx.Headers
    body: bytes


@dataclass(frozen=True)
class MadeImage:
    """One image: the bytes of its file, and the seed that makes it again."""

    data: bytes
    seed: int

    @cached_property
    def picture(self) -> PIL.Image.Image:
        """The image, decoded."""
        picture = PIL.Image.open(io.BytesIO(self.data))
        picture.load()
        return picture

    def save(self, path: str | Path) -> None:
        """Write the file as it came, with what it says of how it was made."""
        Path(path).write_bytes(self.data)


@dataclass(frozen=True)
class Images:
    """The images of one call, in order, and what made them."""

    images: tuple[MadeImage, ...]
    model: str
    revision: str
    timings: TimingsMs
    id: str
    request_id: str | None


@dataclass(frozen=True)
class Job:
    """How far a job is: ``done`` of ``total`` steps have run, and ``position`` jobs are before it, where that is known.

    It has ``images`` when it is done, and an ``error`` when it failed or was cancelled.
    """

    id: str
    status: JobState
    model: str
    revision: str
    done: int
    total: int
    position: int | None
    images: Images | None
    error: JobFailed | None

    @property
    def over(self) -> bool:
        """Whether nothing more will happen to it."""
        return self.images is not None or self.error is not None

    @property
    def result(self) -> Images:
        """Its images. Raises its error, and ValueError for a job that is not over."""
        if self.error is not None:
            raise self.error
        if self.images is None:
            raise ValueError(f"job {self.id} is not over: it is {self.status}")
        return self.images


def read_images(answer: Answer) -> Images:
    """The images of an answer. Raises ServiceError and AnswerUnreadable."""
    return _images(read_model(ImagesResponse)(answer), answer.headers.get("x-request-id"))


def read_job(answer: Answer) -> Job:
    """How far the job of an answer is. Raises ServiceError and AnswerUnreadable."""
    found = read_model(JobResponse)(answer)
    return Job(
        id=found.id,
        status=found.status,
        model=found.model,
        revision=found.revision,
        done=found.progress.done,
        total=found.progress.total,
        position=found.position,
        images=None if found.result is None else _images(found.result, answer.headers.get("x-request-id")),
        error=None if found.error is None else _job_failed(found.error),
    )


def _images(found: ImagesResponse, request_id: str | None) -> Images:
    return Images(
        images=tuple(MadeImage(_from_base64(image.b64_json), image.seed) for image in found.images),
        model=found.model,
        revision=found.revision,
        timings=found.timings,
        id=found.id,
        request_id=request_id,
    )


def _job_failed(error: ErrorBody) -> JobFailed:
    return JobFailed(
        error.code, error.message, param=error.param, request_id=error.request_id, retryable=error.retryable
    )


def read_model(model: type[Model]) -> Callable[[Answer], Model]:
    """What reads an answer as ``model``. It raises ServiceError and AnswerUnreadable."""

    def read(answer: Answer) -> Model:
        if answer.status not in (200, 202):
            raise _refusal(answer)
        try:
            return model.model_validate_json(answer.body, extra="ignore")
        except ValidationError as error:
            raise AnswerUnreadable(f"the answer is not a {model.__name__}") from error

    return read


def _refusal(answer: Answer) -> ServiceError:
    error = _error_of(answer.body)
    text = {name: value for name, value in error.items() if isinstance(value, str)}
    return ServiceError(
        answer.status,
        text.get("code", f"http_{answer.status}"),
        text.get("message", "the answer is an error without a reason"),
        param=text.get("param"),
        request_id=text.get("request_id", answer.headers.get("x-request-id")),
        retryable=error.get("retryable", answer.status in _RETRYABLE) is True,
        retry_after_s=_seconds(answer.headers.get("retry-after")),
    )


def _error_of(body: bytes) -> dict[str, Any]:
    try:
        error = json.loads(body)["error"]
    except (ValueError, LookupError, TypeError, RecursionError):
        return {}
    return error if isinstance(error, dict) else {}


def _seconds(retry_after: str | None) -> float | None:
    """Retry-After in seconds, from its number or its date."""
    if retry_after is None:
        return None
    if retry_after.isascii() and retry_after.isdigit():
        return float(retry_after)
    try:
        until = parsedate_to_datetime(retry_after)
    except (ValueError, OverflowError):
        return None
    return max(0.0, (until - datetime.now(UTC)).total_seconds()) if until.tzinfo else None


def _from_base64(text: str) -> bytes:
    try:
        return base64.b64decode(text, validate=True)
    except ValueError as error:
        raise AnswerUnreadable("an image of the answer is not base64") from error
