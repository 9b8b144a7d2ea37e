"""What tells requests apart: the Idempotency-Key header, what is asked for, and who asks."""

from __future__ import annotations

import hashlib
import json
import re

from fastapi import Request

from engines.images import ImageFormat
from service.errors import ApiError
from service.schemas import GenerateRequest
from service.security.access import caller_of

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
    return _sha256(given[0], caller_of(request))


def digest_of(path: str, body: GenerateRequest, output_format: ImageFormat) -> str:
    """What tells requests apart: the endpoint and the fields, but not whether the client waits for the answer."""
    return _sha256(_said(path, body, output_format))


def identity_of(request: Request, body: GenerateRequest, output_format: ImageFormat) -> str:
    """What recognises a request that was refused and comes again: who asks, from where, for what, under which key."""
    host = request.client.host if request.client else ""
    asked = _said(request.url.path, body, output_format)
    return _sha256(asked, host, *request.headers.getlist(HEADER), caller_of(request))


def _said(path: str, body: GenerateRequest, output_format: ImageFormat) -> str:
    fields = {name: value for name, value in body if name != "asynchronous"}
    # A digest in the place of a file: its bytes as text would be many times dearer.
    return json.dumps([path, output_format, fields], sort_keys=True, default=_sha256)


def _sha256(*parts: str | bytes) -> str:
    said = (part if isinstance(part, bytes) else part.encode() for part in parts)
    return hashlib.sha256(b"\n".join(said)).hexdigest()
