"""The one shape of every error answer, and the ways into it."""

from __future__ import annotations

import json
import math
from collections.abc import Iterable, Iterator, Mapping
from contextlib import contextmanager
from http import HTTPStatus
from typing import Any

from fastapi import FastAPI, Request, Response
from fastapi.exceptions import RequestValidationError
from starlette.exceptions import HTTPException
from starlette.routing import Match

from engines.bundle import BundleError
from engines.images import ImageError
from engines.pipeline import TaskError
from service.jobs import STOPPED, Failed
from service.models.catalogue import LoadsEnded, ModelError, UnknownModel, unreadable
from service.telemetry.logs import request_id_var

_TYPES = {
    401: "authentication_error",
    403: "permission_error",
    429: "overloaded_error",
    500: "internal_error",
    503: "unavailable_error",
    504: "timeout_error",
}
_RETRYABLE = frozenset({408, 429, 500, 503, 504})
_BODY_LEFT_UNREAD = frozenset({408, 413})
_IMAGE_STATUS = {
    "too_many_bytes": 413,
    "too_many_pixels": 413,
    "animated": 422,
    "mask_size": 422,
    "mask_without_alpha": 422,
}
_PROBLEM_CODES = {
    "extra_forbidden": "unknown_field",
    "missing": "missing_field",
    "unsupported_option": "unsupported_option",
}
_METHODS = ("GET", "HEAD", "POST", "DELETE")
SHOULD_RETRY = "X-Should-Retry"  # which the client library of OpenAI heeds
_LISTED_PROBLEMS = 5
_QUOTED_CHARS = 100
_QUEUE_RETRY_S = 2.0
_LOAD_RETRY_S = 60.0
_BUSY_RETRY_S = 1.0


class ApiError(Exception):
    """An answer other than success. ``code`` is for programs, ``message`` for people."""

    def __init__(
        self,
        status: int,
        code: str,
        message: str,
        *,
        param: str | None = None,
        retryable: bool | None = None,
        retry_after_s: float | None = None,
        headers: Mapping[str, str] | None = None,
    ) -> None:
        super().__init__(message)
        self.status = status
        self.code = code
        self.message = message
        self.param = param
        self.retryable = status in _RETRYABLE if retryable is None else retryable
        self.headers = dict(headers or {})
        if status in _BODY_LEFT_UNREAD:
            self.headers["Connection"] = "close"
        if retry_after_s is not None:
            self.headers["Retry-After"] = str(max(1, math.ceil(retry_after_s)))

    def body(self, request_id: str | None) -> dict[str, dict[str, Any]]:
        """The one shape."""
        error = {
            "type": _TYPES.get(self.status, "invalid_request_error"),
            "code": self.code,
            "message": self.message,
            "param": self.param,
            "request_id": request_id,
            "retryable": self.retryable,
        }
        return {"error": error}

    def text(self) -> str:
        """The one shape in JSON, with the id of the request that is being served."""
        # ASCII, because a message may quote a field name that no encoding of the answer could carry.
        return json.dumps(self.body(request_id_var.get()), ensure_ascii=True)

    def response(self) -> Response:
        """The answer."""
        headers = {SHOULD_RETRY: str(self.retryable).lower(), **self.headers}
        return Response(self.text().encode(), self.status, headers, media_type="application/json")


def internal_error() -> ApiError:
    """The answer to a fault of our own; what happened stands in the log under the request id."""
    return ApiError(500, "internal_error", "the service failed; the log has the details")


def queue_unavailable() -> ApiError:
    """The answer while the queue is away."""
    return ApiError(503, "queue_unavailable", "the queue cannot be reached, or is full", retry_after_s=_QUEUE_RETRY_S)


def too_many_requests() -> ApiError:
    """The answer where too many are served already."""
    return ApiError(429, "too_many_requests", "too many requests at once", retry_after_s=_BUSY_RETRY_S)


def too_many_bytes() -> ApiError:
    """The answer to a body that would be one too many at once."""
    message, headers = "too many uploads at once", {"Connection": "close"}
    return ApiError(429, "too_many_bytes", message, retry_after_s=_BUSY_RETRY_S, headers=headers)


def job_not_found(job_id: str) -> ApiError:
    """The answer to a job that is not known, or no longer."""
    message = f"no job {shown(job_id)!r}, or its result is kept no longer"
    return ApiError(404, "job_not_found", message, param="job_id")


def idempotency_conflict(error: Exception) -> ApiError:
    """The answer to a key that names a job for another request."""
    return ApiError(422, "idempotency_conflict", str(error), param="idempotency-key")


@contextmanager
def model_refusals() -> Iterator[None]:
    """Make ApiErrors of what models refuse: 404 for one that there is not, 503 for one that cannot be had."""
    try:
        yield
    except UnknownModel as error:
        raise ApiError(404, "model_not_found", str(error), param="model") from error
    except ModelError as error:
        raise _model_unavailable(error) from error
    except BundleError as error:
        raise _model_unavailable(unreadable(error)) from error


def _model_unavailable(error: ModelError) -> ApiError:
    """The answer where a bundle that is there cannot be loaded, or is not because the service ends."""
    if isinstance(error, LoadsEnded):
        return from_failure(STOPPED)
    retry_after_s = _LOAD_RETRY_S if error.passing else None
    return ApiError(
        503, "model_unavailable", error.told, param="model", retryable=error.passing, retry_after_s=retry_after_s
    )


def from_task_error(error: TaskError, param: str) -> ApiError:
    """What the bundle cannot honour, under the name the field has in the request."""
    return ApiError(422, error.code, error.message, param=param)


def from_image_error(error: ImageError, param: str) -> ApiError:
    """An image that cannot be read (400), is too large (413), or is not of the kind asked for (422)."""
    return ApiError(_IMAGE_STATUS.get(error.code, 400), error.code, error.message, param=param)


def from_failure(failure: Failed) -> ApiError:
    """The answer to a job that gave no images."""
    status, code = {
        "invalid": (422, failure.code or "invalid_request"),
        "expired": (504, "deadline_exceeded"),
        "cancelled": (410, "cancelled"),
        "engine": (500, failure.code or "generation_failed"),
        "stopped": (503, "shutting_down"),
    }[failure.reason]
    # What its client has given up is not to be tried again.
    retryable = {"engine": failure.retryable, "cancelled": False}.get(failure.reason)
    retry_after_s = _BUSY_RETRY_S if failure.reason == "stopped" else None
    return ApiError(
        status,
        code,
        failure.message,
        param=failure.param,
        retryable=retryable,
        retry_after_s=retry_after_s,
    )


def from_validation(problems: Iterable[Mapping[str, Any]]) -> ApiError:
    """pydantic's list of problems as one error: one a field in the message, the first field in ``param``."""
    by_place: dict[str, tuple[str, str, str]] = {}
    for problem in problems:
        place = _place(problem["loc"])
        by_place.setdefault(place, (place, problem["type"], _plain(problem)))
    listed = list(by_place.values())
    message = "; ".join(f"{place}: {text}" if place else text for place, _, text in listed[:_LISTED_PROBLEMS])
    if len(listed) > _LISTED_PROBLEMS:
        message += f"; and {len(listed) - _LISTED_PROBLEMS} more"
    place, kind, _ = listed[0]
    code = _PROBLEM_CODES.get(kind, "invalid_value")
    return ApiError(422, code, message, param=place or None)


def install(app: FastAPI) -> None:
    """Answer every exception that reaches the framework in the one shape."""

    async def api_error(_: Request, error: Exception) -> Response:
        assert isinstance(error, ApiError)
        return error.response()

    async def http_error(request: Request, error: Exception) -> Response:
        assert isinstance(error, HTTPException)
        status = HTTPStatus(error.status_code)
        code = status.phrase.lower().replace(" ", "_").replace("-", "_")
        message = status.description or status.phrase
        headers = {"Allow": _allowed(request)} if status == HTTPStatus.METHOD_NOT_ALLOWED else error.headers
        return ApiError(error.status_code, code, message, headers=headers).response()

    async def validation_error(_: Request, error: Exception) -> Response:
        assert isinstance(error, RequestValidationError)
        # Here a place is said with where it lies: the name of an option follows on "query".
        return from_validation([{**problem, "loc": problem["loc"][1:]} for problem in error.errors()]).response()

    app.add_exception_handler(ApiError, api_error)
    app.add_exception_handler(HTTPException, http_error)
    app.add_exception_handler(RequestValidationError, validation_error)


def _allowed(request: Request) -> str:
    """Every method that the request's path takes: the framework itself names those of the first route only."""

    def takes(method: str) -> bool:
        scope = {**request.scope, "method": method}
        return any(route.matches(scope)[0] is Match.FULL for route in request.app.router.routes)

    return ", ".join(filter(takes, _METHODS))


def shown(name: str) -> str:
    """A name that a client made up, cut to what an answer can quote."""
    return name if len(name) <= _QUOTED_CHARS else name[:_QUOTED_CHARS] + "..."


def _place(location: tuple[int | str, ...]) -> str:
    # The last part of the path through a union names its branch, not a field.
    return shown(str(location[0])) if location else ""


def _plain(problem: Mapping[str, Any]) -> str:
    if problem["type"] == "extra_forbidden":
        return "unknown field"
    if problem["type"] == "missing":
        return "required"
    text = str(problem["msg"])
    return text[:1].lower() + text[1:]
