"""The CORS headers by which pages of the listed origins may call the API and read its answers.

Cookies play no part, so a page may send any header.
"""

from __future__ import annotations

from collections.abc import Sequence

from starlette.datastructures import Headers, MutableHeaders
from starlette.responses import Response
from starlette.types import ASGIApp, Message, Receive, Scope, Send

_METHODS = "GET, HEAD, POST, DELETE"
_ANSWER_HEADERS = "Location, Preference-Applied, Retry-After, Server-Timing, X-Request-ID, X-Seed, X-Should-Retry"
_REMEMBERED_S = 600


def is_preflight(method: str, headers: Headers) -> bool:
    """Whether a browser asks what a page of another origin may send."""
    return method == "OPTIONS" and "origin" in headers and "access-control-request-method" in headers


class Preflights:
    """Answers what browsers ask before a page's request, for pages that may ask at all: others come no further."""

    def __init__(self, app: ASGIApp) -> None:
        self.app = app

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        """Serve one request."""
        if scope["type"] == "http":
            headers = Headers(scope=scope)
            if is_preflight(scope["method"], headers):
                await _allowed(headers)(scope, receive, send)
                return
        await self.app(scope, receive, send)


class Readable:
    """Lets pages of the listed origins read every answer, refusals and faults too."""

    def __init__(self, app: ASGIApp, origins: Sequence[str]) -> None:
        self.app = app
        self._origins = frozenset(origins)

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        """Serve one request."""
        if scope["type"] != "http":
            await self.app(scope, receive, send)
            return
        origin = Headers(scope=scope).get("origin")

        async def readable(message: Message) -> None:
            if message["type"] == "http.response.start":
                headers = MutableHeaders(scope=message)
                headers.add_vary_header("Origin")
                if origin is not None and origin in self._origins:
                    headers["Access-Control-Allow-Origin"] = origin
                    headers["Access-Control-Expose-Headers"] = _ANSWER_HEADERS
            await send(message)

        await self.app(scope, receive, readable)


def _allowed(asked: Headers) -> Response:
    headers = {
        "Access-Control-Allow-Methods": _METHODS,
        "Access-Control-Allow-Headers": asked.get("access-control-request-headers", ""),
        "Access-Control-Max-Age": f"{_REMEMBERED_S}",
    }
    return Response(headers=headers)
