"""Connections of clients: how many at once, and how long each may send no request or leave its answer unread."""

from __future__ import annotations

import asyncio
import logging
import resource
import uuid
from http import HTTPStatus
from typing import Any

import h11
from uvicorn.protocols.http.h11_impl import H11Protocol

from service.errors import ApiError
from service.middleware import SECURITY_HEADERS
from service.telemetry.logs import request_id_var
from service.telemetry.metrics import Metrics

logger = logging.getLogger(__name__)

# Those of a burst that wait in the system to be accepted. Where it has no room for one, that is never answered.
BACKLOG = 2048

_CLOSE = {"Connection": "close"}
# Connections that wait for their next request, of probes and of scrapers.
_SPARE_CONNECTIONS = 1024
# Open files that are not connections of clients: bundles, Redis, logs, and those on their way to being turned away.
_OTHER_FILES = 256


def bound_connections(max_inflight: int) -> int:
    """Raise the bound on open files as far as the system lets this process; returns how many clients may be connected.

    There is room for ``max_inflight`` requests for images, as many who follow jobs, and some more, where the system
    lets there be.
    """
    needed = 2 * max_inflight
    files = _raise_open_files(needed + _SPARE_CONNECTIONS + _OTHER_FILES)
    connections = max(files - _OTHER_FILES, files // 2)
    if connections < needed:
        logger.warning(
            "the system's bound on open files (ulimit -n) leaves fewer connections than max_inflight asks for",
            extra={"open_files": files, "connections": connections, "max_inflight": max_inflight},
        )
    return connections


def _raise_open_files(wanted: int) -> int:
    """Have at least so many open files, or as many as the system grants; returns how many of them there may be."""
    soft, hard = resource.getrlimit(resource.RLIMIT_NOFILE)
    if soft == resource.RLIM_INFINITY or soft >= wanted:
        return wanted
    granted = wanted if hard == resource.RLIM_INFINITY else min(wanted, hard)
    try:
        resource.setrlimit(resource.RLIMIT_NOFILE, (granted, hard))
    except (ValueError, OSError):
        # Some systems name a bound that they do not grant.
        return soft
    return granted


class Connection(H11Protocol):
    """One client's connection. Turned away where there are ``max_connections``, before it has cost more than a file.

    From its beginning, and again from the end of each answer, it has ``timeout_s`` until the next request's line and
    headers are there; one that is late is closed. What is refused here is counted by its code. As long it has to take
    what it is sent, an answer or an event: one that does not read is cut off, and what it left unread is dropped.
    """

    def __init__(self, *args: Any, metrics: Metrics, max_connections: int, timeout_s: float, **kwargs: Any) -> None:
        super().__init__(*args, **kwargs)
        self._metrics = metrics
        self._max_connections = max_connections
        self._timeout_s = timeout_s
        self._patience: asyncio.TimerHandle | None = None
        self._unread: asyncio.TimerHandle | None = None

    def connection_made(self, transport: asyncio.Transport) -> None:  # type: ignore[override]
        """Called by asyncio at the beginning."""
        super().connection_made(transport)
        # Writing is then paused from the first byte that is not taken to the last, also of an answer that is the end.
        transport.set_write_buffer_limits(high=0)
        if len(self.connections) > self._max_connections:
            logger.warning("too many connections", extra={"max_connections": self._max_connections})
            message = "too many connections at once"
            self._refuse(ApiError(503, "too_many_connections", message, retry_after_s=1.0, headers=_CLOSE))
        else:
            self._await_head()

    def connection_lost(self, exc: Exception | None) -> None:
        """Called by asyncio at the end."""
        self._stop_waiting()
        self.resume_writing()
        super().connection_lost(exc)

    def pause_writing(self) -> None:
        """Called by asyncio when the client does not take what it is sent."""
        super().pause_writing()
        self._unread = self.loop.call_later(self._timeout_s, self._cut_off)

    def resume_writing(self) -> None:
        """Called by asyncio when the client has taken all."""
        super().resume_writing()
        if self._unread is not None:
            self._unread.cancel()

    def on_response_complete(self) -> None:
        """Called by uvicorn after each answer."""
        super().on_response_complete()
        if not self.transport.is_closing():
            self._await_head()

    def send_400_response(self, msg: str) -> None:
        """Called by uvicorn for what is not HTTP."""
        self._refuse(ApiError(400, "invalid_http", msg, headers=_CLOSE))

    def _unsupported_upgrade_warning(self) -> None:
        """Called by uvicorn where a client offers to go on in another protocol, as it may: it is served in this one."""

    def _await_head(self) -> None:
        self._stop_waiting()
        self._patience = self.loop.call_later(self._timeout_s, self._end_patience)

    def _stop_waiting(self) -> None:
        if self._patience is not None:
            self._patience.cancel()

    def _end_patience(self) -> None:
        if self.cycle is not None and not self.cycle.response_complete:
            return  # A request is being served; its body has a time limit of its own.
        half_a_head, _ = self.conn.trailing_data
        if half_a_head and self.conn.states == {h11.CLIENT: h11.IDLE, h11.SERVER: h11.IDLE}:
            self._refuse(ApiError(408, "head_timeout", "the request's headers did not arrive in time"))
        self.transport.close()

    def _cut_off(self) -> None:
        logger.info("a client does not read", extra={"unread_bytes": self.transport.get_write_buffer_size()})
        self.transport.abort()  # Closing would wait for it.

    def _refuse(self, error: ApiError) -> None:
        self._metrics.rejected.labels(error.code).inc()
        request_id = uuid.uuid4().hex
        token = request_id_var.set(request_id)
        answer = error.response()
        request_id_var.reset(token)
        answer.headers.update({"X-Request-ID": request_id, **SECURITY_HEADERS})
        status = HTTPStatus(answer.status_code)
        head = h11.Response(status_code=status, headers=answer.raw_headers, reason=status.phrase.encode())
        for event in (head, h11.Data(data=bytes(answer.body)), h11.EndOfMessage()):
            self.transport.write(self.conn.send(event) or b"")
        self.transport.close()
