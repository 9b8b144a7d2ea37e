"""Refuses requests of foreign pages (CSRF), and under foreign names (DNS rebinding).

A browser sends some requests of a page to any host without asking first (a form, also with files); all that it keeps
from the page is the answer. And whoever owns a name may have it lead to 127.0.0.1 once its page is loaded.
"""

from __future__ import annotations

from collections.abc import Sequence

from starlette.datastructures import Headers
from starlette.types import ASGIApp, Receive, Scope, Send

from service.errors import ApiError
from service.security.cors import is_preflight
from service.security.cross_origin import is_loopback, is_own, name_of
from service.telemetry.metrics import Metrics

_SAFE = frozenset({"GET", "HEAD", "OPTIONS"})
_ELSEWHERE = frozenset({"cross-site", "same-site"})


class Foreign:
    """Refuses with 403 what pages of origins that are not listed ask for, reading aside.

    Programs that are not browsers say nothing of an origin, and pass. Where it is ``local``, as it listens to this host
    only, the service has the names of this host and of the origins that are listed, and answers to no other.
    """

    def __init__(self, app: ASGIApp, origins: Sequence[str], local: bool, metrics: Metrics) -> None:
        self.app = app
        self._origins = frozenset(origins)
        self._names = frozenset(name_of(origin.partition("://")[2]) for origin in origins)
        self._local = local
        self._metrics = metrics

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        """Serve one request."""
        if scope["type"] == "http":
            try:
                self._check(scope["method"], Headers(scope=scope))
            except ApiError as refusal:
                self._metrics.rejected.labels(refusal.code).inc()
                await refusal.response()(scope, receive, send)
                return
        await self.app(scope, receive, send)

    def _check(self, method: str, headers: Headers) -> None:
        """Raise ApiError 403 for a foreign page, or under a foreign name."""
        if self._local and not self._knows(headers.get("host", "localhost")):
            message = "the service does not answer to this host name; list its origin in FEWSTEP_CORS_ORIGINS"
            raise ApiError(403, "foreign_host", message, param="host")
        asks = method not in _SAFE or is_preflight(method, headers)
        if asks and self._is_foreign(headers):
            message = "a page of another origin may not ask for this, unless FEWSTEP_CORS_ORIGINS lists its origin"
            raise ApiError(403, "foreign_origin", message, param="origin")

    def _knows(self, host: str) -> bool:
        name = name_of(host)
        return is_loopback(name) or name in self._names

    def _is_foreign(self, headers: Headers) -> bool:
        origin, site = headers.get("origin"), headers.get("sec-fetch-site")
        if origin in self._origins or site == "same-origin":
            # The browser compared with the address that it asked, which a proxy may have changed on the way.
            return False
        return site in _ELSEWHERE or (origin is not None and not is_own(origin, headers.get("host", "")))
