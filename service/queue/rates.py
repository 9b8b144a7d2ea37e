"""The rates of API keys, counted in Redis by all processes together."""

from __future__ import annotations

import asyncio
import logging
import time

from service.queue import keys
from service.queue.clients import AWAY, CoroutinesRedis
from service.security.api_keys import ApiKey
from service.security.rates import MINUTE_S, TokenBuckets

logger = logging.getLogger(__name__)

_AFTER_ERROR_S = 5.0
_LONGEST_S = 2.0  # in which a Redis that hangs would answer if it did not


class RedisRates:
    """Rates in the Redis at ``url``: one bucket for each key, on the clock of Redis, forgotten when it is full.

    While Redis is away each process counts for itself, in buckets that are full at first. Belongs to one event loop.
    """

    def __init__(self, url: str) -> None:
        self._redis = CoroutinesRedis(url)
        self._own = TokenBuckets(time.monotonic)
        self._away_until: float | None = None

    async def wait_s(self, key: ApiKey) -> float:
        """See Rates.wait_s."""
        if key.per_minute is None:
            return 0.0
        if self._away_until is not None and time.monotonic() < self._away_until:
            return self._own.take(key)
        interval_ms = MINUTE_S * 1000 / key.per_minute
        bucket = [str(max(1.0, key.per_minute)), str(interval_ms)]
        try:
            async with asyncio.timeout(_LONGEST_S):
                wait_ms: int = await self._redis.run("rate", [keys.rate(key.name)], bucket)
        except (*AWAY, TimeoutError) as error:
            if self._away_until is None:
                logger.warning("rates are counted by each process", extra={"error": type(error).__name__})
            self._away_until = time.monotonic() + _AFTER_ERROR_S
            return self._own.take(key)
        if self._away_until is not None:
            logger.info("rates are counted together again")
            self._away_until = None
        return wait_ms / 1000

    async def close(self) -> None:
        """See Rates.close."""
        await self._redis.close()
