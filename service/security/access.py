"""Who may ask what: API keys, their rates, and the endpoints that stay open. Without a file of keys, all may."""

from __future__ import annotations

from fastapi import Request
from starlette.datastructures import Headers
from starlette.types import ASGIApp, Receive, Scope, Send

from service.errors import ApiError
from service.security.api_keys import ApiKey, KeyFile
from service.security.rates import Rates
from service.settings import Settings
from service.telemetry.metrics import Metrics

_OPEN = frozenset({"/livez", "/readyz"})
# The page asks its user for a key, so the page itself needs none.
_PAGE = "/"
_PAGE_FILES = "/playground/"
_METRICS = "/metrics"
_CHALLENGE = {"WWW-Authenticate": 'Bearer realm="fewstep"'}


class Access:
    """Lets through what has a good key and stays within its rate; answers the rest with 401 or 429.

    Everything is closed but what is named here, so an endpoint that is new is closed too.
    """

    def __init__(self, app: ASGIApp, keys: KeyFile, rates: Rates, open_metrics: bool, metrics: Metrics) -> None:
        self.app = app
        self._keys = keys
        self._open = _OPEN | ({_METRICS} if open_metrics else set())
        self._rates = rates
        self._metrics = metrics

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        """Serve one request."""
        if scope["type"] == "http" and not self._is_open(scope["path"]):
            try:
                key = scope.setdefault("state", {})["api_key"] = self._known(Headers(scope=scope))
                await self._check_rate(key)
            except ApiError as refusal:
                await refusal.response()(scope, receive, send)
                return
        await self.app(scope, receive, send)

    def _is_open(self, path: str) -> bool:
        return path in self._open or path == _PAGE or path.startswith(_PAGE_FILES)

    def _known(self, headers: Headers) -> ApiKey:
        """The key of a request. Raises ApiError 401."""
        offered = _offered(headers)
        key = self._keys.find(offered)
        if key is None:
            self._metrics.rejected.labels("unauthorized").inc()
            message = "this API key is not known" if offered else "an API key is needed"
            raise ApiError(401, "unauthorized", message, headers=_CHALLENGE)
        return key

    async def _check_rate(self, key: ApiKey) -> None:
        """Raise ApiError 429 where the key asked too often."""
        wait_s = await self._rates.wait_s(key)
        if wait_s > 0:
            self._metrics.rejected.labels("rate_limited").inc()
            message = f"this key may make {key.rate} requests a minute"
            raise ApiError(429, "rate_limited", message, retry_after_s=wait_s)


async def require_admin(request: Request) -> None:
    """A dependency of the endpoints that change what the service runs. Raises ApiError 403."""
    settings: Settings = request.app.state.service.settings
    if not settings.admin:
        raise ApiError(403, "admin_off", "this service does not load or unload bundles on request")
    key = _key_of(request)
    if key is not None and not key.admin:
        raise ApiError(403, "not_an_admin", "this needs the key of an admin")


def caller_of(request: Request) -> str:
    """Who asks: the name of the key where keys are asked for, else the credential that comes along, "" for none."""
    key = _key_of(request)
    if key is not None:
        return key.name
    return _offered(request.headers) or request.headers.get("authorization", "")


def _key_of(request: Request) -> ApiKey | None:
    """The key that let the request in, None where none is asked for."""
    return getattr(request.state, "api_key", None)


def _offered(headers: Headers) -> str:
    """The key that a request brings, "" for none. Which header brings it makes no difference."""
    scheme, _, token = headers.get("authorization", "").partition(" ")
    if scheme.lower() == "bearer":
        return token.strip()
    return headers.get("x-api-key", "").strip()
