"""What the OpenAPI document says of the image endpoints, which read their bodies themselves."""

from __future__ import annotations

import copy
from collections.abc import Mapping
from typing import Any

from fastapi import FastAPI, Security
from fastapi.security import APIKeyHeader, HTTPBearer

from service.bodies import FILE_FIELDS
from service.errors import ApiError
from service.idempotency import HEADER
from service.routes.examples import ACCEPTED, IMAGES, PNG, REQUEST_ID
from service.schemas import Body, ErrorResponse

# status: (what it means, an example's code, its message, its param)
ERRORS: dict[int, tuple[str, str, str, str | None]] = {
    400: ("The body or an image cannot be read", "invalid_json", "the body is not valid JSON", None),
    404: ("No such model", "model_not_found", "no model 'digits'; there are: emoji", "model"),
    406: ("No form of answer that Accept allows", "not_acceptable", "the answer can be ...", "accept"),
    408: ("The body did not arrive in time", "body_timeout", "the body did not arrive in time", None),
    410: ("The job was given up by who has its id", "cancelled", "the job was cancelled", None),
    413: ("Body or image too large", "body_too_large", "the body may have at most 12582912 bytes", None),
    415: ("Another content type", "unsupported_media_type", "send application/json or ...", "content-type"),
    422: (
        "A field is unknown, wrong, or more than the bundle can do",
        "unsupported_steps",
        "no student of 3 steps; there are 1, 2, 4",
        "steps",
    ),
    429: ("Too much waits; see Retry-After", "queue_full", "the queue is full; ...", None),
    500: ("The service failed", "internal_error", "the service failed; the log has the details", None),
    503: (
        "Not ready, shutting down, or without its queue; see Retry-After",
        "not_ready",
        "the bundle is loading",
        None,
    ),
    504: ("The time limit passed", "deadline_exceeded", "the time limit passed before ...", None),
}


# The same, of what not every endpoint or not every service answers.
_ACCESS: dict[int, tuple[str, str, str, str | None]] = {
    401: ("No API key, or none that is known", "unauthorized", "an API key is needed", None),
    403: ("Only for admins, or off; or as elsewhere", "not_an_admin", "this needs the key of an admin", None),
}

_IMAGE_CONTENT: dict[str, Any] = {
    f"image/{name}": {"schema": {"type": "string", "format": "binary"}} for name in ("png", "jpeg", "webp")
}
TIMING_HEADERS: dict[str, Any] = {
    "Server-Timing": {"schema": {"type": "string"}, "description": "Milliseconds in each stage."},
}
"""Of answers with images that were just made."""

_IMAGE_HEADERS: dict[str, Any] = {
    "X-Seed": {"schema": {"type": "integer"}, "description": "The seed, of a raw image."},
    **TIMING_HEADERS,
}
_EVERY_HEADERS: dict[str, Any] = {
    "X-Request-ID": {
        "schema": {"type": "string"},
        "description": "The request's own where it is plain, else a new one.",
    },
}
_ERROR_HEADERS: dict[str, Any] = {
    "X-Should-Retry": {"schema": {"type": "string", "enum": ["true", "false"]}, "description": "As `retryable` says."},
}
_RETRY_HEADERS: dict[str, Any] = {"Retry-After": {"schema": {"type": "integer"}, "description": "Seconds."}}
_CHALLENGE_HEADERS: dict[str, Any] = {"WWW-Authenticate": {"schema": {"type": "string"}}}

_PREFER: dict[str, Any] = {
    "name": "Prefer",
    "in": "header",
    "description": "`respond-async`: answer at once with 202 and a job. Other preferences change nothing.",
    "schema": {"type": "string"},
    "example": "respond-async",
}
_KEY: dict[str, Any] = {
    "name": HEADER,
    "in": "header",
    "description": "A name that the client makes up for its request. The same key with the same request gives the "
    "same job and never a second run, until its result is kept no longer or unless it failed; with another request "
    "it is refused (422 `idempotency_conflict`). A job with a key goes on when its client is gone.",
    "schema": {"type": "string", "minLength": 1, "maxLength": 255, "pattern": "^[!-~]+$"},
}


class DocumentedApp(FastAPI):
    """An app whose OpenAPI document has its examples whole, of which FastAPI leaves out nulls, and all headers."""

    def openapi(self) -> dict[str, Any]:
        """The document."""
        document = super().openapi()
        schemas = document["components"]["schemas"]
        for operations in document["paths"].values():
            for operation in operations.values():
                for status, answer in operation["responses"].items():
                    answer["headers"] = answer.get("headers", {}) | _headers(int(status))
                    media = answer.get("content", {}).get("application/json", {})
                    if "example" in media:
                        media["example"] = _whole(media["example"], media["schema"], schemas)
        return document


def guarded(by_keys: bool) -> dict[str, Any]:
    """Keyword arguments for including a router: what the document says of keys, where any are asked for.

    It is the middleware of access.py that asks for them, also of endpoints that are not documented.
    """
    if not by_keys:
        return {}
    bearer, header = HTTPBearer(auto_error=False), APIKeyHeader(name="X-Api-Key", auto_error=False)
    return {
        "dependencies": [Security(bearer), Security(header)],
        "responses": {401: error(401), 429: _RATE_LIMITED},
    }


def documented(model: type[Body], answer: dict[str, Any] | None = None) -> dict[str, Any]:
    """Keyword arguments for a route whose body is ``model``, as JSON or as multipart.

    It gives ``answer``, and no jobs; or our own answer, or a job.
    """
    schema = model.model_json_schema()
    body = {
        "required": True,
        "content": {
            "application/json": {"schema": schema, "example": _request_example(model)},
            "multipart/form-data": {"schema": _as_multipart(schema)},
        },
    }
    extra = {"requestBody": body, "parameters": [_KEY] if answer else [_PREFER, _KEY]}
    successes = {200: answer} if answer else _successes()
    errors = {status: error(status) for status in ERRORS}
    return {"openapi_extra": extra, "responses": {**successes, **errors}, "response_model": None}


def error(status: int) -> dict[str, Any]:
    """One error answer with an example."""
    return example(status, *(ERRORS | _ACCESS)[status])


def example(status: int, text: str, code: str, message: str, param: str | None) -> dict[str, Any]:
    """An error answer of this meaning, with this example."""
    body = ApiError(status, code, message, param=param).body(REQUEST_ID)
    answer: dict[str, Any] = {
        "model": ErrorResponse,
        "description": text,
        "content": {"application/json": {"example": body}},
    }
    return answer


def _headers(status: int) -> dict[str, Any]:
    """The headers that every answer of this status has."""
    headers = _EVERY_HEADERS
    if status >= 400:
        headers = headers | _ERROR_HEADERS
    if status == 401:
        headers = headers | _CHALLENGE_HEADERS
    return headers | _RETRY_HEADERS if status in (429, 503) else headers


QUEUE_UNAVAILABLE = example(
    503,
    "The queue cannot be reached; see Retry-After",
    "queue_unavailable",
    "the queue cannot be reached, or is full",
    None,
)
_RATE_LIMITED = example(
    429, "The key asked too often; see Retry-After", "rate_limited", "this key may make 60 requests a minute", None
)


FOREIGN = example(
    403,
    "A page of another origin asks, or the service has no such name: see docs/security.md",
    "foreign_origin",
    "a page of another origin may not ask for this, unless ...",
    "origin",
)


# What a connection is told whatever it asks for, before that is known; it is closed then.
OF_CONNECTIONS: dict[int | str, dict[str, Any]] = {
    400: example(400, "What came is not HTTP", "invalid_http", "Invalid HTTP request received.", None),
    408: example(408, "The headers did not arrive in time", "head_timeout", "the request's headers did not ...", None),
    503: example(503, "Too many are connected", "too_many_connections", "too many connections at once", None),
}


def _whole(value: Any, schema: Mapping[str, Any], schemas: Mapping[str, Any]) -> Any:
    """The value with null for every property that its schema requires and that it lacks."""
    if "$ref" in schema:
        return _whole(value, schemas[schema["$ref"].rpartition("/")[2]], schemas)
    if isinstance(value, list):
        return [_whole(item, schema.get("items", {}), schemas) for item in value]
    if not isinstance(value, dict):
        return value
    for either in schema.get("anyOf", ()):
        value = _whole(value, either, schemas)
    lacking = dict.fromkeys(name for name in schema.get("required", ()) if name not in value)
    properties = schema.get("properties", {})
    return {name: _whole(part, properties.get(name, {}), schemas) for name, part in (value | lacking).items()}


def success(body: Body, text: str) -> dict[str, Any]:
    """An answer of this meaning, with ``body`` as its example."""
    content = {"application/json": {"example": body.model_dump(mode="json")}}
    return {"model": type(body), "description": text, "content": content}


def success_or_image(body: Body, text: str) -> dict[str, Any]:
    """The same, or the raw bytes of the one image there is."""
    answer = success(body, f"{text}; raw bytes where there is one image and Accept asks for an image type.")
    return {**answer, "content": answer["content"] | _IMAGE_CONTENT, "headers": _IMAGE_HEADERS}


def _successes() -> dict[int | str, dict[str, Any]]:
    location = {"schema": {"type": "string"}, "description": "Where the job is asked about, followed and cancelled."}
    accepted = {
        **success(ACCEPTED, "A job, where `Prefer: respond-async` or `async` asks for one."),
        "headers": {"Location": location, "Preference-Applied": {"schema": {"type": "string"}}},
    }
    return {200: success_or_image(IMAGES, "The images"), 202: accepted}


def _request_example(model: type[Body]) -> dict[str, Any]:
    example: dict[str, Any] = {"prompt": "a red apple", "steps": 4, "guidance_scale": 3.0, "seed": 7}
    if "image" in model.model_fields:
        example |= {"image": PNG}
    if "mask" in model.model_fields:
        return example | {"mask": PNG, "mask_mode": "white"}
    return example | ({"strength": 0.75} if "strength" in model.model_fields else {"n": 1})


def _as_multipart(schema: dict[str, Any]) -> dict[str, Any]:
    schema = copy.deepcopy(schema)
    for name in FILE_FIELDS & schema["properties"].keys():
        description = schema["properties"][name].get("description", "")
        schema["properties"][name] = {"type": "string", "format": "binary", "description": description}
    return schema
