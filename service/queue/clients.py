"""Clients of a Redis that open when they are first used, and run the scripts of this folder."""

from __future__ import annotations

import asyncio
from collections.abc import AsyncIterator, Sequence
from contextlib import asynccontextmanager
from functools import cache, cached_property
from importlib.resources import files
from typing import Any

import redis.asyncio
from redis.exceptions import RedisClusterException, RedisError

from service.queue.addresses import close_for_coroutines, open_for_coroutines, open_for_threads

Arguments = Sequence[str | bytes | int]

AWAY = (RedisError, RedisClusterException, OSError)
"""What the clients raise while Redis cannot be reached, or does not do as it is told."""

# Fewer than the 100 connections that a client of redis-py has: who wants one more is told that Redis is away. The
# command that blocks has one of the others.
_AT_ONCE = 64
# As long as an answer may take, so that only a silent Redis, or far too much work, runs into it.
_TURN_WITHIN_S = 5.0


@cache
def _script(name: str) -> str:
    folder = files("service.queue") / "scripts"
    return "\n".join((folder / f"{part}.lua").read_text("utf-8") for part in ("common", name))


class ThreadsRedis:
    """For blocking calls from any thread. Every method raises one of AWAY."""

    def __init__(self, url: str) -> None:
        self._url = url

    @cached_property
    def client(self) -> redis.Redis:
        """The client, opened at the first use: that of a cluster connects as it opens."""
        return open_for_threads(self._url)

    def run(self, name: str, keys: Sequence[str], arguments: Arguments = ()) -> Any:
        """The answer of a script."""
        return self.client.register_script(_script(name))(keys, arguments)

    def close(self) -> None:
        """Close the connections there are."""
        if "client" in self.__dict__:
            self.client.close()


class CoroutinesRedis:
    """The same for coroutines of one event loop, which take turns at its connections."""

    def __init__(self, url: str) -> None:
        self._url = url
        self._turns = asyncio.Semaphore(_AT_ONCE)

    @cached_property
    def _client(self) -> redis.asyncio.Redis:
        return open_for_coroutines(self._url)

    async def client(self) -> redis.asyncio.Redis:
        """The client, for the one command that blocks.

        Opened at the first use: that of a cluster sends what comes before that to any node.
        """
        return await self._client.initialize()

    @asynccontextmanager
    async def turn(self) -> AsyncIterator[redis.asyncio.Redis]:
        """The client, for one command that does not block. TimeoutError where the others take too long."""
        async with asyncio.timeout(_TURN_WITHIN_S):
            await self._turns.acquire()
        try:
            yield await self.client()
        finally:
            self._turns.release()

    async def run(self, name: str, keys: Sequence[str], arguments: Arguments = ()) -> Any:
        """The answer of a script."""
        async with self.turn() as client:
            return await client.register_script(_script(name))(keys, arguments)

    async def close(self) -> None:
        """Close the connections there are."""
        if "_client" in self.__dict__:
            await close_for_coroutines(self._client)
