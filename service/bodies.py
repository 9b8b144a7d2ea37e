"""Request bodies -> fields: JSON or multipart, under limits. Knows nothing of what the fields mean."""

from __future__ import annotations

import asyncio
import json
from collections import Counter
from collections.abc import Mapping
from typing import Any, NoReturn, TypeVar

from fastapi import Request
from pydantic import BaseModel, ValidationError
from python_multipart.multipart import parse_options_header
from starlette.datastructures import FormData, Headers, UploadFile
from starlette.formparsers import MultiPartException, MultiPartParser

from service.errors import ApiError, from_validation, shown
from service.runtime import Service
from service.settings import Settings

FILE_FIELDS = frozenset({"image", "mask"})

_MAX_FIELDS = 64
SMALL_BODY_BYTES = 64 * 1024
"""What is no longer is read on the event loop: another thread would cost more."""

_UTF_8 = (b"utf-8", b"utf8")
# Charsets of a text in multipart: some libraries name the last for all text.
_TEXTS = dict.fromkeys((*_UTF_8, b"us-ascii"), "utf-8") | {b"iso-8859-1": "latin-1"}
# Content transfer encodings that leave bytes as they are.
_AS_THEY_ARE = ("7bit", "8bit", "binary")

Model = TypeVar("Model", bound=BaseModel)
Fields = Mapping[str, Any]


async def read_fields(request: Request, service: Service, files: frozenset[str] = FILE_FIELDS) -> tuple[Fields, bool]:
    """The fields of the body, and whether they are typed (JSON) rather than text (multipart).

    ``files`` are the fields that are files in multipart. Raises ApiError: 400 for a body that is not what it says,
    408 for one that does not arrive, 415 for another content type or charset, 422 for a field given twice or in the
    wrong kind of part.
    """
    kind = _content_type(request)
    settings = service.settings
    try:
        async with asyncio.timeout(settings.body_timeout_s):
            if kind == "multipart/form-data":
                return await _read_multipart(request, settings, files), False
            # Not `request.body()`, which keeps it for as long as there is the request.
            body = b"".join([chunk async for chunk in request.stream()])
    except TimeoutError:
        service.metrics.rejected.labels("body_timeout").inc()
        raise ApiError(408, "body_timeout", "the body did not arrive in time") from None
    if len(body) > SMALL_BODY_BYTES:
        # Until the body is parsed, the longest time limit holds.
        deadline = request.state.began + settings.max_timeout_ms / 1000
        return await service.parsed(lambda: parse_json(body), deadline), True
    return parse_json(body), True


def check_fields(model: type[Model], fields: Fields, typed: bool) -> Model:
    """The fields as ``model``; typed ones are not coerced. Raises ApiError 422."""
    try:
        checked = model.model_validate(fields, strict=typed)
    except ValidationError as error:
        raise from_validation(error.errors(include_url=False, include_context=False, include_input=False)) from None
    if not typed:
        _check_numbers(checked, fields)
    return checked


def _check_numbers(checked: BaseModel, fields: Fields) -> None:
    """Refuse numbers in the spelling of Python, as 1_000."""
    for name, field in type(checked).model_fields.items():
        text = fields.get(field.alias or name)
        if isinstance(getattr(checked, name), int | float) and isinstance(text, str) and "_" in text:
            raise ApiError(422, "invalid_value", f"{field.alias or name}: not a number", param=field.alias or name)


def parse_json(body: bytes) -> dict[str, Any]:
    """A JSON object with every name once and only finite numbers. Raises ApiError."""
    try:
        document = json.loads(body.decode("utf-8-sig"), object_pairs_hook=_unique, parse_constant=_not_json)
    except (ValueError, RecursionError) as error:
        raise ApiError(400, "invalid_json", "the body is not valid JSON") from error
    if not isinstance(document, dict):
        raise ApiError(422, "invalid_value", "the body must be a JSON object")
    return document


def _content_type(request: Request) -> str:
    if request.headers.get("content-encoding", "identity").lower() != "identity":
        raise ApiError(415, "unsupported_content_encoding", "send the body without a content encoding")
    header = request.headers.get("content-type", "")
    kind = header.split(";")[0].strip().lower()
    if kind not in ("application/json", "multipart/form-data"):
        raise ApiError(
            415,
            "unsupported_media_type",
            "send application/json or multipart/form-data",
            param="content-type",
        )
    if _charset(header) not in _UTF_8:
        raise ApiError(415, "unsupported_charset", "text must be UTF-8", param="content-type")
    return kind


def _charset(content_type: str) -> bytes:
    return parse_options_header(content_type)[1].get(b"charset", b"utf-8").lower()


def _unique(pairs: list[tuple[str, Any]]) -> dict[str, Any]:
    if len(pairs) > _MAX_FIELDS:
        raise ApiError(422, "too_many_fields", f"at most {_MAX_FIELDS} fields, there are {len(pairs)}")
    fields = dict(pairs)
    if len(fields) != len(pairs):
        ((name, _),) = Counter(name for name, _ in pairs).most_common(1)
        raise _duplicate(name)
    return fields


def _not_json(constant: str) -> NoReturn:
    raise ValueError(f"{constant} is not JSON")


class _StrictParser(MultiPartParser):
    """Refuses text that is not UTF-8, and knows whether the closing boundary came."""

    ended = False

    def on_part_begin(self) -> None:
        """A part comes: its name is UTF-8."""
        super().on_part_begin()
        self._charset = "utf-8"

    def on_headers_finished(self) -> None:
        """The headers of a part are there: refuse what they say of its bytes and cannot be honoured."""
        super().on_headers_finished()
        headers = Headers(raw=self._current_part.item_headers)
        if headers.get("content-transfer-encoding", "binary").strip().lower() not in _AS_THEY_ARE:
            raise self._unfit("send it without a content transfer encoding")
        charset = _charset(headers.get("content-type", ""))
        if self._current_part.file is None:
            if charset not in _TEXTS:
                raise self._unfit("its text must be UTF-8")
            self._charset = _TEXTS[charset]

    def on_part_end(self) -> None:
        """A part is whole: check its text, which would else be taken for Latin-1."""
        if self._current_part.file is None:
            try:
                self._current_part.data.decode(self._charset)
            except UnicodeDecodeError:
                raise self._unfit("its text is not UTF-8; if it is a file, it needs a filename") from None
        super().on_part_end()

    def on_end(self) -> None:
        """The closing boundary."""
        self.ended = True

    def _unfit(self, reason: str) -> MultiPartException:
        return MultiPartException(f"{shown(self._current_part.field_name)}: {reason}")


async def _read_multipart(request: Request, settings: Settings, files: frozenset[str]) -> dict[str, str | bytes]:
    parser = _StrictParser(
        request.headers,
        request.stream(),
        max_files=len(files),
        max_fields=_MAX_FIELDS,
        max_part_size=settings.max_body_bytes,
    )
    # The body is bounded already; a spooled part would need a writable disk.
    parser.spool_max_size = settings.max_body_bytes + 1
    try:
        form = await parser.parse()
        if not parser.ended:
            await form.close()
            raise MultiPartException("The body ends before its closing boundary.")
    except MultiPartException as error:
        raise ApiError(400, "invalid_multipart", error.message) from error
    try:
        return await _unpack(form, files)
    finally:
        await form.close()


async def _unpack(form: FormData, files: frozenset[str]) -> dict[str, str | bytes]:
    fields: dict[str, str | bytes] = {}
    for name, value in form.multi_items():
        if name in fields:
            raise _duplicate(name)
        if isinstance(value, UploadFile):
            if name not in files:
                raise ApiError(422, "invalid_value", f"{shown(name)}: text is expected, not a file", param=shown(name))
            fields[name] = await value.read()
        else:
            if name in files:
                raise ApiError(422, "invalid_value", f"{name}: a file is expected, not text", param=name)
            fields[name] = value
    return fields


def _duplicate(name: str) -> ApiError:
    return ApiError(422, "duplicate_field", f"{shown(name)}: given more than once", param=shown(name))
