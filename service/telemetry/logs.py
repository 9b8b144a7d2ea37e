"""Structured log lines with the request id in each. No line holds a prompt or an image's bytes."""

from __future__ import annotations

import json
import logging
import math
import sys
import time
import traceback
from contextvars import ContextVar
from typing import Any, Literal

from engines.backends.base import EngineError
from engines.bundle import BundleError
from service.models.catalogue import ModelError
from service.queue.wire import WireError

request_id_var: ContextVar[str | None] = ContextVar("request_id", default=None)

_STANDARD = frozenset(vars(logging.makeLogRecord({}))) | {"message", "asctime", "taskName", "color_message"}
# Messages of other exceptions may quote what a client sent, so only their type and place are logged. That of an OSError
# may quote an address or a file: only the system's words are logged of it.
_SAFE_MESSAGES = (EngineError, BundleError, ModelError, WireError, MemoryError)


def describe(error: BaseException) -> dict[str, Any]:
    """Fields for a log line that say what went wrong and where, without the client's data."""
    frames = traceback.extract_tb(error.__traceback__)
    place = [f"{frame.filename}:{frame.lineno} {frame.name}" for frame in frames]
    fields: dict[str, Any] = {"error": type(error).__qualname__, "trace": place}
    if isinstance(error, _SAFE_MESSAGES):
        fields["detail"] = str(error)
    elif isinstance(error, OSError) and error.strerror:
        fields["detail"] = error.strerror
    return fields


class Formatter(logging.Formatter):
    """One line a record: time, level, logger, message, request id and the record's extra fields."""

    def __init__(self, form: Literal["text", "json"]) -> None:
        super().__init__()
        self._form = form

    def format(self, record: logging.LogRecord) -> str:
        """The line for ``record``."""
        stamp = time.strftime("%Y-%m-%dT%H:%M:%S", time.gmtime(record.created))
        fields: dict[str, Any] = {
            "time": f"{stamp}.{int(record.msecs):03d}Z",
            "level": record.levelname.lower(),
            "logger": record.name,
            "event": record.getMessage(),
        }
        if (request_id := request_id_var.get()) is not None:
            fields["request_id"] = request_id
        fields |= {key: value for key, value in vars(record).items() if key not in _STANDARD}
        if record.exc_info and record.exc_info[1] is not None:
            fields |= describe(record.exc_info[1])
        if self._form == "json":
            return json.dumps(fields, default=str)
        head = f"{fields.pop('time')} {fields.pop('level'):<7} {fields.pop('event')}"
        return " ".join([head, *(f"{key}={json.dumps(value, default=str)}" for key, value in fields.items())])


# Libraries that log the contents of what they read, in their finest lines.
_TALKATIVE = ("PIL",)


# By logger: what is said anew for each connection, by asyncio while it has no file left for one. It would fill a disk.
_REPETITIVE = {"asyncio": "socket.accept() out of system resource", "service.connections": "too many connections"}
_SILENCE_S = 1.0


class _Seldom(logging.Filter):
    """Passes what begins like ``repetitive`` once a second, and all else."""

    def __init__(self, repetitive: str) -> None:
        super().__init__()
        self._repetitive = repetitive
        self._last = -math.inf

    def filter(self, record: logging.LogRecord) -> bool:
        """Whether to log it."""
        if not str(record.msg).startswith(self._repetitive):
            return True
        now = time.monotonic()
        if now - self._last < _SILENCE_S:
            return False
        self._last = now
        return True


def configure(form: Literal["text", "json"], level: str) -> None:
    """Send every log line to standard error in ``form``."""
    handler = logging.StreamHandler(sys.stderr)
    handler.setFormatter(Formatter(form))
    root = logging.getLogger()
    root.handlers[:] = [handler]
    root.setLevel(level.upper())
    for name in _TALKATIVE:
        logging.getLogger(name).setLevel(logging.INFO)
    for name, repetitive in _REPETITIVE.items():
        logging.getLogger(name).filters[:] = [_Seldom(repetitive)]
