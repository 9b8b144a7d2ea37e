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


@dataclass(frozen=True, slots=True)
class Connection:
    """The settings of a client. The key is in no text that it is printed as."""

    url: str
    api_key: str | None = field(repr=False)
    timeout_s: float
    retries: Retries

    def __post_init__(self) -> None:
        if not self.url.startswith(("http://", "https://")):
            raise ValueError("url must begin with http:// or https://")
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
        if self.api_key is not None:
            headers["Authorization"] = f"Bearer {self.api_key}"
        return http.build_request(
            call.method,
            self.url.rstrip("/") + call.path,
            content=call.content,
            headers=headers,
            timeout=httpx.Timeout(left_s, connect=min(left_s, _CONNECT_TIMEOUT_S)),
        )
