"""The Idempotency-Key header: which job a request names, and what it asks for."""

from __future__ import annotations

import hashlib
import json
import re

from fastapi import Request

from engines.images import ImageFormat
from service.errors import ApiError
from service.schemas import GenerateRequest

HEADER = "Idempotency-Key"

_KEY = re.compile(r"[!-~]{1,255}")


def key_of(request: Request) -> str | None:
    """The key, as one of this caller's: another caller's same key is another key. Raises ApiError 422."""
    given = request.headers.getlist(HEADER)
    if not given:
        return None
    if len(given) > 1 or not _KEY.fullmatch(given[0]):
        message = "one key of 1 to 255 visible ASCII characters, without spaces"
        raise ApiError(422, "invalid_value", message, param=HEADER.lower())
    callers = (request.headers.get(name, "") for name in ("authorization", "x-api-key"))
    return hashlib.sha256("\n".join((given[0], *callers)).encode()).hexdigest()


def digest_of(path: str, body: GenerateRequest, output_format: ImageFormat) -> str:
    """What tells requests apart: the endpoint and the fields, but not whether the client waits for the answer."""
    fields = body.model_dump(exclude={"asynchronous"})
    said = json.dumps([path, output_format, fields], sort_keys=True, default=bytes.hex)
    return hashlib.sha256(said.encode()).hexdigest()
