"""What surrounds every request: its id, its log line, its metrics, its size limit, and the last safety net.

Plain ASGI, because a wrapper that buffers would hide from the routes that a client has gone.
"""

from __future__ import annotations

import asyncio
import contextlib
import logging
import re
import time
import uuid
from collections.abc import Sequence
from operator import itemgetter

from starlette.datastructures import Headers, MutableHeaders
from starlette.requests import ClientDisconnect
from starlette.routing import BaseRoute, Match
from starlette.types import ASGIApp, Message, Receive, Scope, Send

from service.desk import ClientGone
from service.errors import ApiError, from_failure, internal_error, too_many_bytes
from service.jobs import STOPPED
from service.telemetry.logs import describe, request_id_var
from service.telemetry.metrics import Metrics

logger = logging.getLogger("service.access")

_REQUEST_ID = re.compile(r"[A-Za-z0-9][A-Za-z0-9._-]{0,127}")
_MAX_DIGITS = 18
# What is still read of a body after the answer that refuses it: seconds, and so many times the most of a body.
_LINGER_S = 10.0
_LINGER_BODIES = 4
_CLIENT_CLOSED = 499
_ACCEPTED = 202
_OUTCOMES = {
    **{_ACCEPTED: "accepted", 410: "cancelled", _CLIENT_CLOSED: "cancelled"},
    **{429: "rejected", 503: "rejected", 504: "timeout"},
}
# Others made nothing and tried nothing: their few milliseconds would hide how long images take.
_TIMED = frozenset({"ok", "timeout", "error"})
_QUIET = frozenset({"livez", "readyz", "metrics"})


SECURITY_HEADERS = {
    "X-Content-Type-Options": "nosniff",
    "Content-Security-Policy": "default-src 'none'; frame-ancestors 'none'",
    "Referrer-Policy": "no-referrer",
    "Cross-Origin-Resource-Policy": "same-origin",
    "Cache-Control": "no-store",
}
"""For answers that are not a page: nothing in them may be run, framed or read by another site."""


class RequestContext:
    """Gives each request an id and a start time, and reports how it ended in one log line and in metrics."""

    def __init__(self, app: ASGIApp, metrics: Metrics, routes: Sequence[BaseRoute]) -> None:
        self.app = app
        self.metrics = metrics
        self._routes = routes

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        """Serve one request."""
        if scope["type"] != "http":
            await self.app(scope, receive, send)
            return
        began = time.monotonic()
        scope["path"] = _path_of(scope["path"])
        request_id = _request_id(Headers(scope=scope).get("x-request-id"))
        scope.setdefault("state", {}).update(request_id=request_id, began=began)
        status = 0

        async def tagged(message: Message) -> None:
            nonlocal status
            if message["type"] == "http.response.start":
                status = message["status"]
                headers = MutableHeaders(scope=message)
                headers["X-Request-ID"] = request_id
                for name, value in SECURITY_HEADERS.items():
                    headers.setdefault(name, value)
            await send(message)

        token = request_id_var.set(request_id)
        try:
            await self.app(scope, receive, tagged)
        except (ClientDisconnect, ClientGone):
            status = _CLIENT_CLOSED
        except asyncio.CancelledError:
            # The server gives up what it can wait for no longer.
            if status == 0:
                await from_failure(STOPPED).response()(scope, receive, tagged)
        except Exception as error:
            logger.error("unhandled", extra=describe(error))
            if status == 0:
                await internal_error().response()(scope, receive, tagged)
            status = 500
        finally:
            self._report(scope, status, time.monotonic() - began)
            request_id_var.reset(token)

    def _report(self, scope: Scope, status: int, seconds: float) -> None:
        endpoint, outcome = self._endpoint(scope), _outcome(status)
        self.metrics.requests.labels(endpoint, outcome).inc()
        if outcome in _TIMED:
            self.metrics.request_seconds.labels(endpoint).observe(seconds)
        level = logging.DEBUG if endpoint in _QUIET else logging.INFO
        fields = {
            "method": scope["method"],
            "endpoint": endpoint,
            "status": status,
            "duration_ms": round(seconds * 1000, 1),
        }
        if (key := scope["state"].get("api_key")) is not None:
            fields["key"] = key.name
        logger.log(level, "request", extra=fields)

    def _endpoint(self, scope: Scope) -> str:
        """The name of the request's route, also where it was refused before it came to that."""
        route = scope.get("route")
        if route is None:
            likeness, route = max(((each.matches(scope)[0].value, each) for each in self._routes), key=itemgetter(0))
            if likeness == Match.NONE.value:
                return "unmatched"
        return getattr(route, "name", None) or "unmatched"


class BodyLimit:
    """Bounds the bytes of bodies before anything reads them.

    One body may have ``max_bytes``, else 413: by Content-Length before a byte is read, or when they arrive. All
    bodies of requests in flight may have ``max_total_bytes`` together, else 429: many uploads at once must not
    exhaust memory. An endpoint that holds its body no more says so by ``request.state.let_go_of_body``.
    """

    def __init__(self, app: ASGIApp, max_bytes: int, max_total_bytes: int, metrics: Metrics) -> None:
        self.app = app
        self.max_bytes = max_bytes
        self.max_total_bytes = max_total_bytes
        self.metrics = metrics
        self.total = 0

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        """Serve one request."""
        if scope["type"] != "http":
            await self.app(scope, receive, send)
            return
        headers = Headers(scope=scope)
        declared = headers.get("content-length", "")
        too_large = declared.isdecimal() and (len(declared) > _MAX_DIGITS or int(declared) > self.max_bytes)
        received = 0

        async def counted() -> Message:
            nonlocal received
            if too_large:
                raise self._too_large()
            message = await receive()
            size = len(message.get("body", b""))
            received += size
            self.total += size
            if received > self.max_bytes:
                let_go()
                raise self._too_large()
            if size and self.total > self.max_total_bytes:
                let_go()
                self.metrics.rejected.labels("too_many_bytes").inc()
                raise too_many_bytes()
            return message

        def let_go() -> None:
            nonlocal received
            self.total -= received
            received = 0

        scope.setdefault("state", {})["let_go_of_body"] = let_go
        try:
            await self.app(scope, counted, send)
        finally:
            let_go()

    def _too_large(self) -> ApiError:
        self.metrics.rejected.labels("body_too_large").inc()
        return ApiError(413, "body_too_large", f"the body may have at most {self.max_bytes} bytes")


class Linger:
    """Holds back the end of an answer after which the connection closes until the client has sent its body.

    The first bytes of an early one would be overtaken by a reset where it still sends (RFC 9112, section 9.6).
    """

    def __init__(self, app: ASGIApp, max_bytes: int) -> None:
        self.app = app
        self.max_bytes = max_bytes

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        """Serve one request."""
        if scope["type"] != "http":
            await self.app(scope, receive, send)
            return
        headers = Headers(scope=scope)
        closes = scope["http_version"] == "1.0" or _closes(headers)
        whole = "transfer-encoding" not in headers and headers.get("content-length", "0") == "0"

        async def watched() -> Message:
            nonlocal whole
            message = await receive()
            whole = not message.get("more_body", False)
            return message

        async def lingering(message: Message) -> None:
            nonlocal closes
            if message["type"] == "http.response.start":
                closes = (closes or _closes(Headers(raw=message["headers"]))) and "expect" not in headers
            elif closes and not whole and not message.get("more_body", False):
                await send({**message, "more_body": True})
                await self._discard(receive)
                message = {"type": "http.response.body"}
            await send(message)

        await self.app(scope, watched, lingering)

    async def _discard(self, receive: Receive) -> None:
        """Read the rest of a body, for a while and not without end."""
        left = _LINGER_BODIES * self.max_bytes
        with contextlib.suppress(TimeoutError):
            async with asyncio.timeout(_LINGER_S):
                while left > 0:
                    message = await receive()
                    if not message.get("more_body", False):
                        break
                    left -= len(message.get("body", b""))


def _closes(headers: Headers) -> bool:
    """Whether one side says that the connection ends with this answer."""
    return "close" in {option.strip().lower() for option in headers.get("connection", "").split(",")}


def _path_of(target: str) -> str:
    """The path of a target that may be a whole URL, as proxies are asked (RFC 9112, section 3.2.2)."""
    if not target.lower().startswith(("http://", "https://")):
        return target
    _, _, _, *path = target.split("/", 3)
    return "/" + "".join(path)


def _request_id(offered: str | None) -> str:
    """The client's id where it is plain and short, so that it can do no harm in logs, else a new one."""
    if offered is not None and _REQUEST_ID.fullmatch(offered):
        return offered
    return uuid.uuid4().hex


def _outcome(status: int) -> str:
    if status in _OUTCOMES:
        return _OUTCOMES[status]
    if status >= 500 or status == 0:
        return "error"
    return "invalid" if status >= 400 else "ok"
