"""Request bodies -> fields: JSON or multipart, under limits. Knows nothing of what the fields mean."""

from __future__ import annotations

import asyncio
import json
from collections.abc import Mapping
from typing import Any, NoReturn, TypeVar

from fastapi import Request
from pydantic import BaseModel, ValidationError
from starlette.datastructures import FormData, UploadFile
from starlette.formparsers import MultiPartException, MultiPartParser

from service.errors import ApiError, from_validation
from service.runtime import Service
from service.settings import Settings

FILE_FIELDS = frozenset({"image", "mask"})

_MAX_PARTS = 64
_SMALL_BODY_BYTES = 64 * 1024

Model = TypeVar("Model", bound=BaseModel)
Fields = Mapping[str, Any]


async def read_fields(request: Request, service: Service) -> tuple[Fields, bool]:
    """The fields of the body, and whether they are typed (JSON) rather than text (multipart).

    Raises ApiError: 400 for a body that is not what it says, 408 for one that does not arrive, 415 for
    another content type, 422 for a field given twice or in the wrong kind of part.
    """
    kind = _content_type(request)
    settings = service.settings
    try:
        async with asyncio.timeout(settings.body_timeout_s):
            if kind == "multipart/form-data":
                return await _read_multipart(request, settings), False
            body = await request.body()
    except TimeoutError:
        raise ApiError(408, "body_timeout", "the body did not arrive in time") from None
    if len(body) > _SMALL_BODY_BYTES:
        # Until the body is parsed, the longest time limit holds.
        deadline = service.clock() + settings.max_timeout_ms / 1000
        return await service.in_background(lambda: parse_json(body), deadline), True
    return parse_json(body), True


def check_fields(model: type[Model], fields: Fields, typed: bool) -> Model:
    """The fields as ``model``; typed ones are not coerced. Raises ApiError 422."""
    try:
        return model.model_validate(fields, strict=typed)
    except ValidationError as error:
        raise from_validation(error.errors(include_url=False, include_context=False, include_input=False)) from None


def parse_json(body: bytes) -> dict[str, Any]:
    """A JSON object with every name once and only finite numbers. Raises ApiError."""
    try:
        document = json.loads(body, object_pairs_hook=_unique, parse_constant=_not_json)
    except (ValueError, RecursionError) as error:
        raise ApiError(400, "invalid_json", "the body is not valid JSON") from error
    if not isinstance(document, dict):
        raise ApiError(422, "invalid_value", "the body must be a JSON object")
    return document


def _content_type(request: Request) -> str:
    if request.headers.get("content-encoding", "identity").lower() != "identity":
        raise ApiError(415, "unsupported_content_encoding", "send the body without a content encoding")
    kind = request.headers.get("content-type", "").split(";")[0].strip().lower()
    if kind not in ("application/json", "multipart/form-data"):
        raise ApiError(
            415,
            "unsupported_media_type",
            "send application/json or multipart/form-data",
            param="content-type",
        )
    return kind


def _unique(pairs: list[tuple[str, Any]]) -> dict[str, Any]:
    fields = dict(pairs)
    if len(fields) != len(pairs):
        names = [name for name, _ in pairs]
        raise _duplicate(next(name for name in names if names.count(name) > 1))
    return fields


def _not_json(constant: str) -> NoReturn:
    raise ValueError(f"{constant} is not JSON")


async def _read_multipart(request: Request, settings: Settings) -> dict[str, str | bytes]:
    parser = MultiPartParser(
        request.headers,
        request.stream(),
        max_files=len(FILE_FIELDS),
        max_fields=_MAX_PARTS,
        max_part_size=max(1024, 8 * settings.max_prompt_chars),
    )
    # The body is bounded already; a spooled part would need a writable disk.
    parser.spool_max_size = settings.max_body_bytes + 1
    try:
        form = await parser.parse()
    except MultiPartException as error:
        message = f"{error.message} Images and masks are file parts, all else is short text."
        raise ApiError(400, "invalid_multipart", message) from error
    try:
        return await _unpack(form)
    finally:
        await form.close()


async def _unpack(form: FormData) -> dict[str, str | bytes]:
    fields: dict[str, str | bytes] = {}
    for name, value in form.multi_items():
        if name in fields:
            raise _duplicate(name)
        if isinstance(value, UploadFile):
            if name not in FILE_FIELDS:
                raise ApiError(422, "invalid_value", f"{name}: text is expected, not a file", param=name)
            fields[name] = await value.read()
        else:
            if name in FILE_FIELDS:
                raise ApiError(422, "invalid_value", f"{name}: a file is expected, not text", param=name)
            fields[name] = value
    return fields


def _duplicate(name: str) -> ApiError:
    return ApiError(422, "duplicate_field", f"{name}: given more than once", param=name)
