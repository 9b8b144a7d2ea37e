"""How many requests an API key may still make now. Knows nothing of HTTP."""

from __future__ import annotations

from collections.abc import Callable
from typing import Protocol

from service.security.api_keys import ApiKey

MINUTE_S = 60.0


class Rates(Protocol):
    """A bucket of tokens for each key: a minute's requests at once, then they come back one by one, evenly."""

    async def wait_s(self, key: ApiKey) -> float:
        """Take a token and return 0, or take none and return the seconds until there is one."""
        ...

    async def close(self) -> None:
        """Let go of what is held open. Nothing is called afterwards."""
        ...


class TokenBuckets:
    """Rates that this process counts alone. Belongs to one thread."""

    def __init__(self, clock: Callable[[], float]) -> None:
        self._clock = clock
        # name: (tokens at a time, that time)
        self._levels: dict[str, tuple[float, float]] = {}

    async def wait_s(self, key: ApiKey) -> float:
        """See Rates.wait_s."""
        return self.take(key)

    async def close(self) -> None:
        """See Rates.close."""

    def take(self, key: ApiKey) -> float:
        """The same as `wait_s`, outside an event loop too."""
        if key.per_minute is None:
            return 0.0
        now = self._clock()
        size = max(1.0, key.per_minute)
        level, since = self._levels.get(key.name, (size, now))
        level = min(size, level + (now - since) * key.per_minute / MINUTE_S)
        # Rounding must not refuse one who waited for exactly as long as he was told.
        if allowed := level > 1 - 1e-9:
            level -= 1
        self._levels[key.name] = level, now
        return 0.0 if allowed else (1 - level) * MINUTE_S / key.per_minute
