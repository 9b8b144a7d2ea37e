"""A door in a network: a TCP proxy that can be shut, and then is silent to both sides."""

from __future__ import annotations

import asyncio
from typing import Self

_BYTES = 2**16


class Door:
    """Listens on a free port of this host and passes bytes to ``port``, both ways, while it is open."""

    def __init__(self, port: int) -> None:
        self._target = port
        self._open = asyncio.Event()
        self._open.set()
        self._copies: set[asyncio.Task[None]] = set()

    async def __aenter__(self) -> Self:
        self._server = await asyncio.start_server(self._enter, "127.0.0.1", 0)
        self.port: int = self._server.sockets[0].getsockname()[1]
        return self

    async def __aexit__(self, *_: object) -> None:
        self._server.close()
        for copy in self._copies:
            copy.cancel()
        await asyncio.gather(*self._copies, return_exceptions=True)

    def shut(self) -> None:
        """Nothing passes, and nobody is told: to either side the other is silent."""
        self._open.clear()

    def open(self) -> None:
        """What waited goes through now."""
        self._open.set()

    async def _enter(self, reader: asyncio.StreamReader, writer: asyncio.StreamWriter) -> None:
        try:
            await self._open.wait()
            there = await asyncio.open_connection("127.0.0.1", self._target)
        except OSError:
            writer.close()
            return
        for source, target in ((reader, there[1]), (there[0], writer)):
            copy = asyncio.create_task(self._copy(source, target))
            self._copies.add(copy)
            copy.add_done_callback(self._copies.discard)

    async def _copy(self, source: asyncio.StreamReader, target: asyncio.StreamWriter) -> None:
        try:
            while data := await source.read(_BYTES):
                await self._open.wait()
                target.write(data)
                await target.drain()
            await self._open.wait()  # That one side is gone is news too.
        except OSError:
            pass
        finally:
            target.close()
