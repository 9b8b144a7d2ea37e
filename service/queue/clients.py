"""Clients of a Redis that open when they are first used, and run the scripts of this folder."""

from __future__ import annotations

from collections.abc import Sequence
from functools import cache, cached_property
from importlib.resources import files
from typing import Any

import redis.asyncio
from redis.exceptions import RedisClusterException, RedisError

from service.queue.addresses import close_for_coroutines, open_for_coroutines, open_for_threads

Arguments = Sequence[str | bytes | int]

AWAY = (RedisError, RedisClusterException, OSError)
"""What the clients raise while Redis cannot be reached, or does not do as it is told."""


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
    """The same for coroutines of one event loop."""

    def __init__(self, url: str) -> None:
        self._url = url

    @cached_property
    def _client(self) -> redis.asyncio.Redis:
        return open_for_coroutines(self._url)

    async def client(self) -> redis.asyncio.Redis:
        """The client, opened at the first use: that of a cluster sends what comes before that to any node."""
        return await self._client.initialize()

    async def run(self, name: str, keys: Sequence[str], arguments: Arguments = ()) -> Any:
        """The answer of a script."""
        client = await self.client()
        return await client.register_script(_script(name))(keys, arguments)

    async def close(self) -> None:
        """Close the connections there are."""
        if "_client" in self.__dict__:
            await close_for_coroutines(self._client)
