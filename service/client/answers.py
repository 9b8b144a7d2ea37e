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

from service.client.errors import AnswerUnreadable, ServiceError
from service.schemas import ImagesResponse, TimingsMs

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


def read_images(answer: Answer) -> Images:
    """The images of an answer. Raises ServiceError and AnswerUnreadable."""
    found = read_model(ImagesResponse)(answer)
    return Images(
        images=tuple(MadeImage(_from_base64(image.b64_json), image.seed) for image in found.images),
        model=found.model,
        revision=found.revision,
        timings=found.timings,
        id=found.id,
        request_id=answer.headers.get("x-request-id"),
    )


def read_model(model: type[Model]) -> Callable[[Answer], Model]:
    """What reads an answer as ``model``. It raises ServiceError and AnswerUnreadable."""

    def read(answer: Answer) -> Model:
        if answer.status != 200:
            raise _refusal(answer)
        try:
            return model.model_validate_json(answer.body, extra="ignore")
        except ValidationError as error:
            raise AnswerUnreadable(f"the answer is no {model.__name__}") from error

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
        retryable=bool(error.get("retryable", answer.status in _RETRYABLE)),
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
    except ValueError:
        return None
    return max(0.0, (until - datetime.now(UTC)).total_seconds()) if until.tzinfo else None


def _from_base64(text: str) -> bytes:
    try:
        return base64.b64decode(text, validate=True)
    except ValueError as error:
        raise AnswerUnreadable("an image of the answer is not base64") from error
