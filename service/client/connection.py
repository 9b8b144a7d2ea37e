"""What the two clients share: where the service is, who asks, and how long a call may take."""

from __future__ import annotations

import re
from dataclasses import dataclass, field

import httpx

from service.client.answers import Result
from service.client.calls import Call
from service.client.tries import Retries, Tries

DEFAULT_URL = "http://127.0.0.1:8000"
DEFAULT_TIMEOUT_S = 120.0
DEFAULT_POLL_S = 0.5

# What a header can carry: in a message of httpx the key would be quoted.
_KEY = re.compile(r"[!-~](?:[ -~]*[!-~])?")
# So that an address where nobody answers leaves time for another try.
_CONNECT_TIMEOUT_S = 5.0
_LAST_PORT = 65535


@dataclass(frozen=True, slots=True)
class Connection:
    """The settings of a client. The key, and the password of a URL, are in no text that it is printed as.

    Raises ValueError for what makes no sense.
    """

    url: str = field(repr=False)
    api_key: str | None = field(repr=False)
    timeout_s: float
    retries: Retries

    def __post_init__(self) -> None:
        _check_url(self.url)
        if not self.timeout_s > 0:
            raise ValueError("timeout_s must be more than 0")
        if self.api_key is not None and not _KEY.fullmatch(self.api_key):
            raise ValueError("api_key must be ASCII, without white space at its ends: strip the line of a file")

    def tries(self) -> Tries:
        """The tries of one call, which begins now."""
        return Tries(self.retries, self.timeout_s)

    def request(self, http: httpx.Client | httpx.AsyncClient, call: Call[Result], left_s: float) -> httpx.Request:
        """The request of a try that may take ``left_s`` seconds."""
        headers = {"Accept": "application/json"}
        if call.content is not None:
            headers["Content-Type"] = "application/json"
        if call.respond_async:
            headers["Prefer"] = "respond-async"
        # The service finishes what has a key though its client is gone: without retries nobody would ask for it.
        if call.key is not None and self.retries.tries > 1:
            headers["Idempotency-Key"] = call.key
        return http.build_request(
            call.method,
            self.url.rstrip("/") + call.path,
            content=call.content,
            headers=headers | self._key_header(http),
            timeout=httpx.Timeout(left_s, connect=min(left_s, _CONNECT_TIMEOUT_S)),
        )

    def _key_header(self, http: httpx.Client | httpx.AsyncClient) -> dict[str, str]:
        if self.api_key is None:
            return {}
        # In Authorization these, a proxy's perhaps, would take the place of the key.
        if http.auth is not None or "authorization" in http.headers or httpx.URL(self.url).userinfo:
            return {"X-Api-Key": self.api_key}
        # The better header: httpx takes it away where a redirect leads to another origin.
        return {"Authorization": f"Bearer {self.api_key}"}


def _check_url(url: str) -> None:
    """Raise ValueError where no call could be made. It quotes nothing, as there may be a password."""
    if not url.startswith(("http://", "https://")):
        raise ValueError("url must begin with http:// or https://")
    if "?" in url or "#" in url:
        raise ValueError("url must have no query and no fragment")
    if not _names_a_host(url):
        raise ValueError(f"url must be a URL with a host, and a port of {_LAST_PORT} at most")


def _names_a_host(url: str) -> bool:
    try:
        parsed = httpx.URL(url)
        # Sockets will do so too, and what they raise is not an error of httpx.
        parsed.raw_host.decode("ascii").encode("idna")
        return parsed.host != "" and 0 <= (parsed.port or 0) <= _LAST_PORT
    except (httpx.InvalidURL, ValueError):
        return False
